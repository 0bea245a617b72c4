"""Collectives that gradients pass through: the few that tensor and expert parallelism need.

    name          forward                      backward
    gather        all parts side by side       sum over ranks, own part
    scatter_sum   sum over ranks, own part     all parts side by side
    gather_same   all parts side by side       own part of the gradient
    exchange      rows to other ranks          rows back

`gather_same` is for what every rank of the group then computes alike, where a sum would count it
once a rank. Each is the identity in a group of one.

Shapes.  A lower-case letter is this rank's part of what its capital counts.
    B sequences     S positions     T = B * S tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.parallel.group import Group
from moesaic.planning.split import Split


@dataclass
class Traffic:
    """Bytes that this rank received from others; of a sum, what each of them adds to its part."""

    payload: int = 0
    """Activations and their gradients."""

    routing: int = 0
    """Counts, expert numbers and gates, and gradients of gates."""


def own_part(x: Tensor, split: Split, group: Group, *, dim: int) -> Tensor:
    """This rank's span of `x`; nothing is sent."""
    start, end = split.spans[group.rank]
    return x if group.size == 1 else x.narrow(dim, start, end - start)


def gather(
    x: Tensor,
    split: Split,
    group: Group,
    *,
    dim: int,
    traffic: Traffic | None = None,
    is_payload: bool = True,
) -> Tensor:
    """Join the parts of all ranks along `dim`; gradients are added up over the ranks."""
    if group.size == 1:
        return x
    joined: Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
        x, split.sizes, group, dim, traffic, is_payload
    )
    return joined


def scatter_sum(
    x: Tensor, split: Split, group: Group, *, dim: int, traffic: Traffic | None = None
) -> Tensor:
    """Add `x` over the ranks, and keep this rank's span of `dim`."""
    if group.size == 1:
        return x
    part: Tensor = _ScatterSum.apply(x, split.sizes, group, dim, traffic)  # type: ignore[no-untyped-call]
    return part


def gather_same(x: Tensor, split: Split, group: Group, *, dim: int) -> Tensor:
    """Join the parts of all ranks, for what every rank then computes alike."""
    if group.size == 1:
        return x
    joined: Tensor = _GatherSame.apply(x, split, group, dim)  # type: ignore[no-untyped-call]
    return joined


def own_tokens(x_TE: Tensor, sequences: int, positions: Split, group: Group) -> Tensor:
    """Rows of the tokens at this rank's positions, (B * S, ...) -> (B * s, ...)."""
    if group.size == 1:
        return x_TE
    return own_part(x_TE.unflatten(0, (sequences, -1)), positions, group, dim=1).flatten(0, 1)


def gather_tokens(
    x_tE: Tensor, sequences: int, positions: Split, group: Group, *, same: bool
) -> Tensor:
    """`gather` of such rows, or `gather_same`, (B * s, ...) -> (B * S, ...)."""
    if group.size == 1:
        return x_tE
    shape = (sequences, positions.sizes[group.rank])  # not -1: a rank may have no position
    join = gather_same if same else gather
    return join(x_tE.unflatten(0, shape), positions, group, dim=1).flatten(0, 1)


def rank_by_rank(x_TE: Tensor, sequences: int, positions: Split) -> Tensor:
    """The rows of all tokens, those at the positions of a rank together, (B * S, ...)."""
    parts = x_TE.unflatten(0, (sequences, -1)).split(positions.sizes, dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])


def exchange(
    x_N: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: Group,
    *,
    traffic: Traffic | None = None,
    is_payload: bool = True,
) -> Tensor:
    """Rows to other ranks, as `Group.exchange`; the gradient's rows go back."""
    if group.size == 1:
        return x_N
    rows: Tensor = _Exchange.apply(  # type: ignore[no-untyped-call]
        x_N, tuple(send), tuple(receive), group, traffic, is_payload
    )
    return rows


def _count(
    traffic: Traffic | None, x: Tensor, dim: int, positions: int, *, is_payload: bool = True
) -> None:
    """Count that many positions of `dim` as received."""
    if traffic is None:
        return
    count = positions * math.prod(x.shape[:dim] + x.shape[dim + 1 :]) * x.element_size()
    if is_payload:
        traffic.payload += count
    else:
        traffic.routing += count


def _others(sizes: Sequence[int], group: Group) -> int:
    """Positions that other ranks have."""
    return sum(sizes) - sizes[group.rank]


def _addends(sizes: Sequence[int], group: Group) -> int:
    """Positions of this rank, once for each other rank that adds to them."""
    return (group.size - 1) * sizes[group.rank]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sizes: tuple[int, ...],
        group: Group,
        dim: int,
        traffic: Traffic | None,
        is_payload: bool,
    ) -> Tensor:
        ctx.rest = sizes, group, dim, traffic, is_payload
        _count(traffic, x, dim, _others(sizes, group), is_payload=is_payload)
        return group.gather(x, sizes, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes, group, dim, traffic, is_payload = ctx.rest
        _count(traffic, grad, dim, _addends(sizes, group), is_payload=is_payload)
        return group.scatter_sum(grad, sizes, dim=dim), None, None, None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: tuple[int, ...], group: Group, dim: int, traffic: Traffic | None
    ) -> Tensor:
        ctx.rest = sizes, group, dim, traffic
        _count(traffic, x, dim, _addends(sizes, group))
        return group.scatter_sum(x, sizes, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes, group, dim, traffic = ctx.rest
        _count(traffic, grad, dim, _others(sizes, group))
        return group.gather(grad, sizes, dim=dim), None, None, None, None


class _GatherSame(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split, group: Group, dim: int) -> Tensor:
        ctx.rest = split, group, dim
        return group.gather(x, split.sizes, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split, group, dim = ctx.rest
        return own_part(grad, split, group, dim=dim), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_N: Tensor,
        send: tuple[int, ...],
        receive: tuple[int, ...],
        group: Group,
        traffic: Traffic | None,
        is_payload: bool,
    ) -> Tensor:
        ctx.rest = send, receive, group, traffic, is_payload
        _count(traffic, x_N, 0, _others(receive, group), is_payload=is_payload)
        return group.exchange(x_N, send, receive)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        send, receive, group, traffic, is_payload = ctx.rest
        _count(traffic, grad_N, 0, _others(send, group), is_payload=is_payload)
        return group.exchange(grad_N, receive, send), None, None, None, None, None
