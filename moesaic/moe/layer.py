"""One MoE layer: route, drop what does not fit, run the experts, combine.

    y = sum over the kept choices of gate * Expert(x)   [+ sigmoid(x g^T) * SharedExpert(x)]

In training the layer is handed a `RoutingStep`: it then applies the capacity, adds the losses'
gradient through `inject`, and returns statistics. Without one it is inference: dropless, no loss,
nothing counted.

Shapes.
    B sequences     S positions     T = B * S tokens     D model width
    E experts     K experts per token     N copies that are computed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.errors import ConfigError
from moesaic.moe.balance import BiasForm
from moesaic.moe.capacity import (
    DropPolicy,
    count_copies,
    count_overflow,
    expert_capacity,
    keep_within_capacity,
)
from moesaic.moe.dispatch import combine, gather, plan_dispatch
from moesaic.moe.experts import Experts, Implementation
from moesaic.moe.losses import (
    inject,
    router_z_loss,
    skywork_balance_loss,
    switch_balance_loss,
)
from moesaic.moe.router import Router, RouterOutput
from moesaic.moe.statistics import RoutingStatistics, measure_routing
from moesaic.spec import MoESpec


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


@dataclass(frozen=True)
class RoutingStep:
    """What one layer needs to know about this training step."""

    config: RoutingConfig

    coefficient: Tensor
    """This layer's balance-loss coefficient, ()."""

    scale: float = 1.0
    """Multiplies the injected losses, such as 1 / micro-batches of the step."""


class SharedExpert(nn.Module):
    """A SwiGLU expert that every token visits, without biases."""

    def __init__(self, hidden_dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_dim, expert_dim, bias=False)
        self.up_proj = nn.Linear(hidden_dim, expert_dim, bias=False)
        self.down_proj = nn.Linear(expert_dim, hidden_dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up, down = (
            linear.weight.to(x_TD.dtype)
            for linear in (self.gate_proj, self.up_proj, self.down_proj)
        )
        h_TF = functional.silu(functional.linear(x_TD, gate)) * functional.linear(x_TD, up)
        return functional.linear(h_TF, down)


class MoELayer(nn.Module):
    """The feed-forward network of an MoE layer. Parameter names are those of Mixtral."""

    def __init__(
        self, spec: MoESpec, hidden_dim: int, *, implementation: Implementation = "auto"
    ) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Router(spec, hidden_dim)
        self.experts = Experts(
            spec.num_experts,
            hidden_dim,
            expert_dim=spec.expert_dim,
            implementation=implementation,
        )
        self.shared_expert: SharedExpert | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if spec.shared_expert_dim:
            self.shared_expert = SharedExpert(hidden_dim, spec.shared_expert_dim)
            self.shared_expert_gate = nn.Linear(hidden_dim, 1, bias=False)

    def forward(
        self, x_BSD: Tensor, routing: RoutingStep | None = None
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """Compute the layer.

        Args:
            x_BSD: Normalised hidden states, (B, S, D).
            routing: This training step; None for inference.

        Returns:
            y_BSD: What the residual adds, in x_BSD's dtype, (B, S, D).
            statistics: How this batch was routed; None for inference.
        """
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routed = self.gate(x_TD)
        gates_TK, keep_TK, statistics = routed.gates_TK, None, None
        if routing is not None:
            gates_TK, keep_TK, statistics = self._train_routing(
                routed, routing, sequences=x_BSD.shape[0]
            )
        plan = plan_dispatch(routed.experts_TK, num_experts=self.spec.num_experts, keep_TK=keep_TK)
        y_ND = self.experts(gather(x_TD, plan), plan.counts_E)
        y_TD = combine(y_ND, gates_TK, plan)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            gate_weight_1D = self.shared_expert_gate.weight.to(x_TD.dtype)
            gate_T1 = functional.linear(x_TD, gate_weight_1D).sigmoid()
            y_TD = y_TD + gate_T1 * self.shared_expert(x_TD)
        return y_TD.view(x_BSD.shape), statistics

    def _train_routing(
        self, routed: RouterOutput, routing: RoutingStep, *, sequences: int
    ) -> tuple[Tensor, Tensor | None, RoutingStatistics]:
        """Apply capacity, attach the losses to the gates, count."""
        config, num_experts = routing.config, self.spec.num_experts
        tokens, top_k = routed.experts_TK.shape

        groups = sequences if config.capacity_group == "sequence" else 1
        counts_GE = count_copies(routed.experts_TK, num_experts=num_experts, groups=groups)
        factor = config.capacity_factor
        capacity = expert_capacity(
            config.stated_capacity_factor if factor is None else factor,
            tokens=tokens // groups,
            top_k=top_k,
            num_experts=num_experts,
        )
        overflow = count_overflow(counts_GE, capacity)
        keep_TK = None
        if factor is not None:
            keep_TK = keep_within_capacity(
                routed.experts_TK,
                routed.probs_TE.gather(-1, routed.experts_TK),
                num_experts=num_experts,
                capacity=capacity,
                groups=groups,
                policy=config.drop_policy,
            )

        balance_groups = sequences if config.balance_group == "sequence" else 1
        balance_loss = self._balance_loss(routed, config, groups=balance_groups)
        z_loss = router_z_loss(routed.logits_TE)
        loss = routing.coefficient.to(balance_loss) * balance_loss + config.z_loss_weight * z_loss
        statistics = measure_routing(
            routed.probs_TE,
            copies=tokens * top_k,
            counts_E=counts_GE.sum(dim=0),
            dropped=torch.zeros_like(overflow) if factor is None else overflow,
            would_drop=overflow,
            balance_loss=balance_loss,
            z_loss=z_loss,
        )
        # The gates, because whatever the layer returns has passed through them.
        return inject(routed.gates_TK, loss, routing.scale), keep_TK, statistics

    def _balance_loss(self, routed: RouterOutput, config: RoutingConfig, *, groups: int) -> Tensor:
        if config.balance_loss == "skywork":
            return skywork_balance_loss(routed.probs_TE, groups=groups)
        if config.balance_loss == "switch":
            counts_GE = count_copies(
                routed.experts_TK, num_experts=self.spec.num_experts, groups=groups
            )
            return switch_balance_loss(routed.probs_TE, counts_GE)
        return routed.probs_TE.new_zeros(())
