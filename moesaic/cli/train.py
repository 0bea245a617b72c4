"""`moesaic train RECIPE`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import moesaic
from moesaic.cli.show import size
from moesaic.cli.verb import Summary, verb
from moesaic.config import to_toml
from moesaic.parallel.launch import environment_world, start_ranks
from moesaic.planning.plan import TrainPlan
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


def start(config: TrainConfig, as_json: bool) -> int | None:
    """Start the plan's ranks on this machine, unless this process is one of them or all."""
    if config.plan is None or environment_world() is not None:
        return None
    size = TrainPlan.load(config.plan).world_size
    if size == 1:
        return None
    with tempfile.TemporaryDirectory(prefix="moesaic-train-") as folder:
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "moesaic", "train", str(recipe)]
        # The first rank prints the result here; the others print into their logs.
        return start_ranks(
            [*command, "--json"] if as_json else command, size=size, config=config.launch
        )


@verb(TrainConfig, recipe=True, show=show, status=status, elsewhere=start)
def train(config: TrainConfig) -> Summary:
    """Train a model, dense or mixture of experts: pre-training, continued training, fine-tuning."""
    summary: Summary = moesaic.train(config)
    return summary
