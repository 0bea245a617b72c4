"""`moesaic demo`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.studies.config import DemoConfig

GIB = 2**30


def story(summary: Summary) -> Iterator[str]:
    """What happened, in a few tables; the path of the page is the last line."""
    yield "stage      seconds  peak GiB"
    for stage in summary["stages"]:
        there = "  (there already)" if stage["was_there"] else ""
        yield _cost(stage["name"], stage["seconds"], stage["peak_memory_bytes"]) + there
    yield _cost("total", summary["seconds"], summary["peak_memory_bytes"])
    yield ""
    yield _text(summary["data"])
    difference = summary["largest_logit_difference"]
    yield f"largest logit difference of the upcycled model to the dense one: {difference:.2g}"
    yield ""
    yield f"held-out loss, nats a token, on {summary['heldout_tokens']:,} tokens"
    for row in summary["heldout"]:
        yield f"  {row['label']:34} {row['loss']:.4f}{_difference(row)}"
    yield f"FP8 weights: {summary['fp8_bytes'] / GIB:.2f} GiB, {summary['bytes'] / GIB:.2f} before"
    yield ""
    yield summary["answers"][0]["prompt"]
    for answer in summary["answers"]:
        yield f"  {answer['model']}: {' '.join(answer['text'].split())}"
    yield ""
    yield summary["report"]


def _cost(name: str, seconds: float, memory: int | None) -> str:
    return f"{name:9} {seconds:8.1f}  {'' if memory is None else f'{memory / GIB:8.1f}'}"


def _text(data: dict[str, Any]) -> str:
    train, heldout = data["train"], data["heldout"]
    return (
        f"text: {data['what']} ({data['licence']}), {train['documents']} files of "
        f"{train['tokens']:,} tokens to train on ({data['seen_tokens']:,} were), "
        f"{heldout['documents']} files of {heldout['tokens']:,} tokens held out"
    )


def _difference(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return ""
    error = row["difference_standard_error"]
    give_or_take = "" if error is None else f" ± {error:.4f}"
    return f"  {row['difference']:+.4f}{give_or_take} against dense"


@verb(DemoConfig, show=story)
def demo(config: DemoConfig) -> Summary:
    """Run the whole path on a small real model."""
    summary: Summary = moesaic.demo(config)
    return summary
