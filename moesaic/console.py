"""Progress for people, on stderr; results go to stdout and are printed by the command line alone.

Nothing is drawn when stderr is not a terminal or `MOESAIC_QUIET` is set, so logs, pipes and
tests stay clean.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")


def is_quiet() -> bool:
    """Whether progress stays hidden: stderr is no terminal, or `MOESAIC_QUIET` is set."""
    return bool(os.environ.get("MOESAIC_QUIET")) or not sys.stderr.isatty()


def console() -> Console:
    """A console on the stderr of this moment, which a test or a caller may have replaced."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """Say one line on stderr, unless `MOESAIC_QUIET` is set. It is never markup."""
    if not os.environ.get("MOESAIC_QUIET"):
        console().print(message, markup=False)


def progress() -> Progress:
    """A progress display to use in a `with` block; the caller adds tasks and advances them."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
        disable=is_quiet(),
        transient=True,
    )


def track(iterable: Iterable[Item], *, total: int | None = None, label: str) -> Iterator[Item]:
    """Yield what `iterable` yields and draw how far it has come.

    Args:
        iterable: What to go through.
        total: How many items there will be; None asks `len`, or shows no end.
        label: What is being done, in a few words.
    """
    with progress() as display:
        yield from display.track(iterable, total=total, description=label)
