"""The simulator does what torch's own schedules do: in order, in time, and in what they keep."""

from __future__ import annotations

import functools
import random
import threading
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from moesaic.errors import PlanError
from moesaic.parallel.schedule import _ONE_STAGE, _SEVERAL
from moesaic.planning.actions import Action, actions
from moesaic.planning.plan import V_SHAPED
from moesaic.planning.schedules import can_run, stages_of
from moesaic.planning.simulate import StageSeconds, in_flight, simulate
from tests.ranks import run_ranks
from tests.sleeping import CASES, UNIT, Case, Sleeper, compare

SCHEDULES = (*_ONE_STAGE, *_SEVERAL)
SPLITTING = ("zb1p", "zbv", "dualpipev")


def pipelines(schedule: str, *, most_ranks: int, most: int) -> list[tuple[int, int, int]]:
    """Ranks, stages and micro-batches that a schedule can run."""
    per_rank = [1] if schedule in _ONE_STAGE else [2] if schedule in V_SHAPED else [1, 2, 3, 4]
    return [
        (ranks, ranks * count, micro_batches)
        for ranks in range(2, most_ranks + 1)
        for count in per_rank
        for micro_batches in range(1, most + 1)
        if can_run(schedule, micro_batches, ranks=ranks, stages=ranks * count)
    ]


def random_stages(dice: random.Random, count: int, *, whole: float = 0.3) -> list[StageSeconds]:
    def recompute() -> float:
        return dice.random() if dice.random() < whole else 0.0

    return [
        StageSeconds(
            dice.random(),
            dice.random(),
            dice.random(),
            recompute(),
            is_compiled=dice.random() < whole / 3,
        )
        for _ in range(count)
    ]


# --- Torch's schedules, in a time of their own ------------------------------------------------


class Clockwork:
    """Torch's code of a schedule on every rank, a thread each, with clocks that only it moves.

    A message goes when both its ends have been posted, as gloo and NCCL have it.
    """

    def __init__(
        self,
        schedule: str,
        seconds: Sequence[StageSeconds],
        *,
        ranks: int,
        micro_batches: int,
        send_seconds: Sequence[float],
        patch: pytest.MonkeyPatch,
    ) -> None:
        self.seconds, self.send_seconds = seconds, send_seconds
        self.posted: dict[Any, float] = {}
        self.arrived: dict[Any, float] = {}
        self.changed = threading.Condition()
        self.own = threading.local()
        self.done: list[list[tuple[Action, float, float]]] = [[] for _ in range(ranks)]
        self.errors: list[BaseException] = []
        patch.setattr(torch_schedules, "_batch_p2p", self.post)
        patch.setattr(torch_schedules, "_wait_batch_p2p", self.wait)
        patch.setattr(torch_schedules, "_sorted_batch_p2p", lambda ops, **_: {0: self.post(ops)})
        for cls in (torch_schedules.PipelineScheduleSingle, torch_schedules.PipelineScheduleMulti):
            patch.setattr(cls, f"_initialize_stage{'s' * ('Multi' in cls.__name__)}", ignore)
        patch.setattr(torch_schedules._PipelineSchedule, "_maybe_get_loss", ignore)
        threads = [
            threading.Thread(target=self.run, args=(schedule, rank, ranks, micro_batches))
            for rank in range(ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def run(self, schedule: str, rank: int, ranks: int, micro_batches: int) -> None:
        self.own.rank, self.own.now = rank, 0.0
        count = len(self.seconds)
        stages = [
            ClockworkStage(self, number, count, rank, ranks)
            for number in stages_of(rank, schedule, ranks=ranks, stages=count)
        ]
        made = (
            _ONE_STAGE[schedule](stages[0], micro_batches, loss_fn=ignore)
            if schedule in _ONE_STAGE
            else _SEVERAL[schedule](stages, micro_batches, loss_fn=ignore)
        )
        try:
            made._step_microbatches(target_mbs=[None] * micro_batches)
        except BaseException as error:
            with self.changed:
                self.errors.append(error)
                self.changed.notify_all()

    def post(self, ops: Sequence[Any], **_: Any) -> list[Any]:
        with self.changed:
            for message in ops:
                _, from_stage, to_stage, _ = message
                other = self.posted.pop(message, None)
                if other is None:
                    self.posted[message] = self.own.now
                else:
                    hop = self.send_seconds[min(from_stage, to_stage)]
                    self.arrived[message] = max(other, self.own.now) + hop
                    self.changed.notify_all()
        return list(ops)

    def wait(self, works: Sequence[Any]) -> None:
        with self.changed:
            for message in works:
                self.changed.wait_for(lambda m=message: m in self.arrived or self.errors)
                self.own.now = max(self.own.now, self.arrived[message])

    def work(self, kind: str, stage: int, micro_batch: int, seconds: float) -> None:
        start = self.own.now
        self.own.now += seconds
        done = (Action(kind, stage, micro_batch), start, self.own.now)
        self.done[self.own.rank].append(done)


class ClockworkStage(SimpleNamespace):
    """What torch's schedules call of a stage; runs backward passes as moesaic's stages do."""

    def __init__(
        self, clockwork: Clockwork, number: int, count: int, rank: int, ranks: int
    ) -> None:
        super().__init__(clockwork=clockwork, stage_index=number, num_stages=count, group_rank=rank)
        self.group_size, self.submod = ranks, None
        self.is_first, self.is_last = number == 0, number == count - 1
        self.seconds = clockwork.seconds[number]
        self.set_local_fwd_input = self.set_local_bwd_input = self.perform_reduce_grad = ignore
        self.get_local_bwd_output = ignore

    def get_fwd_recv_ops(self, mb: int) -> list[Any]:
        return [] if self.is_first else [("F", self.stage_index - 1, self.stage_index, mb)]

    def get_fwd_send_ops(self, mb: int) -> list[Any]:
        return [] if self.is_last else [("F", self.stage_index, self.stage_index + 1, mb)]

    def get_bwd_recv_ops(self, mb: int) -> list[Any]:
        return [] if self.is_last else [("B", self.stage_index + 1, self.stage_index, mb)]

    def get_bwd_send_ops(self, mb: int) -> list[Any]:
        return [] if self.is_first else [("B", self.stage_index, self.stage_index - 1, mb)]

    def forward_one_chunk(self, mb: int, *_: Any, **__: Any) -> None:
        self.clockwork.work("F", self.stage_index, mb, self.seconds.forward)

    def backward_one_chunk(self, mb: int, *, full_backward: bool = True, **_: Any) -> None:
        both = self.seconds.input_gradient + self.seconds.weight_gradient
        if full_backward or self.seconds.is_whole:
            self.clockwork.work("B", self.stage_index, mb, self.seconds.recompute + both)
        else:
            seconds = 0.0 if self.is_first else self.seconds.input_gradient
            self.clockwork.work("I", self.stage_index, mb, seconds)

    def backward_weight_one_chunk(self, mb: int, **_: Any) -> None:
        if not self.seconds.is_whole:
            both = self.seconds.input_gradient + self.seconds.weight_gradient
            seconds = both if self.is_first else self.seconds.weight_gradient
            self.clockwork.work("W", self.stage_index, mb, seconds)


def ignore(*_: Any, **__: Any) -> None:
    pass


@pytest.mark.parametrize("sending", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_simulation_is_what_torch_does(schedule, sending, monkeypatch):
    dice = random.Random(f"{schedule} {sending}")
    possible = pipelines(schedule, most_ranks=6, most=14)
    for ranks, stages, micro_batches in dice.sample(possible, k=12):
        seconds = random_stages(dice, stages)
        hops = [sending * dice.random() for _ in range(stages - 1)]
        sizes = {"ranks": ranks, "micro_batches": micro_batches, "send_seconds": hops}
        expected = Clockwork(schedule, seconds, patch=monkeypatch, **sizes).done
        timeline = simulate(schedule, seconds, **sizes)
        found: list[list[Any]] = [[] for _ in range(ranks)]
        for action, rank, start, end in timeline.done:
            found[rank].append((action, start, end))
        for ours, theirs in zip(found, expected, strict=True):
            assert [action for action, *_ in ours] == [action for action, *_ in theirs]
            for (_, *our_times), (_, *their_times) in zip(ours, theirs, strict=True):
                assert our_times == pytest.approx(their_times, abs=1e-9)
        assert timeline.seconds == pytest.approx(max(done[-1][2] for done in expected))
        assert timeline.busy == pytest.approx(
            [sum(end - start for _, start, end in done) for done in expected]
        )


# --- Order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", _SEVERAL)
def test_the_order_is_that_of_torch(schedule):
    for ranks, stages, micro_batches in pipelines(schedule, most_ranks=5, most=14):
        placed = [
            SimpleNamespace(
                group_size=ranks, group_rank=0, num_stages=stages, submod=None, stage_index=number
            )
            for number in range(stages // ranks)
        ]
        made = _SEVERAL[schedule](placed, micro_batches, loss_fn=ignore)
        expected = [
            [
                (one.computation_type.value, one.stage_index, one.microbatch_index)
                for action in made.pipeline_order[rank]
                if action is not None
                for one in action.sub_actions or (action,)
            ]
            for rank in range(ranks)
        ]
        found = actions(schedule, ranks=ranks, stages=stages, micro_batches=micro_batches)
        assert found == expected, (ranks, stages, micro_batches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_micro_batch_goes_once_through_every_stage_and_back(schedule):
    for ranks, stages, micro_batches in pipelines(schedule, most_ranks=4, most=9):
        sizes = {"ranks": ranks, "stages": stages, "micro_batches": micro_batches}
        orders = actions(schedule, **sizes)
        for rank, order in enumerate(orders):
            own = stages_of(rank, schedule, ranks=ranks, stages=stages)
            wanted = [(stage, number) for stage in own for number in range(micro_batches)]
            for kinds in ("F", "BI", "BW"):
                found = [(s, number) for kind, s, number in order if kind in kinds]
                assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_rank_goes_forth_and_back_with_each_micro_batch(schedule):
    assert actions(schedule, ranks=1, stages=1, micro_batches=2) == [
        [("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1)]
    ]
    seconds = StageSeconds(1, 2, 3, recompute=4)
    timeline = simulate(schedule, [seconds], ranks=1, micro_batches=5, action_seconds=0.5)
    assert timeline.seconds == 5 * (10 + 2 * 0.5)
    assert timeline.in_flight == (1,)


def test_a_stage_that_is_whole_goes_back_at_once():
    divided = actions("zb1p", ranks=2, stages=2, micro_batches=3)
    whole = actions("zb1p", ranks=2, stages=2, micro_batches=3, whole=[1])
    assert whole[0] == divided[0]
    assert [kind for kind, *_ in divided[1]] == list("FIFIWFIWW")
    assert [kind for kind, *_ in whole[1]] == list("FBFBFB")


# --- Closed forms ----------------------------------------------------------------------------


FORWARD, BACKWARD = 2.0, 5.0


def uniform(count: int) -> list[StageSeconds]:
    return [StageSeconds(FORWARD, 2, 1, recompute=2)] * count


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (4, 9), (8, 8), (12, 128)])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_equal_stages_take_as_long_as_micro_batches_and_ranks_but_one(
    schedule, ranks, micro_batches
):
    timeline = simulate(schedule, uniform(ranks), ranks=ranks, micro_batches=micro_batches)
    assert timeline.seconds == (micro_batches + ranks - 1) * (FORWARD + BACKWARD)
    assert timeline.busy == (micro_batches * (FORWARD + BACKWARD),) * ranks


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), [(2, 2, 4), (4, 3, 16), (16, 4, 64)])
def test_interleaving_shortens_the_fill_by_the_number_of_chunks(ranks, chunks, micro_batches):
    timeline = simulate(
        "interleaved", uniform(ranks * chunks), ranks=ranks, micro_batches=micro_batches
    )
    steps = micro_batches * chunks + ranks - 1
    assert timeline.seconds == steps * (FORWARD + BACKWARD)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((3, 3, 3, 3, 2, 2, 2, 2), 267), ((3, 2, 3, 2, 2, 3, 2, 3), 273), ((2.5,) * 8, 262.5)],
    ids=["3 and 2 on every rank", "by turns 3 and 2, 2 and 3", "equal"],
)
def test_what_ranks_sum_to_does_not_say_how_long_interleaving_takes(layers, expected):
    stages = [StageSeconds(size, size, size) for size in layers]
    assert simulate("interleaved", stages, ranks=4, micro_batches=16).seconds == expected


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_schedules_that_split_backward_passes_wait_less(ranks):
    def idle(schedule: str, per_rank: int) -> float:
        part = 1 / per_rank
        stages = [StageSeconds(part, part, part)] * (ranks * per_rank)
        timeline = simulate(schedule, stages, ranks=ranks, micro_batches=32)
        return timeline.seconds - max(timeline.busy)

    assert idle("1f1b", 1) == pytest.approx(3 * (ranks - 1))
    assert idle("interleaved", 2) == pytest.approx(3 * (ranks - 1) / 2)
    assert idle("zb1p", 1) == pytest.approx(ranks - 1)
    assert idle("zbv", 2) == pytest.approx((ranks - 1) / 2)
    assert idle("dualpipev", 2) == pytest.approx(ranks - 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_time_is_below_what_the_slowest_rank_works(schedule):
    dice = random.Random(schedule)
    for ranks, stages, micro_batches in pipelines(schedule, most_ranks=4, most=9):
        timeline = simulate(
            schedule, random_stages(dice, stages), ranks=ranks, micro_batches=micro_batches
        )
        assert timeline.seconds >= max(timeline.busy) * (1 - 1e-12)  # sums in another order


# --- What is kept ----------------------------------------------------------------------------


def test_1f1b_keeps_as_many_micro_batches_as_stages_follow():
    for ranks, _, micro_batches in pipelines("1f1b", most_ranks=6, most=9):
        found = in_flight("1f1b", ranks=ranks, stages=ranks, micro_batches=micro_batches)
        assert found == tuple(min(micro_batches, ranks - rank) for rank in range(ranks))


def test_gpipe_keeps_every_micro_batch():
    assert in_flight("gpipe", ranks=3, stages=3, micro_batches=7) == (7, 7, 7)


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 2), (4, 2), (8, 4), (3, 3)])
def test_interleaved_ranks_keep_fewer_the_later_they_come(ranks, chunks):
    stages = ranks * chunks
    timeline = simulate("interleaved", uniform(stages), ranks=ranks, micro_batches=4 * ranks)
    assert timeline.peak([1] * stages) == tuple(
        (chunks - 1) * ranks + 2 * (ranks - rank - 1) + 1 for rank in range(ranks)
    )
    if ranks == 8:
        assert timeline.in_flight[::8] == (16, 16, 8, 8)
        assert timeline.peak([1] * stages)[0] == 39


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_peak_is_of_one_moment_and_not_of_each_stage_apart(schedule):
    dice = random.Random(schedule)
    possible = pipelines(schedule, most_ranks=4, most=9)
    for ranks, stages, micro_batches in dice.sample(possible, k=min(20, len(possible))):
        seconds = random_stages(dice, stages, whole=0.2)
        kept, more = ([dice.randrange(1, 9) for _ in range(stages)] for _ in range(2))
        timeline = simulate(schedule, seconds, ranks=ranks, micro_batches=micro_batches)
        whole = [stage for stage, of in enumerate(seconds) if of.is_whole]
        sizes = {"ranks": ranks, "stages": stages, "micro_batches": micro_batches}
        assert timeline.in_flight == in_flight(schedule, **sizes, whole=whole)
        for rank, peak in enumerate(timeline.peak(kept, more)):
            done = [(d.action, d.start, d.end) for d in timeline.done if d.rank == rank]
            assert peak == max(kept_at(moment, done, kept, more) for _, _, moment in done)


def kept_at(moment: float, done: Sequence[Any], kept: Sequence[int], more: Sequence[int]) -> float:
    """Bytes of a rank just before a moment, counted micro-batch by micro-batch."""
    begun = {action: start for action, start, _ in done}
    ended = {(a.kind, *a[1:]): end for a, _, end in done}
    total = 0
    for (kind, *place), start in begun.items():
        last = ended.get(("B", *place), ended.get(("W", *place)))
        stage = place[0]
        if kind == "F":
            total += kept[stage] * (start < moment <= last)
        elif kind == "I" and stage > 0:
            total += more[stage] * (start < moment <= last)
    return total


def test_between_the_two_parts_of_a_backward_pass_nearly_all_activations_are_kept():
    kept: list[weakref.ref[_Kept]] = []

    def keep(x: Tensor) -> _Kept:
        one = _Kept(x.detach())
        kept.append(weakref.ref(one))
        return one

    def alive() -> int:
        return sum(one() is not None for one in kept)

    layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)))
    x = torch.randn(2, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.x):
        y = layers(x)
    before = alive()
    _, groups = stage_backward_input([y], [torch.ones_like(y)], [x], layers.parameters())
    # What the last tanh kept is gone: after it comes no weight.
    assert alive() == before - 1
    stage_backward_weight(layers.parameters(), groups)
    assert alive() == 0


class _Kept:
    def __init__(self, x: Tensor) -> None:
        self.x = x


# --- What cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"schedule": "zbv", "stages": 4}, "4 stages, but zbv runs 2 on each of its 4 .* Give 8"),
        ({"schedule": "1f1b", "micro_batches": 3}, "1f1b over 4 stages needs at least 4"),
        ({"send_seconds": [0.0]}, "1 durations of sending between 4 stages. Give one for each"),
        ({"seconds": -1.0}, "takes -1.0 s"),
        ({"seconds": float("nan")}, "takes nan s"),
        ({"action_seconds": float("inf")}, "takes inf s"),
    ],
)
def test_what_cannot_be_simulated_is_refused(given, message):
    chosen = {"schedule": "1f1b", "stages": 4, "micro_batches": 8, "seconds": 1.0, **given}
    seconds = chosen.pop("seconds")
    stages = [StageSeconds(seconds, 1, 1)] * chosen.pop("stages")
    with pytest.raises(PlanError, match=message) as error:
        simulate(chosen.pop("schedule"), stages, ranks=4, **chosen)
    assert "\n" not in str(error.value)


# --- Real ranks -------------------------------------------------------------------------------


REAL = (
    Case("gpipe", 2, 3, (1, 1)),
    Case("1f1b", 2, 5, (1, 2)),
    Case("interleaved", 2, 4, (1, 1, 1, 1)),
    Case("zb1p", 2, 4, (1, 1)),
    Case("zb1p", 2, 4, (1, 2), again=(0, 1)),
    Case("zbv", 2, 4, (1, 1, 1, 1)),
    Case("zbv", 2, 4, (1, 1, 1, 2), again=(1, 0, 0, 2)),
    Case("dualpipev", 2, 6, (1, 1, 1, 1)),
)


@functools.cache
def done_by_ranks() -> list[dict[str, list[Any]]]:
    return run_ranks(2, do_without_sleep, REAL)


def do_without_sleep(cases: Sequence[Case]) -> dict[str, list[Any]]:
    found = {}
    for case in cases:
        sleeper = Sleeper.join(case)
        log: list[tuple[str, int, int]] = []
        for stage in sleeper.stages:
            stage.log = log
        sleeper.pipeline.step(
            torch.ones(case.micro_batches, 1, dtype=torch.int64),
            numbers=torch.arange(case.micro_batches),
        )
        found[case.name] = log
    return found


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_training_does_what_is_planned(case):
    whole = [stage for stage, count in enumerate(case.again) if count]
    expected = actions(
        case.schedule,
        ranks=case.ranks,
        stages=len(case.layers),
        micro_batches=case.micro_batches,
        whole=whole,
    )
    for found, planned in zip(done_by_ranks(), expected, strict=True):
        # The first stage's I does nothing, and its W everything.
        assert found[case.name] == [
            ("B" if kind == "W" and stage == 0 else kind, stage, number)
            for kind, stage, number in planned
            if (kind, stage) != ("I", 0)
        ]


def test_real_ranks_wait_for_each_other_as_simulated():
    """Only so much as a busy machine cannot spoil: sleeping ranks are never early."""
    cases = [Case("1f1b", 2, 3, (1, 1)), Case("zbv", 2, 4, (1, 1, 1, 1))]
    for comparison in compare(cases, unit=0.01, steps=1):
        assert comparison.measured[0] >= comparison.case.simulate(0.01).seconds - 1e-4
        assert comparison.action_seconds > 0


LIMIT = 0.02


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_simulation_is_what_real_ranks_take(ranks):
    """What other work on this machine has made late is tried again."""
    left = [case for case in CASES if case.ranks == ranks]
    for _ in range(4):
        found = list(compare(left, unit=UNIT, steps=5))
        left = [one.case for one in found if abs(one.error) > LIMIT]
    assert not left, found
