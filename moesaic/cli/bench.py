"""`moesaic bench serve URL`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.show import table
from moesaic.cli.verb import Summary, verb
from moesaic.serving.config import BenchServeConfig

LATENCIES = {
    "first_token_seconds": "to the first token",
    "token_seconds": "a token after it, by answer",
    "gap_seconds": "between two pieces",
    "request_seconds": "whole request",
}


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """Rates, and a table of latencies."""
    yield (
        f"{done['model']} at {done['url']}: {done['requests']} requests, {done['load']}, "
        f"{done['seconds']:.1f} s"
    )
    yield (
        f"{done['output_tokens_per_second']:.1f} tokens/s of answers, "
        f"{done['tokens_per_second']:.1f} with prompts, "
        f"{done['requests_per_second']:.2f} requests/s"
    )
    rows = [
        (name, *(f"{1000 * value:.1f}" for value in done[key].values()))
        for key, name in LATENCIES.items()
        if done[key]
    ]
    yield from table(["milliseconds", "mean", "p50", "p90", "p95", "p99", "max"], rows)
    for fault, count in done["faults"].items():
        yield f"{count} failed: {fault}"
    if "out" in done:
        yield f"wrote {done['out']}"


def status(done: Mapping[str, Any]) -> int:
    """A load that was not answered in full is no measurement."""
    return 3 if done["failed"] else 0


@verb(BenchServeConfig, positional=("url",), show=show, status=status)
def serve(config: BenchServeConfig) -> Summary:
    """Put a server under load and measure it."""
    summary: Summary = moesaic.bench_serve(config)
    return summary
