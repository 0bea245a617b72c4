"""Lower bounds of the slowest rank's seconds, for several stages a rank of units not all alike.

Both forget the order of the units, and take every stage of a rank for the one with the fewest
micro-batches in flight. What is forgotten can only help, so no layout is faster.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moesaic.planning.choose import Chooser, Group
from moesaic.planning.interleave import EqualLayers
from moesaic.planning.problem import Choice, Problem
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


def halves_bound(equal: EqualLayers, upper: float) -> float:
    """Hand out whole halves of equal layers to ranks: the least seconds, at most `upper`."""
    row, layers = equal.row, equal.count
    if equal.first > 1 or len(row.single) - equal.first - 2 * layers > 1:
        return 0.0
    tables = [_Halves(equal, rank).table(upper) for rank in range(row.problem.ranks)]
    values = sorted({seconds for table in tables for seconds in table.values()})

    def can_hold(seconds: float) -> bool:
        most = np.full(layers + 1, -np.inf)
        most[0] = 0
        for table in tables:
            held = dict[int, int]()
            for (first, second), takes in table.items():
                if takes <= seconds:
                    held[first] = max(second, held.get(first, 0))
            following = np.full(layers + 1, -np.inf)
            for first, second in held.items():
                part = following[first:]
                np.maximum(part, most[: layers + 1 - first] + second, out=part)
            most = following
        return bool(most[-1] >= layers)

    where = bisect.bisect_left(values, True, key=can_hold)
    return values[where] if where < len(values) else upper


class _Halves:
    """Least seconds of a rank with any number of first and second halves of equal layers."""

    def __init__(self, equal: EqualLayers, rank: int) -> None:
        row, problem = equal.row, equal.row.problem
        self.row, self.rank, self.layers = row, rank, equal.count
        self.halves = row.single[equal.first : equal.first + 2]
        self.stages = len(problem.stages_of(rank))
        self.in_flight = min(problem.in_flight[s] for s in problem.stages_of(rank))
        whole = len(row.kinds)
        pairs = itertools.product(*(row.kinds[half].choices for half in self.halves))
        both = tuple(_both(one, two) for one, two in pairs)
        choices = row.kinds[row.whole[equal.first]].choices + both
        self.kinds = [*row.kinds, row.kinds[row.whole[equal.first]]._replace(choices=choices)]
        self.whole = whole
        self.chooser = Chooser([kind.choices for kind in self.kinds])
        end = equal.first + 2 * equal.count
        self.others = [
            Group(row.single[unit], 1, problem.in_flight[stage])
            for unit, stage in ((0, 0), (len(row.single) - 1, problem.stages - 1))
            if stage in problem.stages_of(rank) and not equal.first <= unit < end
        ]

    def table(self, upper: float) -> dict[tuple[int, int], float]:
        """Seconds by numbers of first and second halves, where they are below `upper`.

        A stage begins with a second half and ends with a first one at most, so that the numbers
        differ by no more than there are stages.
        """
        found = {}
        for first in range(self.layers + 1):
            near = range(max(0, first - self.stages), min(self.layers, first + self.stages) + 1)
            for second in near:
                seconds = self._seconds(first, second, upper)
                if seconds < upper:
                    found[first, second] = seconds
        return found

    def _seconds(self, first: int, second: int, upper: float) -> float:
        whole = min(first, second)
        counts = [
            (self.whole, whole),
            *zip(self.halves, (first - whole, second - whole), strict=True),
        ]
        groups = self.others + [Group(kind, n, self.in_flight) for kind, n in counts if n]
        problem = self.row.problem
        base = sum(group.units * self.kinds[group.kind].seconds for group in groups)
        if base / problem.speeds[self.rank] >= upper:
            return math.inf
        room = problem.budgets[self.rank] - sum(g.units * self.kinds[g.kind].state for g in groups)
        chosen = self.chooser.cheapest(groups, room)
        return math.inf if chosen is None else (base + chosen.seconds) / problem.speeds[self.rank]


def _both(one: Choice, two: Choice) -> Choice:
    return Choice(
        f"{one.recompute} {two.recompute}",
        one.seconds + two.seconds,
        one.kept_bytes + two.kept_bytes,
        max(one.transient_bytes, two.transient_bytes),
    )
