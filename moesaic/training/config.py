"""What a training run may choose. Nothing here loads torch.

Skywork-MoE publishes neither optimizer nor schedule. Where its base model's report
(Skywork-13B, arXiv 2310.19341) states a value, it is the default here; every other
default is ours, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError
from moesaic.moe.config import RoutingConfig
from moesaic.parallel.config import LaunchConfig
from moesaic.training.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class TrainDataConfig:
    """Which tokens are read, and how many at once. Their folder sets the sequence length."""

    tokens: Path
    """Token folder, as `moesaic prepare` writes it."""

    weights: Mapping[str, float] | None = None
    """Share of the sequences that each source gives, by name; None for those in the folder."""

    micro_batch: int = 4
    """Sequences that go through the model at once. Ours."""

    accumulation: int = 1
    """Micro-batches in an optimizer step. Ours."""

    attend_across_documents: bool = False
    """Let a token see earlier documents of its sequence."""

    def __post_init__(self) -> None:
        _at_least("data.micro_batch", self.micro_batch, 1)
        _at_least("data.accumulation", self.accumulation, 1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, and the clip before it."""

    lr: float = 1e-4
    """Peak learning rate. Ours; Skywork-13B used 6e-4 from scratch and 6e-5 to continue."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments. Skywork-13B's."""

    eps: float = 1e-8
    """Added to the root of the second moment. Ours."""

    weight_decay: float = 0.1
    """Of matrices; norms, biases and other one-dimensional weights never decay. Skywork-13B's."""

    clip: float = 1.0
    """Largest norm of the gradient over all weights; 0 for no limit. Skywork-13B's."""

    expert_lr_multiplier: float = 1.0
    """Learning rate of routed experts over that of the rest. Skywork-MoE C.1 tried top_k over
    the number of experts and its root, and advises against both."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"optimizer.{name} is {getattr(self, name)}. It must be above 0.")
        for name in ("weight_decay", "clip", "expert_lr_multiplier"):
            _at_least(f"optimizer.{name}", getattr(self, name), 0)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"optimizer.betas are {self.betas[0]} and {self.betas[1]}. "
                f"Both must be at least 0 and below 1."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run can be resumed from. One that is asked to stop always leaves a checkpoint."""

    every: int = 100
    """Steps between checkpoints; 0 for none on the way. Ours."""

    at_end: bool = True
    """Leave one after the last step, so that the run can be made longer. Without, a longer run
    begins again at the last checkpoint there is."""

    keep: int = 2
    """Checkpoints that stay; older ones are deleted after a new one is complete. Ours."""

    in_background: bool = False
    """Go on training while a checkpoint is written. It takes a copy of what is written in memory:
    three times the float32 weights, divided by the ranks."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 0)
        _at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is measured beside the loss. Nothing here changes a weight."""

    similarity_every: int = 100
    """Steps between measurements of expert similarity; 0 for never. Ours."""

    log_every: int = 10
    """Steps between progress lines where stderr is no terminal. Ours."""

    peak_flops: float | None = None
    """Operations a second that MFU is a share of, such as a GPU's stated 989e12; None: measured
    once with a square matrix product in the compute dtype, and kept in the run folder."""

    tensorboard: bool = True
    """Write TensorBoard events."""

    def __post_init__(self) -> None:
        _at_least("metrics.similarity_every", self.similarity_every, 0)
        _at_least("metrics.log_every", self.log_every, 1)
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ConfigError(f"metrics.peak_flops is {self.peak_flops}. It must be above 0.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: pre-training, continued training or fine-tuning, MoE or dense."""

    model: Path
    """Model folder to start from."""

    run: Path
    """Run folder to write, or to go on with."""

    data: TrainDataConfig
    """Which tokens are read."""

    steps: int
    """Optimizer steps of the whole run."""

    seed: int = 0
    """Sets the order of the data. A step draws no other random number."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW."""

    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the steps."""

    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """Capacity and balance of MoE layers; without meaning for a dense model."""

    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and matrix products. Weights, gradients and moments are float32."""

    recompute: Literal["none", "all"] | int | tuple[int, ...] = "none"
    """Layers whose activations are computed again in the backward pass instead of kept:
    `none`, `all`, the first n, or a list of layers."""

    freeze: tuple[str, ...] = ()
    """Weights that stay as they are: patterns of parameter names, such as `*.self_attn.*`."""

    compile: bool = False
    """Compile attention and dense feed-forward layers. Changes the last bits of a loss."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""

    plan: Path | None = None
    """Layout over ranks, a plan.json as docs/plan.md specifies it; None: one rank."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How long ranks wait for each other. Without meaning for one rank."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How often a run can be resumed from."""

    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What is measured beside the loss."""

    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights in the final model folder."""

    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint in the run folder. never: refuse a run folder
    that holds anything."""

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        if self.routing.capacity_group == "global_batch" and self.data.accumulation > 1:
            raise ConfigError(
                f"routing.capacity_group is global_batch, but a step has "
                f"{self.data.accumulation} micro-batches, which cannot wait for each other. "
                f"Set data.accumulation to 1, or count by micro_batch or sequence."
            )
        self.schedule.check(peak=self.optimizer.lr, steps=self.steps)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:  # also refuses NaN
        raise ConfigError(f"{name} is {value}. It must be at least {least}.")
