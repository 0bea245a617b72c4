"""Several stages a rank of equal layers that may be cut in two, exactly where these are few.

For given cuts `EqualLayers` is exact. Which layers to cut is found by a walk over the ranks: all
that one rank needs to know of those before is at which of the edges that it shares with the last
of them a layer is cut, and how many layers they can hold within a limit of seconds. The limit is
halved down to one that cannot be kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from moesaic.planning.choose import Floats, Ints
from moesaic.planning.interleave import EqualLayers, Halves

Edges = tuple[bool, ...]
"""At which of the edges that two ranks share a layer is cut, by the turn of their stages."""

MOST_EXACT = 4
"""Stages a rank for which all cuts are tried; for more those at one edge, at all and at none."""

CLOSE = 1e-3
"""How near the limit is brought to the least, as a fraction, before it is lowered step by step."""


class HalvedLayers:
    """Equal layers, any of which may be cut in two."""

    def __init__(self, equal: EqualLayers) -> None:
        self.equal = equal
        self.problem = equal.row.problem
        each = self.problem.interleave
        self.is_all = each <= MOST_EXACT
        """Whether all cuts are tried."""
        self.edges = [
            edges
            for edges in itertools.product((False, True), repeat=each)
            if each <= MOST_EXACT or sum(edges) in (0, 1, each)
        ]
        self.cuts = np.array([sum(edges) for edges in self.edges], np.float64)
        self._with_halves: dict[tuple[int, Edges, Edges], EqualLayers] = {}
        self._seconds: dict[tuple[int, Edges, Edges, int], float] = {}

    def best(self) -> EqualLayers:
        """The layers with the best cuts that were found; none where nothing fits."""
        best, upper = self.equal, self.equal.slowest()
        if upper == math.inf:
            best = self._faster(math.inf) or best
            upper = best.slowest()
        layer = self.equal.row.kinds[self.equal.row.whole[self.equal.first]].seconds
        lower = self.equal.count * layer / sum(self.problem.speeds) if upper < math.inf else upper
        while lower < upper * (1 - CLOSE):
            middle = (lower + upper) / 2
            found = self._faster(middle)
            if found is None:
                lower = middle
            else:
                best, upper = found, found.slowest()
        while upper < math.inf and (found := self._faster(upper)) is not None:
            best, upper = found, found.slowest()
        return best

    def _faster(self, limit: float) -> EqualLayers | None:
        """Cuts with which every rank takes less than a limit."""
        ranks = [self._most(rank, limit) for rank in range(self.problem.ranks)]
        for start in self.edges:
            if not self._may_start(start):
                continue
            most = np.full(len(self.edges), -np.inf)
            most[self.edges.index(start)] = 0
            ways = []
            for of_rank in ranks:
                total = most[:, None] + of_rank + self.cuts
                ways.append(total.argmax(axis=0))
                most = total.max(axis=0)
            for end in range(len(self.edges)):
                again = self._cut_twice(start, self.edges[end])
                if again is not None and most[end] - again >= self.equal.count:
                    return self._built(ways, end)
        return None

    def _may_start(self, before: Edges) -> bool:
        """Whether the first rank's stages may begin so."""
        return not any(before) if self.problem.v_shaped else not before[0]

    def _cut_twice(self, start: Edges, end: Edges) -> int | None:
        """How many cuts after the last rank were counted twice; None if ends do not meet.

        The last rank's stages go on in the first rank, or in the last one itself.
        """
        if self.problem.v_shaped:
            return int(end[0]) if end[0] == end[1] else None
        return 0 if end == (*start[1:], False) else None

    def _most(self, rank: int, limit: float) -> Floats:
        """Whole layers that a rank holds below a limit, by the edges before and after it."""
        most = np.full((len(self.edges), len(self.edges)), -np.inf)
        layer = self.equal.row.kinds[self.equal.row.whole[self.equal.first]].seconds
        top = self.equal.count
        if layer > 0 and limit < math.inf:
            top = min(top, int(limit * self.problem.speeds[rank] / layer) + 1)
        for b, before in enumerate(self.edges):
            for a, after in enumerate(self.edges):
                equal = self._equal(rank, before, after)
                low, high = equal.fewest(rank) - 1, top
                while low < high:
                    middle = (low + high + 1) // 2
                    if self._takes(equal, (rank, before, after, middle)) < limit:
                        low = middle
                    else:
                        high = middle - 1
                if low >= equal.fewest(rank):
                    most[b, a] = low
        return most

    def _takes(self, equal: EqualLayers, key: tuple[int, Edges, Edges, int]) -> float:
        if key not in self._seconds:
            self._seconds[key] = equal.seconds(key[0], key[3])
        return self._seconds[key]

    def _equal(self, rank: int, before: Edges, after: Edges) -> EqualLayers:
        key = rank, before, after
        if key not in self._with_halves:
            halves = list(self.equal.halves)
            self._cut(halves, *key)
            self._with_halves[key] = dataclasses.replace(self.equal, halves=tuple(halves))
        return self._with_halves[key]

    def _cut(self, halves: list[Halves], rank: int, before: Edges, after: Edges) -> None:
        """Note halves of a rank's stages; every other stage of a V runs back."""
        for turn, stage in enumerate(self.problem.stages_of(rank)):
            ends = before[turn], after[turn]
            halves[stage] = ends[::-1] if self.problem.v_shaped and turn else ends

    def _built(self, ways: list[Ints], end: int) -> EqualLayers:
        halves = list(self.equal.halves)
        for rank in reversed(range(self.problem.ranks)):
            start = int(ways[rank][end])
            self._cut(halves, rank, self.edges[start], self.edges[end])
            end = start
        return dataclasses.replace(self.equal, halves=tuple(halves))
