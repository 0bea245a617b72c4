"""A lower bound of the slowest rank's seconds, for several stages a rank of any units.

A linear program hands out units in fractions, in any order, and with every stage of a rank taken
for the one with the fewest micro-batches in flight. All that can only help, so that no layout is
faster than its optimum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moesaic.planning.problem import Problem
from moesaic.planning.row import Row

TOLERANCE = 1e-6
"""Relative; more than the linear program's solver leaves."""


class _Class(NamedTuple):
    """Units that are alike: layers by the kinds of the whole and of the halves, or other units."""

    whole: int
    halves: tuple[int, ...]
    """Empty where it is not cut."""
    stage: int | None
    """Of the row's first and last unit, which have no choice."""


class _Column(NamedTuple):
    """Units of a kind, or halves of them, on a rank with one choice."""

    rank: int
    rows: tuple[int, ...]
    """The equations that count them."""
    seconds: float
    bytes: float


def linear_bound(row: Row) -> float:
    """Hand out fractions of units to ranks: the least seconds; infinite if even that cannot fit."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    problem, ranks = row.problem, row.problem.ranks
    classes = _classes(row)
    columns, counts = _columns(row, classes)
    scale = max(1.0, *map(abs, problem.budgets))

    def matrix(entries: Sequence[tuple[int, int, float]], rows: int) -> object:
        at, column, values = zip(*entries, strict=True)
        return coo_array((values, (at, column)), shape=(rows, len(columns) + 1)).tocsr()

    limits = [(column.rank, number, column.seconds) for number, column in enumerate(columns)]
    limits += [(rank, len(columns), -speed) for rank, speed in enumerate(problem.speeds)]
    limits += [(ranks + c.rank, number, c.bytes / scale) for number, c in enumerate(columns)]
    found = linprog(
        np.eye(1, len(columns) + 1, len(columns))[0],
        A_ub=matrix(limits, 2 * ranks),
        b_ub=[0.0] * ranks + [budget / scale for budget in problem.budgets],
        A_eq=matrix([(r, n, 1.0) for n, c in enumerate(columns) for r in c.rows], len(counts)),
        b_eq=counts,
        method="highs",
    )
    if found.status == 2:
        return math.inf
    if found.status != 0:
        return sum(unit.seconds for unit in problem.units) / sum(problem.speeds)
    return float(found.fun) * (1 - TOLERANCE)


def _classes(row: Row) -> Counter[_Class]:
    problem, last = row.problem, len(row.single) - 1
    classes: Counter[_Class] = Counter()
    in_layers = {unit for first in row.whole for unit in (first, first + 1)}
    for first, whole in row.whole.items():
        is_cut = first + 1 in problem.cuts
        classes[_Class(whole, tuple(row.single[first : first + 2]) if is_cut else (), None)] += 1
    for unit, kind in enumerate(row.single):
        if unit not in in_layers:
            stage = 0 if unit == 0 else problem.stages - 1 if unit == last else None
            classes[_Class(kind, (), stage)] += 1
    return classes


def _columns(row: Row, classes: Counter[_Class]) -> tuple[list[_Column], list[int]]:
    """All ways to place units, and how many each equation asks for."""
    problem, columns, counts = row.problem, list[_Column](), list[int]()
    for one, count in classes.items():
        rows = tuple(range(len(counts), len(counts) + max(1, len(one.halves))))
        counts += [count] * len(rows)
        parts = [(one.whole, rows), *zip(one.halves, ((r,) for r in rows), strict=False)]
        for rank, in_flight in _places(problem, one.stage):
            for kind, part in parts:
                seconds, state, choices = row.kinds[kind]
                columns += [
                    _Column(rank, part, seconds + c.seconds, state + in_flight * c.kept_bytes)
                    for c in choices
                ]
    return columns, counts


def _places(problem: Problem, stage: int | None) -> Iterator[tuple[int, float]]:
    """Ranks that may hold a unit, with the fewest micro-batches that they keep of it."""
    for rank in range(problem.ranks):
        stages = problem.stages_of(rank)
        if stage is None:
            yield rank, min(problem.in_flight[s] for s in stages)
        elif stage in stages:
            yield rank, problem.in_flight[stage]
