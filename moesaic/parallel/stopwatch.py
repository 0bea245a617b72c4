"""How long a device was at work, on the CPU's clock or between events of a GPU's stream."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Adds up the time between the ends of its `with` blocks.

    On a GPU nothing waits until `seconds` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        self._begin = self._now()

    def __exit__(self, *error: object) -> None:
        self._spans.append((self._begin, self._now()))

    @property
    def seconds(self) -> float:
        """What was added up so far."""
        if not self._is_cuda:
            return float(sum(end - begin for begin, end in self._spans))
        for _, end in self._spans[-1:]:
            end.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._spans)) / 1000

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
