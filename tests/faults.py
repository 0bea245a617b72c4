"""Make the n-th write to disk fail, or kill the process there."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moesaic.errors import MoesaicError

MADE_BY = ("mkdir", "rename", "replace", "fsync", "sendfile", "pwrite")
"""Functions of `os` that change the disk, besides writing to a file."""


class Faults:
    """Counts what is done to the disk; the `number`-th time, from 1, `strike` is called."""

    def __init__(self, number: int, strike: Callable[[], None]) -> None:
        self.number = number
        self.count = 0
        self._strike = strike

    @property
    def has_struck(self) -> bool:
        return self.count >= self.number

    def tick(self) -> None:
        self.count += 1
        if self.count == self.number:
            self._strike()


class _File:
    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, content: Any) -> Any:
        self._faults.tick()
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def fault(number: int, strike: Callable[[], None] = disk_full) -> Iterator[Faults]:
    """Within the block, the `number`-th change to the disk meets `strike` and is not made."""
    faults = Faults(number, strike)
    real_open = builtins.open
    real = {name: getattr(os, name) for name in MADE_BY}

    def wrapped_open(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        file = real_open(path, mode, *rest, **named)
        return _File(file, faults) if set(mode) & set("wax+") else file

    def wrapped(function: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            faults.tick()
            return function(*args, **named)

        return call

    try:
        builtins.open = io.open = wrapped_open  # type: ignore[assignment]
        for name, function in real.items():
            setattr(os, name, wrapped(function))
        yield faults
    finally:
        builtins.open = io.open = real_open
        for name, function in real.items():
            setattr(os, name, function)


def failure_of(attempt: Callable[[], object]) -> MoesaicError | None:
    """Call `attempt`; return what it raised on purpose, which must be one line."""
    failure = None
    try:
        attempt()
    except MoesaicError as error:
        failure = error
    assert "\n" not in str(failure), failure
    return failure


def faults_in_turn(attempt: Callable[[], object], check: Callable[[bool], None]) -> int:
    """Call `attempt` with a full disk at its first change, its second... until none is met.

    `check` looks at the disk each time; it is told whether the attempt failed. Returns how
    many faults were met.
    """
    for number in itertools.count(1):
        with fault(number) as faults:
            error = failure_of(attempt)
        if not faults.has_struck:
            assert error is None, error
            check(False)
            return number - 1
        assert error is None or "No space left" in str(error), error
        check(error is not None)
    raise AssertionError
