"""Start the ranks of a run on this machine, and start them again when one of them dies.

Several machines are torchrun's business. On one, this does without torchrun's agent, for reasons:
the agent restarts ranks that refused a mistake in what was given, and those would refuse it again;
it waits thirty fixed seconds for a stopped process to react to SIGTERM; a second Ctrl-C leaves its
ranks running; and it loads torch, of which the process that only waits here has no need.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

from moesaic.errors import ConfigError, TrainingError
from moesaic.parallel.config import LaunchConfig
from moesaic.parallel.watch import LAUNCH_FOLDER, RESTART_STATUS, how_far, last_step_file

STOPPED_STATUS = 130
"""Exit status of a run that was asked to stop."""

LINGER_SECONDS = 10.0
"""Once a rank has refused to go on, the others have so long to end by themselves."""


class Member(NamedTuple):
    """Who this process is among the ranks of a run."""

    rank: int
    size: int
    local_rank: int
    """Its number among those on the same machine, which is also that of its GPU."""


def environment_world() -> Member | None:
    """Who torchrun or `start_ranks` made this process; None if nobody did.

    Raises:
        ConfigError: The environment says it only in part, or not in numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if "RANK" not in given or "WORLD_SIZE" not in given:
        return None
    if len(given) < len(names) or not all(text.isdigit() for text in given.values()):
        stands = ", ".join(f"{name}={text}" for name, text in given.items())
        raise ConfigError(
            f"The environment has {stands}, but RANK, WORLD_SIZE and LOCAL_RANK must all be "
            f"there, and numbers. Start the ranks with torchrun, or unset these."
        )
    return Member(*(int(given[name]) for name in names))


def start_ranks(
    command: Sequence[str],
    *,
    size: int,
    config: LaunchConfig | None = None,
    again: str = "goes on from the last checkpoint",
) -> int:
    """Run `command` as `size` ranks on this machine, and wait until they are done.

    Rank 0 prints where this process does. SIGINT, SIGTERM and SIGHUP are passed on, so that the
    ranks end in good order; a second one kills them. Each rank computes with a fair share of the
    cores, unless OMP_NUM_THREADS is set.

    Args:
        command: The program and its arguments; it calls `joined`.
        size: Ranks.
        config: How often to start again, and how long to wait.
        again: What the same command does once this one has given up.

    Returns:
        0 when all ranks are done; 130 when they were asked to stop; else what a rank that refused
        to go on returned, after it has said why.

    Raises:
        TrainingError: Ranks were killed or hung more often than they may start again.
    """
    config = config or LaunchConfig()
    with tempfile.TemporaryDirectory(prefix="moesaic-ranks-") as folder, _Requests() as requests:
        for attempt in range(config.max_restarts + 1):
            with _Ranks(command, size, attempt=attempt, folder=Path(folder)) as ranks:
                codes = ranks.wait(requests, config)
                what = ranks.deaths(codes)
            if refusals := _refusals(codes):
                return refusals[0]
            if requests.signals:
                is_done = len(codes) == size and not any(codes.values())
                return 0 if is_done else STOPPED_STATUS
            if not _is_crash(codes):
                return max(codes.values())
            if attempt < config.max_restarts:
                _tell(f"{what} Starting again ({attempt + 1} of {config.max_restarts}).")
    raise TrainingError(
        f"{what} launch.max_restarts is {config.max_restarts}; the same command {again}."
    )


class _Ranks:
    """The processes of one attempt; none outlives the block."""

    def __init__(self, command: Sequence[str], size: int, *, attempt: int, folder: Path) -> None:
        self._folder = folder / str(attempt)
        self._folder.mkdir()
        environment = {
            **_shared_environment(size),
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            LAUNCH_FOLDER: str(self._folder),
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(size):
                process = subprocess.Popen(
                    list(command),
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    # The terminal's Ctrl-C comes to this process alone, which passes it on once.
                    start_new_session=True,
                )
                self._processes.append(process)
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._kill()
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # the cursor that a killed progress bar had hidden
            sys.stderr.flush()

    def wait(self, requests: _Requests, config: LaunchConfig) -> dict[int, int]:
        """Exit statuses of the ranks that ended before the rest had to be killed, if any had."""
        passed_on, give_up = 0, float("inf")
        while True:
            codes = self._codes()
            now = time.monotonic()
            if _refusals(codes):
                give_up = min(give_up, now + LINGER_SECONDS)
            elif _is_crash(codes):
                return codes
            if len(codes) == len(self._processes):
                return codes
            if len(requests.signals) > passed_on:
                if passed_on:
                    return codes
                passed_on = len(requests.signals)
                self._send(requests.signals[0])
                give_up = min(give_up, now + config.grace_seconds)
            if now > give_up:
                if requests.signals:
                    left = len(self._processes) - len(codes)
                    _tell(
                        f"{left} of {len(self._processes)} ranks had not ended "
                        f"{config.grace_seconds:.0f} s after {requests.signals[0].name} "
                        f"(launch.grace_seconds), and were killed."
                    )
                return codes
            time.sleep(0.05)

    def deaths(self, codes: Mapping[int, int]) -> str:
        """Which ranks were killed, and how far they were."""
        killed = [rank for rank, code in sorted(codes.items()) if code < 0]
        if not killed:
            return "A rank was lost (see above)."
        return " ".join(self._death(rank, -codes[rank]) for rank in killed)

    def _death(self, rank: int, number: int) -> str:
        by = signal.Signals(number).name if number in _SIGNALS else f"signal {number}"
        hint = ", as the system does when memory runs out" if by == "SIGKILL" else ""
        try:
            facts = json.loads(last_step_file(self._folder, rank).read_text())
        except (OSError, ValueError):
            facts = {"label": "", "step": None, "doing": ""}
        label = f" ({facts['label']})" if facts["label"] else ""
        step = how_far(facts["step"], facts["doing"])
        return f"Rank {rank}{label} was ended by {by}{hint}{step}."

    def _codes(self) -> dict[int, int]:
        codes = {rank: process.poll() for rank, process in enumerate(self._processes)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def _send(self, number: signal.Signals) -> None:
        # The ranks know of Ctrl-C and of being asked to stop, and of nothing else.
        number = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        for process in self._processes:
            process.send_signal(number)

    def _kill(self) -> None:
        for process in self._processes:
            # With whatever it has started itself. The number is ours until we have waited for it.
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            # One that is stuck in the kernel does not end even so; no use to hang with it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=LINGER_SECONDS)


_SIGNALS = {number.value for number in signal.Signals}


class _Requests:
    """Signals that ask to stop, collected while the block runs."""

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(kind) == signal.SIG_IGN:  # as under nohup
                continue
            try:
                self._before[kind] = signal.signal(kind, self._collect)
            except ValueError:  # not the main thread, which alone may do this
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _collect(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number))


def _shared_environment(size: int) -> dict[str, str]:
    """What all ranks of an attempt find in their environment."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // size)))
    if sys.platform == "linux":
        # All are here: whatever the machine's name stands for is not needed.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A store that its peer has left warns with a page of stack.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return environment


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _refusals(codes: Mapping[int, int]) -> list[int]:
    """Statuses of ranks that would end so again."""
    others = (STOPPED_STATUS, RESTART_STATUS)
    return [code for _, code in sorted(codes.items()) if code > 0 and code not in others]


def _is_crash(codes: Mapping[int, int]) -> bool:
    """Whether a rank ended in a way in which it might not end again."""
    return any(code < 0 or code == RESTART_STATUS for code in codes.values())


def _tell(line: str) -> None:
    sys.stderr.write(f"moesaic: {line}\n")
    sys.stderr.flush()
