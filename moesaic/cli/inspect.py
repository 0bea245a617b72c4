"""`moesaic inspect MODEL`."""

from __future__ import annotations

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.reporting.config import InspectConfig


@verb(InspectConfig, positional=("model",))
def inspect(config: InspectConfig) -> Summary:
    """Show what a model folder holds: sizes, parameters, operations, how alike its experts are."""
    summary: Summary = moesaic.inspect(config)
    return summary
