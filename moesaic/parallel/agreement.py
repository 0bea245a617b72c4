"""What one rank does for all, and what all must have done before any goes on.

An error that a user or a file can cause is raised on every rank, so that none is left waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from moesaic.errors import MoesaicError
from moesaic.parallel.group import Group

T = TypeVar("T")


def first_does(group: Group, action: Callable[[], T]) -> T:
    """Let rank 0 call `action`, and give what it returned (pickled) to every rank.

    Raises:
        MoesaicError: On every rank, what `action` raised on rank 0.
    """
    mine: tuple[MoesaicError | None, T | None] = (None, None)
    if group.rank == 0:
        mine = _outcome(action)
    error, result = group.objects(mine)[0]
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def all_do(group: Group, action: Callable[[], T]) -> T:
    """Call `action` on every rank, and go on when all have; what it returned stays here.

    Raises:
        MoesaicError: On every rank, what the first rank that failed raised.
    """
    error, result = _outcome(action)
    for failed in group.objects(error):
        if failed is not None:
            raise failed
    return result  # type: ignore[return-value]


def _outcome(action: Callable[[], T]) -> tuple[MoesaicError | None, T | None]:
    try:
        return None, action()
    except MoesaicError as error:
        return error, None
