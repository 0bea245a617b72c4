"""What pipeline schedules ask of the numbers of stages and micro-batches, and who runs which stage.

                           stages             micro-batches of a step on one data-parallel rank
    gpipe                  1 a rank           any number
    1f1b                   1 a rank           at least as many as there are stages
    interleaved, zb1p      equally many       whole rounds: M micro-batches over P ranks run in
                                              max(1, M // P) rounds, all of one length
    zbv                    2 a rank           any number
    dualpipev              2 a rank           at least as many as there are stages

Stage s is on rank s % P, but zbv and dualpipev go down the ranks and up again. One rank alone runs
one stage and any number of micro-batches.
"""

from __future__ import annotations

from moesaic.errors import PlanError
from moesaic.planning.plan import V_SHAPED, Schedule

MANY = ("1f1b", "dualpipev")
"""Schedules that need a micro-batch for each stage."""

ROUNDS = ("interleaved", "zb1p")
"""Schedules that take micro-batches in equal rounds."""


def stages_of(rank: int, schedule: Schedule, *, ranks: int, stages: int) -> tuple[int, ...]:
    """Stages that a pipeline rank runs, in the order that tokens pass."""
    if schedule in V_SHAPED and ranks > 1:
        return (rank, 2 * ranks - 1 - rank)
    return tuple(range(rank, stages, ranks))


def check_stages(schedule: Schedule, *, ranks: int, stages: int) -> None:
    """Refuse a number of stages that a schedule cannot run over so many pipeline ranks.

    Raises:
        PlanError: It cannot.
    """
    if ranks == 1:
        if stages != 1:
            raise PlanError(
                f"The plan has {stages} stages, but pp 1, and one rank runs the whole model as one "
                f"stage. Leave stages out, or raise pp."
            )
    elif schedule in V_SHAPED:
        if stages != 2 * ranks:
            raise PlanError(
                f"The plan has {stages} stages, but {schedule} runs 2 on each of its {ranks} "
                f"pipeline ranks. Give {2 * ranks}."
            )
    elif schedule in ROUNDS:
        if stages % ranks:
            raise PlanError(
                f"The plan has {stages} stages for {ranks} pipeline ranks. "
                f"Each rank runs equally many; give a multiple of {ranks}."
            )
    elif stages != ranks:
        raise PlanError(
            f"The plan has {stages} stages, but {schedule} runs 1 on each of its {ranks} "
            f"pipeline ranks."
        )


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
        return micro_batches % rounds(micro_batches, ranks) == 0
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
        f"data-parallel rank in {rounds(micro_batches, ranks)} rounds of unequal length. "
        f"Use {fewer} or {more} micro-batches."
    )


def rounds(micro_batches: int, ranks: int) -> int:
    """Equal rounds in which `interleaved` and `zb1p` take their micro-batches."""
    return max(1, micro_batches // ranks)
