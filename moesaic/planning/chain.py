"""Cut a row of any units into one stage a rank, exactly: the slowest rank as fast as can be.

What a stage costs depends on its rank and on the kinds it holds, not on where it lies; equal
stages share one number. Each cost is first bounded from below by a Lagrange relaxation, for all
stages at once. Dynamic programming over the bounds gives a layout that looks best; the costs on its
way that are only bounds are worked out exactly, and so on until a best layout has none left. Then
no layout is better: whatever was not worked out costs at least its bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moesaic.planning.choose import SLACK, Floats, Group
from moesaic.planning.row import Row
from moesaic.planning.split import Span

MANY_PRICES = 12
"""Prices of a byte at which costs are bounded, at most."""

MANY_LEVELS = 4
"""Ranges of transients over which costs are bounded, at most."""

LONGEST_CODE = 2**62
"""Of the number of a stage by the kinds it holds; where it would be longer, every stage has one."""

Bools = npt.NDArray[np.bool_]


class Chain:
    """All stages of a row with one stage a rank."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.begin, self.end = np.triu_indices(len(row.positions), 1)
        """Positions between which each possible stage lies."""
        self._counted: dict[int, tuple[Group, ...]] = {}
        self._number_stages()
        self._set_widest(len(row.positions) - 1)
        _, upper, self._lack = self._bound([math.inf])
        limit = self._slowest(upper)
        if limit < math.inf:
            left = self._keep(self._sums(row.seconds[None])[0] / max(row.problem.speeds) <= limit)
            self._lack = self._lack[:, left]
        lower, upper, _ = self._bound(None)
        limit = self._slowest(upper)
        if limit < math.inf:
            left = self._keep(lower.min(axis=0)[:-1] * (1 - SLACK) <= limit)
            lower, upper, self._lack = lower[:, left], upper[:, left], self._lack[:, left]
        self.known = upper <= lower
        """Whether `cost` is exact."""
        self.cost = np.where(self.known, upper, lower * (1 - SLACK))
        """Seconds of a rank with a stage, by the stage's number, or a lower bound of them."""
        self.least = self._slowest(self.cost)
        """No layout has a lower bottleneck; infinite if nothing fits."""

    def _number_stages(self) -> None:
        """Number the stages that differ; `number` has that of every begin and end."""
        kinds = len(self.row.kinds)
        ends, starts = self.row.additive(np.eye(kinds, dtype=np.int64))
        digits = [int(most) + 1 for most in (ends[:, -1] - starts[:, 0])]
        halves = {self.row.single[u] for first in self.row.whole for u in (first, first + 1)}
        digits = [digit + 2 * (kind in halves) for kind, digit in enumerate(digits)]
        if math.prod(digits) < LONGEST_CODE:
            radix = np.cumprod([1, *digits[:-1]], dtype=np.int64)
            codes = (radix @ ends)[self.end] - (radix @ starts)[self.begin]
            _, self.example, number = np.unique(codes, return_index=True, return_inverse=True)
        else:
            self.example = number = np.arange(len(self.begin))
        count = len(self.row.positions)
        self.number = np.full((count, count), -1)
        self.number[self.begin, self.end] = number

    def _sums(self, values: Floats) -> Floats:
        """Per-kind values, (quantities, kinds), summed over every stage that differs."""
        ends, starts = self.row.additive(values)
        return np.asarray(
            ends[:, self.end[self.example]] - starts[:, self.begin[self.example]], np.float64
        )

    def _keep(self, kept: Bools) -> Bools:
        """Leave out stages that no best layout has; which numbers are left, with that of none."""
        left = np.append(kept, True)
        self.number = np.where(left, np.cumsum(left) - 1, -1)[self.number]
        self.number[self.number == len(self.example[kept])] = -1
        self.example = self.example[kept]
        possible = self.number[self.begin, self.end] >= 0
        self._set_widest(int((self.end - self.begin)[possible].max()))
        return left

    def _bound(self, prices: list[float] | None) -> tuple[Floats, Floats, Floats]:
        """Seconds of every rank with every stage from below and above, and bytes that it lacks.

        The last number is that of no stage.

        Args:
            prices: Of a byte, at which to bound; None for all at which a choice changes.
        """
        row, problem = self.row, self.row.problem
        seconds, state = self._sums(np.stack([row.seconds, row.state]))
        room = np.array(problem.budgets)[:, None] - state
        in_flight = np.array(problem.in_flight)[:, None]
        none = np.full((problem.ranks, len(seconds) + 1), np.inf)
        bounds = none, none.copy(), none.copy()
        for floor, ceiling in self._levels():
            found = self._bound_level(floor, ceiling, room, in_flight, prices)
            for known, new in zip(bounds, found, strict=True):
                np.minimum(known[:, :-1], new, out=known[:, :-1])
        speeds = np.array(problem.speeds)[:, None]
        for bound in bounds[:2]:
            bound[:, :-1] += seconds
            bound /= speeds
        return bounds

    def _levels(self) -> list[tuple[float, float]]:
        """Ranges that hold every transient of a choice: the least and the largest of each."""
        transients = np.unique(np.concatenate(self.row.chooser.transient))
        parts = np.array_split(transients, min(MANY_LEVELS, len(transients)))
        return [(float(part[0]), float(part[-1])) for part in parts]

    def _bound_level(
        self,
        floor: float,
        ceiling: float,
        room: Floats,
        in_flight: Floats,
        prices: list[float] | None,
    ) -> tuple[Floats, Floats, Floats]:
        """Extra seconds, and bytes that lack, with a largest transient of `floor` to `ceiling`.

        At a price of a byte, each kind's choice of least seconds and price: their sum, less the
        price of all bytes there are, is a lower bound; where they fit, an upper one.
        """
        chooser = self.row.chooser
        within = [transient <= ceiling for transient in chooser.transient]
        impossible = np.array([not some.any() for some in within])
        prices = self._prices(within) if prices is None else prices
        picked = np.zeros((2 * len(prices) + 1, len(within)))
        picked[-1] = impossible
        for kind in np.flatnonzero(~impossible):
            some = within[kind]
            seconds, kept = chooser.seconds[kind][some], chooser.kept[kind][some]
            for number, price in enumerate(prices):
                total = kept if price == math.inf else seconds + price * kept
                best = np.lexsort((seconds, kept, total))[0]
                picked[2 * number : 2 * number + 2, kind] = seconds[best], kept[best]
        *sums, impossible_sum = self._sums(picked)
        lower = np.full(room.shape, -np.inf)
        upper, lack = -lower, -lower
        for price, seconds, kept in zip(prices, sums[::2], sums[1::2], strict=True):
            held = kept * in_flight
            if price == math.inf:
                lower[held > room - floor] = np.inf
                lack = held + ceiling - room
            else:
                over = (held - (room - floor)) / in_flight
                np.maximum(lower, seconds + price * over, out=lower)
            fits = held <= room - ceiling
            upper[fits] = np.minimum(upper, seconds)[fits]
        for found in (lower, upper, lack):
            found[:, impossible_sum > 0] = np.inf
        return lower, upper, lack

    def _prices(self, within: Sequence[Bools]) -> list[float]:
        """No price, those at which some kind's choice changes, and any price."""
        chooser = self.row.chooser
        slopes = set()
        for kind, some in enumerate(within):
            if some.any():
                level = float(chooser.transient[kind][some].max())
                slopes |= {seconds / kept for seconds, kept in chooser.hull(kind, level)}
        found = np.array(sorted(slopes))
        if len(found) > MANY_PRICES:
            found = np.quantile(found, np.linspace(0, 1, MANY_PRICES))
        return [0.0, *found.tolist(), math.inf]

    def _set_widest(self, widest: int) -> None:
        """Lay out stages by end and length, up to a length."""
        positions = np.arange(len(self.row.positions))
        begin = positions[:, None] - widest + np.arange(widest)
        self.numbers = self.number[begin, positions[:, None]]
        self.numbers[begin < 0] = -1
        self.begins = np.where(begin < 0, -1, begin)

    def _slowest(self, cost: Floats, start: float = 0.0) -> float:
        """The least that the largest cost of a layout can be; at least `start`."""
        best = np.full(len(self.row.positions) + 1, np.inf)
        best[0] = start
        for of_rank in cost:
            best[:-1] = np.maximum(best[self.begins], of_rank[self.numbers]).min(axis=1)
        return float(best[-2])

    def _fewest(self, cost: Floats, limit: float) -> list[tuple[int, int]]:
        """Positions of the stages of a layout with the least sum of costs, each within a limit."""
        best = np.full(len(self.row.positions) + 1, np.inf)
        best[0] = 0.0
        ways = []
        for of_rank in np.where(cost <= limit, cost, np.inf):
            total = best[self.begins] + of_rank[self.numbers]
            way = total.argmin(axis=1)
            best[:-1] = total[np.arange(len(way)), way]
            ways.append(way)
        stages, end = [], len(self.row.positions) - 1
        for way in reversed(ways):
            begin = int(self.begins[end, way[end]])
            stages.append((begin, end))
            end = begin
        return stages[::-1]

    def _work_out(self, stages: Sequence[tuple[int, int]]) -> bool:
        """Work out the costs of a layout that are only bounds; whether there was any."""
        any_open = False
        for rank, (begin, end) in enumerate(stages):
            number = int(self.number[begin, end])
            if not self.known[rank, number]:
                any_open = True
                self.known[rank, number] = True
                self.cost[rank, number] = self.row.load(rank, self._groups(rank, number)).seconds
        return any_open

    def _groups(self, rank: int, number: int) -> tuple[Group, ...]:
        if number not in self._counted:
            example = self.example[number]
            begin, end = self.begin[example], self.end[example]
            span = self.row.positions[begin], self.row.positions[end]
            self._counted[number] = self.row.groups([(span, 1.0)])
        in_flight = self.row.problem.in_flight[rank]
        return tuple(group._replace(in_flight=in_flight) for group in self._counted[number])

    def best(self) -> list[Span] | None:
        """Stages of the least bottleneck, of these the fewest seconds in all; None if none fits."""
        while True:
            limit = self._slowest(self.cost)
            if limit == math.inf:
                return None
            stages = self._fewest(self.cost, limit)
            if not self._work_out(stages):
                return self._spans(stages)

    def best_within(self, limit: float, weights: Sequence[float]) -> list[Span]:
        """Stages of the fewest seconds in all, weighted by rank, of a limit that can be kept."""
        weight = np.array(weights)[:, None]
        while True:
            stages = self._fewest(np.where(self.cost <= limit, weight * self.cost, np.inf), np.inf)
            if not self._work_out(stages):
                return self._spans(stages)

    def tightest(self) -> list[Span]:
        """Stages of which the one that lacks the most bytes lacks the least."""
        limit = self._slowest(self._lack, -math.inf)
        return self._spans(self._fewest(self._lack, limit))

    def _spans(self, stages: Sequence[tuple[int, int]]) -> list[Span]:
        positions = self.row.positions
        return [(positions[begin], positions[end]) for begin, end in stages]
