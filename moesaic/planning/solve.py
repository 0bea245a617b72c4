"""Stages and recompute of a pipeline together, so that its slowest rank is as fast as can be.

    one stage a rank, any units                              exact
    several stages a rank, equal layers, cut between them    exact
    2 to 4 stages a rank, equal layers, cut anywhere         exact
    several stages a rank, anything else                     a good layout, and a lower bound

Other units may stand before and after equal layers, on the first stage and on the last.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.chain import Chain
from moesaic.planning.choose import SLACK
from moesaic.planning.halves import HalvedLayers
from moesaic.planning.interleave import EqualLayers
from moesaic.planning.layouts import Layouts
from moesaic.planning.problem import Choice, Problem, Solution, Unit
from moesaic.planning.relax import linear_bound
from moesaic.planning.row import Row
from moesaic.planning.split import Span

GIB = 2**30

__all__ = [
    "Choice",
    "Problem",
    "Shortage",
    "Solution",
    "Unit",
    "near_optimal",
    "shortage",
    "solve",
    "solve_within",
]


class Shortage(NamedTuple):
    """The rank that lacks the most bytes in the layout where it lacks the least."""

    rank: int
    needed_bytes: float
    """At least, whatever is recomputed."""
    available_bytes: float


class _Found(NamedTuple):
    stages: list[Span]
    bound: float | None
    """None where the stages are proved to be the best."""


def solve(problem: Problem, *, quick: bool = False) -> Solution:
    """The stages with the least bottleneck, and the cheapest recompute that fits in each.

    Args:
        problem: What to cut, and what the ranks can hold.
        quick: Where it is not exact, search for a tenth of the time; where nothing fits, do not
            say what lacks.

    Raises:
        PlanError: Nothing fits, or nothing was found that fits.
    """
    solution = solve_within(problem, math.inf, quick=quick)
    assert solution is not None
    return solution


def solve_within(problem: Problem, limit: float, *, quick: bool = False) -> Solution | None:
    """The same, or None as soon as it is clear that every bottleneck is above `limit`.

    Args:
        problem: As for `solve`.
        limit: Seconds of the slowest rank, for one micro-batch.
        quick: As for `solve`.

    Raises:
        PlanError: As `solve`.
    """
    row = Row(problem)
    found = _find(row, quick=quick, limit=limit)
    if found is None:
        return None
    solution = row.solution(found.stages, bound=found.bound)
    return solution if solution.bottleneck <= limit else None


def near_optimal(problem: Problem, *, slack: float = 0.01, limit: int = 64) -> list[Solution]:
    """Layouts whose bottleneck is little above the least, each with its cheapest recompute.

    Args:
        problem: As for `solve`.
        slack: How much slower the slowest rank may be, as a fraction.
        limit: Layouts to list, at most.

    Returns:
        Different layouts, by bottleneck and then by the seconds of all ranks together. They are
        reached by small steps from what `solve` finds and, with one stage a rank, from the
        layouts that put the least time on the first, on the last and on the middle ranks.

    Raises:
        PlanError: Nothing fits, or nothing was found that fits.
    """
    row = Row(problem)
    found = _find(row, quick=False)
    assert found is not None
    stages, bound = found
    layouts = Layouts(row)
    best = layouts.edges(stages)
    fastest = layouts.score(best).seconds[0]
    seeds = [best]
    if problem.interleave == 1:
        ramp = [rank + 1.0 for rank in range(problem.ranks)]
        peak = [1.0 + min(rank, problem.ranks - 1 - rank) for rank in range(problem.ranks)]
        chain = Chain(row)
        for weights in (ramp, ramp[::-1], peak):
            seeds.append(layouts.edges(chain.best_within(fastest, weights)))
    known = row.solution(stages, bound=bound).bound
    near = layouts.near(
        list(dict.fromkeys(seeds)), limit=fastest * (1 + slack), count=max(1, limit)
    )
    return [row.solution(layouts.stages(edges), bound=known) for edges in near]


def shortage(problem: Problem) -> Shortage | None:
    """What is missing where nothing fits; None where something fits, or may."""
    found = _shortage(Row(problem))
    return found if found.needed_bytes > found.available_bytes else None


def _find(row: Row, *, quick: bool, limit: float = math.inf) -> _Found | None:
    """The best stages, or good ones with a bound; None if all are clearly above a limit."""
    problem, equal = row.problem, EqualLayers.of(row)
    if problem.interleave == 1:
        chain = Chain(row)
        if limit < chain.least < math.inf:
            return None
        return _proved(row, chain.best(), quick=quick)
    if equal is None:
        return _search(row, None, None, quick=quick)
    if equal.is_all:
        if limit < math.inf and not equal.can_be_within(limit):
            return None
        return _proved(row, equal.best(), quick=quick)
    if not equal.has_halves or equal.count < problem.stages:
        return _search(row, equal, equal.best(), quick=quick)
    halved = HalvedLayers(equal)
    stages = halved.best().best()
    if halved.is_all and problem.cuts <= {0, *range(equal.first, equal.end + 1)}:
        return _proved(row, stages, quick=quick)
    return _search(row, equal, stages, quick=quick)


def _proved(row: Row, stages: list[Span] | None, *, quick: bool) -> _Found:
    if stages is None:
        raise PlanError("Nothing fits.") if quick else _does_not_fit(_shortage(row))
    return _Found(stages, None)


def _search(
    row: Row, equal: EqualLayers | None, stages: list[Span] | None, *, quick: bool
) -> _Found:
    """Improve layouts of simpler problems, and bound what any other could be."""
    layouts = Layouts(row)
    starts = [_one_stage_a_rank(row)] + ([] if stages is None else [stages])
    found = [layouts.improve(layouts.edges(start)) for start in starts]
    if not quick:
        found.append(layouts.improve(layouts.shake(min(found, key=layouts.score))))
    best = min(found, key=layouts.score)
    if layouts.score(best).seconds[0] == math.inf:
        best = layouts.improve(layouts.edges(_tight(row)))
    if layouts.score(best).seconds[0] == math.inf:
        raise PlanError("Nothing fits.") if quick else _does_not_fit(_shortage(row))
    bound = max(linear_bound(row), _heaviest(row))
    if equal is not None:
        bound = max(bound, _equal_bound(equal))
    return _Found(layouts.stages(best), bound * (1 - SLACK))


def _heaviest(row: Row) -> float:
    """What is never cut is on one rank."""
    pieces = itertools.pairwise(row.positions)
    problem = row.problem
    return max(sum(u.seconds for u in problem.units[a:b]) for a, b in pieces) / max(problem.speeds)


def _equal_bound(equal: EqualLayers) -> float:
    """The most equal layers alone, wherever they may be cut."""
    relaxed = equal.relaxed()
    inside = set(range(equal.first + 1, equal.end, 2))
    if not inside & equal.row.problem.cuts:
        return relaxed.slowest()
    halved = HalvedLayers(relaxed)
    return halved.best().slowest() if halved.is_all else 0.0


def _one_stage_a_rank(row: Row) -> list[Span]:
    """The best stages if each had its share of its rank's bytes to itself."""
    problem = row.problem
    state = sum(unit.state_bytes for unit in problem.units) / problem.stages
    kept = sum(unit.choices[0].kept_bytes for unit in problem.units) / problem.stages
    needs = [state + in_flight * kept for in_flight in problem.in_flight]
    budgets, speeds = [0.0] * problem.stages, [1.0] * problem.stages
    for rank in range(problem.ranks):
        total = sum(needs[stage] for stage in problem.stages_of(rank))
        for stage in problem.stages_of(rank):
            share = needs[stage] / total if total else 1 / problem.interleave
            budgets[stage] = problem.budgets[rank] * share
            speeds[stage] = problem.speeds[rank]
    alone = dataclasses.replace(
        problem,
        ranks=problem.stages,
        interleave=1,
        v_shaped=False,
        budgets=tuple(budgets),
        speeds=tuple(speeds),
    )
    chain = Chain(Row(alone))
    return chain.best() or chain.tightest()


def _tight(row: Row) -> list[Span]:
    """The layout in which the rank that lacks most lacks the least; one near it for some units."""
    if row.problem.interleave == 1:
        return Chain(row).tightest()
    equal, layouts = EqualLayers.of(row), Layouts(row)
    stages = _one_stage_a_rank(row) if equal is None else equal.tightest()
    if equal is not None and equal.is_all:
        return stages
    return layouts.stages(layouts.improve(layouts.edges(stages)))


def _shortage(row: Row) -> Shortage:
    problem, stages = row.problem, _tight(row)
    needs = [row.least_bytes(row.groups_of(rank, stages)) for rank in range(problem.ranks)]
    rank = max(range(problem.ranks), key=lambda rank: needs[rank] - problem.budgets[rank])
    return Shortage(rank, needs[rank], problem.budgets[rank])


def _does_not_fit(found: Shortage) -> PlanError:
    return PlanError(
        f"No layout was found that fits: in one as tight as can be, rank {found.rank} of the "
        f"pipeline needs at least {_size(found.needed_bytes)} for its units and has "
        f"{_size(found.available_bytes)}. Use more pipeline or tensor ranks, a smaller "
        f"micro-batch, zero, or a schedule with fewer micro-batches in flight."
    )


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if abs(count) >= GIB else f"{count:.0f} bytes"
