"""Take this process's place among the ranks of a run, and leave it in good order.

    with joined(lambda: Needs(plan.world_size), config=config.launch) as watch:
        watch.keep_log(run.path / "logs")
        watch.describe("stage 1")
        ...
        watch.progress(step, "the next step")

Whoever starts the ranks, `moesaic.parallel.launch` or torchrun, may start them again over one
store. What an earlier start wrote there is addresses of dead processes, so each start of all
ranks has a number, and its own part of the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from moesaic.errors import ConfigError, FolderError, PlanError, TrainingError
from moesaic.parallel.config import LaunchConfig
from moesaic.parallel.launch import Member, environment_world
from moesaic.parallel.watch import RESTART_STATUS, Watch

MARGIN_SECONDS = 60
"""Collectives time out so much later than the watch does, which can say who is to blame."""


class Needs(NamedTuple):
    """What a run needs."""

    size: int
    """Ranks."""
    device: str = "cpu"
    """`cpu` for gloo; `cuda` for NCCL too, on the GPU of each rank's local number."""


@contextmanager
def joined(needs: Callable[[], Needs], *, config: LaunchConfig | None = None) -> Iterator[Watch]:
    """Be one of the ranks that were started, with torch's process group, until the block ends.

    A rank alone is given a watch that watches nothing, and torch.distributed is not touched. A
    process group that is there already is used and left as it is.

    From here to the end of its process, what a rank prints goes to its log; rank 0's also goes
    where it went before. Nothing else is printed by more than one rank: an error is said by the
    first that meets it and by the others only in their logs, and all end with its status.

    Args:
        needs: Called once the ranks have met, so that what it raises is said once.
        config: How long to wait for others.

    Raises:
        PlanError: Another number of ranks was started.
        ConfigError: The environment says only half of who this rank is; or it has no GPU.
        TrainingError: Other ranks did not come.
        SystemExit: Another rank met an error, and says so.
    """
    config = config or LaunchConfig()
    member = environment_world() or Member(0, 1, 0)
    if member.size == 1 or dist.is_initialized():
        _check_size(needs().size, member)
        yield Watch(member.rank, member.size)
        return
    log = RankLog(member.rank)
    store, number = _meet(member, config, log)
    part = f"moesaic/{number}"
    watch = Watch(
        member.rank,
        member.size,
        # A connection of its own: one that another thread waits in is blocked.
        store=PrefixStore(part, _connect(member, config, log)),
        config=config,
        log=log,
        store_is_of_rank_0=not _has_agent_store(),
    )
    watch.start()
    try:
        size, device = needs()
        _check_size(size, member)
        if device == "cuda":
            _take_gpu(member)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=PrefixStore(part, store),
            rank=member.rank,
            world_size=size,
            timeout=timedelta(seconds=config.wait_seconds + MARGIN_SECONDS),
        )
        yield watch
        watch.leave()
    except BaseException as error:
        watch.fail(error)
        raise
    dist.destroy_process_group()


class RankLog:
    """What a rank prints. Kept aside until it is known which folder it belongs to.

    Ranks but the first print nowhere else, C++ libraries included. The first prints where it did
    before, and its log has what Python prints, without a progress bar's redrawing.
    """

    def __init__(self, rank: int) -> None:
        self.path: Path | None = None
        self._rank = rank
        self._terminal = os.dup(2)
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        if rank == 0:
            sys.stderr = cast(TextIO, _Both(sys.stderr, self))
        else:
            self._redirect()

    def keep(self, folder: Path, title: str) -> None:
        """Add to `folder`/rank-N.log from here on, below a line that says which start this is.

        Raises:
            FolderError: The log cannot be written.
        """
        path = folder / f"rank-{self._rank}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"-- {now}, {title}, process {os.getpid()}\n".encode())
            self._file.seek(0)
            shutil.copyfileobj(self._file, file)
        except OSError as error:
            raise FolderError(f"{path} cannot be written: {error.strerror or error}.") from error
        before, self._file, self.path = self._file, file, path
        if self._rank > 0:
            self._redirect()
        before.close()

    def say(self, line: str) -> None:
        """Write one line for the person at the terminal, and not into the log."""
        text = f"moesaic: {' '.join(line.split())}\n"
        # Over the progress bar, if there is one.
        text = f"\r\x1b[K{text}" if os.isatty(self._terminal) else text
        with contextlib.suppress(OSError):
            os.write(self._terminal, text.encode())

    def write(self, text: str) -> None:
        """Write into the log. That a disk is full is told by what the run needs to write."""
        with contextlib.suppress(OSError):
            self._file.write(text.encode(errors="replace"))

    def _redirect(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor in (1, 2):
            os.dup2(self._file.fileno(), descriptor)


class _Both:
    """A stream whose text goes into a log too."""

    def __init__(self, stream: TextIO, log: RankLog) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        plain = _COLOUR.sub("", text)
        if "\x1b" not in plain:  # else it moves the cursor
            self._log.write(plain)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def _check_size(size: int, member: Member) -> None:
    if member.size == size:
        return
    if member.size == 1:
        raise PlanError(
            f"The plan is for {size} ranks, but this process is alone. `moesaic train` and "
            f"`moesaic serve` start them; torchrun needs --nproc-per-node {size}."
        )
    raise PlanError(
        f"The plan is for {size} rank{'s' if size > 1 else ''}, but {member.size} were started. "
        f"Start {size}, or take another plan."
    )


def _take_gpu(member: Member) -> None:
    count = torch.cuda.device_count()
    if member.local_rank >= count:
        raise ConfigError(
            f"Rank {member.rank} needs GPU {member.local_rank}, but this machine has {count}. "
            f"Start fewer ranks on it, or use device cpu."
        )
    torch.cuda.set_device(member.local_rank)


def _has_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(member: Member, config: LaunchConfig, log: RankLog, *, again: bool = True) -> Any:
    """A connection to the store that all ranks share; rank 0 makes it where no agent did."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise ConfigError(
            "RANK and WORLD_SIZE are set, but MASTER_ADDR and MASTER_PORT are not. "
            "Start the ranks with torchrun, or with `moesaic train` and nothing of these set."
        ) from None
    makes_it = member.rank == 0 and not again and not _has_agent_store()
    try:
        return TCPStore(
            host,
            port,
            is_master=makes_it,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=config.wait_seconds),
        )
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        if member.rank == 0 or member.local_rank == 0:
            log.say(f"Rank {member.rank} cannot use the store at {host}:{port}: {first_line}")
        raise SystemExit(RESTART_STATUS) from error


def _meet(member: Member, config: LaunchConfig, log: RankLog) -> tuple[Any, int]:
    """Wait for all ranks, and agree with them on the number of this start.

    TORCHELASTIC_RESTART_COUNT is no such number: over several machines an agent whose own ranks
    were well does not count, and ranks of one start have different ones. And no rank can tell by
    itself whether what it finds in the store is of this start. So each asks rank 0 with a token
    that nobody used before.
    """
    store = _connect(member, config, log, again=False)
    end = time.monotonic() + config.wait_seconds
    if member.rank == 0:
        number = store.add("moesaic/starts", 1)
        status = _status_of_start(store, number - 1)
        if status is not None:
            store.set(f"moesaic/{number}/cause", json.dumps(["", status, 0]))
        answer = json.dumps([number, status])
        missing = list(range(1, member.size))
        while missing:
            for rank in missing:
                asks = f"moesaic/asks/{rank}"
                if store.check([asks]):
                    store.set(f"moesaic/answers/{store.get(asks).decode()}", answer)
            time.sleep(0.02)
            missing = [r for r in missing if not store.check([f"moesaic/{number}/here/{r}"])]
            if time.monotonic() > end:
                who = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
                raise TrainingError(
                    f"{len(missing)} of {member.size} ranks did not come within "
                    f"{config.wait_seconds:.0f} s: {who}. Look why they did not start."
                )
        store.set(f"moesaic/{number}/all", "here")
    else:
        token = uuid.uuid4().hex
        store.set(f"moesaic/asks/{member.rank}", token)
        has_met_first = False
        try:
            number, status = json.loads(store.get(f"moesaic/answers/{token}"))
            store.set(f"moesaic/{number}/here/{member.rank}", "")
            has_met_first = True  # and it says whoever else does not come
            store.wait([f"moesaic/{number}/all"])
        except RuntimeError as error:
            if member.rank == 1 and not has_met_first:
                log.say(f"Rank 0 did not come within {config.wait_seconds:.0f} s.")
            raise SystemExit(RESTART_STATUS) from error
    if status is not None:
        raise SystemExit(status)
    return store, number


def _status_of_start(store: Any, number: int) -> int | None:
    """The status with which an earlier start ended for good. Starting again would not help it."""
    key = f"moesaic/{number}/cause"
    # A store may be older than this run, whose first start is to forget what stands there.
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not store.check([key]):
        return None
    _, status, _ = json.loads(store.get(key))
    return None if status == RESTART_STATUS else int(status)
