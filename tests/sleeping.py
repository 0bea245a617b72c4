"""Pipelines whose stages sleep instead of computing.

What a schedule takes can so be measured on any machine, with more ranks than it has cores. The
pipelines are those that train; only the layers are others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.parallel.backward import wanted
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.world import World
from moesaic.planning.layout import fit
from moesaic.planning.plan import Schedule, Stage, TrainPlan
from moesaic.planning.simulate import StageSeconds, Timeline, simulate
from tests.ranks import run_ranks
from tests.tiny import LLAMA

UNIT = 0.02
"""Seconds of a layer's forward pass, of its gradient of the input, and of those of its weights."""


@dataclass(frozen=True)
class Case:
    """A pipeline of sleeping stages."""

    schedule: Schedule
    ranks: int
    micro_batches: int
    layers: tuple[int, ...]
    """Of each stage."""
    again: tuple[int, ...] = ()
    """Of each stage, layers that are computed again in the backward pass; none where left out."""

    @property
    def name(self) -> str:
        again = f", again {'+'.join(map(str, self.again))}" if self.again else ""
        layers = "+".join(map(str, self.layers))
        return f"{self.schedule} on {self.ranks}, {self.micro_batches} x ({layers}{again})"

    @property
    def plan(self) -> TrainPlan:
        """The plan that training would be given."""
        ends = list(itertools.accumulate(self.layers))
        first = ["embedding", *(f"{layer}.attention" for layer in ends[:-1])]
        last = [*(f"{layer - 1}.feed_forward" for layer in ends[:-1]), "head"]
        starts = [end - size for end, size in zip(ends, self.layers, strict=True)]
        return TrainPlan(
            pp=self.ranks,
            schedule=self.schedule,
            stages=tuple(Stage(*pair) for pair in zip(first, last, strict=True)),
            recompute={
                start + layer: "full"
                for start, count in zip(starts, self.again, strict=False)
                for layer in range(count)
            },
        )

    def stage_seconds(self, unit: float) -> list[StageSeconds]:
        """What each stage takes where a layer's forward pass takes `unit`."""
        pairs = itertools.zip_longest(self.layers, self.again, fillvalue=0)
        return [
            StageSeconds(unit * size, unit * size, unit * size, recompute=unit * count)
            for size, count in pairs
        ]

    def simulate(self, unit: float, *, action_seconds: float = 0.0) -> Timeline:
        """What the planner expects."""
        return simulate(
            self.schedule,
            self.stage_seconds(unit),
            ranks=self.ranks,
            micro_batches=self.micro_batches,
            action_seconds=action_seconds,
        )


EVEN = (1, 1, 1, 1)
CASES = (
    Case("gpipe", 4, 12, EVEN),
    Case("gpipe", 3, 6, (2, 1, 3)),
    Case("1f1b", 2, 6, (2, 1)),
    Case("1f1b", 3, 5, (2, 1, 2)),
    Case("1f1b", 4, 8, EVEN),
    Case("1f1b", 4, 16, EVEN),
    Case("1f1b", 4, 8, (3, 2, 2, 1)),
    Case("1f1b", 4, 8, (1, 2, 1, 2)),
    Case("1f1b", 4, 8, (2, 2, 2, 2), again=(2, 2, 2, 2)),
    Case("1f1b", 4, 8, (2, 2, 2, 2), again=(2, 1, 1, 0)),
    Case("1f1b", 8, 16, (1, 2, 1, 1, 2, 1, 1, 1), again=(1, 0, 1, 0, 0, 1, 0, 0)),
    Case("interleaved", 2, 4, (1, 1, 1, 1, 1, 1)),
    Case("interleaved", 4, 8, EVEN * 2),
    Case("interleaved", 4, 10, EVEN * 2),
    Case("interleaved", 4, 8, (2, 1, 1, 1, 1, 1, 1, 2)),
    Case("interleaved", 3, 6, (1,) * 9, again=(1, 1, 0)),
    Case("zb1p", 4, 8, EVEN),
    Case("zb1p", 4, 8, (1, 2, 2, 1)),
    Case("zb1p", 2, 8, EVEN),
    Case("zb1p", 4, 8, (2, 2, 2, 2), again=(0, 1, 0, 0)),
    Case("zbv", 4, 8, EVEN * 2),
    Case("zbv", 3, 8, (1, 1, 2, 2, 1, 1)),
    Case("zbv", 4, 8, (1, 1, 1, 2, 1, 1, 1, 1), again=(1, 0, 0, 0, 0, 0, 0, 0)),
    Case("dualpipev", 2, 8, EVEN),
    Case("dualpipev", 4, 10, EVEN * 2),
    Case("dualpipev", 4, 8, (1, 2, 1, 1, 1, 1, 2, 1)),
    Case("dualpipev", 3, 8, (1, 1, 2, 1, 1, 1), again=(0, 1, 0, 0, 0, 1)),
)


class SleepingStage(nn.Module):
    """Layers that hand on what they are given.

    Args:
        number: Of the stage.
        case: The pipeline that it belongs to.
    """

    def __init__(self, number: int, case: Case) -> None:
        super().__init__()
        self.again = case.again[number] if number < len(case.again) else 0
        self.layers = case.layers[number]
        self.number = number
        self.is_last = number == len(case.layers) - 1
        self.weight = nn.Parameter(torch.ones(()))
        self.unit = 0.0
        self.owed = 0.0
        """Seconds of what was computed again, for the backward pass to sleep."""
        self.log: list[tuple[str, int, int]] = []
        """What was done: its kind, the stage, the micro-batch."""

    def forward(self, x: Tensor, *, numbers: Tensor) -> Tensor:
        number = int(numbers)
        self.log.append(("F", self.number, number))
        if self.number == 0:
            x = x[..., None] * self.weight
        x = _Sleep.apply(x, self.weight, self, number)
        if self.again:
            x = checkpoint(self._compute_again, x, use_reentrant=False)
            self.owed = 0.0
        return x.sum() if self.is_last else x

    def _compute_again(self, x: Tensor) -> Tensor:
        self.owed += self.again * self.unit
        return x * self.weight


class _Sleep(torch.autograd.Function):
    """Sleeps a layer's time for each, as long for the gradient of x, and as long for that of w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stage: SleepingStage, number: int) -> Tensor:
        ctx.stage, ctx.number = stage, number
        time.sleep(stage.layers * stage.unit)
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weights = wanted()
        stage: SleepingStage = ctx.stage
        kind = "B" if inputs and weights else "I" if inputs else "W"
        stage.log.append((kind, stage.number, ctx.number))
        time.sleep(stage.layers * stage.unit * (inputs + weights) + stage.owed)
        stage.owed = 0.0
        return grad if inputs else None, grad.sum() if weights else None, None, None


@dataclass(frozen=True)
class Sleeper:
    """This rank's part of a case."""

    case: Case
    stages: Sequence[SleepingStage]
    pipeline: Pipeline

    @classmethod
    def join(cls, case: Case) -> Sleeper:
        """Take this process's place in the pipeline, and run a step, in which links are made."""
        spec = LLAMA.replace(num_layers=sum(case.layers))
        world = World.join(fit(case.plan, spec), torch.device("cpu"))
        stages = [SleepingStage(number, case) for number in world.stages]
        pipeline = Pipeline(
            world,
            stages,
            micro_batches=case.micro_batches,
            activation=((1, 1, 1), torch.float32),
        )
        sleeper = cls(case, stages, pipeline)
        sleeper.step(0.0)
        return sleeper

    def step(self, unit: float) -> tuple[float, float]:
        """When a step began on this rank and ended, on the clock that processes share."""
        for stage in self.stages:
            stage.unit = unit
            stage.log.clear()
        count = self.case.micro_batches
        tokens, numbers = torch.ones(count, 1, dtype=torch.int64), torch.arange(count)
        dist.barrier()
        start = time.monotonic()
        self.pipeline.step(tokens, numbers=numbers)
        return start, time.monotonic()


Spans = list[tuple[float, float]]
"""When steps began and ended on one rank."""


def yardstick(case: Case) -> Case:
    """Equal stages under 1F1B, whose time is known: that of 3 * ranks - 1 forth and back.

    For gpipe under gpipe, which takes as long. There all ranks wake at once, and on fewer cores
    than ranks they then wait for each other.
    """
    schedule: Schedule = "gpipe" if case.schedule == "gpipe" else "1f1b"
    return Case(schedule, case.ranks, 2 * case.ranks, (1,) * case.ranks)


def sleep_through(
    cases: Mapping[str, Case], unit: float, steps: int
) -> dict[str, tuple[Spans, Spans]]:
    """On every rank: the steps of each case, and as many of its yardstick, by turns."""
    known = {yard: Sleeper.join(yard) for yard in dict.fromkeys(map(yardstick, cases.values()))}
    found = {}
    for name, case in cases.items():
        sleeper, other = Sleeper.join(case), known[yardstick(case)]
        both = [(sleeper.step(unit), other.step(unit)) for _ in range(steps)]
        found[name] = ([step for step, _ in both], [step for _, step in both])
    return found


@dataclass(frozen=True)
class Comparison:
    """What a case took, and what the planner expected."""

    case: Case
    measured: tuple[float, ...]
    """Seconds of each step."""
    action_seconds: float
    """What an action takes beside sleeping, as the yardstick shows."""
    simulated: float

    @property
    def error(self) -> float:
        """Of the simulation, against the fastest step: other work only makes ranks late."""
        return self.simulated / min(self.measured) - 1


PART = 6
"""Cases that one world of ranks runs."""


def compare(cases: Sequence[Case], *, unit: float, steps: int) -> Iterator[Comparison]:
    """Let real ranks sleep through cases, and hold what they take against simulations."""
    for ranks in sorted({case.ranks for case in cases}):
        equal = [case for case in cases if case.ranks == ranks]
        for start in range(0, len(equal), PART):
            part = {case.name: case for case in equal[start : start + PART]}
            of_ranks = run_ranks(ranks, sleep_through, part, unit, steps)
            for name, case in part.items():
                yield _compared(case, [of_rank[name] for of_rank in of_ranks], unit)


def _compared(case: Case, of_ranks: Sequence[tuple[Spans, Spans]], unit: float) -> Comparison:
    known = min(_lengths([spans for _, spans in of_ranks]))
    forth_and_back = known / (3 * case.ranks - 1)
    cost = (forth_and_back - 3 * unit) / 2
    return Comparison(
        case,
        tuple(_lengths([spans for spans, _ in of_ranks])),
        cost,
        case.simulate(unit, action_seconds=cost).seconds,
    )


def _lengths(of_ranks: Sequence[Spans]) -> list[float]:
    """From the moment at which the first rank began to that at which the last one ended."""
    return [
        max(end for _, end in step) - min(start for start, _ in step)
        for step in zip(*of_ranks, strict=True)
    ]
