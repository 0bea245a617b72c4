"""Layouts one step apart: make one better step by step, and list those that are about as good.

A step moves the edges between neighbouring stages, all by as much: the stage at one end of them
gives units away, the one at the other end gets as many, and those between pass them on.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moesaic.planning.choose import Group
from moesaic.planning.row import Load, Row
from moesaic.planning.split import Span

Edges = tuple[int, ...]
"""Where stages begin and the last one ends, as numbers of the row's positions."""

STRIDES = (1, 2)
"""Positions that a step moves: half layers and layers where layers may be cut in two."""


SHAKES = ((0.01, 0.0), (0.003, 0.75))
"""Runs of random steps: how much worse a step may be at the beginning, as a fraction, and the
share of steps that are between neighbours."""

STEPS = 10_000
"""Random steps of a run; some 20,000 take a second of one core."""

SHARPNESS = 24.0
"""Power by which slow ranks count more than fast ones."""

MISSING = 1e6
"""Seconds that a layout counts for that does not fit."""


class Score(NamedTuple):
    """How good a layout is; less is better."""

    lack: float
    """Bytes that ranks lack, all together."""

    seconds: tuple[float, ...]
    """Of all ranks, the slowest first."""


class Layouts:
    """Layouts of a row, and how good each is."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.rank_of = {
            stage: rank
            for rank in range(row.problem.ranks)
            for stage in row.problem.stages_of(rank)
        }
        self._groups: dict[tuple[Span, float], tuple[Group, ...]] = {}

    def edges(self, stages: Sequence[Span]) -> Edges:
        """A layout as positions."""
        where = {position: number for number, position in enumerate(self.row.positions)}
        return tuple(where[unit] for unit in (*(begin for begin, _ in stages), stages[-1][1]))

    def stages(self, edges: Edges) -> list[Span]:
        """A layout as units."""
        at = [self.row.positions[edge] for edge in edges]
        return list(itertools.pairwise(at))

    def groups(self, rank: int, edges: Edges) -> tuple[Group, ...]:
        """What a rank holds."""
        found: tuple[Group, ...] = ()
        for stage in self.row.problem.stages_of(rank):
            key = (edges[stage], edges[stage + 1]), self.row.problem.in_flight[stage]
            if key not in self._groups:
                span = self.row.positions[key[0][0]], self.row.positions[key[0][1]]
                self._groups[key] = self.row.groups([(span, key[1])])
            found += self._groups[key]
        return found

    def load(self, rank: int, edges: Edges) -> Load:
        """What a rank has to do."""
        return self.row.load(rank, self.groups(rank, edges))

    def score(self, edges: Edges) -> Score:
        """How good a layout is."""
        lack, seconds = 0.0, []
        for rank in range(self.row.problem.ranks):
            load = self.load(rank, edges)
            seconds.append(load.seconds)
            if load.chosen is None:
                lack += self.lack(rank, edges)
        return Score(lack, tuple(sorted(seconds, reverse=True)))

    def lack(self, rank: int, edges: Edges) -> float:
        """Bytes that a rank needs beyond what it has; below 0 if some are left."""
        least = self.row.least_bytes(self.groups(rank, edges))
        return least - self.row.problem.budgets[rank]

    def improve(self, edges: Edges) -> Edges:
        """Take steps off the slowest rank, or off the one that lacks most, while any helps."""
        score = self.score(edges)
        while True:
            ranks = range(self.row.problem.ranks)
            if score.lack > 0:
                worst = max(ranks, key=lambda rank: self.lack(rank, edges))
            else:
                worst = max(ranks, key=lambda rank: self.load(rank, edges).seconds)
            best = min(
                ((self.score(step), step) for step in self._giving(worst, edges)),
                default=(score, edges),
            )
            if best[0] >= score:
                return edges
            score, edges = best

    def shake(self, edges: Edges) -> Edges:
        """Take random steps, fewer and fewer of them for the worse; the best layout on the way.

        The steps are the same in every run of the program.
        """
        rng = random.Random(0)
        for warmth, near in SHAKES:
            edges = self._shake(edges, rng, warmth, near)
        return edges

    def _shake(self, edges: Edges, rng: random.Random, warmth: float, near: float) -> Edges:
        stages, unit = len(edges) - 1, self._energy(edges) or 1.0
        at, energy = edges, 1.0
        best, least = edges, self.score(edges)
        for left in range(STEPS, 0, -1):
            giver = rng.randrange(stages)
            is_near = rng.random() < near
            taker = giver + rng.choice((-1, 1)) if is_near else rng.randrange(stages)
            step = _step(at, giver, taker, rng.choice(STRIDES)) if 0 <= taker < stages else None
            if step is None:
                continue
            after = self._energy(step) / unit
            if after <= energy or rng.random() < math.exp((energy - after) * STEPS / warmth / left):
                at, energy = step, after
                score = self.score(at)
                if score < least:
                    best, least = at, score
        return best

    def _energy(self, edges: Edges) -> float:
        """One number for how slow the slowest ranks are, or how many bytes are missing."""
        score = self.score(edges)
        if score.lack > 0:
            return MISSING * (1 + score.lack / math.fsum(map(abs, self.row.problem.budgets)))
        top = score.seconds[0] or 1.0
        return top * math.pow(
            math.fsum((part / top) ** SHARPNESS for part in score.seconds), 1 / SHARPNESS
        )

    def _giving(self, rank: int, edges: Edges) -> Iterator[Edges]:
        """Steps by which a stage of a rank gives units to a rank that stays faster, or fits."""
        before = self.load(rank, edges).seconds
        for giver in self.row.problem.stages_of(rank):
            for taker in range(len(edges) - 1):
                other = self.rank_of[taker]
                if other != rank:
                    for stride in STRIDES:
                        step = _step(edges, giver, taker, stride)
                        if step and self.load(other, step).seconds < before:
                            yield step

    def near(self, seeds: Sequence[Edges], *, limit: float, count: int) -> list[Edges]:
        """Layouts of at most `limit` seconds a rank, reached from seeds by small steps, in turns.

        Args:
            seeds: Where to begin; one that is over the limit is left out.
            limit: Seconds of the slowest rank.
            count: Layouts to find, at most.

        Returns:
            Layouts in the order of the slowest rank's seconds and those of all ranks.
        """
        found: dict[Edges, tuple[float, float]] = {}
        heaps: list[list[tuple[float, float, Edges]]] = [[] for _ in seeds]
        for heap, seed in zip(heaps, seeds, strict=True):
            self._visit(seed, heap, found, limit, count)
        while any(heaps) and len(found) < count:
            for heap in heaps:
                if heap:
                    *_, edges = heapq.heappop(heap)
                    for step in _small_steps(edges):
                        self._visit(step, heap, found, limit, count)
        return sorted(found, key=lambda edges: (*found[edges], edges))

    def _visit(
        self,
        edges: Edges,
        heap: list[tuple[float, float, Edges]],
        found: dict[Edges, tuple[float, float]],
        limit: float,
        count: int,
    ) -> None:
        if edges in found or len(found) >= count:
            return
        seconds = self.score(edges).seconds
        if seconds[0] <= limit:
            found[edges] = seconds[0], math.fsum(seconds)
            heapq.heappush(heap, (*found[edges], edges))


def _step(edges: Edges, giver: int, taker: int, stride: int) -> Edges | None:
    """Move units from one stage to another; None if it has not more than that."""
    if edges[giver + 1] - edges[giver] <= stride or giver == taker:
        return None
    moved = list(edges)
    if taker < giver:
        moved[taker + 1 : giver + 1] = [edge + stride for edge in edges[taker + 1 : giver + 1]]
    else:
        moved[giver + 1 : taker + 1] = [edge - stride for edge in edges[giver + 1 : taker + 1]]
    return tuple(moved)


def _small_steps(edges: Edges) -> Iterator[Edges]:
    """All steps between neighbours."""
    for stage in range(len(edges) - 2):
        for giver, taker in ((stage, stage + 1), (stage + 1, stage)):
            for stride in STRIDES:
                step = _step(edges, giver, taker, stride)
                if step:
                    yield step
