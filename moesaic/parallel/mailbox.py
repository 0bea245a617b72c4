"""Tensors between ranks of one machine, through memory that they share.

gloo sends what ranks of one machine tell each other through the network stack, which takes longer
than some of the layers whose results it carries. Here each rank lays its parts into memory of its
own and the others read them from there. Nothing is left behind by a rank that is killed: the
memory has no name in any file system.

    n-th exchange   lay parts into slot n % 2, say n, wait until every rank has said n, read theirs

Two slots are enough: a rank says n + 1 only when it has read everything of n, and slot n % 2 is
written again only when everybody has said n + 1.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

_ALIGNMENT = 64
_PATIENT_AFTER = 0.002
"""Seconds of waiting after which a rank leaves the processor to others."""
_SUSPICIOUS_AFTER = 1.0
"""Seconds of waiting after which it looks whether the one it waits for lives."""


class Mailbox:
    """What ranks of a group lay out for each other. All of them make the same calls in order.

    Args:
        rank: This process's number in the group.
        boxes: The memory of each rank.
    """

    def __init__(self, rank: int, boxes: Sequence[_Box]) -> None:
        self.rank, self._boxes = rank, boxes
        self._number = 0

    @classmethod
    def open(cls, size: int, rank: int, process_group: dist.ProcessGroup) -> Self | None:
        """Share memory with the others; None where not all are of one machine that can.

        Every rank of the group must come here.
        """
        mine = _Box.make(size) if _orders_stores() else None
        address = None if mine is None else mine.address
        addresses: list[_Address | None] = [None] * size
        dist.all_gather_object(addresses, address, group=process_group)
        boxes = [
            mine if other == rank else _Box.of(found, size) for other, found in enumerate(addresses)
        ]
        opened = [box for box in boxes if box is not None]
        is_open: list[bool] = [False] * size
        dist.all_gather_object(is_open, len(opened) == size, group=process_group)
        return cls(rank, opened) if all(is_open) else None

    @torch.no_grad()
    def exchange(
        self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> list[Tensor]:
        """Give each rank its part, and get what each has for this one.

        Args:
            parts: For each rank; one tensor may stand there more than once.
            shapes: Of what each rank gives; the own one is not looked at.
            dtype: Of all of that.

        Returns:
            What each rank gave, this one's own part as it is. The others' lie in their memory
            until the next call: copy them.
        """
        self._number += 1
        self._boxes[self.rank].lay(parts, self.rank, self._number)
        found = []
        for rank, (box, shape) in enumerate(zip(self._boxes, shapes, strict=True)):
            if rank == self.rank:
                found.append(parts[rank])
                continue
            box.wait_for(self._number)
            found.append(box.look(self.rank, self._number, shape, dtype))
        return found


class _Address(NamedTuple):
    """Where a rank's memory is found by other processes."""

    process: int
    descriptor: int
    token: int
    """Stands at its beginning: process numbers mean something else in another container."""


class _Box:
    """Memory of one rank: a table of int64, then what it lays out.

    The table has the token, the number of the last exchange, and for each slot and rank where
    its part begins and how many bytes it has.
    """

    def __init__(self, descriptor: int, size: int, process: int) -> None:
        self._descriptor, self._size, self.process = descriptor, size, process
        self._begin = _aligned(8 * (2 + 4 * size))
        self._map()
        self._slots = [(self._begin, 0), (self._begin, 0)]
        self._end = self._begin

    @classmethod
    def make(cls, size: int) -> Self | None:
        """New memory of this process; None if the system has none to give."""
        try:
            descriptor = os.memfd_create("moesaic")
            os.ftruncate(descriptor, _aligned(8 * (2 + 4 * size)))
            box = cls(descriptor, size, os.getpid())
        except OSError:
            return None
        box._table[0] = secrets.randbits(62)
        return box

    @classmethod
    def of(cls, address: _Address | None, size: int) -> Self | None:
        """Memory of another process; None if this one does not reach it."""
        if address is None:
            return None
        path = Path("/proc", str(address.process), "fd", str(address.descriptor))
        try:
            descriptor = os.open(path, os.O_RDWR)
            box = cls(descriptor, size, address.process)
        except (OSError, ValueError):
            return None
        return box if box._table[0] == address.token else None

    @property
    def address(self) -> _Address:
        """For other processes."""
        return _Address(self.process, self._descriptor, self._table[0])

    def lay(self, parts: Sequence[Tensor], own: int, number: int) -> None:
        """Lay out a part for each rank but the own one, then say so."""
        distinct = {id(part): part for rank, part in enumerate(parts) if rank != own}
        needed = sum(_aligned(part.numel() * part.element_size()) for part in distinct.values())
        slot = number % 2
        if needed > self._slots[slot][1]:
            self._grow(slot, needed)
        place = self._slots[slot][0]
        places = {}
        for name, part in distinct.items():
            places[name] = place
            if part.numel():
                self._at(place, part.shape, part.dtype).copy_(part)
            place += _aligned(part.numel() * part.element_size())
        for rank, part in enumerate(parts):
            if rank != own:
                entry = self._entry(slot, rank)
                self._table[entry] = places[id(part)]
                self._table[entry + 1] = part.numel() * part.element_size()
        # Last: whoever sees the number sees what was stored before it.
        self._table[1] = number

    def wait_for(self, number: int) -> None:
        """Return once the rank has said `number`.

        Raises:
            RuntimeError: Its process is gone.
        """
        for _ in range(100):
            if self._table[1] >= number:
                return
        start = looked = time.monotonic()
        while self._table[1] < number:
            now = time.monotonic()
            if now - start < _PATIENT_AFTER:
                os.sched_yield()
                continue
            time.sleep(0.0001)
            if now - looked > _SUSPICIOUS_AFTER:
                looked = now
                if not _lives(self.process) and self._table[1] < number:
                    # The watch takes what speaks of a connection for another rank's end.
                    raise RuntimeError(f"The connection to process {self.process} is lost.")

    def look(self, rank: int, number: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What lies here for `rank`."""
        entry = self._entry(number % 2, rank)
        place, count = self._table[entry], self._table[entry + 1]
        expected = torch.Size(shape).numel() * dtype.itemsize
        assert count == expected, f"{shape=}, {dtype=}, {count=}"
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if place + count > len(self._memory):
            self._map()
        return self._at(place, shape, dtype)

    def _entry(self, slot: int, rank: int) -> int:
        return 2 + 2 * (slot * self._size + rank)

    def _at(self, place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=place).view(shape)

    def _grow(self, slot: int, needed: int) -> None:
        """Give a slot more room, at the end; what others still read stays where it is."""
        room = _aligned(needed + needed // 4)
        self._slots[slot] = (self._end, room)
        self._end += room
        os.ftruncate(self._descriptor, self._end)
        self._map()

    def _map(self) -> None:
        # Tensors that look into an earlier map keep it.
        self._memory = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        self._table = memoryview(self._memory)[: self._begin].cast("q")


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _orders_stores() -> bool:
    """Whether a store is seen by other processors only after those before it."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def _lives(process: int) -> bool:
    """Whether a process runs; one that has ended may still have its number."""
    try:
        status = Path("/proc", str(process), "stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")
