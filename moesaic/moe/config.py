"""How training balances experts: a choice for one run. Nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesaic.errors import ConfigError

DropPolicy = Literal["probability", "position"]
"""Which copies an expert keeps: the most probable, or those of the earliest tokens."""

BiasForm = Literal["error", "sign"]
"""What moves a selection bias: the load's error, or only its sign."""


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How training keeps the experts of every MoE layer balanced."""

    capacity_factor: float | None = None
    """An expert takes ceil(factor k T / n) copies of a group and drops the rest; None: dropless."""

    drop_policy: DropPolicy = "probability"
    """What an overfull expert keeps: the most probable copies, or those of the earliest tokens."""

    capacity_group: Literal["sequence", "micro_batch", "global_batch"] = "micro_batch"
    """Tokens over which the capacity is counted. `global_batch` is legal only where a step has one
    micro-batch, and is then the same as `micro_batch`."""

    stated_capacity_factor: float = 1.25
    """Dropless only: the capacity factor whose drop rate drives the adaptive coefficient. The
    report states none; this one is ours."""

    balance_loss: Literal["skywork", "switch", "none"] = "skywork"
    """Skywork-MoE Eq. 4, Switch Transformer's, or none."""

    balance_group: Literal["sequence", "micro_batch"] = "micro_batch"
    """Tokens over which the balance loss takes its means."""

    coefficient: Literal["adaptive", "fixed"] = "adaptive"
    """Whether each layer's coefficient follows its drop rate (Eq. 7-9) or stays at the maximum."""

    coefficient_max: float = 0.01
    """Alpha_max of Eq. 9: the largest coefficient, and the first."""

    coefficient_slope: float = 0.2
    """Xi of Eq. 9: coefficient per unit of drop rate."""

    coefficient_decay: float = 0.99
    """Beta of Eq. 8: how much of the old coefficient a step keeps."""

    z_loss_weight: float = 0.0
    """Weight of the router z-loss on raw logits; 0 turns it off."""

    bias_rate: float = 0.0
    """Step of the selection bias in loss-free balancing; 0 leaves the bias alone."""

    bias_form: BiasForm = "error"
    """Whether the bias moves by the load's error or only by its sign."""

    def __post_init__(self) -> None:
        for name in ("capacity_factor", "stated_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and not factor > 0:
                raise ConfigError(f"{name} is {factor}, but a capacity must be above 0.")
        for name in ("coefficient_max", "coefficient_slope", "z_loss_weight", "bias_rate"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}. Choose 0 or more.")
        if not 0 <= self.coefficient_decay <= 1:
            raise ConfigError(
                f"coefficient_decay is {self.coefficient_decay}. Choose it from 0 to 1."
            )
