"""`moesaic train RECIPE`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.show import size
from moesaic.cli.verb import Summary, verb
from moesaic.training.config import TrainConfig


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """How far training came, and where its result lies."""
    if done["resumed_from"] is not None:
        yield f"went on from step {done['resumed_from']}"
    loss = "" if done["loss"] is None else f", loss {done['loss']:.4f}"
    yield (
        f"step {done['step']:,} of {done['steps']:,}{loss}, {done['seconds']:,.1f} s, "
        f"peak memory {size(done['peak_memory_bytes'])}"
    )
    if done["stopped_by"] is not None:
        yield f"stopped by {done['stopped_by']}; the same command goes on from here"
    yield f"its result: {done['model'] or done['run']}"


def status(done: Mapping[str, Any]) -> int:
    """A run that was asked to stop has not done what was asked at first."""
    return 0 if done["stopped_by"] is None else 130


@verb(TrainConfig, recipe=True, show=show, status=status)
def train(config: TrainConfig) -> Summary:
    """Train a model, dense or mixture of experts: pre-training, continued training, fine-tuning."""
    summary: Summary = moesaic.train(config)
    return summary
