"""The job behind `moesaic bench serve`: ask a server many things and see how fast it answers.

Either so many requests are open all the time (`concurrency`), which shows what a server can do, or
they begin at random moments however many are open (`rate`), which shows what its users feel.
Loads no torch: what it measures may be this machine.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from moesaic.console import note, progress
from moesaic.errors import ServingError
from moesaic.serving.client import client_of, first_model, stream
from moesaic.serving.config import BenchServeConfig

PERCENTS = (50, 90, 95, 99)

DEFAULT_CONCURRENCY = 8

_WORDS = (
    "the of and a to in is you that it he was for on are with as his they be at one have this from "
    "or had by hot word but what some we can out other were all there when up use your how said an "
    "each she which do their time if will way about many then them write would like so these her "
    "long make thing see him two has look more day could go come did number sound no most people "
    "my over know water than call first who may down side been now find any new work part take get "
    "place made live where after back little only round man year came show every good me give our "
    "under name very through just form sentence great think say help low line differ turn cause"
)
WORDS = _WORDS.split()


@dataclass(frozen=True)
class Asked:
    """One request before it is sent."""

    prompt: str | list[int]
    output_tokens: int
    at: float | None
    """Seconds from the start; None: when another one has ended."""


@dataclass
class Answered:
    """What came of it. Times are seconds from the start of the run."""

    began: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    first: float | None = None
    last: float | None = None
    gaps: tuple[float, ...] = ()
    """Seconds from one piece to the next."""
    fault: str | None = None

    @property
    def token_seconds(self) -> float | None:
        """Seconds a token after the first; None of a single one."""
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)


def bench_serve(config: BenchServeConfig) -> dict[str, Any]:
    """Put load on a server.

    Returns:
        `requests`, `failed` with their `faults`, `seconds`, tokens and rates, and percentiles of
        `first_token_seconds`, `token_seconds` (an answer's mean) and `request_seconds`.

    Raises:
        ConfigError: The address is none.
        ServingError: The server cannot be reached, or answered nothing at all.
        FolderError: The tokenizer cannot be read.
    """
    asked = list(workload(config))
    answered, seconds, name = asyncio.run(_run(config, asked))
    if all(one.fault for one in answered):
        raise ServingError(f"Every request failed; the first: {answered[0].fault}")
    result = summary(config, answered, seconds=seconds, name=name)
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        kept = {**result, "config": asdict(config), "answers": [asdict(one) for one in answered]}
        path = config.out / "bench.json"
        path.write_text(json.dumps(kept, indent=1, default=str) + "\n", encoding="utf-8")
        draw(answered, config.out / "bench.svg", title=_title(config, name))
        result["out"] = config.out
    return result


def workload(config: BenchServeConfig) -> Iterator[Asked]:
    """The requests, the same for the same seed."""
    draw_of = random.Random(config.seed)
    tokens_of = _tokens_of(config.tokenizer)
    at = 0.0
    for _ in range(config.requests):
        length = draw_of.randint(*config.prompt_tokens)
        text = " ".join(draw_of.choice(WORDS) for _ in range(length))
        prompt: str | list[int] = text if tokens_of is None else tokens_of(text)[:length]
        if config.rate is not None:
            at += draw_of.expovariate(config.rate)
        yield Asked(
            prompt=prompt,
            output_tokens=draw_of.randint(*config.output_tokens),
            at=None if config.rate is None else at,
        )


def _tokens_of(folder: Path | None) -> Callable[[str], list[int]] | None:
    if folder is None:
        return None
    from moesaic.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda text: list(tokenizer(text)["input_ids"])


async def _run(
    config: BenchServeConfig, asked: Sequence[Asked]
) -> tuple[list[Answered], float, str]:
    connections = len(asked) if config.rate else config.concurrency or DEFAULT_CONCURRENCY
    client = client_of(
        config.url,
        config.api_key,
        timeout_seconds=config.timeout_seconds,
        connections=connections,
    )
    async with client:
        name = config.name or await first_model(client)
        places = asyncio.Semaphore(connections)
        start = time.perf_counter()
        answered: list[Answered] = []
        with progress() as display:
            bar = display.add_task(f"asking {name}", total=len(asked))

            async def one(request: Asked) -> None:
                if request.at is not None:
                    await asyncio.sleep(request.at - (time.perf_counter() - start))
                async with places:
                    answered.append(await _ask(client, config, name, request, start))
                display.advance(bar)

            async with asyncio.TaskGroup() as group:
                for request in asked:
                    group.create_task(one(request))
        return answered, time.perf_counter() - start, name


async def _ask(
    client: httpx.AsyncClient, config: BenchServeConfig, name: str, request: Asked, start: float
) -> Answered:
    body: dict[str, Any] = {
        "model": name,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        body["ignore_eos"] = True
    done = Answered(began=time.perf_counter() - start)
    moments: list[float] = []
    try:
        async with asyncio.timeout(config.timeout_seconds):
            async for chunk in stream(client, "completions", body):
                if any(choice.get("text") for choice in chunk["choices"]):
                    moments.append(time.perf_counter() - start)
                if usage := chunk.get("usage"):
                    done.prompt_tokens = usage["prompt_tokens"]
                    done.output_tokens = usage["completion_tokens"]
        if not moments:
            done.fault = "no text came"
    except TimeoutError:
        done.fault = f"not answered within {config.timeout_seconds:g} s"
    except ServingError as error:
        done.fault = str(error)
    if moments:
        done.first, done.last = moments[0], moments[-1]
        done.gaps = tuple(after - before for before, after in itertools.pairwise(moments))
    return done


def summary(
    config: BenchServeConfig, answered: Sequence[Answered], *, seconds: float, name: str
) -> dict[str, Any]:
    """Figures of a run."""
    good = [one for one in answered if one.fault is None]
    firsts = [one.first - one.began for one in good if one.first is not None]
    each = [one.token_seconds for one in good]
    wholes = [one.last - one.began for one in good if one.last is not None]
    output = sum(one.output_tokens for one in good)
    prompt = sum(one.prompt_tokens for one in good)
    return {
        "url": config.url,
        "model": name,
        "load": _load(config),
        "requests": len(answered),
        "failed": len(answered) - len(good),
        "faults": dict(Counter(one.fault for one in answered if one.fault)),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output / seconds,
        "tokens_per_second": (prompt + output) / seconds,
        "first_token_seconds": percentiles(firsts),
        "token_seconds": percentiles([value for value in each if value is not None]),
        "gap_seconds": percentiles([gap for one in good for gap in one.gaps]),
        "request_seconds": percentiles(wholes),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and the largest, by the nearest value; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    places = {
        f"p{percent}": ordered[min(len(ordered) - 1, -(-percent * len(ordered) // 100) - 1)]
        for percent in PERCENTS
    }
    return {"mean": sum(ordered) / len(ordered), **places, "max": ordered[-1]}


def _load(config: BenchServeConfig) -> str:
    if config.rate is not None:
        return f"{config.rate:g} requests a second"
    return f"{config.concurrency or DEFAULT_CONCURRENCY} requests at a time"


def _title(config: BenchServeConfig, name: str) -> str:
    return f"{name}: {config.requests} requests, {_load(config)}"


def draw(answered: Sequence[Answered], path: Path, *, title: str) -> None:
    """How latencies are distributed, and tokens and open requests over the run."""
    from matplotlib.figure import Figure

    good = [one for one in answered if one.fault is None and one.first is not None]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title)
    first, each, course = figure.subplots(1, 3)
    for axes, values, name in (
        (
            first,
            [1000 * (one.first - one.began) for one in good if one.first],
            "to the first token",
        ),
        (each, [1000 * one.token_seconds for one in good if one.token_seconds], "a token after it"),
    ):
        ordered = sorted(values)
        axes.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post")
        axes.set(xlabel=f"ms {name}", ylabel="share of requests", ylim=(0, 1.02), xlim=(0, None))
        axes.grid(alpha=0.3)
    end = max((one.last or 0.0 for one in good), default=0.0)
    bins = max(1, min(120, round(end)))
    tokens, open_requests = [0.0] * bins, [0] * bins
    for one in good:
        assert one.first is not None, f"{one=}"
        assert one.last is not None, f"{one=}"
        rate = one.output_tokens / max(one.last - one.first, 1e-9)
        for i in range(bins):
            low, high = end * i / bins, end * (i + 1) / bins
            inside = max(0.0, min(high, one.last) - max(low, one.first))
            tokens[i] += rate * inside / (high - low)
            open_requests[i] += one.began < high and one.last > low
    moments = [end * (i + 0.5) / bins for i in range(bins)]
    course.plot(moments, tokens, label="tokens a second")
    course.plot(moments, open_requests, label="open requests")
    course.set(xlabel="seconds", ylim=(0, None))
    course.legend(frameon=False)
    course.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    note(f"wrote {path}")
