"""Several stages a rank of equal layers, exactly.

Stages of a rank share its time and its bytes. Where layers are equal, a rank's time depends only on
how many it has: beyond the least that each stage needs, they lie best in the stage with the fewest
micro-batches in flight. Handing out layers one by one, each to the rank that takes the least time
with one more, gives the fastest slowest rank, because a rank's time only grows.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moesaic.planning.choose import SLACK, Group
from moesaic.planning.row import Row
from moesaic.planning.split import Span

Measure = Callable[[int, dict[int, int]], float]
"""Of a rank with whole layers in each of its stages: its seconds, or the bytes that it lacks."""


Halves = tuple[bool, bool]
"""Whether a stage begins with the second half of a layer, and ends with the first half of one."""


@dataclass(frozen=True)
class EqualLayers:
    """A row of equal layers, any of which may end a stage, with other units before and after."""

    row: Row
    first: int
    """First unit of the first layer."""

    count: int
    least: tuple[int, ...]
    """Whole layers that each stage needs so as not to be empty, if it has no half."""

    halves: tuple[Halves, ...]
    """Of each stage."""

    before: tuple[int, ...]
    """Kinds of what is on the first stage, before the layers."""

    after: tuple[int, ...]
    """Kinds of what is on the last stage, after the layers."""

    @classmethod
    def of(cls, row: Row) -> EqualLayers | None:
        """The most equal layers in a row, none of them cut; None if there are too few.

        Units before them are on the first stage then, and those after them on the last.
        """
        problem, cuts = row.problem, row.problem.cuts
        firsts = max(_runs(row), key=len, default=[])
        if not firsts or not set(firsts[1:]) <= cuts:
            return None
        first, end = firsts[0], firsts[-1] + 2
        ends = {first, end} - {0, len(problem.units)}
        least = [1] * problem.stages
        least[0] -= first in ends & cuts
        least[-1] -= end in ends & cuts
        if sum(least) > len(firsts):
            return None
        before, after = row.items((0, first)), row.items((end, len(problem.units)))
        return cls(
            row,
            first,
            len(firsts),
            tuple(least),
            ((False, False),) * problem.stages,
            tuple(item.kind for item in before),
            tuple(item.kind for item in after),
        )

    def relaxed(self) -> EqualLayers:
        """The layers without what may be on any other stage, and stages that may be empty.

        It is no slower than any layout of the whole row.
        """
        in_layers = {unit for first in self.row.whole for unit in (first, first + 1)}
        single, last = self.row.single, len(self.row.single) - 1
        return replace(
            self,
            least=(0,) * len(self.least),
            before=() if 0 in in_layers else (single[0],),
            after=() if last in in_layers else (single[last],),
        )

    @property
    def end(self) -> int:
        """The unit after the last layer."""
        return self.first + 2 * self.count

    @property
    def is_all(self) -> bool:
        """Whether there are no other places to cut than between layers."""
        return not self.row.problem.cuts - {0, *range(self.first, self.end + 1, 2)}

    @property
    def has_halves(self) -> bool:
        """Whether any of the layers may be cut."""
        return set(range(self.first + 1, self.end, 2)) <= self.row.problem.cuts

    def best(self) -> list[Span] | None:
        """Stages of the least bottleneck; in each rank as equal in time as that allows."""
        layers = self._fastest()
        limit = max(self.seconds(rank, number) for rank, number in enumerate(layers))
        if limit == math.inf:
            return None
        counts = [0] * self.row.problem.stages
        for rank, number in enumerate(layers):
            for stage, count in self._even(rank, number, limit).items():
                counts[stage] = count
        return self._stages(counts)

    def can_be_within(self, limit: float) -> bool:
        """Whether some layout's bottleneck is within a limit."""
        left = self._shared
        for rank in range(self.row.problem.ranks):
            left -= self._most(rank, limit, left)
            if left <= 0:
                return True
        return False

    @property
    def _shared(self) -> int:
        """Whole layers, whoever has them."""
        return self.count - sum(end for _, end in self.halves)

    def _most(self, rank: int, limit: float, most: int) -> int:
        """Whole layers with which a rank is within a limit of its seconds, up to a number."""
        row, problem = self.row, self.row.problem
        others = sum(
            row.kinds[kind].seconds
            for stage in problem.stages_of(rank)
            for kind in self._others(stage)
        )
        layer = row.kinds[row.whole[self.first]].seconds
        # So many if nothing is recomputed.
        number = min(most, math.floor((limit * problem.speeds[rank] - others) / layer + SLACK))
        fewest = self.fewest(rank)
        while number >= fewest and self.seconds(rank, number) > limit:
            number -= 1
        return number if number >= fewest else 0

    def slowest(self) -> float:
        """The least bottleneck; infinite if nothing fits."""
        layers = self._fastest()
        return max(self.seconds(rank, number) for rank, number in enumerate(layers))

    def tightest(self) -> list[Span]:
        """Stages of which the one that lacks the most bytes lacks the least."""
        counts = [0] * self.row.problem.stages
        fewest = [self.fewest(rank) for rank in range(self.row.problem.ranks)]
        for rank, number in enumerate(self._hand_out(self._lack, fewest)):
            for stage, count in self._crowd(rank, number).items():
                counts[stage] = count
        return self._stages(counts)

    def _seconds(self, rank: int, counts: dict[int, int]) -> float:
        return self.row.load(rank, self._groups(counts)).seconds

    def _lack(self, rank: int, counts: dict[int, int]) -> float:
        return self.row.least_bytes(self._groups(counts)) - self.row.problem.budgets[rank]

    def _fastest(self) -> list[int]:
        """Whole layers of each rank, so that the slowest is as fast as can be."""
        row, problem = self.row, self.row.problem
        work = self._shared * row.kinds[row.whole[self.first]].seconds + sum(
            row.kinds[kind].seconds
            for stage in range(problem.stages)
            for kind in self._others(stage)
        )
        # The slowest rank takes no less than the mean, up to which the order does not matter.
        mean = work / sum(problem.speeds) * (1 - SLACK)
        fewest = [self.fewest(rank) for rank in range(problem.ranks)]
        begin = [
            max(least, self._most(rank, mean, self._shared)) for rank, least in enumerate(fewest)
        ]
        return self._hand_out(self._seconds, begin if sum(begin) <= self._shared else fewest)

    def _hand_out(self, measure: Measure, begin: Sequence[int]) -> list[int]:
        """Whole layers of each rank, so that the largest measure is the least."""
        layers = list(begin)
        heap = [
            (measure(rank, self._crowd(rank, number + 1)), rank)
            for rank, number in enumerate(layers)
        ]
        heapq.heapify(heap)
        for _ in range(self._shared - sum(layers)):
            _, rank = heap[0]
            layers[rank] += 1
            more = measure(rank, self._crowd(rank, layers[rank] + 1))
            heapq.heapreplace(heap, (more, rank))
        return layers

    def seconds(self, rank: int, number: int) -> float:
        """The least that a rank takes with so many whole layers."""
        return self._seconds(rank, self._crowd(rank, number))

    def fewest(self, rank: int) -> int:
        """Whole layers without which a stage of the rank would be empty."""
        return sum(map(self._fewest, self.row.problem.stages_of(rank)))

    def _fewest(self, stage: int) -> int:
        return 0 if any(self.halves[stage]) else self.least[stage]

    def _crowd(self, rank: int, number: int) -> dict[int, int]:
        """Layers of each stage of a rank that holds them in the fewest bytes."""
        problem = self.row.problem
        counts = {stage: self._fewest(stage) for stage in problem.stages_of(rank)}
        lightest = min(counts, key=lambda stage: problem.in_flight[stage])
        counts[lightest] += number - sum(counts.values())
        return counts

    def _even(self, rank: int, number: int, limit: float) -> dict[int, int]:
        """Layers of each stage of a rank, as equal in time as a limit of its seconds allows."""
        in_flight = self.row.problem.in_flight
        counts = self._crowd(rank, self.fewest(rank))
        layer = self.row.kinds[self.row.whole[self.first]].seconds
        others = {
            stage: sum(self.row.kinds[kind].seconds for kind in self._others(stage))
            for stage in counts
        }
        while sum(counts.values()) < number:
            counts[min(counts, key=lambda s: others[s] + counts[s] * layer)] += 1
        while self._seconds(rank, counts) > limit:
            lightest = min(counts, key=lambda s: in_flight[s])
            heaviest = max(
                (s for s in counts if counts[s] > self._fewest(s) and s != lightest),
                key=lambda s: (in_flight[s], counts[s]),
            )
            counts[heaviest] -= 1
            counts[lightest] += 1
        return counts

    def _others(self, stage: int) -> list[int]:
        """Kinds of what a stage has besides whole layers."""
        begins, ends = self.halves[stage]
        return [
            *(self.before if stage == 0 else ()),
            *([self.row.single[self.first + 1]] if begins else []),
            *([self.row.single[self.first]] if ends else []),
            *(self.after if stage == self.row.problem.stages - 1 else ()),
        ]

    def _groups(self, counts: dict[int, int]) -> tuple[Group, ...]:
        whole, units = self.row.whole[self.first], Counter[tuple[float, int]]()
        for stage, layers in counts.items():
            in_flight = self.row.problem.in_flight[stage]
            units.update((in_flight, kind) for kind in self._others(stage))
            units[in_flight, whole] += layers
        return tuple(
            Group(kind, count, in_flight)
            for (in_flight, kind), count in sorted(units.items())
            if count
        )

    def _stages(self, counts: Sequence[int]) -> list[Span]:
        edges, unit = [0], self.first
        for layers, (begins, ends) in zip(counts, self.halves, strict=True):
            unit += begins + 2 * layers + ends
            edges.append(unit)
        return list(itertools.pairwise([*edges[:-1], len(self.row.problem.units)]))


def _runs(row: Row) -> list[list[int]]:
    """First units of equal layers that follow each other."""
    runs: list[list[int]] = []
    for first, kind in sorted(row.whole.items()):
        if runs and runs[-1][-1] + 2 == first and row.whole[runs[-1][-1]] == kind:
            runs[-1].append(first)
        else:
            runs.append([first])
    return runs
