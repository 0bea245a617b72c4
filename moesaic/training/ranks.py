"""What each rank did in a step: a line of ranks.jsonl, as docs/run-folder.md lists it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What one rank measured of itself."""

    rank: int

    pp: int
    """Its place in the mesh of dense weights, with `dp` and `tp`."""

    dp: int

    tp: int

    stages: tuple[int, ...]
    """Stages that it runs, in the order that tokens pass."""

    peak_memory_bytes: int
    """Most memory that it held so far."""

    compute_seconds: float
    """Inside the forward and backward passes of its stages, exchanges within them included."""

    tokens_received: int
    """Rows that reached its experts in this step."""


def rank_line(step: int, seconds: float, records: Sequence[RankRecord]) -> dict[str, Any]:
    """One line for all ranks.

    Args:
        step: Optimizer steps done.
        seconds: Of this step, on the rank that writes the line.
        records: One for each rank, in any order.
    """
    ordered = sorted(records, key=lambda record: record.rank)
    ranks = [record.rank for record in ordered]
    assert ranks == list(range(len(ranks))), f"{ranks=}"
    return {
        "step": step,
        "seconds": seconds,
        "ranks": [
            # Clocks of two ranks do not agree to the last digit.
            {
                **asdict(record),
                "stages": list(record.stages),
                "wait_seconds": max(0.0, seconds - record.compute_seconds),
            }
            for record in ordered
        ],
    }
