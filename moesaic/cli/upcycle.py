"""`moesaic upcycle DENSE OUT --experts 8 --top-k 2`."""

from __future__ import annotations

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.upcycling.config import UpcycleConfig


@verb(UpcycleConfig, positional=("dense", "out"))
def upcycle(config: UpcycleConfig) -> Summary:
    """Turn a dense model into a mixture of experts, with a proof that it computes the same."""
    summary: Summary = moesaic.upcycle(config)
    return summary
