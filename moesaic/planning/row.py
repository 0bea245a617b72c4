"""A problem's units as a row of numbers: rounded alike, told apart by kind, summed over any span.

A layer whose two units lie in one span counts as one item, one that the span cuts as a half.
Seconds and bytes become whole multiples of a power of two, so fine (2**-53 of their sum) that
nothing is lost that a float could show, and every sum of them is exact: equal layers take equal
time wherever they stand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moesaic.planning.choose import Chooser, Chosen, Floats, Group, Ints
from moesaic.planning.problem import Choice, Problem, Solution
from moesaic.planning.split import Span


class Item(NamedTuple):
    """A layer, half a layer or another unit, in a stage."""

    kind: int
    first: int
    """Its first unit."""


class Load(NamedTuple):
    """What a rank has to do with given stages and the cheapest recompute that fits."""

    seconds: float
    """Over its speed; infinite if nothing fits."""

    chosen: Chosen | None
    groups: tuple[Group, ...]


class _Kind(NamedTuple):
    seconds: float
    state: float
    choices: tuple[Choice, ...]


class Row:
    """The units of a problem, and the least load of any rank with any stages."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.positions = sorted({0, *problem.cuts, len(problem.units)})
        """Where a stage may begin or end."""
        self.kinds: list[_Kind] = []
        self._tidy = _Tidy(problem)
        numbers: dict[tuple[float, float, int], int] = {}
        self.single: list[int] = []
        """Kind of each unit by itself."""
        self.whole: dict[int, int] = {}
        """Kind of each layer, by its first unit."""
        for unit in problem.units:
            kind = self._tidy.kind([unit.seconds], [unit.state_bytes], unit.choices)
            self.single.append(self._number(kind, numbers))
        for first, choices in sorted(problem.layers.items()):
            pair = problem.units[first : first + 2]
            kind = self._tidy.kind(
                [unit.seconds for unit in pair], [unit.state_bytes for unit in pair], choices
            )
            self.whole[first] = self._number(kind, numbers)
        self.chooser = Chooser([kind.choices for kind in self.kinds])
        self.seconds = np.array([kind.seconds for kind in self.kinds])
        self.state = np.array([kind.state for kind in self.kinds])
        self._loads: dict[tuple[int, tuple[Group, ...]], Load] = {}

    def _number(self, kind: _Kind, numbers: dict[tuple[float, float, int], int]) -> int:
        # Equal choices were made one object, whose number is found faster than its hash.
        key = kind.seconds, kind.state, id(kind.choices)
        if key not in numbers:
            numbers[key] = len(self.kinds)
            self.kinds.append(kind)
        return numbers[key]

    def items(self, span: Span) -> list[Item]:
        """What a stage holds, in order."""
        items, unit, end = [], *span
        while unit < end:
            if unit in self.whole and unit + 2 <= end:
                items.append(Item(self.whole[unit], unit))
                unit += 2
            else:
                items.append(Item(self.single[unit], unit))
                unit += 1
        return items

    def additive(self, values: Floats | Ints) -> tuple[Floats | Ints, Floats | Ints]:
        """Sums of per-kind values over any span, as the difference of two arrays.

        Args:
            values: (quantities, kinds)

        Returns:
            ends, starts: (quantities, positions); positions a to b sum to ends[b] - starts[a].
        """
        inside = np.array([position - 1 in self.whole for position in self.positions])
        halves = {first + 1 for first in self.whole}
        kind = [
            self.whole[unit - 1] if unit in halves else single
            for unit, single in enumerate(self.single)
        ]
        counted = np.array([unit not in self.whole for unit in range(len(kind))])
        sums = np.zeros((len(values), len(kind) + 1), values.dtype)
        np.cumsum(values[:, kind] * counted, axis=1, out=sums[:, 1:])
        at = np.array(self.positions)
        single = values[:, self.single]
        ends = sums[:, at] + single[:, at - 1] * inside
        starts = sums[:, at + inside] - single[:, np.minimum(at, len(kind) - 1)] * inside
        return ends, starts

    def groups(self, spans: Iterable[tuple[Span, float]]) -> tuple[Group, ...]:
        """Items of stages with their in-flight counts, counted by kind."""
        return tuple(
            Group(kind, count, in_flight)
            for span, in_flight in spans
            for kind, count in sorted(Counter(item.kind for item in self.items(span)).items())
        )

    def load(self, rank: int, groups: tuple[Group, ...]) -> Load:
        """The fewest seconds of a rank with these items."""
        key = rank, groups
        if key not in self._loads:
            base = sum(group.units * self.kinds[group.kind].seconds for group in groups)
            room = self.problem.budgets[rank] - self.state_bytes(groups)
            chosen = self.chooser.cheapest(groups, room)
            seconds = math.inf if chosen is None else base + chosen.seconds
            self._loads[key] = Load(seconds / self.problem.speeds[rank], chosen, groups)
        return self._loads[key]

    def load_of(self, rank: int, stages: Sequence[Span]) -> Load:
        """The fewest seconds of a rank when the stages of all ranks are these."""
        return self.load(rank, self.groups_of(rank, stages))

    def groups_of(self, rank: int, stages: Sequence[Span]) -> tuple[Group, ...]:
        """Items of a rank when the stages of all ranks are these."""
        problem = self.problem
        return self.groups((stages[s], problem.in_flight[s]) for s in problem.stages_of(rank))

    def state_bytes(self, groups: Iterable[Group]) -> float:
        """Weights, gradients and optimizer of these items."""
        return sum(group.units * self.kinds[group.kind].state for group in groups)

    def least_bytes(self, groups: Sequence[Group]) -> float:
        """The fewest bytes that a rank with these items can do with."""
        return self.state_bytes(groups) + self.chooser.least_bytes(groups)

    def solution(self, stages: Sequence[Span], *, bound: float | None = None) -> Solution:
        """Stages with the cheapest recompute; without a bound they are proved to be the best."""
        problem = self.problem
        choices: dict[int, Choice] = {}
        for rank in range(problem.ranks):
            load = self.load_of(rank, stages)
            assert load.chosen is not None, f"{rank=}, {stages=}"
            choices |= self._assign(rank, load, stages)
        held = [
            [item.first for s in problem.stages_of(rank) for item in self.items(stages[s])]
            for rank in range(problem.ranks)
        ]
        seconds = tuple(
            math.fsum(
                [choices[first].seconds for first in firsts]
                + [
                    problem.units[u].seconds
                    for s in problem.stages_of(rank)
                    for u in range(*stages[s])
                ]
            )
            / problem.speeds[rank]
            for rank, firsts in enumerate(held)
        )
        bottleneck = max(seconds)
        recompute = {
            self._name(first, stages): choice.recompute
            for first, choice in sorted(choices.items())
            if choice.recompute != "none"
        }
        return Solution(
            stages=tuple(stages),
            recompute=recompute,
            bottleneck=bottleneck,
            bound=bottleneck if bound is None else min(bound, bottleneck),
            rank_seconds=seconds,
            rank_bytes=tuple(self._bytes(rank, stages, choices) for rank in range(problem.ranks)),
        )

    def _assign(self, rank: int, load: Load, stages: Sequence[Span]) -> dict[int, Choice]:
        """Of equal layers of a stage the first ones are recomputed."""
        assert load.chosen is not None
        counts = dict[tuple[float, int], list[int]]()
        assigned: dict[int, Choice] = {}
        ways = iter(zip(load.groups, load.chosen.counts, strict=True))
        for s in self.problem.stages_of(rank):
            items = self.items(stages[s])
            for _ in {item.kind for item in items}:
                group, chosen = next(ways)
                counts[s, group.kind] = list(chosen)
            for item in items:
                left = counts[s, item.kind]
                choice = max(c for c, count in enumerate(left) if count)
                left[choice] -= 1
                assigned[item.first] = self._choices(item)[choice]
        return assigned

    def _choices(self, item: Item) -> tuple[Choice, ...]:
        if self.whole.get(item.first) == item.kind:
            return self.problem.layers[item.first]
        return self.problem.units[item.first].choices

    def _bytes(self, rank: int, stages: Sequence[Span], choices: dict[int, Choice]) -> float:
        problem = self.problem
        total, transient = [], 0.0
        for s in problem.stages_of(rank):
            total += [problem.units[u].state_bytes for u in range(*stages[s])]
            made = [choices[item.first] for item in self.items(stages[s])]
            total += [problem.in_flight[s] * choice.kept_bytes for choice in made]
            transient = max(transient, *(choice.transient_bytes for choice in made))
        return math.fsum([*total, transient])

    def _name(self, first: int, stages: Sequence[Span]) -> int | str:
        name = self.problem.units[first].name
        layer, _, _ = name.partition(".")
        is_whole = first in self.whole and not any(start == first + 1 for start, _ in stages)
        return int(layer) if is_whole and layer.isdecimal() else name


class _Tidy:
    """Rounds seconds to the nearest and bytes upwards, to whole multiples of powers of two."""

    def __init__(self, problem: Problem) -> None:
        choices = [unit.choices for unit in problem.units] + list(problem.layers.values())
        self._second = _quantum(
            sum(unit.seconds for unit in problem.units)
            + sum(max(c.seconds for c in some) for some in choices)
        )
        most = max(problem.in_flight)
        self._byte = _quantum(
            sum(unit.state_bytes for unit in problem.units)
            + sum(max(most * c.kept_bytes + c.transient_bytes for c in some) for some in choices)
        )
        self._seen: dict[tuple[Choice, ...], tuple[Choice, ...]] = {}
        self._by_id: dict[int, tuple[Choice, ...]] = {}

    def kind(
        self, seconds: Sequence[float], state: Sequence[float], choices: tuple[Choice, ...]
    ) -> _Kind:
        tidy = self._by_id.get(id(choices))
        if tidy is None:
            if choices not in self._seen:
                self._seen[choices] = self._choices(choices)
            tidy = self._by_id[id(choices)] = self._seen[choices]
        return _Kind(sum(map(self._seconds, seconds)), sum(map(self._bytes, state)), tidy)

    def _choices(self, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
        return tuple(
            Choice(
                choice.recompute,
                self._seconds(choice.seconds),
                self._bytes(choice.kept_bytes),
                self._bytes(choice.transient_bytes),
            )
            for choice in choices
        )

    def _seconds(self, value: float) -> float:
        return round(value / self._second) * self._second

    def _bytes(self, value: float) -> float:
        return math.ceil(value / self._byte) * self._byte


def _quantum(total: float) -> float:
    """A power of two of which `total` has fewer than 2**53."""
    return math.ldexp(1.0, math.frexp(total)[1] - 53) if total > 0 else 1.0
