"""`moesaic evaluate MODEL... --data TOKENS`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.show import losses
from moesaic.cli.verb import Summary, verb
from moesaic.evaluation.config import EvaluateConfig


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """The loss of every model."""
    rows, tokens = done["sequences"], done["tokens"]
    yield f"{done['split']} of {done['data']}: {rows:,} rows, {tokens:,} tokens"
    yield from losses(done["models"])


@verb(EvaluateConfig, positional=("models",), show=show)
def evaluate(config: EvaluateConfig) -> Summary:
    """Measure held-out loss and perplexity of one model, or of several on the same text."""
    summary: Summary = moesaic.evaluate(config)
    return summary
