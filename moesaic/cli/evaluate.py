"""`moesaic evaluate MODEL... --data TOKENS`."""

from __future__ import annotations

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.evaluation.config import EvaluateConfig


@verb(EvaluateConfig, positional=("models",))
def evaluate(config: EvaluateConfig) -> Summary:
    """Measure held-out loss and perplexity of one model, or of several on the same text."""
    summary: Summary = moesaic.evaluate(config)
    return summary
