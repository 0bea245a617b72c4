"""`moesaic prepare RECIPE`, or with flags alone."""

from __future__ import annotations

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.data.config import PrepareConfig


@verb(PrepareConfig, recipe=True)
def prepare(config: PrepareConfig) -> Summary:
    """Turn text into training data."""
    summary: Summary = moesaic.prepare(config)
    return summary
