"""`moesaic bench serve` and `moesaic chat`, with a server that says what it is told to."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moesaic.cli.app import run
from moesaic.errors import ConfigError
from moesaic.serving.bench import bench_serve, percentiles, workload
from moesaic.serving.chat import chat
from moesaic.serving.config import BenchServeConfig, ChatConfig
from tests.fake_engine import FakeEngine
from tests.http_server import Running, running
from tests.tiny import LLAMA, tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def server(tokenizer: Any) -> Iterator[Running]:
    engine = FakeEngine(tokenizer, lambda prompt: "x" * 64, pause=0.002)
    with running(engine) as server:
        yield server


# bench serve


def test_every_request_is_measured(server: Running, tmp_path: Path, capsys: Any) -> None:
    words = ["--requests", "10", "--concurrency", "3", "--prompt-tokens", "2", "5"]
    words += ["--output-tokens", "8", "16", "--out", str(tmp_path / "out")]
    assert run(["bench", "serve", server.url, *words]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"tiny at {server.url}: 10 requests, 3 requests at a time, ")
    assert "tokens/s of answers" in out[1]
    assert out[2].split() == ["milliseconds", "mean", "p50", "p90", "p95", "p99", "max"]
    kept = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert kept["failed"] == 0
    assert len(kept["answers"]) == 10
    asked = {request.sampling.max_new_tokens for request in server.engine.taken}
    assert asked <= set(range(8, 17))
    assert kept["output_tokens"] == sum(r.sampling.max_new_tokens for r in server.engine.taken)
    # A token takes its pause at least, and an answer all of its tokens.
    assert kept["token_seconds"]["p50"] >= 0.002
    assert kept["request_seconds"]["p50"] > kept["first_token_seconds"]["p50"]
    assert (tmp_path / "out" / "bench.svg").read_text().count("<svg") == 1


def test_requests_begin_at_random_moments_of_a_rate() -> None:
    config = BenchServeConfig(url="http://x", rate=50, requests=4000)
    moments = [request.at for request in workload(config)]
    gaps = [after - before for before, after in zip([0, *moments], moments, strict=False)]
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 50, rel=0.05)
    # Of gaps of a Poisson process, 1 - 1/e are shorter than their mean.
    assert sum(gap < 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.03)
    assert list(workload(config)) == list(workload(config))


def test_a_rate_is_kept_however_many_requests_are_open(tokenizer: Any) -> None:
    with running(FakeEngine(tokenizer, "x" * 20, pause=0.02)) as server:
        config = BenchServeConfig(url=f"{server.url}/v1/", rate=100, requests=40)
        result = bench_serve(config)
    assert result["failed"] == 0
    assert result["seconds"] < 3  # one after the other they would take sixteen


def test_prompts_have_the_length_that_was_asked_for(tokenizer: Any, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path)
    config = BenchServeConfig(url="http://x", prompt_tokens=(7, 7), tokenizer=folder)
    assert {len(request.prompt) for request in workload(config)} == {7}


def test_failures_are_counted_by_what_they_say(tokenizer: Any, capsys: Any) -> None:
    with running(FakeEngine(tokenizer, places=2, pause=0.05)) as server:
        words = ["--requests", "6", "--concurrency", "6", "--output-tokens", "5", "5"]
        assert run(["bench", "serve", server.url, *words]) == 3
    assert "4 failed: The server answers 503: Too many wait." in capsys.readouterr().out


MISTAKES = {
    "no address": (["nowhere"], "cannot be reached"),
    "nobody there": (["http://127.0.0.1:9"], "cannot be reached"),
    "both loads": (["http://x", "--rate", "1", "--concurrency", "2"], "choose one"),
    "lengths the wrong way round": (["http://x", "--prompt-tokens", "5", "2"], "least first"),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: Any) -> None:
    assert run(["bench", "serve", *words]) in (2, 3)
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_percentiles_are_values_that_were_measured() -> None:
    found = percentiles([float(value) for value in range(1, 101)])
    assert found == {"mean": 50.5, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    assert percentiles([3.0]) == dict.fromkeys(["mean", "p50", "p90", "p95", "p99", "max"], 3.0)
    assert percentiles([]) is None


# chat


def test_a_conversation_with_a_server_goes_on(server: Running) -> None:
    server.engine.text = lambda prompt: f"{len(prompt.split('<|user|>')) - 1} said"
    pieces: list[str] = []
    config = ChatConfig(model=server.url, temperature=0, system="be brief")
    said = chat(config, on_text=pieces.append, lines=iter(["one", "two", "/new", "three", ""]))
    assert "".join(pieces) == "1 said\n2 said\n1 said\n"
    assert said["model"] == "tiny"
    assert [message["content"] for message in said["messages"]] == ["three", "1 said"]
    prompt = server.engine.tokenizer.decode(server.engine.taken[1].prompt_ids)
    assert prompt == (
        "<|system|>be brief</s><|user|>one</s><|assistant|>1 said</s><|user|>two</s><|assistant|>"
    )


def test_a_conversation_with_a_folder_needs_no_server(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_folder(tmp_path / "model", LLAMA.replace(max_positions=256))
    config = ChatConfig(model=str(folder), temperature=0, max_new_tokens=8)
    first = chat(config, lines=iter(["hello"]))["messages"]
    again = chat(config, lines=iter(["hello", "and?"]))["messages"]
    assert again[:2] == first
    assert [message["role"] for message in again] == ["user", "assistant"] * 2
    long = chat(config, lines=iter(["word " * 500, "hello"]))
    assert long["messages"] == first
    assert "The conversation has" in capsys.readouterr().err


def test_what_is_typed_is_answered_on_stdout(
    server: Running, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert run(["chat", server.url, "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == "xxxxx\n"


def test_a_folder_takes_no_key_and_needs_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="are for a server"):
        chat(ChatConfig(model=str(tmp_path), name="x"), lines=iter([]))
    folder = tiny_folder(tmp_path / "model", LLAMA)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        chat(ChatConfig(model=str(folder)), lines=iter([]))
