"""What to recompute on one rank: the fewest extra seconds that fit into its bytes, exactly.

Units with the same choices are counted, not told apart. All ways to choose for a number of them
make a front: points (seconds, kept bytes) of which none is worse than another in both. Fronts are
joined one after the other, without points that cannot fit or cannot beat the linear relaxation's
rounded solution. Transients are a maximum and not a sum, so each of the few distinct transients
is tried as the ceiling.

Nothing is rounded to a grid: seconds and bytes are taken as they come, so that sums are exact as
long as they are whole multiples of one power of two below 2**53 of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesaic.planning.problem import Choice

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SLACK = 1e-9
"""Relative error of sums that only bound others: far more than they have, too little to matter."""

FEW = 4096
"""Joined points below which bounds cost more than they save."""


class Group(NamedTuple):
    """Units of one kind in one stage."""

    kind: int
    units: int
    in_flight: float
    """Micro-batches whose activations the stage keeps."""


class Chosen(NamedTuple):
    """What a rank recomputes."""

    seconds: float
    """Extra, of one micro-batch."""

    bytes: float
    """Kept by all micro-batches in flight, and the largest transient."""

    counts: tuple[tuple[int, ...], ...]
    """For each group how many of its units make each choice."""


class _Front(NamedTuple):
    """All choices for units of one kind of which none is worse in seconds and in bytes."""

    seconds: Floats
    """Ascending."""

    kept: Floats
    """Descending."""

    counts: Ints
    """(points, choices)"""


class _Step(NamedTuple):
    """A step down the convex hull of a front: `seconds` buy `bytes`, so many times at most."""

    price: float
    seconds: float
    bytes: float
    times: int


class _Fastest(NamedTuple):
    """The choice of the fewest seconds."""

    seconds: float
    kept: float
    transient: float
    counts: tuple[int, ...]
    """1 for this choice, 0 for the others."""


@dataclass(frozen=True)
class _Relaxed:
    """The linear relaxation."""

    least: float
    """No choice takes fewer seconds."""

    rounded: float
    """Some choice that fits takes no more than these."""

    price: float
    """Seconds that one more byte would save."""


class Chooser:
    """Chooses for units of the given kinds; fronts that were found are kept for the next call."""

    def __init__(self, kinds: Sequence[tuple[Choice, ...]]) -> None:
        self.seconds = [np.array([c.seconds for c in kind], np.float64) for kind in kinds]
        self.kept = [np.array([c.kept_bytes for c in kind], np.float64) for kind in kinds]
        self.transient = [np.array([c.transient_bytes for c in kind], np.float64) for kind in kinds]
        self._fastest = [_fastest(kind) for kind in kinds]
        self._levels = [tuple(sorted(set(t.tolist()))) for t in self.transient]
        self._fronts: dict[tuple[int, int], list[_Front]] = {}
        self._steps: dict[tuple[int, int], list[tuple[float, float]]] = {}
        self._masks: dict[tuple[int, float], int] = {}

    def cheapest(self, groups: Sequence[Group], room: float) -> Chosen | None:
        """The fewest extra seconds whose bytes fit into `room`, of these the fewest bytes.

        None if nothing fits.
        """
        free = self._without_limit(groups)
        if free is not None and free.bytes <= room:
            return free
        least = sum(group.units * float(self.seconds[group.kind].min()) for group in groups)
        best: Chosen | None = None
        for level in self.levels(groups):
            if level > room:
                break
            found = self._within(groups, level, room, math.inf if best is None else best.seconds)
            if found is not None and (best is None or found[:2] < best[:2]):
                best = found
            if best is not None and best.seconds <= least:
                break
        return best

    def _without_limit(self, groups: Sequence[Group]) -> Chosen | None:
        """What everything would choose if there were room; None where that is not clear."""
        seconds = kept = transient = 0.0
        counts = []
        for group in groups:
            fastest = self._fastest[group.kind]
            if fastest is None:
                return None
            seconds += group.units * fastest.seconds
            kept += group.units * group.in_flight * fastest.kept
            transient = max(transient, fastest.transient)
            counts.append(tuple(group.units * one for one in fastest.counts))
        return Chosen(seconds, kept + transient, tuple(counts))

    def least_bytes(self, groups: Sequence[Group]) -> float:
        """The fewest bytes that these units can do with."""
        return min(
            level
            + sum(
                group.units * group.in_flight * float(self._front(group, level).kept[-1])
                for group in groups
            )
            for level in self.levels(groups)
        )

    def levels(self, groups: Sequence[Group]) -> list[float]:
        """Transients that may be the largest: at least one choice of every unit is within."""
        levels = {level for group in groups for level in self._levels[group.kind]}
        floor = max((self._levels[group.kind][0] for group in groups), default=0.0)
        return sorted(level for level in levels if level >= floor)

    def _within(
        self, groups: Sequence[Group], level: float, room: float, upper: float
    ) -> Chosen | None:
        """The best with no transient above `level`, if it takes at most `upper` seconds."""
        fronts = [self._front(group, level) for group in groups]
        scaled = [front.kept * group.in_flight for front, group in zip(fronts, groups, strict=True)]
        order = sorted(range(len(groups)), key=lambda g: len(fronts[g].seconds))
        capacity = room - level
        rest_bytes = [0.0]
        for g in reversed(order):
            rest_bytes.append(rest_bytes[-1] + float(scaled[g][-1]))
        if rest_bytes[-1] > capacity:
            return None
        relaxed = None
        if math.prod(len(front.seconds) for front in fronts) > FEW:
            relaxed = self._relax(groups, level, capacity)
            if relaxed.least * (1 - SLACK) > upper:
                return None
            upper = min(upper, relaxed.rounded)
        joined = _Join(capacity, upper * (1 + SLACK))
        if relaxed is not None:
            joined.price(relaxed.price, [(fronts[g].seconds, scaled[g]) for g in order])
        for place, g in enumerate(order[:-1]):
            joined.add(fronts[g].seconds, scaled[g], rest_bytes[len(order) - 1 - place])
        last = order[-1] if order else None
        picked = joined.finish(
            *((fronts[last].seconds, scaled[last]) if last is not None else (_ZERO, _ZERO))
        )
        if picked is None:
            return None
        seconds, kept, points = picked
        counts = dict(zip(order, points, strict=False))
        return Chosen(
            seconds,
            kept + level,
            tuple(tuple(fronts[g].counts[counts[g]].tolist()) for g in range(len(groups))),
        )

    def _relax(self, groups: Sequence[Group], level: float, capacity: float) -> _Relaxed:
        """Buy bytes where they cost the fewest seconds, until what is kept fits."""
        seconds, kept, steps = 0.0, 0.0, []
        for group in groups:
            single = self._front(group._replace(units=1), level)
            seconds += group.units * float(single.seconds[0])
            kept += group.units * group.in_flight * float(single.kept[0])
            for step_seconds, step_bytes in self.hull(group.kind, level):
                step_bytes *= group.in_flight
                steps.append(
                    _Step(step_seconds / step_bytes, step_seconds, step_bytes, group.units)
                )
        price, least = 0.0, seconds
        for step in sorted(steps):
            excess = kept - capacity
            if excess <= 0:
                break
            price = step.price
            count = min(step.times, math.ceil(excess / step.bytes))
            least = seconds + min(excess, step.times * step.bytes) * price
            seconds += count * step.seconds
            kept -= count * step.bytes
        return _Relaxed(least, seconds if kept <= capacity else math.inf, price)

    def _front(self, group: Group, level: float) -> _Front:
        mask = self._mask(group.kind, level)
        fronts = self._fronts.get((group.kind, mask))
        if fronts is None:
            allowed = np.flatnonzero(self.transient[group.kind] <= level)
            seconds, kept = self.seconds[group.kind][allowed], self.kept[group.kind][allowed]
            points = pareto(seconds, kept)
            counts = np.zeros((len(points), len(self.kept[group.kind])), np.int64)
            counts[np.arange(len(points)), allowed[points]] = 1
            fronts = [_Front(seconds[points], kept[points], counts)]
            self._fronts[group.kind, mask] = fronts
        single = fronts[0]
        while len(fronts) < group.units:
            before = fronts[-1]
            seconds = np.add.outer(before.seconds, single.seconds).ravel()
            kept = np.add.outer(before.kept, single.kept).ravel()
            points = pareto(seconds, kept)
            first, second = np.divmod(points, len(single.seconds))
            counts = before.counts[first] + single.counts[second]
            fronts.append(_Front(seconds[points], kept[points], counts))
        return fronts[group.units - 1]

    def _mask(self, kind: int, level: float) -> int:
        """Choices within a level, as bits."""
        key = kind, level
        if key not in self._masks:
            within = self.transient[kind] <= level
            self._masks[key] = sum(1 << int(c) for c in np.flatnonzero(within))
        return self._masks[key]

    def hull(self, kind: int, level: float) -> list[tuple[float, float]]:
        """Steps (seconds, bytes) of one unit along its lower convex hull, cheapest first."""
        key = kind, self._mask(kind, level)
        if key not in self._steps:
            front = self._front(Group(kind, 1, 1.0), level)
            self._steps[key] = _hull(front.seconds.tolist(), front.kept.tolist())
        return self._steps[key]


def _fastest(choices: Sequence[Choice]) -> _Fastest | None:
    """None where two take the same."""
    least = min(choice.seconds for choice in choices)
    best = [choice for choice in choices if choice.seconds == least]
    if len(best) > 1:
        return None
    counts = tuple(int(choice is best[0]) for choice in choices)
    return _Fastest(least, best[0].kept_bytes, best[0].transient_bytes, counts)


def pareto(seconds: Floats, kept: Floats) -> Ints:
    """Numbers of the points that no other beats in both; equals once. Seconds ascend."""
    order = np.lexsort((kept, seconds))
    ordered = kept[order]
    better = np.empty(len(order), np.bool_)
    better[:1] = True
    np.less(ordered[1:], np.minimum.accumulate(ordered)[:-1], out=better[1:])
    return order[better]


def _hull(seconds: list[float], kept: list[float]) -> list[tuple[float, float]]:
    corners: list[int] = []
    for point in range(len(seconds)):
        while len(corners) > 1:
            first, second = corners[-2], corners[-1]
            rise = (seconds[second] - seconds[first]) * (kept[second] - kept[point])
            if rise < (seconds[point] - seconds[second]) * (kept[first] - kept[second]):
                break
            corners.pop()
        corners.append(point)
    return [(seconds[b] - seconds[a], kept[a] - kept[b]) for a, b in itertools.pairwise(corners)]


_ZERO = np.zeros(1)


class _Join:
    """Points of the groups joined so far."""

    def __init__(self, capacity: float, upper: float) -> None:
        self.capacity = capacity
        self.upper = upper
        self.seconds, self.kept = _ZERO, _ZERO
        self.trace: list[tuple[Ints, Ints]] = []
        self.byte_price = 0.0
        self.rest_seconds: list[float] = []

    def price(self, price: float, fronts: Sequence[tuple[Floats, Floats]]) -> None:
        """Bound what is still to come by a price of bytes."""
        self.byte_price = price
        self.upper += SLACK * price * self.capacity
        rest = 0.0
        for seconds, kept in reversed(fronts):
            self.rest_seconds.append(rest)
            rest += float((seconds + price * kept).min())

    def add(self, seconds: Floats, kept: Floats, rest_bytes: float) -> None:
        """Join a front; `rest_bytes` are the least that all after it need."""
        if len(seconds) == 1:
            self.seconds, self.kept = self.seconds + seconds, self.kept + kept
            zeros = np.zeros(len(self.seconds), np.int64)
            self.trace.append((np.arange(len(self.seconds)), zeros))
            self._next_rest()
            return
        all_seconds = np.add.outer(self.seconds, seconds).ravel()
        all_kept = np.add.outer(self.kept, kept).ravel()
        rest_seconds = self._next_rest()
        good = (all_kept + rest_bytes <= self.capacity) & (
            all_seconds + self.byte_price * (all_kept - self.capacity) + rest_seconds <= self.upper
        )
        fits = np.flatnonzero(good)
        points = fits[pareto(all_seconds[fits], all_kept[fits])]
        self.seconds, self.kept = all_seconds[points], all_kept[points]
        first, second = np.divmod(points, len(seconds))
        self.trace.append((first, second))

    def _next_rest(self) -> float:
        return self.rest_seconds.pop() if self.rest_seconds else 0.0

    def finish(self, seconds: Floats, kept: Floats) -> tuple[float, float, list[int]] | None:
        """Join the last front: seconds, kept bytes and the point of each front, in order."""
        where = np.searchsorted(-kept, self.kept - self.capacity)
        fits = np.flatnonzero(where < len(kept))
        if not len(fits):
            return None
        where = where[fits]
        all_seconds, all_kept = self.seconds[fits] + seconds[where], self.kept[fits] + kept[where]
        best = int(np.lexsort((all_kept, all_seconds))[0])
        points, state = [int(where[best])], int(fits[best])
        for first, second in reversed(self.trace):
            points.append(int(second[state]))
            state = int(first[state])
        return float(all_seconds[best]), float(all_kept[best]), points[::-1]
