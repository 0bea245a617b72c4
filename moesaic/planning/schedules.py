"""What pipeline schedules ask of the number of micro-batches.

    gpipe, zbv             any number
    1f1b, dualpipev        at least as many as there are stages
    interleaved, zb1p      whole rounds: M micro-batches over P ranks run in max(1, M // P)
                           rounds, all of one length

M counts the micro-batches of a step on one data-parallel rank. One rank alone runs any number.
"""

from __future__ import annotations

from moesaic.errors import PlanError
from moesaic.planning.plan import Schedule

MANY = ("1f1b", "dualpipev")
"""Schedules that need a micro-batch for each stage."""

ROUNDS = ("interleaved", "zb1p")
"""Schedules that take micro-batches in equal rounds."""


def can_run(schedule: Schedule, micro_batches: int, *, ranks: int, stages: int) -> bool:
    """Whether a schedule can run so many micro-batches.

    Args:
        schedule: Its name.
        micro_batches: In a step, of one data-parallel rank.
        ranks: Pipeline ranks.
        stages: Of all of them.
    """
    if ranks == 1 or micro_batches < 1:
        return micro_batches >= 1
    if schedule in MANY:
        return micro_batches >= stages
    if schedule in ROUNDS:
        return micro_batches % _rounds(micro_batches, ranks) == 0
    return True


def check_micro_batches(schedule: Schedule, micro_batches: int, *, ranks: int, stages: int) -> None:
    """Refuse a number of micro-batches that a schedule cannot run; the arguments of `can_run`.

    Raises:
        PlanError: It cannot.
    """
    if can_run(schedule, micro_batches, ranks=ranks, stages=stages):
        return
    if micro_batches < 1:
        raise PlanError(f"A step has {micro_batches} micro-batches on each data-parallel rank.")
    if schedule in MANY:
        raise PlanError(
            f"{schedule} over {stages} stages needs at least {stages} micro-batches in a step on "
            f"each data-parallel rank, but there are {micro_batches}. Use a larger batch, a "
            f"smaller micro_batch, fewer stages or gpipe."
        )
    fewer, more = (
        next(m for m in found if can_run(schedule, m, ranks=ranks, stages=stages))
        for found in (range(micro_batches, 0, -1), range(micro_batches, 2 * micro_batches * ranks))
    )
    raise PlanError(
        f"{schedule} over {ranks} pipeline ranks would run the {micro_batches} micro-batches of a "
        f"data-parallel rank in {_rounds(micro_batches, ranks)} rounds of unequal length. "
        f"Use {fewer} or {more} micro-batches."
    )


def _rounds(micro_batches: int, ranks: int) -> int:
    return max(1, micro_batches // ranks)
