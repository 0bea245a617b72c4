"""What `moesaic plan train` and `moesaic plan check` may be asked. Nothing here loads numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlanTrainConfig:
    """The fastest legal layout for training a model on a cluster."""

    model: str
    """A preset such as skywork-moe-146b, a `config.json`, a model folder, or a training recipe."""

    cluster: str
    """Devices, such as 8x4090, 192x8xA800, 2xH100+6xA800 or cpu2, or a TOML file."""

    sequence: int | None = None
    """Tokens of a sequence; none: the recipe's."""

    global_batch: int | None = None
    """Sequences of a step, over all ranks; none: the recipe's."""

    fix: str = ""
    """What is given, as name=value,name=value: pp, tp, dp, cp, ep, etp, experts-over, micro-batch,
    schedule, interleave, zero, shard, dispatch and others of a published run; recompute, one
    choice for every layer; layers, those of each stage as 4+4.5+4."""

    dtype: Literal["bf16", "fp8", "fp32"] = "bf16"
    """What matrix products run in."""

    framework: Literal["moesaic", "megatron"] = "moesaic"
    """Whose memory and overlap are meant: this program's training, or Megatron's."""

    load_mean: float = 1.1
    """Tokens at the fullest rank's experts over the mean rank's, averaged over steps: for time.
    Ours."""

    load_tail: float = 1.5
    """The same at the 99th percentile of steps: for memory. Ours."""

    usable: float = 0.92
    """Part of each device's memory to fill. Ours; the rest is for what is not counted."""

    half_layers: bool = True
    """Whether stages may part a layer between attention and feed-forward network."""

    measured: Path | None = None
    """Table that `moesaic measure` saved; it replaces the formulas for what it has."""

    count: int = 5
    """Plans to show."""

    out: Path | None = None
    """File to write the plan to."""

    draw: Path | None = None
    """File to draw the timeline of the plan to, above the uniform one's: .svg or .png."""

    curve: tuple[float, ...] = ()
    """Memory of a device in GB, once and again: what the plan's mesh gains over fair baselines."""

    compare: tuple[Path, ...] = ()
    """Plan files to evaluate beside the one that is found."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count is {self.count}. Show at least 1 plan.")
        if not 0 < self.usable <= 1:
            raise ConfigError(f"usable is {self.usable}. It is a part of memory, at most 1.")
        if self.draw is not None and self.draw.suffix not in (".svg", ".png"):
            raise ConfigError(f"draw is {self.draw}. Name a file that ends with .svg or .png.")
        if any(not gigabytes > 0 for gigabytes in self.curve):
            raise ConfigError(f"curve is {self.curve}. Give gigabytes above 0.")


@dataclass(frozen=True, kw_only=True)
class PlanCheckConfig:
    """Predictions beside published runs."""

    runs: Path
    """CSV file of runs; docs/planner.md has its columns."""
