"""`moesaic train RECIPE`."""

from __future__ import annotations

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.training.config import TrainConfig


@verb(TrainConfig, recipe=True)
def train(config: TrainConfig) -> Summary:
    """Train a model, dense or mixture of experts: pre-training, continued training, fine-tuning."""
    summary: Summary = moesaic.train(config)
    return summary
