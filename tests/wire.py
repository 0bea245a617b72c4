"""What this rank gets from others, read off the calls that bring it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.mailbox import Mailbox


@contextlib.contextmanager
def received_bytes() -> Iterator[list[int]]:
    """Collect the bytes that each collective brings from other ranks, call by call."""
    found: list[int] = []
    all_to_all, all_gather = dist.all_to_all_single, dist.all_gather_single

    def watched_all_to_all(
        output: Any, given: Any, receive: Any = None, send: Any = None, group: Any = None
    ) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        rows = [output.shape[0] // size] * size if receive is None else receive
        row_bytes = output[:1].nbytes if output.shape[0] else 0
        found.append((sum(rows) - rows[rank]) * row_bytes)
        all_to_all(output, given, receive, send, group=group)

    def watched_all_gather(output: Any, given: Any, group: Any = None) -> None:
        found.append(output.nbytes - given.nbytes)
        all_gather(output, given, group=group)

    exchange = Mailbox.exchange

    def watched_exchange(
        self: Mailbox, parts: Sequence[Tensor], shapes: Any, dtype: torch.dtype
    ) -> list[Tensor]:
        got = exchange(self, parts, shapes, dtype)
        found.append(sum(part.nbytes for part in got) - parts[self.rank].nbytes)
        return got

    with (
        mock.patch.object(Mailbox, "exchange", watched_exchange),
        mock.patch.object(dist, "all_to_all_single", watched_all_to_all),
        mock.patch.object(dist, "all_gather_single", watched_all_gather),
    ):
        yield found
