"""What `moesaic measure` may be asked. Nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError
from moesaic.moe.config import RoutingConfig
from moesaic.parallel.config import LaunchConfig
from moesaic.planning.plan import ExpertsOver


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How long each kind of layer of a model, and each kind of exchange, takes on this machine."""

    model: str
    """Model folder, of which only `config.json` is read, or a preset such as skywork-13b."""

    out: Path = Path("measured.json")
    """File to write the table to, which `moesaic plan train --measured` reads."""

    tokens: Path | None = None
    """Token folder of the training: its rows have the sequence length, and parts of them belong to
    different documents. None: random tokens of one document a row."""

    sequence: int | None = None
    """Tokens of a sequence; None: the token folder's."""

    micro_batch: int = 4
    """Sequences that go through a layer at once, as in the recipe or plan of the training."""

    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations and matrix products; weights, gradients and moments are float32."""

    ranks: int | None = None
    """Ranks that measure at once, started on this machine; None: torchrun's, else 1. They share
    processor and memory as they will in training, and exchanges between them are measured."""

    tp: int = 1
    """Ranks of a tensor-parallel group; each times its share of the layers."""

    experts_over: ExpertsOver = "edp"
    """Which ranks the experts are split over, as in a plan."""

    ep: int | None = None
    """Ranks that share one set of experts, as in a plan."""

    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """Capacity and balance of MoE layers, as in the recipe of the training."""

    rounds: int = 10
    """Times that everything is timed; the table has medians. Ours."""

    warmup_rounds: int = 3
    """Rounds before these that are not counted. Ours."""

    largest_message: int = 2**25
    """Bytes of the largest exchange that is timed; 0 times none. Ours."""

    clock: Literal["wall", "processor"] = "wall"
    """What layers are timed by. processor: the time that a rank's thread has the processor, which
    other work on a busy machine does not lengthen; with one thread a rank, and no exchange in a
    layer. Exchanges always go by the wall's."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to measure; auto takes a GPU if there is one."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How long ranks wait for each other. Without meaning for one rank."""

    def __post_init__(self) -> None:
        least = {"sequence": 1, "micro_batch": 1, "ranks": 1, "tp": 1, "ep": 1}
        least |= {"rounds": 1, "warmup_rounds": 0, "largest_message": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ConfigError(f"{name} is {value}. It must be at least {bound}.")
        if self.clock == "processor" and (
            self.tp > 1 or (self.ep or 1) > 1 or self.experts_over != "edp"
        ):
            raise ConfigError(
                "clock is processor, which counts no waiting, but layers split over ranks wait for "
                "each other. Use the wall's clock, or tp 1 with experts over edp."
            )
        if self.sequence is None and self.tokens is None:
            raise ConfigError("Neither sequence nor tokens is given. Say how long sequences are.")
        if self.ranks is not None and self.ranks % self.tp:
            raise ConfigError(
                f"{self.ranks} ranks cannot form tensor-parallel groups of {self.tp}. "
                f"Make ranks a multiple of tp."
            )
