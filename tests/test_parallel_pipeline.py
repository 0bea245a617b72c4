"""Every schedule, over any number of ranks, leaves the gradients that one process finds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moesaic.errors import PlanError, TrainingError
from moesaic.parallel.backward import only, wanted
from moesaic.parallel.collectives import gather, scatter_sum
from moesaic.parallel.group import ALONE, Group, Groups
from moesaic.parallel.pipeline import Pipeline, PipelineRun
from moesaic.parallel.sharding import share
from moesaic.parallel.world import World
from moesaic.planning.layout import fit, num_units
from moesaic.planning.plan import Recompute, Stage, TrainPlan
from moesaic.planning.schedules import can_run
from moesaic.planning.split import Span, Split
from tests.ranks import run_ranks
from tests.tiny import LLAMA

SPEC = LLAMA.replace(num_layers=7)
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev")
TWO_A_RANK = ("interleaved", "zbv", "dualpipev")
SPLITTING = ("zb1p", "zbv", "dualpipev")
"""Schedules that run backward passes in two parts."""
ROWS, LENGTH, WIDTH, VOCAB = 2, 5, 6, 11
FLOAT = torch.float64


# --- A model as small as can be --------------------------------------------------------------


Edge = Callable[[Tensor], Tensor]
"""What a stage does to its input and to its result."""


def same(x: Tensor) -> Tensor:
    return x


class Half(nn.Module):
    """x + W2 tanh(W1 x + b), which `group` shares as tensor-parallel ranks do."""

    def __init__(self, unit: int, group: Group, parts: Split) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(unit)
        self.group, self.parts = group, parts
        self.forwards = 0
        inner = Split.balanced(7, group.size).spans[group.rank]
        self.w1, self.b, self.w2 = (
            nn.Parameter(weight.contiguous())
            for weight in (
                random(generator, 7, WIDTH)[slice(*inner)],
                random(generator, 7)[slice(*inner)],
                random(generator, WIDTH, 7)[:, slice(*inner)],
            )
        )

    def forward(self, x_BsD: Tensor) -> Tensor:
        self.forwards += 1
        x_BSD = gather(x_BsD, self.parts, self.group, dim=1)
        y_BSD = F.linear(F.linear(x_BSD, self.w1, self.b).tanh(), self.w2)
        return x_BsD + scatter_sum(y_BSD, self.parts, self.group, dim=1)


class Toy(nn.Module):
    """Units of a model: an embedding, halves of layers, a head with its loss."""

    def __init__(
        self,
        units: Span,
        group: Group = ALONE,
        *,
        recompute: Mapping[int, Recompute] | None = None,
        edge: Edge = same,
    ) -> None:
        super().__init__()
        parts = Split.balanced(LENGTH, group.size)
        start, end = units
        last = num_units(SPEC) - 1
        self.group, self.parts, self.edge = group, parts, edge
        self.recompute = recompute or {}
        self.embedding = self.head = None
        if start == 0:
            self.embedding = nn.Parameter(random(torch.Generator().manual_seed(99), VOCAB, WIDTH))
        self.halves = nn.ModuleDict(
            {str(unit): Half(unit, group, parts) for unit in range(max(start, 1), min(end, last))}
        )
        if end > last:
            self.head = nn.Parameter(random(torch.Generator().manual_seed(98), VOCAB, WIDTH))

    def forward(self, x: Tensor, *, targets_BS: Tensor, weights_BS: Tensor) -> Tensor:
        if self.embedding is not None:
            x_BSD = F.embedding(x, self.embedding)
            x = x_BSD[:, slice(*self.parts.spans[self.group.rank])]
        else:
            x = self.edge(x)
        for unit, half in self.halves.items():
            if self.recompute.get((int(unit) - 1) // 2, "none") == "none":
                x = half(x)
            else:
                x = checkpoint(half, x, use_reentrant=False)
        if self.head is None:
            return self.edge(x)
        own = slice(*self.parts.spans[self.group.rank])
        logits_BsV = F.linear(x, self.head)
        nats_Bs = F.cross_entropy(logits_BsV.movedim(-1, 1), targets_BS[:, own], reduction="none")
        return (nats_Bs * weights_BS[:, own]).sum()


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) / 2


def batch(seed: int, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (2, rows, LENGTH), generator=generator)
    weights = torch.rand(rows, LENGTH, generator=generator, dtype=torch.float64)
    return {"tokens": ids[0], "targets_BS": ids[1], "weights_BS": weights / weights.sum()}


# --- One process, and many -------------------------------------------------------------------


def alone(data: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole model in one piece."""
    toy = Toy((0, num_units(SPEC)))
    named = dict(data)
    loss = toy(named.pop("tokens"), **named)
    loss.backward()
    return float(loss.detach()), {
        name: p.grad for name, p in toy.named_parameters() if p.grad is not None
    }


def build(
    plan: TrainPlan, micro_batches: int, *, edge: Edge = same
) -> tuple[World, list[Toy], Pipeline]:
    world = World.join(fit(plan, SPEC), torch.device("cpu"))
    tp = world.groups.tp
    stages = [
        Toy(world.layout.stages[number], tp, recompute=plan.recompute, edge=edge)
        for number in world.stages
    ]
    for stage in stages:
        share(stage, world, blocks=stage.halves.values(), experts=[], zero=plan.zero)
    own = Split.balanced(LENGTH, tp.size).sizes[tp.rank]
    pipeline = Pipeline(
        world,
        stages,
        micro_batches=micro_batches,
        activation=((ROWS, own, WIDTH), torch.float64),
    )
    return world, stages, pipeline


def own_rows(world: World, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    dp = world.layout.plan.dp
    return {name: x.chunk(dp)[world.place.dp] for name, x in data.items()}


def difference(world: World, stages: list[Toy], expected: Mapping[str, Tensor]) -> float:
    """The largest of all gradients of this rank."""
    worst = 0.0
    for stage in stages:
        for name, parameter in stage.named_parameters():
            found = parameter.grad
            assert found is not None, name
            found = found.full_tensor() if hasattr(found, "full_tensor") else found
            whole = expected[name]
            if ".w1" in name or ".b" in name or ".w2" in name:
                inner = Split.balanced(7, world.groups.tp.size).spans[world.groups.tp.rank]
                whole = whole.narrow(1 if ".w2" in name else 0, inner[0], inner[1] - inner[0])
            else:
                world.groups.tp.sum_(found)
            worst = max(worst, float((found - whole).abs().max().nan_to_num(nan=torch.inf)))
    return worst


def check_plan(
    plan: TrainPlan, micro_batches: int, edge: Edge = same
) -> tuple[float, dict[int, int]]:
    """Two steps; the largest difference, and how often each half ran forwards."""
    world, stages, pipeline = build(plan, micro_batches, edge=edge)
    worst = 0.0
    for seed in (1, 2):
        data = batch(seed, plan.dp * micro_batches * ROWS)
        loss, expected = alone(data)
        for stage in stages:
            stage.zero_grad()
        run = pipeline.step(**own_rows(world, data))
        total = world.everyone.sum_(run.loss.clone())
        worst = max(worst, abs(float(total) - loss), difference(world, stages, expected))
        check_seconds(run, len(stages))
    return worst, {
        int(unit): half.forwards for stage in stages for unit, half in stage.halves.items()
    }


def check_seconds(run: PipelineRun, stages: int) -> None:
    assert len(run.seconds) == stages
    assert all(seconds > 0 for seconds in run.seconds)


def worst_of(plan: TrainPlan, micro_batches: int) -> float:
    return check_plan(plan, micro_batches)[0]


def in_one_world(
    size: int, check: Callable[..., Any], cases: Mapping[str, tuple[Any, ...]]
) -> dict[str, list[Any]]:
    """What `check` gives on each rank, by case. New worlds take longer than what runs in them."""
    found = run_ranks(size, check_all, check, cases)
    return {name: [of_rank[name] for of_rank in found] for name in cases}


def check_all(check: Callable[..., Any], cases: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {name: check(*arguments) for name, arguments in cases.items()}


def stages_ending(*last: str) -> tuple[Stage, ...]:
    """Stages that end with these units, and one up to the head."""
    names = ["embedding"]
    names += [f"{n}.{p}" for n in range(7) for p in ("attention", "feed_forward")] + ["head"]
    first = ["embedding", *(names[names.index(unit) + 1] for unit in last)]
    return tuple(Stage(*ends) for ends in zip(first, (*last, "head"), strict=True))


TWO = stages_ending("4.attention")
FOUR = stages_ending("embedding", "1.feed_forward", "6.feed_forward")
"""An embedding alone, a head alone, and two of unequal length."""
EVEN = stages_ending("0.attention", "2.attention", "4.attention")
EIGHT = stages_ending(
    "embedding",
    "0.attention",
    "2.attention",
    "2.feed_forward",
    "4.feed_forward",
    "5.feed_forward",
    "6.feed_forward",
)


def staged(schedule: str, ranks: int) -> dict[str, Any]:
    per_rank = 2 if schedule in TWO_A_RANK else 1
    return {
        "pp": ranks,
        "schedule": schedule,
        "stages": {2: TWO, 4: FOUR, 8: EIGHT}[ranks * per_rank],
    }


# --- Gradients -------------------------------------------------------------------------------


@functools.cache
def gradients(ranks: int) -> dict[str, list[float]]:
    cases = {schedule: (TrainPlan(**staged(schedule, ranks)), 8) for schedule in SCHEDULES}
    return in_one_world(ranks, worst_of, cases)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_schedule_gives_the_gradients_of_one_process(schedule, ranks):
    assert max(gradients(ranks)[schedule]) < 1e-12


@functools.cache
def shared_gradients(zero: int) -> dict[str, list[float]]:
    cases = {s: (TrainPlan(dp=2, zero=zero, **staged(s, 2)), 4) for s in SCHEDULES}
    return in_one_world(4, worst_of, cases)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_data_parallel_ranks_share_weights_under_every_schedule(schedule, zero):
    assert max(shared_gradients(zero)[schedule]) < 1e-12


EIGHT_RANKS: dict[str, dict[str, Any]] = {
    "with tensor parallelism": {"dp": 2, "tp": 2, "zero": 3, "recompute": {2: "full"}},
    "in copies": {"dp": 4, "shard": 2, "zero": 2},
}


@functools.cache
def gradients_on_eight(what: str) -> dict[str, list[float]]:
    cases = {s: (TrainPlan(**EIGHT_RANKS[what], **staged(s, 2)), 4) for s in SCHEDULES}
    return in_one_world(8, worst_of, cases)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("what", EIGHT_RANKS)
def test_weights_may_be_shared_at_will_under_every_schedule(schedule, what):
    assert max(gradients_on_eight(what)[schedule]) < 1e-12


@functools.cache
def recomputed() -> dict[str, list[Any]]:
    again = {0: "full", 4: "full", 6: "attention"}
    cases = {s: (TrainPlan(recompute=again, **staged(s, 2)), 4) for s in SCHEDULES}
    return in_one_world(2, check_plan, cases)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_recomputed_is_recomputed_once(schedule):
    found = recomputed()[schedule]
    assert max(worst for worst, _ in found) < 1e-12
    forwards = {unit: count for _, of_rank in found for unit, count in of_rank.items()}
    again = [1, 2, 9, 10, 13, 14]  # this toy recomputes whole layers only
    steps, micro_batches = 2, 4
    assert forwards == {
        unit: steps * micro_batches * (2 if unit in again else 1) for unit in range(1, 15)
    }


@functools.cache
def counted_collectives() -> dict[str, list[Any]]:
    cases = {s: (TrainPlan(tp=2, **staged(s, 2)), 4) for s in ("1f1b", *SPLITTING)}
    return in_one_world(4, count_collectives, cases)


@pytest.mark.parametrize("schedule", ["1f1b", *SPLITTING])
def test_a_collective_of_tensor_parallelism_runs_once_each_way(schedule):
    for worst, halves, calls in counted_collectives()[schedule]:
        assert worst < 1e-12
        # A half gathers and adds up forwards, and does the opposite backwards.
        assert calls == {"gather": 2 * 4 * halves, "scatter_sum": 2 * 4 * halves}


def count_collectives(plan: TrainPlan, micro_batches: int) -> tuple[float, int, dict[str, int]]:
    """One step: the largest difference, this rank's halves, and calls by name."""
    world, stages, pipeline = build(plan, micro_batches)
    calls = {"gather": 0, "scatter_sum": 0}

    def counted(name: str) -> Callable[..., Tensor]:
        method = getattr(Group, name)

        def call(group: Group, *args: Any, **named: Any) -> Any:
            calls[name] += group is world.groups.tp
            return method(group, *args, **named)

        return call

    data = batch(1, micro_batches * ROWS)
    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(Group, name, counted(name))
        pipeline.step(**data)
    _, expected = alone(data)
    halves = sum(len(stage.halves) for stage in stages)
    return difference(world, stages, expected), halves, calls


@functools.cache
def handed_on(edge: Edge) -> dict[str, list[Any]]:
    cases = {s: (TrainPlan(**staged(s, 2)), 4, edge) for s in ("1f1b", *SPLITTING)}
    return in_one_world(2, check_plan, cases)


@pytest.mark.parametrize("schedule", ["1f1b", *SPLITTING])
def test_stages_may_hand_on_views(schedule):
    assert max(worst for worst, _ in handed_on(as_a_view)[schedule]) < 1e-12


@pytest.mark.parametrize("schedule", ["1f1b", *SPLITTING])
def test_stages_may_hand_on_any_layout_of_memory(schedule):
    assert max(worst for worst, _ in handed_on(laid_out_otherwise)[schedule]) < 1e-12


def as_a_view(x: Tensor) -> Tensor:
    return x.view_as(x)


def laid_out_otherwise(x: Tensor) -> Tensor:
    y = _Transposed.apply(x) * 1
    assert not y._is_view()
    assert not y.is_contiguous()
    return y


class _Transposed(torch.autograd.Function):
    """The same numbers, and the same gradient, in another order of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.movedim(0, 1).contiguous().movedim(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.movedim(0, 1).contiguous().movedim(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SPLITTING)
def test_stages_may_be_compiled(schedule):
    plan = TrainPlan(**staged(schedule, 2))
    for worst in run_ranks(2, check_compiled, plan, 4):
        assert worst < 1e-12


def check_compiled(plan: TrainPlan, micro_batches: int) -> float:
    world = World.join(fit(plan, SPEC), torch.device("cpu"))
    stages = [Toy(world.layout.stages[number]) for number in world.stages]
    for stage in stages:
        for half in stage.halves.values():
            half.compile()
    shape = (ROWS, LENGTH, WIDTH)
    pipeline = Pipeline(world, stages, micro_batches=micro_batches, activation=(shape, FLOAT))
    data = batch(1, micro_batches * ROWS)
    pipeline.step(**data)
    return difference(world, stages, alone(data)[1])


def test_gradients_are_added_to_those_that_are_there():
    plan = TrainPlan(dp=2, **staged("1f1b", 2))
    for worst in run_ranks(4, add_up, plan, 2):
        assert worst < 1e-12


def add_up(plan: TrainPlan, micro_batches: int) -> float:
    """The same step twice, by one pipeline and then by another."""
    world, stages, first = build(plan, micro_batches)
    shape = (ROWS, LENGTH, WIDTH)
    second = Pipeline(world, stages, micro_batches=micro_batches, activation=(shape, FLOAT))
    data = batch(1, plan.dp * micro_batches * ROWS)
    for pipeline in (first, second):
        pipeline.step(**own_rows(world, data))
    expected = {name: 2 * gradient for name, gradient in alone(data)[1].items()}
    return difference(world, stages, expected)


# --- Backward passes in two parts --------------------------------------------------------------


@functools.cache
def counted_products() -> dict[str, list[Any]]:
    cases = {s: (TrainPlan(**staged(s, 2)), 4) for s in SPLITTING}
    return in_one_world(2, count_products, cases)


@pytest.mark.parametrize("schedule", SPLITTING)
def test_a_function_that_asks_computes_each_gradient_once(schedule):
    for counts, expected in counted_products()[schedule]:
        assert counts == expected


class _Product(torch.autograd.Function):
    """x w, counting what its backward pass computes."""

    counts: ClassVar[dict[str, int]] = {}

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        for name in _Product.counts:
            _Product.counts[name] += getattr(wanted(), name)
        return (
            grad * w if wanted().activations else None,
            (grad * x).sum((0, 1)) if wanted().weights else None,
        )


class _Products(nn.Module):
    """A stage of one product."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy
        self.w = nn.Parameter(torch.linspace(1, 2, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        if self.toy.embedding is None:
            x = _Product.apply(x, self.w)
        return self.toy(x, **others)


def count_products(plan: TrainPlan, micro_batches: int) -> tuple[dict[str, int], dict[str, int]]:
    world, toys, _ = build(plan, micro_batches)
    stages = [_Products(toy) for toy in toys]
    pipeline = Pipeline(
        world, stages, micro_batches=micro_batches, activation=((ROWS, LENGTH, WIDTH), FLOAT)
    )
    _Product.counts.update(activations=0, weights=0)
    pipeline.step(**batch(1, micro_batches * ROWS))
    with_product = sum(toy.embedding is None for toy in toys)
    for stage in stages:
        assert stage.toy.embedding is not None or stage.w.grad is not None
    counts = dict(_Product.counts)
    return counts, dict.fromkeys(counts, with_product * micro_batches)


def test_outside_of_the_two_parts_every_gradient_is_wanted():
    assert wanted() == (True, True)
    with only(weights=True):
        assert wanted() == (False, True)
    assert wanted() == (True, True)


# --- Memory and time -------------------------------------------------------------------------


@functools.cache
def watched_weights(schedule: str) -> dict[str, list[tuple[bool, bool]]]:
    stages = TWO if schedule == "1f1b" else EVEN
    fields = {"pp": 2, "dp": 2, "schedule": schedule, "stages": stages}
    cases = {f"{zero}": (TrainPlan(zero=zero, **fields), 4) for zero in (1, 2, 3)}
    return in_one_world(4, watch_weights, cases)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_lets_go_of_weights_and_gradients_between_micro_batches(schedule, zero):
    for whole_weights, whole_gradients in watched_weights(schedule)[f"{zero}"]:
        assert whole_weights is (zero < 3)
        assert whole_gradients is (zero < 2)


def watch_weights(plan: TrainPlan, micro_batches: int) -> tuple[bool, bool]:
    """Whether a block ever had whole weights, and ever whole gradients, as its stage began.

    Looked at before each forward pass but the first of a stage.
    """
    world, stages, pipeline = build(plan, micro_batches)
    found = []

    def look(stage: Toy, _: Any) -> None:
        weights = [p for half in stage.halves.values() for p in half.parameters()]
        whole = [p for p in weights if not isinstance(p, DTensor)]
        found.append((bool(whole), any(p.grad is not None for p in whole)))

    for stage in stages:
        stage.register_forward_pre_hook(look)
    pipeline.step(**own_rows(world, batch(1, plan.dp * micro_batches * ROWS)))
    later = found[len(stages) :]
    return any(weights for weights, _ in later), any(gradients for _, gradients in later)


IN_FLIGHT = {"1f1b": 1, "zb1p": 2, "gpipe": 8}
"""Micro-batches of which the last of two ranks keeps the input, at most."""


@functools.cache
def watched_inputs() -> dict[str, list[tuple[int, int]]]:
    cases = {s: (TrainPlan(pp=2, schedule=s, stages=TWO), 8) for s in IN_FLIGHT}
    return in_one_world(2, watch_received, cases)


@pytest.mark.parametrize("schedule", IN_FLIGHT)
def test_received_activations_live_no_longer_than_their_micro_batch(schedule):
    assert watched_inputs()[schedule][1] == (IN_FLIGHT[schedule], 0)


def watch_received(plan: TrainPlan, micro_batches: int) -> tuple[int, int]:
    """The most inputs of a stage that were alive in a second step, and those left after it."""
    _, (stage,), pipeline = build(plan, micro_batches)
    received: list[weakref.ref[Tensor]] = []
    alive = []

    def look(_: nn.Module, inputs: tuple[Tensor]) -> None:
        received.append(weakref.ref(inputs[0]))
        alive.append(sum(x() is not None for x in received))

    stage.register_forward_pre_hook(look)
    for seed in (1, 2):
        received.clear()
        alive.clear()
        pipeline.step(**batch(seed, micro_batches * ROWS))
    return max(alive), sum(x() is not None for x in received)


def test_seconds_count_a_stage_at_work_and_not_waiting():
    plan = TrainPlan(pp=2, stages=TWO)
    (first,), (last,) = run_ranks(2, sleepy_seconds, plan, 4)
    assert last >= 4 * 0.05
    assert first < last / 2


def sleepy_seconds(plan: TrainPlan, micro_batches: int) -> tuple[float, ...]:
    world, (stage,), pipeline = build(plan, micro_batches)
    data = batch(1, micro_batches * ROWS)
    pipeline.step(**data)
    if world.place.pp == 1:
        stage.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    return pipeline.step(**data).seconds


# --- What cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "micro_batches", "message"),
    [
        (
            "1f1b",
            3,
            "1f1b over 4 stages needs at least 4 micro-batches in a step on each data-parallel "
            "rank, but there are 3. Use a larger batch, a smaller micro_batch, fewer stages or "
            "gpipe.",
        ),
        ("dualpipev", 7, "dualpipev over 8 stages needs at least 8 micro-batches .* are 7"),
        (
            "interleaved",
            11,
            "interleaved over 4 pipeline ranks would run the 11 micro-batches of a data-parallel "
            "rank in 2 rounds of unequal length. Use 10 or 12 micro-batches.",
        ),
        ("zb1p", 9, "zb1p over 4 pipeline ranks .* Use 8 or 10 micro-batches."),
        ("zbv", 0, "A step has 0 micro-batches on each data-parallel rank."),
    ],
)
def test_a_number_of_micro_batches_that_does_not_fit_is_refused(schedule, micro_batches, message):
    layout = fit(TrainPlan(**staged(schedule, 4)), SPEC)
    nobody = {f.name: ALONE for f in dataclasses.fields(World)}
    world = World(
        **{
            **nobody,
            "layout": layout,
            "rank": 0,
            "device": torch.device("cpu"),
            "groups": Groups(),
            "dense_mesh": None,
            "expert_mesh": None,
        }
    )
    with pytest.raises(PlanError, match=message) as error:
        Pipeline(world, [], micro_batches=micro_batches, activation=((ROWS, LENGTH, WIDTH), FLOAT))
    assert "\n" not in str(error.value)


TORCH = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb1p": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


@pytest.mark.parametrize("schedule", TORCH)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_is_refused_is_what_torch_cannot_run(schedule, ranks):
    per_rank = 1 if schedule == "1f1b" else 2
    stages = [
        SimpleNamespace(
            group_size=ranks, group_rank=0, num_stages=ranks * per_rank, submod=None, stage_index=0
        )
        for _ in range(per_rank)
    ]
    for micro_batches in range(1, 13):
        runs = can_run(schedule, micro_batches, ranks=ranks, stages=ranks * per_rank)
        given = stages[0] if schedule == "1f1b" else stages
        with nullcontext() if runs else pytest.raises(ValueError, match=r"(?i)micro-?batches"):
            TORCH[schedule](given, micro_batches, loss_fn=lambda output, _: output)


def test_an_error_of_a_stage_comes_out_as_it_is():
    plan = TrainPlan(pp=2, schedule="gpipe", stages=TWO)
    assert run_ranks(2, fail, plan, 2) == ["no number at 1", "no number at 0"]


def fail(plan: TrainPlan, micro_batches: int) -> str:
    """Both stages fail: the first in its second micro-batch, when the other has its first."""
    world, (stage,), pipeline = build(plan, micro_batches)
    fatal = 1 - world.place.pp
    calls = itertools.count()

    def raise_at(*_: Any) -> None:
        if next(calls) == fatal:
            raise TrainingError(f"no number at {fatal}")

    stage.register_forward_pre_hook(raise_at)
    try:
        pipeline.step(**batch(1, micro_batches * ROWS))
    except TrainingError as error:
        return str(error)
    return "nothing"
