"""`moesaic quantize MODEL OUT`."""

from __future__ import annotations

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.quantizing.config import QuantizeConfig


@verb(QuantizeConfig, positional=("model", "out"))
def quantize(config: QuantizeConfig) -> Summary:
    """Shrink a model to FP8, and say what that cost."""
    summary: Summary = moesaic.quantize(config)
    return summary
