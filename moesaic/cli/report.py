"""`moesaic report RUN`."""

from __future__ import annotations

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.reporting.config import ReportConfig


@verb(ReportConfig, positional=("run",))
def report(config: ReportConfig) -> Summary:
    """Draw one HTML page about a training run."""
    summary: Summary = moesaic.report(config)
    return summary
