"""How one dimension is cut over ranks: the only place where a size or an offset is worked out.

The layer, the weight reader, the checkpoint and the cache all read the same `Split`. It holds
spans and not counts, so that ranks that hold nothing and spans that overlap (a key-value head held
by several ranks) are normal cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from moesaic.errors import PlanError

Span = tuple[int, int]
"""First position, and the one after the last."""


@dataclass(frozen=True)
class Split:
    """Which span of a dimension each rank holds."""

    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        for rank, (start, end) in enumerate(self.spans):
            if not 0 <= start <= end:
                raise PlanError(
                    f"Rank {rank} of a split holds {start} to {end}. A span starts at 0 or later "
                    f"and does not end before it starts."
                )

    @classmethod
    def from_counts(cls, counts: Sequence[int], *, unit: int = 1) -> Self:
        """Spans side by side, `counts[rank]` times `unit` positions long."""
        ends = list(itertools.accumulate(count * unit for count in counts))
        return cls(tuple(zip([0, *ends], ends, strict=False)))

    @classmethod
    def balanced(cls, total: int, parts: int, *, unit: int = 1) -> Self:
        """`total` units over `parts` ranks, as equal as can be; the first ranks hold one more."""
        least, more = divmod(total, parts)
        return cls.from_counts([least + (rank < more) for rank in range(parts)], unit=unit)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Positions each rank holds."""
        return tuple(end - start for start, end in self.spans)

    @property
    def total(self) -> int:
        """Length of the whole dimension."""
        return max((end for _, end in self.spans), default=0)

    @property
    def is_partition(self) -> bool:
        """Whether every position is held exactly once, in the order of ranks."""
        ends = [end for _, end in self.spans]
        return [start for start, _ in self.spans] == [0, *ends[:-1]]

    def scaled(self, unit: int) -> Split:
        """The same split of a dimension whose positions are each `unit` of that other one."""
        return Split(tuple((start * unit, end * unit) for start, end in self.spans))


def cut(span: Span, parts: int, part: int) -> Span:
    """Where torch's FSDP puts shard `part` of `parts` of a span: ceil-sized pieces, the last short.

    With more parts than positions the last shards are empty.
    """
    start, end = span
    size = -(-(end - start) // parts)
    return min(start + part * size, end), min(start + (part + 1) * size, end)
