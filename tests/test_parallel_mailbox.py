"""What ranks of one machine lay out for each other, and what happens when one of them is gone."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moesaic.parallel import mailbox
from moesaic.parallel.mailbox import Mailbox
from tests.ranks import run_ranks


def opened() -> Mailbox:
    found = Mailbox.open(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    assert found is not None
    return found


def value(sender: int, receiver: int, number: int) -> int:
    return 10_000 * number + 100 * sender + receiver


def check_many_exchanges() -> None:
    """Parts of all sizes, from nothing to more than lay there before."""
    size, rank, box = dist.get_world_size(), dist.get_rank(), opened()
    dtypes = [torch.int64, torch.float64, torch.float32]
    alike = random.Random(5)
    for number in range(300):
        dtype = alike.choice(dtypes)
        longest = alike.choice([1, 5, 5000])
        rows = [[alike.randrange(longest) for _ in range(size)] for _ in range(size)]
        if alike.random() < 0.2:  # one for all
            rows = [[row[0]] * size for row in rows]
            parts = [torch.full((rows[rank][0], 2), value(rank, 0, number), dtype=dtype)] * size
        else:
            parts = [
                torch.full((rows[rank][to], 2), value(rank, to, number), dtype=dtype)
                for to in range(size)
            ]
        got = box.exchange(parts, [(row[rank], 2) for row in rows], dtype)
        if alike.random() < 0.1 and rank == number % size:
            torch.ones(2_000_000).sum()  # one of them is late
        for sender, part in enumerate(got):
            to = 0 if parts[0] is parts[-1] and size > 1 else rank
            assert part.shape == (rows[sender][rank], 2)
            assert bool((part == value(sender, to, number)).all()), f"{number=}, {sender=}"


@pytest.mark.parametrize("size", [2, 3, 5])
def test_each_rank_gets_what_was_laid_for_it(size):
    run_ranks(size, check_many_exchanges)


def check_parts_of_any_layout() -> None:
    rank, box = dist.get_rank(), opened()
    whole = torch.arange(24, dtype=torch.bfloat16).view(4, 6) + rank
    got = box.exchange(whole.split([2, 4], dim=1), [(4, [2, 4][rank])] * 2, torch.bfloat16)
    other = torch.arange(24, dtype=torch.bfloat16).view(4, 6) + 1 - rank
    assert torch.equal(got[1 - rank], other.split([2, 4], dim=1)[rank])


def test_a_part_may_be_a_slice():
    run_ranks(2, check_parts_of_any_layout)


def test_a_rank_that_is_gone_is_not_waited_for():
    with subprocess.Popen(["sleep", "60"]) as process:
        box = mailbox._Box.make(2)
        box.process = process.pid
        with mock.patch.object(mailbox, "_SUSPICIOUS_AFTER", 0.05):
            waiting = threading.Thread(target=box.wait_for, args=(1,))
            waiting.start()
            waiting.join(0.3)
            assert waiting.is_alive()  # it is slow, but lives
            box.lay([torch.zeros(1)] * 2, own=0, number=1)
            waiting.join(10)
            assert not waiting.is_alive()
            process.kill()
            with pytest.raises(RuntimeError, match=r"connection to process \d+ is lost"):
                box.wait_for(2)


def check_without_memory() -> None:
    """One rank that cannot share its memory is enough."""
    failing = mock.patch.object(os, "memfd_create", side_effect=OSError)
    if dist.get_rank() == 1:
        with failing:
            found = Mailbox.open(2, 1, dist.group.WORLD)
    else:
        found = Mailbox.open(2, 0, dist.group.WORLD)
    assert found is None


def check_another_container() -> None:
    """Process numbers that mean another process there."""
    real = mailbox._Box.address.fget
    with mock.patch.object(
        mailbox._Box, "address", property(lambda box: real(box)._replace(token=7))
    ):
        assert Mailbox.open(2, dist.get_rank(), dist.group.WORLD) is None


@pytest.mark.parametrize("check", [check_without_memory, check_another_container])
def test_ranks_that_do_not_reach_each_others_memory_do_without(check):
    run_ranks(2, check)
