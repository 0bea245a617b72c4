"""`moesaic demo`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.show import losses, size, table
from moesaic.cli.verb import Summary, verb
from moesaic.studies.config import DemoConfig


def story(summary: Mapping[str, Any]) -> Iterator[str]:
    """What happened, in a few tables; the path of the page is the last line."""
    total = {"name": "total", "was_there": False, **summary}
    costs = [_cost(stage) for stage in (*summary["stages"], total)]
    yield from table(["stage", "seconds", "peak memory", ""], costs)
    yield ""
    yield _text(summary["data"])
    difference = summary["largest_logit_difference"]
    yield f"largest logit difference of the upcycled model to the dense one: {difference:.2g}"
    yield f"weights: {size(summary['bytes'])}, in FP8 {size(summary['fp8_bytes'])}"
    yield ""
    yield f"held-out loss on {summary['heldout_tokens']:,} tokens:"
    yield from losses(summary["heldout"])
    yield ""
    yield summary["answers"][0]["prompt"]
    for answer in summary["answers"]:
        yield f"  {answer['model']}: {' '.join(answer['text'].split())}"
    yield ""
    yield summary["report"]


def _cost(stage: Mapping[str, Any]) -> list[str]:
    memory = stage["peak_memory_bytes"]
    return [
        stage["name"],
        f"{stage['seconds']:,.1f}",
        "" if memory is None else size(memory),
        "there already" if stage["was_there"] else "",
    ]


def _text(data: Mapping[str, Any]) -> str:
    train, heldout = data["train"], data["heldout"]
    return (
        f"text: {data['what']} ({data['licence']}): {train['documents']} files of "
        f"{train['tokens']:,} tokens to train on, of which {data['seen_tokens']:,} were seen; "
        f"{heldout['documents']} files of {heldout['tokens']:,} tokens held out"
    )


@verb(DemoConfig, show=story)
def demo(config: DemoConfig) -> Summary:
    """Run the whole path on a small real model."""
    summary: Summary = moesaic.demo(config)
    return summary
