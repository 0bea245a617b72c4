"""Several stages a rank: exact where all layers are equal, a good layout and a bound elsewhere.

Stages of a rank share its time and its bytes. Where layers are equal, a rank's time depends only on
how many it has: beyond the least that each stage needs they lie best in the stage with the fewest
micro-batches in flight. Handing out layers one by one, each to the rank that takes the least time
with one more, gives the fastest slowest rank, because a rank's time only grows.

Where they are not equal, layouts are improved step by step, and held against two lower bounds: a
linear program that hands out units in fractions and in any order, and, for equal layers that may
be cut in two, one that hands out whole halves in any order.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesaic.planning.choose import Group
from moesaic.planning.row import Row
from moesaic.planning.split import Span

Measure = Callable[[int, tuple[Group, ...]], float]
"""Of a rank with given units: its seconds, or the bytes that it lacks."""


@dataclass(frozen=True)
class EqualLayers:
    """A row of equal layers, any of which may end a stage, with other units before and after."""

    row: Row
    first: int
    """First unit of the first layer."""

    count: int
    least: tuple[int, ...]
    """Layers that each stage needs so as not to be empty."""

    is_exact: bool
    """Whether stages may be cut between layers only."""

    @classmethod
    def of(cls, row: Row) -> EqualLayers | None:
        """The row as equal layers; None if it is not."""
        firsts, problem = sorted(row.whole), row.problem
        if len(set(row.whole.values())) != 1:
            return None
        first, end = firsts[0], firsts[-1] + 2
        between = set(range(first + 2, end, 2))
        if firsts != list(range(first, end, 2)) or not between <= problem.cuts:
            return None
        ends = {first, end} - {0, len(problem.units)}
        least = [1] * problem.stages
        least[0] -= first in ends & problem.cuts
        least[-1] -= end in ends & problem.cuts
        is_exact = not problem.cuts - between - ends - {0}
        if sum(least) > len(firsts):
            return None
        return cls(row, first, len(firsts), tuple(least), is_exact)

    def best(self) -> list[Span] | None:
        """Stages of the least bottleneck; in each rank as equal in time as that allows."""
        layers = self._hand_out(self._seconds)
        limit = max(self._seconds(rank, self._crowded(rank, n)) for rank, n in enumerate(layers))
        if limit == math.inf:
            return None
        counts = [0] * self.row.problem.stages
        for rank, number in enumerate(layers):
            for stage, count in self._even(rank, number, limit).items():
                counts[stage] = count
        return self._stages(counts)

    def tightest(self) -> list[Span]:
        """Stages of which the one that lacks the most bytes lacks the least."""
        counts = [0] * self.row.problem.stages
        for rank, number in enumerate(self._hand_out(self._lack)):
            for stage, count in self._crowd(rank, number).items():
                counts[stage] = count
        return self._stages(counts)

    def _seconds(self, rank: int, groups: tuple[Group, ...]) -> float:
        return self.row.load(rank, groups).seconds

    def _lack(self, rank: int, groups: tuple[Group, ...]) -> float:
        return self.row.least_bytes(groups) - self.row.problem.budgets[rank]

    def _hand_out(self, measure: Measure) -> list[int]:
        """Layers of each rank, so that the largest measure is the least."""
        problem = self.row.problem
        layers = [
            sum(self.least[stage] for stage in problem.stages_of(rank))
            for rank in range(problem.ranks)
        ]
        heap = [
            (measure(rank, self._crowded(rank, number + 1)), rank)
            for rank, number in enumerate(layers)
        ]
        heapq.heapify(heap)
        for _ in range(self.count - sum(layers)):
            _, rank = heap[0]
            layers[rank] += 1
            more = measure(rank, self._crowded(rank, layers[rank] + 1))
            heapq.heapreplace(heap, (more, rank))
        return layers

    def _crowd(self, rank: int, number: int) -> dict[int, int]:
        """Layers of each stage of a rank that holds them in the fewest bytes."""
        problem = self.row.problem
        stages = problem.stages_of(rank)
        counts = {stage: self.least[stage] for stage in stages}
        lightest = min(stages, key=lambda stage: problem.in_flight[stage])
        counts[lightest] += number - sum(counts.values())
        return counts

    def _crowded(self, rank: int, number: int) -> tuple[Group, ...]:
        return self._groups(self._crowd(rank, number))

    def _even(self, rank: int, number: int, limit: float) -> dict[int, int]:
        """Layers of each stage of a rank, as equal in time as a limit of its seconds allows."""
        in_flight = self.row.problem.in_flight
        counts = self._crowd(rank, sum(self.least[s] for s in self.row.problem.stages_of(rank)))
        layer = self.row.kinds[self.row.whole[self.first]].seconds
        while sum(counts.values()) < number:
            stage = min(counts, key=lambda s: self._extra(s) + counts[s] * layer)
            counts[stage] += 1
        while self._seconds(rank, self._groups(counts)) > limit:
            lightest = min(counts, key=lambda s: in_flight[s])
            heaviest = max(
                (s for s in counts if counts[s] > self.least[s] and s != lightest),
                key=lambda s: (in_flight[s], counts[s]),
            )
            counts[heaviest] -= 1
            counts[lightest] += 1
        return counts

    def _extra(self, stage: int) -> float:
        return sum(self.row.kinds[kind].seconds for kind in self._others(stage))

    def _others(self, stage: int) -> list[int]:
        """Kinds of units of a stage besides layers."""
        single, end = self.row.single, self.first + 2 * self.count
        before = single[: self.first] if stage == 0 else []
        return before + (single[end:] if stage == self.row.problem.stages - 1 else [])

    def _groups(self, counts: dict[int, int]) -> tuple[Group, ...]:
        whole = self.row.whole[self.first]
        return tuple(
            Group(kind, count, self.row.problem.in_flight[stage])
            for stage, layers in counts.items()
            for kind, count in sorted(Counter([*self._others(stage), *[whole] * layers]).items())
        )

    def _stages(self, counts: Sequence[int]) -> list[Span]:
        ends = [self.first + 2 * n for n in itertools.accumulate(counts)]
        return list(itertools.pairwise([0, *ends[:-1], len(self.row.problem.units)]))
