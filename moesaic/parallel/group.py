"""Ranks that work together on something, and what they can do together, outside of autograd.

Every rank of a group makes the same calls in the same order. A group of one returns what it was
given and issues no collective.

Shapes.  n ranks of the group     r this rank's part of what R counts in all
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.mailbox import Mailbox


class Group:
    """Some ranks, this process among them.

    Args:
        size: Ranks in the group.
        rank: This process's number in it, from 0.
        process_group: torch's; None for a group of one.
        mailbox: Where ranks of one machine exchange what lies in its memory; None: they use the
            process group for that too.
    """

    def __init__(
        self,
        size: int = 1,
        rank: int = 0,
        process_group: dist.ProcessGroup | None = None,
        mailbox: Mailbox | None = None,
    ) -> None:
        assert (size == 1) or process_group is not None, f"{size=}"
        self.size, self.rank = size, rank
        self.process_group = process_group
        self._mailbox = mailbox

    def sum_(self, x: Tensor) -> Tensor:
        """Add `x` over the group, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.process_group)
        return x

    def gather(self, x_r: Tensor, sizes: Sequence[int], *, dim: int = 0) -> Tensor:
        """All ranks' parts side by side along `dim`.

        Args:
            x_r: This rank's part, sizes[rank] long.
            sizes: Length of each rank's part.
            dim: What is cut; the other dimensions are alike on every rank.
        """
        if self.size == 1:
            return x_r
        shapes = [_resized(x_r, dim, size) for size in sizes]
        if self._mailbox is not None:
            return torch.cat(self._mailbox.exchange([x_r] * self.size, shapes, x_r.dtype), dim)
        counts = [math.prod(shape) for shape in shapes]
        mine = x_r.contiguous().view(-1)
        joined = mine.new_empty(sum(counts))
        if min(sizes) == max(sizes):
            _all_gather(joined, mine, group=self.process_group)
        else:
            # gloo has no uneven gather, and NCCL's is a row of broadcasts.
            send = [mine.numel()] * self.size
            dist.all_to_all_single(
                joined, mine.repeat(self.size), counts, send, group=self.process_group
            )
        if math.prod(x_r.shape[:dim]) == 1:  # one after the other is side by side
            return joined.view(_resized(x_r, dim, sum(sizes)))
        parts = zip(joined.split(counts), shapes, strict=True)
        return torch.cat([part.view(shape) for part, shape in parts], dim)

    def gather_into(self, out: Tensor, x: Tensor) -> None:
        """All ranks' parts, of equal length, one after the other. `x` may lie in its place."""
        if self._mailbox is None:
            _all_gather(out, x, group=self.process_group)
            return
        parts = self._mailbox.exchange([x] * self.size, [x.shape] * self.size, x.dtype)
        for place, part in zip(out.split(x.shape[0]), parts, strict=True):
            if place.data_ptr() != part.data_ptr():
                place.copy_(part)

    def scatter_sum(self, x_R: Tensor, sizes: Sequence[int], *, dim: int = 0) -> Tensor:
        """Add `x_R` over the group, and keep this rank's part of `dim`.

        Every rank sends each part to the rank that keeps it, which adds up what it gets in the
        order of ranks, at least in float32.
        """
        if self.size == 1:
            return x_R
        # Not reduce_scatter: gloo's is an all-reduce, which moves twice as much and rounds
        # bfloat16 at every step, and neither backend's takes parts of unequal length.
        shapes = [_resized(x_R, dim, size) for size in sizes]
        if self._mailbox is not None:
            mine = [shapes[self.rank]] * self.size
            parts = self._mailbox.exchange(x_R.split(list(sizes), dim), mine, x_R.dtype)
            if self.size == 2:
                return parts[0] + parts[1]
            return torch.stack(parts).sum(dim=0, dtype=x_R.dtype)
        counts = [math.prod(shape) for shape in shapes]
        received = x_R.new_empty(self.size, *shapes[self.rank])
        dist.all_to_all_single(
            received.view(-1),
            _part_by_part(x_R, sizes, dim),
            [counts[self.rank]] * self.size,
            counts,
            group=self.process_group,
        )
        if self.size == 2:  # the same, but for bfloat16 in a seventh of the time
            return received[0] + received[1]
        return received.sum(dim=0, dtype=x_R.dtype)

    def exchange(self, x_N: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send the first `send[0]` rows to rank 0, the next `send[1]` to rank 1, and so on.

        Args:
            x_N: (sum of send, ...).
            send: Rows for each rank.
            receive: Rows from each rank, as `exchange_counts` found them.

        Returns:
            Rows from rank 0, then from rank 1, and so on, (sum of receive, ...).
        """
        if self.size == 1:
            return x_N
        if self._mailbox is not None:
            shapes = [(count, *x_N.shape[1:]) for count in receive]
            return torch.cat(self._mailbox.exchange(x_N.split(list(send)), shapes, x_N.dtype))
        received = x_N.new_empty(sum(receive), *x_N.shape[1:])
        dist.all_to_all_single(
            received, x_N.contiguous(), list(receive), list(send), group=self.process_group
        )
        return received

    def exchange_counts(self, counts_n: Tensor) -> Tensor:
        """What each rank has for this one, given what this one has for each rank, (n,) int64."""
        if self.size == 1:
            return counts_n
        if self._mailbox is not None:
            parts = counts_n.split(1)
            return torch.cat(self._mailbox.exchange(parts, [(1,)] * self.size, counts_n.dtype))
        received = torch.empty_like(counts_n)
        dist.all_to_all_single(received, counts_n.contiguous(), group=self.process_group)
        return received

    def objects(self, mine: Any) -> list[Any]:
        """What every rank gave, in the order of ranks. For small things; they are pickled."""
        if self.size == 1:
            return [mine]
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, mine, group=self.process_group)
        return everything

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        if self.size > 1:
            dist.barrier(group=self.process_group)


# Its name since torch 2.13, which warns of the older one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

ALONE = Group()
"""This process and no other."""


@dataclass(frozen=True)
class Groups:
    """Those that a layer works with."""

    tp: Group = ALONE
    """Ranks that share heads, columns, vocabulary and positions."""

    ep: Group = ALONE
    """Ranks that share one set of experts: `tp` itself where experts lie over it (EDP)."""

    etp: Group = ALONE
    """Ranks that share the columns of the same experts."""


def _resized(x: Tensor, dim: int, size: int) -> list[int]:
    """The shape of `x`, but `size` long in `dim`."""
    return [*x.shape[:dim], size, *x.shape[dim + 1 :]]


def _part_by_part(x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """The elements of `x`, those of each part of `dim` together."""
    if math.prod(x.shape[:dim]) == 1:
        return x.contiguous().view(-1)
    flat = x.new_empty(x.numel())
    parts = x.split(list(sizes), dim)
    places = flat.split([part.numel() for part in parts])
    for part, place in zip(parts, places, strict=True):
        place.view(part.shape).copy_(part)
    return flat
