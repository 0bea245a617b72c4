"""Carry tokens to the ranks that hold their experts, and bring the results back.

    all_to_all   each rank sends a token's row to the ranks that hold its experts: once to a rank
                 that holds several of them, or once for each copy. Counts travel first, because
                 receive buffers must exist before rows arrive
    all_gather   every rank gets every row, computes what its experts add to it, and the
                 parts are added up: less traffic where a token has as many experts as there are
                 ranks, or more

With a row travel the numbers of its experts and its gates, so that the rank that computes also
weighs, and one row for each token and rank goes back. Where the columns of an expert are cut over
ranks too, these first bring their rows together, and add up their products. A group of one hands
everything through untouched.

Shapes.
    T tokens of this rank     D model width     K experts per token     N rows that leave
    R rows that arrive     J experts named by a row that arrives: K, or 1 if each copy travels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic.moe.dispatch import Dispatch, add_copies, gather, plan_dispatch
from moesaic.parallel import collectives
from moesaic.parallel.collectives import Traffic
from moesaic.parallel.group import ALONE, Group
from moesaic.planning.split import Span, Split

NOWHERE = -1
"""Stands for the expert of a copy that was dropped."""


@dataclass(frozen=True)
class Arrived:
    """Rows for the experts of this rank."""

    x_RD: Tensor

    experts_RJ: Tensor
    """Which of this rank's experts each row is for, counted from its first."""

    gates_RJ: Tensor
    """Weight of each of them."""

    keep_RJ: Tensor | None
    """False where the copy was dropped or is for another rank; None where all are for this one."""

    way_back: _WayBack


@dataclass(frozen=True)
class _WayBack:
    """How results retrace the way their rows came; None where nothing was sent."""

    plan: Dispatch | None = None
    send: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()
    gathered: Split | None = None
    shared: Split | None = None


_NOTHING_SENT = _WayBack()


class Exchange:
    """The way between a layer's tokens and its experts.

    Args:
        experts: Which experts each rank of `ep` holds.
        held: Which of them this rank holds.
        ep: Ranks that share the experts.
        etp: Ranks that share the columns of the same experts.
        dispatch: How rows travel over `ep`.
        deduplicate: In an all-to-all, send a token once to a rank.
    """

    def __init__(
        self,
        experts: Split,
        held: Span,
        *,
        ep: Group = ALONE,
        etp: Group = ALONE,
        dispatch: Literal["all_to_all", "all_gather"] = "all_to_all",
        deduplicate: bool = True,
    ) -> None:
        self.held, self.ep, self.etp = held, ep, etp
        self.dispatch, self.deduplicate = dispatch, deduplicate
        # Not on the default device, which is meta while a model is built without memory.
        self._ends = torch.tensor([end for _, end in experts.spans], device="cpu")
        self.traffic = Traffic()
        """What this rank received since it was last set to zero."""

    def send(
        self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor, *, keep_TK: Tensor | None = None
    ) -> Arrived:
        """Bring each row to where its experts are.

        Args:
            x_TD: Rows, (T, D).
            experts_TK: Experts of each, over all ranks, (T, K).
            gates_TK: Their weights, (T, K).
            keep_TK: False where a copy was dropped; None when none was.
        """
        if self.ep.size == self.etp.size == 1:
            return Arrived(x_TD, experts_TK, gates_TK, keep_TK, _NOTHING_SENT)
        if keep_TK is not None:
            experts_TK = experts_TK.where(keep_TK, NOWHERE)
        is_all_here = keep_TK is None and self.ep.size == 1
        plan: Dispatch | None = None
        send: tuple[int, ...] = ()
        receive: tuple[int, ...] = ()
        gathered: Split | None = None
        shared: Split | None = None
        x, experts, gates = x_TD, experts_TK, gates_TK
        if self.ep.size > 1 and self.dispatch == "all_to_all":
            plan, experts_NJ, gates_NJ = self._departures(experts, gates, keep_TK)
            is_all_here = experts_NJ.shape[1] == 1
            send, receive = self._exchanged_counts(plan.counts_E)
            x = self._exchange(gather(x, plan), send, receive)
            gates = self._exchange(gates_NJ, send, receive, is_payload=False)
            experts = self._exchange(experts_NJ, send, receive, is_payload=False)
        elif self.ep.size > 1:
            gathered = self._rows_of(self.ep, x)
            x, experts, gates = self._gather(self.ep, gathered, x, experts, gates)
        if self.etp.size > 1:
            shared = self._rows_of(self.etp, x)
            x, experts, gates = self._gather(self.etp, shared, x, experts, gates)
        start, end = self.held
        return Arrived(
            x,
            experts - start,
            gates,
            None if is_all_here else (experts >= start) & (experts < end),
            _WayBack(plan, send, receive, gathered, shared),
        )

    def send_to_all(
        self,
        x_TD: Tensor,
        experts_RK: Tensor,
        gates_RK: Tensor,
        *,
        rows: Split,
        keep_RK: Tensor | None = None,
    ) -> Arrived:
        """As `send` by gathering over `ep`, where every rank knows how all rows were routed.

        Args:
            x_TD: Rows of this rank, (T, D).
            experts_RK: Experts of the rows of all ranks, rank by rank, (R, K).
            gates_RK: Their weights, (R, K), whose gradients are to be summed over the ranks.
            rows: Which of them are which rank's.
            keep_RK: False where a copy was dropped; None when none was.
        """
        x_RD = collectives.gather(x_TD, rows, self.ep, dim=0, traffic=self.traffic)
        start, end = self.held
        is_here_RK = (experts_RK >= start) & (experts_RK < end)
        if keep_RK is not None:
            is_here_RK &= keep_RK
        return Arrived(x_RD, experts_RK - start, gates_RK, is_here_RK, _WayBack(gathered=rows))

    def bring_back(self, y_RD: Tensor, way: _WayBack) -> Tensor:
        """Add up what this rank's tokens got on all ranks, (T, D)."""
        y = y_RD
        if way.shared is not None:
            y = collectives.scatter_sum(y, way.shared, self.etp, dim=0, traffic=self.traffic)
        if way.gathered is not None:
            y = collectives.scatter_sum(y, way.gathered, self.ep, dim=0, traffic=self.traffic)
        if way.plan is not None:
            y = add_copies(self._exchange(y, way.receive, way.send), way.plan)
        return y

    def _departures(
        self, experts_TK: Tensor, gates_TK: Tensor, keep_TK: Tensor | None
    ) -> tuple[Dispatch, Tensor, Tensor]:
        """Sort rows by rank, and say with each what it is for."""
        if self._ends.device != experts_TK.device:
            self._ends = self._ends.to(experts_TK.device)
        # The first rank whose span ends beyond the expert; empty spans end before it.
        ranks_TK = torch.searchsorted(self._ends, experts_TK, right=True)
        if not self.deduplicate or experts_TK.shape[1] == 1:
            plan = plan_dispatch(ranks_TK, num_experts=self.ep.size, keep_TK=keep_TK)
            experts_N, gates_N = (
                of_TK.reshape(-1).index_select(0, plan.copies_N) for of_TK in (experts_TK, gates_TK)
            )
            return plan, experts_N[:, None], gates_N[:, None]
        # A copy stays behind if an earlier one of its token goes to the same rank.
        same_TKK = ranks_TK[:, :, None] == ranks_TK[:, None, :]
        if keep_TK is not None:
            same_TKK &= keep_TK[:, None, :]
        leaves_TK = ~same_TKK.tril(diagonal=-1).any(dim=-1)
        if keep_TK is not None:
            leaves_TK &= keep_TK
        plan = plan_dispatch(ranks_TK, num_experts=self.ep.size, keep_TK=leaves_TK)
        return plan, experts_TK[plan.tokens_N], gather(gates_TK, plan)

    def _exchanged_counts(self, counts_n: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        received_n = self.ep.exchange_counts(counts_n)
        self.traffic.routing += (self.ep.size - 1) * counts_n.element_size()
        # One list: each waits for the device.
        send, receive = torch.stack([counts_n, received_n]).tolist()
        return tuple(send), tuple(receive)

    def _exchange(
        self, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], *, is_payload: bool = True
    ) -> Tensor:
        return collectives.exchange(
            x, send, receive, self.ep, traffic=self.traffic, is_payload=is_payload
        )

    def _rows_of(self, group: Group, x: Tensor) -> Split:
        """Rows that each rank of the group has."""
        mine_n = torch.full((group.size,), x.shape[0], device=x.device)
        self.traffic.routing += (group.size - 1) * mine_n.element_size()
        return Split.from_counts(group.exchange_counts(mine_n).tolist())

    def _gather(
        self, group: Group, rows: Split, x: Tensor, experts: Tensor, gates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        others = rows.total - x.shape[0]
        x = collectives.gather(x, rows, group, dim=0, traffic=self.traffic)
        gates = collectives.gather(
            gates, rows, group, dim=0, traffic=self.traffic, is_payload=False
        )
        self.traffic.routing += others * experts.shape[1] * experts.element_size()
        return x, group.gather(experts, rows.sizes), gates
