"""One MoE layer: route, drop what does not fit, run the experts, combine.

    y = sum over the kept choices of gate * Expert(x)   [+ sigmoid(x g^T) * SharedExpert(x)]

In training the layer is handed a `RoutingStep`: it then applies the capacity, adds the losses'
gradient through `inject`, and returns statistics. Without one it is inference: dropless, no loss,
nothing counted.

Where positions are cut over ranks, every rank gets the logits of all of them (few numbers a
token beside its activations) and chooses, counts and drops alike, so that these never depend on
the layout. Each then sends its own tokens to their experts.

Shapes.
    B sequences     S positions, s of them this rank's     D model width
    T = B * S tokens     t = B * s of them     E experts     K experts per token
    R rows that arrive     J experts each names     N copies that are computed here
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moesaic.moe.capacity import (
    count_copies,
    count_overflow,
    expert_capacity,
    keep_within_capacity,
)
from moesaic.moe.config import RoutingConfig
from moesaic.moe.dispatch import combine, gather, plan_dispatch
from moesaic.moe.exchange import Arrived, Exchange
from moesaic.moe.experts import Experts, Implementation
from moesaic.moe.losses import (
    inject,
    router_z_loss,
    skywork_balance_loss,
    switch_balance_loss,
)
from moesaic.moe.router import Router, RouterOutput, sum_to_one
from moesaic.moe.statistics import RoutingStatistics, measure_routing
from moesaic.parallel import collectives
from moesaic.parallel.group import ALONE, Group, Groups
from moesaic.planning.layout import Shard
from moesaic.planning.split import Split
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
    """A SwiGLU expert that every token visits, without biases.

    Args:
        hidden_dim: Model width.
        expert_dim: Columns that this rank holds.
        group: Ranks that hold the others.
    """

    def __init__(self, hidden_dim: int, expert_dim: int, group: Group = ALONE) -> None:
        super().__init__()
        self.group = group
        self.gate_proj = nn.Linear(hidden_dim, expert_dim, bias=False)
        self.up_proj = nn.Linear(hidden_dim, expert_dim, bias=False)
        self.down_proj = nn.Linear(expert_dim, hidden_dim, bias=False)

    def forward(self, x_BsD: Tensor, parts: Split) -> Tensor:
        """(B, s, D) -> (B, s, D)."""
        x_BSD = collectives.gather(x_BsD, parts, self.group, dim=1)
        gate, up, down = (
            linear.weight.to(x_BSD.dtype)
            for linear in (self.gate_proj, self.up_proj, self.down_proj)
        )
        h_BSF = functional.silu(functional.linear(x_BSD, gate)) * functional.linear(x_BSD, up)
        y_BSD = functional.linear(h_BSF, down)
        return collectives.scatter_sum(y_BSD, parts, self.group, dim=1)


class MoELayer(nn.Module):
    """The feed-forward network of an MoE layer. Parameter names are those of Mixtral.

    Args:
        spec: The mixture.
        hidden_dim: Model width.
        implementation: How the experts are computed.
        shard: What this rank holds of it; None: everything.
        groups: Ranks that hold the rest.
    """

    def __init__(
        self,
        spec: MoESpec,
        hidden_dim: int,
        *,
        implementation: Implementation = "auto",
        shard: Shard | None = None,
        groups: Groups | None = None,
    ) -> None:
        super().__init__()
        groups = groups or Groups()
        experts, columns, shared = (
            (spec.num_experts, spec.expert_dim, spec.shared_expert_dim)
            if shard is None
            else (
                end - start
                for start, end in (shard.experts, shard.expert_columns, shard.shared_ffn)
            )
        )
        self.spec = spec
        self.tp = groups.tp
        self.gate = Router(spec, hidden_dim)
        self.experts = Experts(
            experts, hidden_dim, expert_dim=columns, implementation=implementation
        )
        self.exchange = Exchange(
            Split.from_counts([experts]) if shard is None else shard.expert_split,
            (0, experts) if shard is None else shard.experts,
            ep=groups.ep,
            etp=groups.etp,
            dispatch="all_to_all" if shard is None else shard.dispatch,
            deduplicate=shard is None or shard.deduplicate,
        )
        self.routes_all = (
            self.tp.size > 1
            and groups.ep is self.tp
            and groups.etp.size == 1
            and self.exchange.dispatch == "all_gather"
        )
        """Whether the ranks that share positions all compute each other's rows (EDP)."""
        self.rows = 0
        """Rows that the experts here were given since this was last set to 0."""
        self.shared_expert: SharedExpert | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if spec.shared_expert_dim:
            self.shared_expert = SharedExpert(hidden_dim, shared, groups.tp)
            self.shared_expert_gate = nn.Linear(hidden_dim, 1, bias=False)

    def forward(
        self,
        x_BsD: Tensor,
        routing: RoutingStep | None = None,
        parts: Split | None = None,
        *,
        recompute: bool = False,
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """Compute the layer.

        Args:
            x_BsD: Normalised hidden states of this rank's positions, (B, s, D).
            routing: This training step; None for inference.
            parts: Which of the S positions are which rank's; None: all are this one's.
            recompute: Compute the inside of the experts again in the backward pass.

        Returns:
            y_BsD: What the residual adds, in x_BsD's dtype, (B, s, D).
            statistics: How this batch was routed, all of its S positions; None for inference.
        """
        batch, _, width = x_BsD.shape
        parts = Split.from_counts([x_BsD.shape[1]]) if parts is None else parts
        x_tD = x_BsD.reshape(-1, width)
        # A rank that computes some experts of every token finds its share of their gradients; one
        # that computes its own tokens finds all of it.
        logits_TE = collectives.gather_tokens(
            self.gate.score(x_tD), batch, parts, self.tp, same=not self.routes_all
        )
        routed = self.gate.choose(logits_TE)
        gates_TK, keep_TK, statistics = routed.gates_TK, None, None
        if routing is not None:
            gates_TK, keep_TK, statistics = self._train_routing(routed, routing, sequences=batch)
        elif self.spec.renormalize and x_BsD.dtype == torch.float32:
            gates_TK = sum_to_one(gates_TK)
        arrived = self._send(x_tD, routed.experts_TK, gates_TK, keep_TK, batch, parts)
        plan = plan_dispatch(
            arrived.experts_RJ,
            num_experts=self.experts.w1.shape[0],
            keep_TK=arrived.keep_RJ,
        )
        rows_ND = gather(arrived.x_RD, plan)
        self.rows += rows_ND.shape[0]
        if recompute:
            y_ND = checkpoint(self.experts, rows_ND, plan.counts_E, use_reentrant=False)
        else:
            y_ND = self.experts(rows_ND, plan.counts_E)
        y_RD = combine(y_ND, arrived.gates_RJ, plan)
        y_BsD = self.exchange.bring_back(y_RD, arrived.way_back).view(x_BsD.shape)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            gate_weight_1D = self.shared_expert_gate.weight.to(x_BsD.dtype)
            gate_Bs1 = functional.linear(x_BsD, gate_weight_1D).sigmoid()
            y_BsD = y_BsD + gate_Bs1 * self.shared_expert(x_BsD, parts)
        return y_BsD, statistics

    def _send(
        self,
        x_tD: Tensor,
        experts_TK: Tensor,
        gates_TK: Tensor,
        keep_TK: Tensor | None,
        batch: int,
        parts: Split,
    ) -> Arrived:
        """Bring this rank's rows to their experts, given how those of all ranks were routed."""

        def rank_by_rank(of_all_TK: Tensor) -> Tensor:
            return collectives.rank_by_rank(of_all_TK, batch, parts)

        def own(of_all_TK: Tensor) -> Tensor:
            return collectives.own_tokens(of_all_TK, batch, parts, self.tp)

        if self.routes_all:
            return self.exchange.send_to_all(
                x_tD,
                rank_by_rank(experts_TK),
                rank_by_rank(gates_TK),
                rows=Split.from_counts([batch * size for size in parts.sizes]),
                keep_RK=None if keep_TK is None else rank_by_rank(keep_TK),
            )
        return self.exchange.send(
            x_tD,
            own(experts_TK),
            own(gates_TK),
            keep_TK=None if keep_TK is None else own(keep_TK),
        )

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
        # Where ranks have shares of their gradient, each injects its share of the loss.
        scale = routing.scale / (self.tp.size if self.routes_all else 1)
        return inject(routed.gates_TK, loss, scale), keep_TK, statistics

    def _balance_loss(self, routed: RouterOutput, config: RoutingConfig, *, groups: int) -> Tensor:
        if config.balance_loss == "skywork":
            return skywork_balance_loss(routed.probs_TE, groups=groups)
        if config.balance_loss == "switch":
            counts_GE = count_copies(
                routed.experts_TK, num_experts=self.spec.num_experts, groups=groups
            )
            return switch_balance_loss(routed.probs_TE, counts_GE)
        return routed.probs_TE.new_zeros(())
