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

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.moe.capacity import (
    count_copies,
    count_overflow,
    expert_capacity,
    keep_within_capacity,
)
from moesaic.moe.config import RoutingConfig
from moesaic.moe.dispatch import combine, gather, plan_dispatch
from moesaic.moe.experts import Experts, Implementation
from moesaic.moe.losses import (
    inject,
    router_z_loss,
    skywork_balance_loss,
    switch_balance_loss,
)
from moesaic.moe.router import Router, RouterOutput, sum_to_one
from moesaic.moe.statistics import RoutingStatistics, measure_routing
from moesaic.spec import MoESpec


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
        elif self.spec.renormalize and x_TD.dtype == torch.float32:
            gates_TK = sum_to_one(gates_TK)
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
