"""Every rank shows that it lives and how far it is, and all end when one of them does not.

A *beat* is what a rank says of itself about once a second, in a store that all ranks reach.
Whatever goes wrong first is the *cause* of the end: who finds it writes it into the store, where
only the first one stays, and says it on the terminal. The others read it within a second and end
with its status. So one line names the rank that is gone or hangs, and nobody waits for it.

Two threads of each rank do this beside the one that works. The first talks to the store, and
blocks for ever in a store whose process is stopped; no time-out of TCPStore ends that. The second
never blocks: it notices when the first has not come round, and keeps the time. That time counts
only while this process runs, so a rank that was stopped itself accuses nobody when it goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import moesaic
from moesaic.errors import MoesaicError
from moesaic.parallel.config import LaunchConfig

RESTART_STATUS = 75
"""Exit status of a rank that ends because of another one, EX_TEMPFAIL: starting again may help."""

FAULT_STATUS = 1
"""Exit status of a rank that met a fault of Moesaic's own."""

LAUNCH_FOLDER = "MOESAIC_LAUNCH_FOLDER"
"""Environment variable: where each rank leaves its last step for the process that started it."""

BEAT_SECONDS = 1.0

LOST_SECONDS = 5.0
"""Once a connection has broken, a rank without a beat for so long is the one that is gone."""

FAREWELL_SECONDS = 3.0
"""Ranks that end because of the same cause wait so long for each other."""

BEATS_A_ROUND = 64
"""Beats that a rank reads a second at most; with more ranks it reads less often."""

_OF_A_CONNECTION = re.compile(r"gloo|nccl|connection|socket|peer|timed out|timeout", re.IGNORECASE)


class Store(Protocol):
    """What is used of torch's stores."""

    def set(self, key: str, value: str) -> None: ...
    def add(self, key: str, value: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


class Log(Protocol):
    """Where a rank writes."""

    path: Path | None
    """The log's file, once it is known."""

    def say(self, line: str) -> None:
        """Write one line for the person at the terminal, and not into the log."""

    def write(self, text: str) -> None:
        """Write into the log."""

    def keep(self, folder: Path, title: str) -> None:
        """Write into the folder from here on."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int
    """Grows from beat to beat."""
    label: str
    """Which part of the model it holds, such as `stage 1`."""
    step: int | None
    """The last that it finished."""
    doing: str
    """In its own words; may be empty."""
    place: str
    """Line of code at which the working thread stands."""
    is_waiting: bool
    """Whether that is inside a collective operation."""
    still: float
    """Seconds for which it has stood there without a move."""


class Cause(NamedTuple):
    """Why all ranks end."""

    text: str
    """One line for people."""
    status: int
    """Exit status of all ranks."""
    by: int
    """The rank that found it."""


class Watch:
    """This rank's beats, and its eye on the others.

    Args:
        rank: This rank.
        size: Ranks in all; nothing is watched where it is 1.
        store: A connection that only the watch uses; None to watch nothing.
        config: How long is too long.
        log: Where this rank writes.
        store_is_of_rank_0: The store lives and dies with rank 0, not with an agent of torchrun.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        store: Store | None = None,
        config: LaunchConfig | None = None,
        log: Log | None = None,
        store_is_of_rank_0: bool = True,
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._config, self._log = store, config or LaunchConfig(), log
        self._store_is_of_rank_0 = store_is_of_rank_0
        self._label, self._doing = "", ""
        self._step: int | None = None
        self._moves = 0
        self._title = f"rank {rank} of {size}"
        self._working_thread = _Thread(threading.get_ident())
        self._parent = os.getppid()
        folder = os.environ.get(LAUNCH_FOLDER)
        self._last_step_file = last_step_file(Path(folder), rank) if folder else None
        self._clock = 0.0
        self._came_round = 0.0
        self._number = 0
        self._beats: dict[int, Beat] = {}
        self._heard = dict.fromkeys(range(size), 0.0)
        """When a rank's beat was last a new one."""
        self._has_lost_connection = False
        self._cause: Cause | None = None
        self._has_cause = threading.Event()
        self._has_ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def describe(self, label: str) -> None:
        """Say which part of the model this rank holds, such as `stage 1`."""
        self._label = label
        self._leave_last_step()

    def progress(self, step: int, doing: str = "") -> None:
        """Say how far this rank is. Cheap enough for every micro-batch.

        Args:
            step: The last step that it finished.
            doing: What comes now, in a few words.
        """
        self._step, self._doing = step, doing
        self._moves += 1
        self._leave_last_step()

    def keep_log(self, folder: Path) -> None:
        """Write what this rank prints into `folder`/rank-N.log, and what it has printed so far.

        Raises:
            FolderError: The log cannot be written.
        """
        if self._log is not None:
            self._log.keep(folder, self._title)

    def start(self) -> None:
        """Begin to beat and to watch."""
        for job in (self._keep_time, self._talk):
            self._threads.append(threading.Thread(target=job, daemon=True))
            self._threads[-1].start()

    def leave(self) -> None:
        """Come to an end together with all others, however long they take.

        Raises:
            RuntimeError: The store is gone.
        """
        if self._store is not None:
            self._meet("left", seconds=None)
            self._stop()
            if self._store_is_of_rank_0:
                # Who holds the store goes last, and no longer matters to who finds it gone.
                with contextlib.suppress(RuntimeError):
                    self._meet("gone", seconds=FAREWELL_SECONDS if self.rank == 0 else 0.0)

    def fail(self, error: BaseException) -> None:
        """Come to an end together with all others over what the working thread met.

        Returns if `error` is to be raised again, because it is the first thing that went wrong.

        Raises:
            SystemExit: Something else is; its status is everyone's.
        """
        if self._store is None or not isinstance(error, Exception):
            return
        ours = self._cause_of(error)
        cause, is_first = self._wait_for_cause(error) if ours is None else self._publish(ours)
        # What is raised again is printed by the command line, where rank 0 has a reader.
        is_raised = is_first and cause.status != RESTART_STATUS
        if is_first and not (is_raised and self.rank == 0):
            self._say(cause.text)
        if not is_raised:
            self._write(f"{cause.text}\n")
            if ours is not None:
                self._write_traceback(error)
        if cause.status == RESTART_STATUS:
            self._exit(cause.status)  # at once: an orderly end may wait for a rank that is gone
        self._stop()
        with contextlib.suppress(RuntimeError):
            self._meet("failed", seconds=FAREWELL_SECONDS)
        if not is_first:
            raise SystemExit(cause.status) from error

    def _wait_for_cause(self, error: Exception) -> tuple[Cause, bool]:
        """Find out who is gone, once a connection has broken; and whether this rank says so."""
        self._write_traceback(error)
        self._has_lost_connection = True
        with contextlib.suppress(ValueError):  # not the main thread, which alone may do this
            # torchrun asks the ranks that are left to end, but nobody has said why yet.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._has_cause.wait(2 * LOST_SECONDS):
            assert self._cause is not None
            return self._cause, False
        how = (str(error).splitlines() or [type(error).__name__])[0]
        text = f"{self._name(self.rank)} lost its connection to another one: {how}"
        return self._publish(self._our_cause(text))

    # What goes wrong

    def _cause_of(self, error: Exception) -> Cause | None:
        """None where it is only what another rank's end looks like from here."""
        if isinstance(error, MoesaicError):
            return Cause(" ".join(str(error).split()), error.exit_status, self.rank)
        if is_of_a_connection(error):
            return None
        first_line = (str(error).splitlines() or [""])[0]
        text = f"{self._name(self.rank)} failed: {type(error).__name__}: {first_line}"
        # A GPU's own errors; running out of memory is none of them.
        is_of_a_device = type(error).__name__ == "AcceleratorError"
        status = RESTART_STATUS if is_of_a_device else FAULT_STATUS
        where = f" {self._log.path} has more." if self._log and self._log.path else ""
        return Cause(f"{text}.{where}", status, self.rank)

    def _find(self) -> Cause | None:
        """Whatever is wrong with another rank."""
        limit = self._config.hang_seconds
        if self._has_lost_connection:
            limit = min(limit, LOST_SECONDS * self._pause / BEAT_SECONDS)
        silent = {r: self._clock - heard for r, heard in self._heard.items() if r != self.rank}
        rank = max(silent, key=lambda r: silent[r])
        if silent[rank] > limit:
            how = f"has not answered for {silent[rank]:.0f} s"
            how = "is gone" if self._has_lost_connection else how
            return self._our_cause(f"{self._name(rank)} {how}{self._last_step(rank)}. Stopping.")
        slow = slowest(self._beats, seconds=self._config.wait_seconds)
        if slow:
            who = "; ".join(
                f"{self._name(rank)} at {self._beats[rank].place}{self._last_step(rank)}"
                for rank in slow[:4]
            )
            more = f"; and {len(slow) - 4} more ranks" if len(slow) > 4 else ""
            return self._our_cause(
                f"No rank has gone on for {self._config.wait_seconds:.0f} s, because of "
                f"{_inside(who)}{more}. Stopping."
            )
        return None

    def _store_is_gone(self, how: str) -> Cause:
        who = self._name(0)
        if not self._store_is_of_rank_0:
            who = f"The machine of {_inside(who)}"
        return self._our_cause(f"{who} {how}{self._last_step(0)}. Stopping.")

    def _our_cause(self, text: str) -> Cause:
        return Cause(text, RESTART_STATUS, self.rank)

    def _name(self, rank: int) -> str:
        label = self._beats[rank].label if rank in self._beats else ""
        label = self._label if rank == self.rank else label
        return f"Rank {rank}" + (f" ({label})" if label else "")

    def _last_step(self, rank: int) -> str:
        beat = self._beats.get(rank)
        return how_far(None, "") if beat is None else how_far(beat.step, beat.doing)

    # The two threads

    def _talk(self) -> None:
        """Beat, listen, and end with the others."""
        try:
            while not self._has_ended.is_set():
                self._exchange_beats()
                cause, is_first = self._read_cause(), False
                if cause is None:
                    cause = self._find()
                    if cause is not None:
                        cause, is_first = self._publish(cause)
                if cause is not None:
                    self._end(cause, is_first=is_first)
                    return
                self._came_round = self._clock
                self._has_ended.wait(BEAT_SECONDS)
        except RuntimeError:  # as torch's stores raise
            # Those who end in good order stop before the store does.
            if not self._has_ended.wait(BEAT_SECONDS):
                self._end_without_store("is gone")

    def _keep_time(self) -> None:
        """Count the time that this process runs, and notice a store that does not answer."""
        before = time.monotonic()
        while not self._has_ended.wait(BEAT_SECONDS / 4):
            now = time.monotonic()
            self._clock += min(now - before, BEAT_SECONDS)
            before = now
            silent = self._clock - self._came_round
            # A little later than other ranks notice, who can still tell each other.
            if silent > self._config.hang_seconds + 2 * BEAT_SECONDS and self._cause is None:
                self._end_without_store(f"has not answered for {silent:.0f} s")
            if os.getppid() != self._parent:
                # Who started this rank was killed: finish in good order instead of for nobody.
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)

    def _exchange_beats(self) -> None:
        assert self._store is not None
        place, is_waiting, still = self._working_thread.look(self._clock, self._moves)
        beat = Beat(self._number, self._label, self._step, self._doing, place, is_waiting, still)
        self._store.set(f"beat/{self.rank}", json.dumps(asdict(beat)))
        self._number += 1
        if self._number % round(self._pause / BEAT_SECONDS):
            return
        ranks = [r for r in range(self.size) if r in self._beats or self._has_beat(r)]
        for rank, raw in zip(
            ranks, self._store.multi_get([f"beat/{rank}" for rank in ranks]), strict=True
        ):
            beat = Beat(**json.loads(raw))
            if rank not in self._beats or self._beats[rank].number != beat.number:
                self._beats[rank], self._heard[rank] = beat, self._clock

    def _has_beat(self, rank: int) -> bool:
        assert self._store is not None
        return self._store.check([f"beat/{rank}"])

    @property
    def _pause(self) -> float:
        """Seconds between two readings of all ranks' beats."""
        return BEAT_SECONDS * max(1, round(self.size / BEATS_A_ROUND))

    def _read_cause(self) -> Cause | None:
        assert self._store is not None
        return _cause(self._store.get("cause")) if self._store.check(["cause"]) else None

    def _publish(self, cause: Cause) -> tuple[Cause, bool]:
        """The cause that stays, and whether it is this one."""
        assert self._store is not None
        try:
            stays = _cause(self._store.compare_set("cause", "", json.dumps(cause)))
        except RuntimeError:
            return cause, self._speaks_without_store
        return stays, stays.by == self.rank

    @property
    def _speaks_without_store(self) -> bool:
        """One rank a machine speaks where ranks can no longer agree on one."""
        return self.rank == 1 or (self.rank > 0 and os.environ.get("LOCAL_RANK") == "0")

    def _end(self, cause: Cause, *, is_first: bool) -> None:
        """End this process, unless the working thread comes to its end by itself."""
        if is_first:
            self._say(cause.text)
        self._cause = cause
        self._has_cause.set()
        if cause.status != RESTART_STATUS and self._has_ended.wait(FAREWELL_SECONDS):
            return
        self._write(f"{cause.text}\n{self._working_thread.stack()}")
        if cause.status != RESTART_STATUS:
            with contextlib.suppress(RuntimeError):
                self._meet("failed", seconds=0)
        self._exit(cause.status)

    def _end_without_store(self, how: str) -> None:
        if not self._speaks_without_store:
            # Once one has ended, who started the ranks kills the others: the one that speaks first.
            time.sleep(FAREWELL_SECONDS)
        self._end(self._store_is_gone(how), is_first=self._speaks_without_store)

    def _exit(self, status: int) -> None:
        os._exit(status)

    def _meet(self, what: str, *, seconds: float | None) -> None:
        """Return when every rank has come here, or after so many seconds."""
        assert self._store is not None
        end = math.inf if seconds is None else time.monotonic() + seconds
        count = self._store.add(what, 1)
        while count < self.size and time.monotonic() < end:
            time.sleep(0.02)
            count = self._store.add(what, 0)

    def _stop(self) -> None:
        self._has_ended.set()
        for thread in self._threads:
            thread.join(timeout=BEAT_SECONDS)

    def _say(self, line: str) -> None:
        if self._log is not None:
            self._log.say(line)

    def _write_traceback(self, error: Exception) -> None:
        self._write("".join(traceback.format_exception(error)))

    def _write(self, text: str) -> None:
        if self._log is not None:
            self._log.write(text)

    def _leave_last_step(self) -> None:
        """For whoever started this rank, should it die without a word."""
        if self._last_step_file is not None:
            facts = {"label": self._label, "step": self._step, "doing": self._doing}
            try:
                self._last_step_file.write_text(json.dumps(facts))
            except OSError:  # the one who would read it is gone
                self._last_step_file = None


def is_of_a_connection(error: BaseException) -> bool:
    """Whether it, or what it was raised from, may be only what another rank's end looks like."""
    found: BaseException | None = error
    while found is not None and not _OF_A_CONNECTION.search(str(found)):
        found = found.__cause__
    return found is not None


def how_far(step: int | None, doing: str) -> str:
    """How far a rank was, in words that follow others."""
    step_words = "it had finished no step" if step is None else f"its last step was {step}"
    return f"; {step_words}" + (f" ({doing})" if doing else "")


def slowest(beats: Mapping[int, Beat], *, seconds: float) -> list[int]:
    """Who keeps the others waiting, once somebody has not moved for so many seconds.

    Who stands outside of collective operations while others wait in one. Where that tells nothing,
    as on a GPU, whose collectives return at once: who stands elsewhere than most.
    """
    if not any(beat.still >= seconds for beat in beats.values()):
        return []
    at_work = [rank for rank in sorted(beats) if not beats[rank].is_waiting]
    if 0 < len(at_work) < len(beats):
        return at_work
    places = Counter(beat.place for beat in beats.values())
    usual, _ = places.most_common(1)[0]
    return [rank for rank in sorted(beats) if beats[rank].place != usual] or sorted(beats)


def last_step_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its last step, in the folder that `LAUNCH_FOLDER` names."""
    return folder / f"rank-{rank}.json"


def _inside(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _cause(raw: bytes) -> Cause:
    return Cause(*json.loads(raw))


class _Thread:
    """Where a thread stands, as another one sees it."""

    def __init__(self, ident: int) -> None:
        self._ident = ident
        self._before: Any = None
        self._since = 0.0

    def look(self, clock: float, moves: int) -> tuple[str, bool, float]:
        """Its place, whether that is inside a collective operation, and seconds without a move."""
        frame = sys._current_frames().get(self._ident)
        if frame is None:
            return "its end", False, 0.0
        now = (moves, id(frame), frame.f_lasti)
        # Whoever waits for all to end may wait long: the last model is being written.
        if now != self._before or frame.f_code.co_filename == __file__:
            self._before, self._since = now, clock
        return _place(frame), _is_collective(frame), clock - self._since

    def stack(self) -> str:
        """The lines of code that brought it there."""
        frame = sys._current_frames().get(self._ident)
        return "" if frame is None else "".join(traceback.format_stack(frame))


_PACKAGE = os.path.dirname(moesaic.__file__) + os.sep  # noqa: PTH120


def _place(frame: FrameType) -> str:
    """The innermost line of Moesaic's own code, or of any."""
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(_PACKAGE):
        ours = ours.f_back
    frame = ours or frame
    file = frame.f_code.co_filename.removeprefix(os.path.dirname(_PACKAGE[:-1]) + os.sep)  # noqa: PTH120
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_collective(frame: FrameType) -> bool:
    here: FrameType | None = frame
    while here is not None and here.f_code.co_filename.endswith("/torch/_ops.py"):
        here = here.f_back
    file = "" if here is None else here.f_code.co_filename
    # Checkpoints are written in there too, and that is work.
    return file == __file__ or (
        "/torch/distributed/" in file and "/torch/distributed/checkpoint/" not in file
    )
