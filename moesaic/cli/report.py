"""`moesaic report RUN`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.reporting.config import ReportConfig


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """What the page says, and its path on the last line."""
    yield from done["summary"]
    yield from done["notes"]
    yield done["report"]


@verb(ReportConfig, positional=("run",), show=show)
def report(config: ReportConfig) -> Summary:
    """Draw one HTML page about a training run."""
    summary: Summary = moesaic.report(config)
    return summary
