"""Run a check on several ranks: processes of one world, forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

LIMIT_SECONDS = 120.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.ranks_preload"])


def run_ranks(size: int, check: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `check(*args)` on every rank of a new world, and return what each gave.

    Args:
        size: Ranks.
        check: A function of a test module; it may use torch.distributed at once, on gloo.
        args: What it is called with; pickled.

    Raises:
        AssertionError: A rank failed, with its traceback; or did not come to an end.
    """
    results: Any = _context.Queue()
    port = _free_port()
    ranks = [
        _context.Process(target=_rank, args=(rank, size, port, results, check, args), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    found: dict[int, tuple[bool, Any]] = {}
    end = time.monotonic() + LIMIT_SECONDS
    try:
        while len(found) < size and all(is_good for is_good, _ in found.values()):
            try:
                rank, is_good, value = results.get(timeout=0.5)
                found[rank] = (is_good, value)
            except queue.Empty:
                dead = [r for r, p in enumerate(ranks) if r not in found and p.exitcode]
                assert not dead, f"ranks {dead} died without a word"
                assert time.monotonic() < end, f"only ranks {sorted(found)} came to an end"
        # What fails first is seldom the one that others only waited for in vain: wait a little.
        for rank, (is_good, value) in sorted(found.items()):
            assert is_good, f"rank {rank} of {size}:\n{value}"
    finally:
        for process in ranks:
            process.join(timeout=5 if len(found) == size else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
    return [found[rank][1] for rank in range(size)]


def _rank(
    rank: int, size: int, port: int, results: Any, check: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        value = check(*args)
        dist.barrier()
        results.put((rank, True, value))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        # Peers may wait for a rank that failed; nothing is gained by an orderly end.
        os._exit(0)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
