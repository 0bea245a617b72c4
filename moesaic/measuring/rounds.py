"""Time many things in rounds, so that whatever drifts meanwhile hits all of them alike.

A round goes through every case once, in an order of its own: first its forward actions, then, in
reverse order, its backward ones. That is how a step of training goes through its layers, so a case
finds the processor's caches as cold as a layer does there.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol


class Action(NamedTuple):
    """Something that is timed."""

    name: str
    run: Callable[[], object]


class Case(Protocol):
    """One of the things that a round goes through."""

    name: str

    def prepare(self) -> None:
        """What the backward actions need to find, untimed."""

    def forward(self) -> Sequence[Action]:
        """What to time on the way there."""

    def backward(self) -> Sequence[Action]:
        """What to time on the way back."""


class Clock(Protocol):
    """Measures what runs in a `with` block."""

    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...

    @property
    def seconds(self) -> float:
        """How long that took; asked for when the round is over."""


class ProcessorTime:
    """Measures for how long this thread has the processor; waiting does not count."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._begin = time.thread_time()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.thread_time() - self._begin


Samples = dict[tuple[str, str], list[float]]
"""By case and action, seconds round by round."""


def time_rounds(
    cases: Sequence[Case],
    *,
    rounds: int,
    warmup_rounds: int,
    clock: Callable[[Case], Clock],
    meet: Callable[[], None] = lambda: None,
    tell: Callable[[int], None] = lambda done: None,
    seed: int = 0,
) -> Samples:
    """Go through all cases, round by round.

    Args:
        cases: Of different names. Ranks that exchange anything in them must list them alike.
        rounds: That count.
        warmup_rounds: Before these, that do not.
        clock: Makes a new one for each action of a case.
        meet: Called before each action, untimed; waits for other ranks.
        tell: Called after each round with the number done.
        seed: Of the orders.
    """
    samples: Samples = {}
    orders = random.Random(seed)
    for number in range(warmup_rounds + rounds):
        found: list[tuple[str, str, Clock]] = []
        for case, action in _round(orders.sample(cases, len(cases))):
            meet()
            stopwatch = clock(case)
            with stopwatch:
                action.run()
            found.append((case.name, action.name, stopwatch))
        if number >= warmup_rounds:
            for name, what, stopwatch in found:
                samples.setdefault((name, what), []).append(stopwatch.seconds)
        tell(number + 1)
    return samples


def _round(order: Sequence[Case]) -> Iterator[tuple[Case, Action]]:
    for case in order:
        for action in case.forward():
            yield case, action
    for case in reversed(order):
        case.prepare()
        for action in case.backward():
            yield case, action


class Summary(NamedTuple):
    """Of samples."""

    median: float
    spread: float
    """Between the quartiles."""


def summary(samples: Sequence[float]) -> Summary:
    """Median and spread."""
    if len(samples) < 2:
        return Summary(samples[0], 0.0)
    first, middle, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(middle, third - first)


def pooled(of_ranks: Sequence[Samples]) -> Samples:
    """Those of all ranks together."""
    return {key: [s for samples in of_ranks for s in samples[key]] for key in of_ranks[0]}


def slowest(of_ranks: Sequence[Mapping[tuple[str, str], list[float]]]) -> Samples:
    """For each round the most that a rank took; ranks that took no part may lack a key."""
    keys = dict.fromkeys(key for samples in of_ranks for key in samples)
    return {
        key: [max(row) for row in zip(*(s[key] for s in of_ranks if key in s), strict=True)]
        for key in keys
    }
