"""Lay the copies of the tokens expert by expert, and bring the results back.

A token travels as K copies, one per chosen expert. Copies are sorted by expert, and within an
expert by token, so that every expert finds its rows side by side. `combine` undoes what
`gather` did and weighs each copy with its gate. Both are gathers in the forward *and* in the
backward pass: nothing is added through an index, so the order of sums never depends on
the machine.

Shapes.
    T tokens     D model width     K experts per token     E experts     N copies that are computed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Which copy stands in which row."""

    tokens_N: Tensor
    """The token of each row, int64."""

    copies_N: Tensor
    """The copy of each row, an index into the T * K copies in token order, int64."""

    rows_TK: Tensor
    """The row of each copy; 0 for a dropped one, int64."""

    keep_TK: Tensor | None
    """False where a copy was dropped; None when none was."""

    counts_E: Tensor
    """Rows of each expert, int64; they sum to N."""


def plan_dispatch(
    experts_TK: Tensor, *, num_experts: int, keep_TK: Tensor | None = None
) -> Dispatch:
    """Sort the kept copies by expert."""
    top_k = experts_TK.shape[1]
    experts_N = experts_TK.reshape(-1)
    if keep_TK is not None:
        # Dropped copies sort behind the last expert, and are cut off.
        experts_N = experts_N.where(keep_TK.reshape(-1), num_experts)
    copies_N = experts_N.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts_N.device)
    counts_E = counts.scatter_add_(0, experts_N, torch.ones_like(experts_N))[:num_experts]
    if keep_TK is not None:
        copies_N = copies_N[: int(counts_E.sum())]
    rows = torch.zeros_like(experts_N)
    rows[copies_N] = torch.arange(copies_N.numel(), device=rows.device)
    return Dispatch(
        tokens_N=copies_N // top_k,
        copies_N=copies_N,
        rows_TK=rows.view_as(experts_TK),
        keep_TK=keep_TK,
        counts_E=counts_E,
    )


def gather(x_TD: Tensor, plan: Dispatch) -> Tensor:
    """Copy each token to the rows of its experts, (T, D) -> (N, D)."""
    rows_ND: Tensor = _Gather.apply(x_TD, plan)  # type: ignore[no-untyped-call]
    return rows_ND


def combine(y_ND: Tensor, gates_TK: Tensor, plan: Dispatch) -> Tensor:
    """Sum each token's copies, weighted with its gates, (N, D) -> (T, D), in y_ND's dtype.

    The sum is done in the wider of the two dtypes. A dropped copy counts as zero.
    """
    y_TD: Tensor = _Combine.apply(y_ND, gates_TK, plan)  # type: ignore[no-untyped-call]
    return y_TD


def add_copies(y_ND: Tensor, plan: Dispatch) -> Tensor:
    """Sum each token's copies as they are, (N, D) -> (T, D), at least in float32."""
    y_TD: Tensor = _AddCopies.apply(y_ND, plan)  # type: ignore[no-untyped-call]
    return y_TD


def _sum_copies(
    rows_ND: Tensor, weights_TK: Tensor | None, plan: Dispatch, dtype: torch.dtype
) -> Tensor:
    """Weigh and add up in `dtype`; returned in that of the rows."""
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(plan.rows_TK.shape[0], rows_ND.shape[1])
    keep_TK = plan.keep_TK
    if keep_TK is not None:
        # A dropped copy weighs nothing; to mask its row would be another pass over all rows.
        weights_TK = keep_TK.to(dtype) if weights_TK is None else weights_TK.where(keep_TK, 0.0)
    total_TD: Tensor | None = None
    # One copy at a time: K is small, and a (T, K, D) tensor would be the largest one here.
    for k in range(plan.rows_TK.shape[1]):
        part_TD = rows_ND.index_select(0, plan.rows_TK[:, k]).to(dtype)
        if weights_TK is not None:
            part_TD.mul_(weights_TK[:, k, None])
        total_TD = part_TD if total_TD is None else total_TD.add_(part_TD)
    assert total_TD is not None, f"{plan.rows_TK.shape=}"
    return total_TD.to(rows_ND.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return x_TD.index_select(0, plan.tokens_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _sum_copies(grad_ND, None, ctx.plan, grad_ND.dtype), None


class _AddCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return _sum_copies(y_ND, None, plan, torch.promote_types(y_ND.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD.index_select(0, ctx.plan.tokens_N), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, gates_TK: Tensor, plan: Dispatch) -> Tensor:
        ctx.save_for_backward(y_ND, gates_TK)
        ctx.plan = plan
        dtype = torch.promote_types(y_ND.dtype, gates_TK.dtype)
        return _sum_copies(y_ND, gates_TK, plan, dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y_ND, gates_TK = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        dtype = torch.promote_types(y_ND.dtype, gates_TK.dtype)
        # Widened once: a product of two dtypes widens the narrow one anew, and takes longer.
        grad_ND = grad_TD.index_select(0, plan.tokens_N).to(dtype)
        grad_gates_TK = None
        if ctx.needs_input_grad[1]:
            dots_N = (grad_ND * y_ND.to(dtype)).sum(dim=-1)
            grad_gates = torch.zeros_like(gates_TK).view(-1)
            grad_gates[plan.copies_N] = dots_N.to(gates_TK.dtype)
            grad_gates_TK = grad_gates.view_as(gates_TK)
        grad_y_ND = None
        if ctx.needs_input_grad[0]:
            gates_N1 = gates_TK.reshape(-1)[plan.copies_N, None]
            grad_y_ND = grad_ND.mul_(gates_N1).to(y_ND.dtype)
        return grad_y_ND, grad_gates_TK, None
