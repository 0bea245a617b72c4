"""Shares of heads and of columns for devices of several kinds: the fastest that fit.

Rank i takes a_i h seconds for h key-value heads of a layer and f_i c for c units of columns; the
layer takes the largest of the first plus the largest of the second. What rank i holds of a layer
on average, u_i heads and c_i units, must fit its memory: m_h u_i + m_c c_i <= R_i, where m_h counts
the keys and values of the whole batch too. m_h and m_c are the same on every rank, because the
model is, so ranks trade heads for columns at one rate. Whether slowest times (A, F) can be had is
then plain: give each rank the heads that cost it no columns, the others anywhere, and count the
columns.

Trying every A, with the least F beside it by bisection, finds the least A + F in whole heads and
units a layer. With real numbers of them in place of whole ones the same search is convex and bounds
what any shares can reach.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """One batch's question: the sizes of a layer, what ranks need for a part of it, and have."""

    heads: int
    """Key-value heads of a layer."""
    most_heads: int
    """Of a layer, that one rank may hold."""
    units: int
    """Units of columns of a layer."""
    head_seconds: tuple[float, ...]
    """Of each rank, for one head of one layer."""
    unit_seconds: tuple[float, ...]
    """Of each rank, for one unit of one layer."""
    head_bytes: float
    """Of one head of every layer, with its keys and values."""
    unit_bytes: float
    """Of one unit of every layer."""
    room: tuple[float, ...]
    """Bytes of each rank for heads and units."""

    @cached_property
    def kinds(self) -> dict[tuple[float, float, float], int]:
        """Ranks that are alike, in seconds and room, and how many there are."""
        return Counter(zip(self.head_seconds, self.unit_seconds, self.room, strict=True))


class Shares(NamedTuple):
    """Mean heads and units of a layer on each rank, and the seconds of a layer."""

    heads: tuple[float, ...]
    units: tuple[float, ...]
    seconds: float


def could_fit(question: Sharing) -> bool:
    """Whether any shares fit, however slow."""
    return _held(question, math.inf, math.inf, whole=False) is not None


def share(question: Sharing) -> Shares | None:
    """The shares whose slowest rank is the fastest; None where nothing fits."""
    unit_times = _times(question.unit_seconds, question.units)
    best: tuple[float, float, float] | None = None
    for attention in _times(question.head_seconds, question.most_heads):
        if best is not None and attention + unit_times[0] >= best[0]:
            break
        index = _first(question, attention, unit_times)
        if index is None:
            continue
        seconds = attention + unit_times[index]
        if best is None or seconds < best[0]:
            best = (seconds, attention, unit_times[index])
    if best is None:
        return None
    held = _held(question, best[1], best[2], whole=True)
    assert held is not None, f"{best=}"
    ranks = list(zip(question.head_seconds, question.unit_seconds, question.room, strict=True))
    return Shares(
        heads=tuple(held[rank][0] for rank in ranks),
        units=tuple(held[rank][1] for rank in ranks),
        seconds=best[0],
    )


def bound(question: Sharing) -> float:
    """Seconds of a layer that no shares can be below, in real numbers of heads and units.

    The least time of units beside one of attention is convex, so the least sum is found by
    golden section; what is returned is below it by the width that is left.
    """

    def least_units(attention: float) -> float:
        """From below; infinite where nothing fits."""
        low, high = 0.0, question.units * max(question.unit_seconds)
        if _held(question, attention, high, whole=False) is None:
            return math.inf
        for _ in range(PRECISION):
            middle = (low + high) / 2
            if _held(question, attention, middle, whole=False) is None:
                low = middle
            else:
                high = middle
        return low

    low, high = 0.0, question.most_heads * max(question.head_seconds)
    if math.isinf(least_units(high)):
        return math.inf
    ratio = (math.sqrt(5) - 1) / 2
    points = [high - ratio * (high - low), low + ratio * (high - low)]
    sums = [point + least_units(point) for point in points]
    for _ in range(PRECISION):
        # Where nothing fits on either side, more attention does.
        if sums[0] <= sums[1] and not math.isinf(sums[0]):
            high = points[1]
            points = [high - ratio * (high - low), points[0]]
            sums = [points[0] + least_units(points[0]), sums[0]]
        else:
            low = points[0]
            points = [points[1], low + ratio * (high - low)]
            sums = [sums[1], points[1] + least_units(points[1])]
    return low + least_units(high)


PRECISION = 30
"""Steps of each search, which leave less than a millionth of where it began."""


def _times(each: Sequence[float], most: int) -> list[float]:
    """Every time that some rank may take."""
    return sorted({count * seconds for seconds in set(each) for count in range(1, most + 1)})


def _first(question: Sharing, attention: float, unit_times: Sequence[float]) -> int | None:
    """Which is the first time of units that can be had beside this one of attention."""
    low, high = 0, len(unit_times)
    while low < high:
        middle = (low + high) // 2
        if _held(question, attention, unit_times[middle], whole=True) is None:
            low = middle + 1
        else:
            high = middle
    return low if low < len(unit_times) else None


Held = dict[tuple[float, float, float], tuple[float, float]]
"""Heads and units of each kind of rank."""


def _held(question: Sharing, attention: float, units: float, *, whole: bool) -> Held | None:
    """Heads and units of each kind of rank with no slower one; None where they do not fit.

    Args:
        question: What is asked.
        attention: Seconds that a rank may take for its heads.
        units: Seconds that it may take for its columns.
        whole: Whether in some layer a rank holds its mean rounded up.
    """
    per_head, per_unit = question.head_bytes, question.unit_bytes
    limits = []
    all_free = all_most = 0.0
    for kind, count in question.kinds.items():
        head_seconds, unit_seconds, room = kind
        if room < 0:
            return None
        heads = min(attention / head_seconds, question.most_heads)
        columns = min(units / unit_seconds, question.units)
        if whole:
            heads, columns = math.floor(heads + 1e-9), math.floor(columns + 1e-9)
        free = min(heads, max(0.0, room - per_unit * columns) / per_head)
        most = min(heads, room / per_head)
        all_free += count * free
        all_most += count * most
        limits.append((kind, count, free, most, columns))
    lacking, spare = question.heads - all_free, all_most - all_free
    if lacking > spare + 1e-9 or not all_most:
        return None
    held: Held = {}
    total = 0.0
    for kind, count, free, most, columns in limits:
        if lacking > 0 and spare > 0:
            mine = free + (most - free) * min(1.0, lacking / spare)
        else:
            mine = free * question.heads / all_free
        fit = max(0.0, min(columns, (kind[2] - per_head * mine) / per_unit))
        total += count * fit
        held[kind] = (mine, fit)
    if total < question.units * (1 - 1e-9):
        return None
    scale = question.units / total
    return {kind: (heads, columns * scale) for kind, (heads, columns) in held.items()}
