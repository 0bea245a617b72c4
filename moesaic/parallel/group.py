"""Ranks that work together on something, and what they can do together, outside of autograd.

Every rank of a group makes the same calls in the same order. A group of one returns what it was
given and issues no collective.

Shapes.  n ranks of the group     r this rank's part of what R counts in all
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.mailbox import Mailbox

_LARGE_SUM = 2**18
"""Bytes beyond which a sum is shared out among more than two ranks. Ours."""

_TELL_NUMBERS = 512
"""Integers that are told in one go; a decoding step of some twenty answers has fewer."""


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

    @classmethod
    def of_all(cls, device: torch.device | str = "cpu") -> Self:
        """All ranks of torch's process group; this process alone where there is none.

        Every rank must come here. On a CPU they share memory if they are of one machine.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        size, rank, world = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
        assert world is not None, "no process group, though torch.distributed is initialised"
        on_cpu = torch.device(device).type == "cpu"
        return cls(size, rank, world, Mailbox.open(size, rank, world) if on_cpu else None)

    def sum_(self, x: Tensor) -> Tensor:
        """Add `x` over the group, in place: the same result on every rank, bit for bit.

        Ranks that share memory add up in the order of ranks, at least in float32.
        """
        # Alone there is not even a context to enter: a decoding step comes here sixty times.
        return x if self.size == 1 else self._sum(x)

    @torch.no_grad()
    def _sum(self, x: Tensor) -> Tensor:
        if self._mailbox is None:
            dist.all_reduce(x, group=self.process_group)
            return x
        if self.size > 2 and x.nbytes > _LARGE_SUM and x.is_contiguous():
            # Each adds up a part: then nobody reads more than twice what there is.
            flat = x.view(-1)
            even = [len(part) for part in flat.tensor_split(self.size)]
            flat.copy_(self.gather(self.scatter_sum(flat, even), even))
            return x
        parts = self._mailbox.exchange([x] * self.size, [x.shape] * self.size, x.dtype)
        if self.size == 2:
            return torch.add(parts[0], parts[1], out=x)
        wide = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else x.dtype
        total = parts[0].to(wide, copy=True)
        for part in parts[1:]:
            total += part
        return x.copy_(total)

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

    def gather_on_first(self, x_r: Tensor, sizes: Sequence[int], *, dim: int = 0) -> Tensor | None:
        """As `gather`, on rank 0; None on the others."""
        if self.size == 1:
            return x_r
        if self._mailbox is None:
            joined = self.gather(x_r, sizes, dim=dim)
            return joined if self.rank == 0 else None
        nothing = x_r.new_empty(0)
        shapes = [_resized(x_r, dim, size) if self.rank == 0 else [0] for size in sizes]
        mine = [x_r, *[nothing] * (self.size - 1)]
        parts = self._mailbox.exchange(mine, shapes, x_r.dtype)
        return torch.cat(parts, dim) if self.rank == 0 else None

    def tell(self, numbers: Sequence[int] | None) -> list[int]:
        """What rank 0 says, on every rank: any number of integers. The others give None."""
        if self.size == 1:
            assert numbers is not None, "rank 0 has something to say"
            return list(numbers)
        head = torch.zeros(_TELL_NUMBERS, dtype=torch.int64)
        if numbers is not None:
            said = torch.tensor(numbers, dtype=torch.int64)
            head[0] = len(said)
            head[1 : 1 + len(said)] = said[: _TELL_NUMBERS - 1]
        head = self._from_first(head)
        count = int(head[0])
        found = head[1 : 1 + count].tolist()
        if count > len(found):
            rest = torch.zeros(count - len(found), dtype=torch.int64)
            if numbers is not None:
                rest.copy_(said[len(found) :])
            found += self._from_first(rest).tolist()
        return found

    def _from_first(self, x: Tensor) -> Tensor:
        """What rank 0 has in a tensor that is of one shape everywhere, on the CPU."""
        if self._mailbox is None:
            device = "cpu" if dist.get_backend(self.process_group) == "gloo" else None
            moved = x if device == "cpu" else x.cuda()
            dist.broadcast(moved, 0, group=self.process_group)
            return moved.cpu()
        nothing = x.new_empty(0)
        mine = [x if self.rank == 0 else nothing] * self.size
        shapes = [x.shape if rank == 0 else (0,) for rank in range(self.size)]
        return self._mailbox.exchange(mine, shapes, x.dtype)[0]

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

    def pass_on(self, x: Tensor, *, distance: int = 1) -> bool:
        """Send `x` so many ranks further, as stages do, or receive into it from there.

        The first `distance` ranks send, the next as many receive, and so on; one whose partner
        would be beyond the last rank does nothing.

        Returns:
            Whether this rank sent or received.
        """
        sends = self.rank // distance % 2 == 0
        partner = self.rank + (distance if sends else -distance)
        if partner >= self.size:
            return False
        assert self.process_group is not None, f"{self.size=}"
        there = dist.get_global_rank(self.process_group, partner)
        action = dist.P2POp(dist.isend if sends else dist.irecv, x, there, self.process_group)
        for work in dist.batch_isend_irecv([action]):
            work.wait()
        return True

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
