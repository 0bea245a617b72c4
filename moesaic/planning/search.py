"""The fastest way to train a model on a cluster, over everything that a plan leaves open.

    outer choices    tensor, pipeline and data ranks, where experts lie, micro-batch, schedule,
                     stages a rank, ZeRO: every legal combination is looked at
    inner choices    the cut into stages and what each layer recomputes: `solve`, then the
                     simulator ranks the layouts that are nearly as good

No step is shorter than the work of its micro-batches dealt evenly over the ranks, and no rank holds
less than its share of the half layers. What is not tried is known to be slower by such a bound.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.activations import Means
from moesaic.planning.cluster import ClusterSpec
from moesaic.planning.cost import Prediction, UnitCost, default_stages, predict, unit_costs
from moesaic.planning.job import Job
from moesaic.planning.measured import MeasuredTable
from moesaic.planning.memory import (
    Kept,
    Ledger,
    UnitMemory,
    fixed_memory,
    layer_memory,
    pipeline_memory,
    unit_memory,
)
from moesaic.planning.plan import SPLIT, V_SHAPED, Recompute, Schedule, Stage, TrainPlan
from moesaic.planning.schedules import can_run
from moesaic.planning.shape import ModelShape, MoEShape, unit_names
from moesaic.planning.simulate import in_flight
from moesaic.planning.solve import Choice, Problem, Solution, Unit, near_optimal, solve_within
from moesaic.planning.split import Span

USABLE = 0.92
"""Part of a device's memory that a plan may fill. The rest is for what no model counts: the
device's context, buffers of NCCL, and what the allocator cannot reuse. Ours."""

MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Sequences of a micro-batch that are tried."""

INTERLEAVES = (2, 3, 4)
"""Stages a rank that are tried where a schedule leaves them open."""

UNBOUNDED = 1e30
"""Bytes that nothing exceeds."""

EXTRA = 1
"""Answers looked at more closely beside those asked for."""

RECOMPUTE: tuple[Recompute, ...] = ("none", "moe_activations", "attention", "full")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be trained where, and what of the answer is given."""

    shape: ModelShape
    cluster: ClusterSpec
    sequence: int
    global_batch: int
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Job` that are given."""
    recompute: tuple[Recompute, ...] = RECOMPUTE
    """Choices allowed for a layer; without `none`, one of the others is made for every layer."""
    half_layers: bool = True
    """Whether a stage may begin between attention and feed-forward network of a layer."""
    usable: float = USABLE
    """Part of each device's memory that may be filled."""
    table: MeasuredTable | None = None
    """What was measured of the units."""

    def __post_init__(self) -> None:
        for name in ("sequence", "global_batch"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}. It must be at least 1.")
        if not 0 < self.usable <= 1:
            raise PlanError(f"usable is {self.usable}. It is a part of memory, above 0, at most 1.")
        if self.table is not None:
            self.table.check(
                self.shape,
                sequence=self.sequence,
                dtype=self.fixed.get("dtype", "bf16"),
                micro_batch=self.fixed.get("micro_batch"),
                ranks=self.cluster.ranks,
                on_cpu=self.means.device == "cpu",
            )

    @cached_property
    def moe(self) -> MoEShape | None:
        """The experts of the first layer that has some."""
        found = (layer.feed_forward for layer in self.shape.layers)
        return next((network for network in found if isinstance(network, MoEShape)), None)

    @cached_property
    def means(self) -> Means:
        """What memory depends on beside the job."""
        is_cpu = all("cpu" in device.name.lower() for device in self.cluster.devices)
        return Means(device="cpu" if is_cpu else "gpu")

    def budgets(self, job: Job) -> list[float]:
        """Bytes that the smallest device of each pipeline rank may fill."""
        found = []
        for place in range(job.pp):
            kinds = self.cluster.kinds_of(place * job.stage_ranks, job.stage_ranks)
            least = min(self.cluster.device(rank).memory_bytes for rank in kinds)
            found.append(self.usable * least)
        return found


@dataclass(frozen=True)
class Answer:
    """One way to train, with what it takes."""

    question: Question
    job: Job
    stages: tuple[Span, ...]
    recompute: Mapping[int | str, Recompute]
    prediction: Prediction
    bottleneck: float
    """Seconds of the slowest pipeline rank for one micro-batch."""
    bottleneck_bound: float
    """No cut into stages has less; equal where that is proved."""

    @cached_property
    def ledgers(self) -> tuple[Ledger, ...]:
        """Of the fullest rank of each pipeline rank."""
        question = self.question
        return pipeline_memory(
            question.shape, self.job, self.stages, self.recompute, question.means
        )

    @cached_property
    def excess(self) -> tuple[float, ...]:
        """Bytes by which each pipeline rank is above what it may fill, or below."""
        budgets = self.question.budgets(self.job)
        return tuple(
            ledger.total - budget for ledger, budget in zip(self.ledgers, budgets, strict=True)
        )

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.prediction.seconds

    @property
    def tokens_per_second(self) -> float:
        """Of each rank."""
        return self.prediction.tokens_per_second(self.job)

    @property
    def mfu(self) -> float:
        """Model FLOPs, causal, nothing counted twice, over the peak of the cluster's devices."""
        question, job = self.question, self.job
        cluster = question.cluster
        peak = sum(
            node.count * count * node.device.peak(job.dtype) for node, count in cluster.nodes
        )
        flops = question.shape.flops_per_token(job.sequence) * job.step_tokens
        return flops / self.seconds / peak

    @property
    def gap(self) -> float:
        """By how much the bottleneck may be above the least there is; 0 where it is proved."""
        return self.bottleneck / self.bottleneck_bound - 1 if self.bottleneck_bound else math.inf

    @cached_property
    def unit_names(self) -> list[str]:
        """As a plan's file names them."""
        return unit_names(self.question.shape)

    def plan(self) -> TrainPlan:
        """What training obeys.

        Raises:
            PlanError: The job has what Moesaic's training does not do.
        """
        return plan_of(self)


class Tried(NamedTuple):
    """What became of a combination."""

    answer: Answer | None
    """None: it is slower than it was allowed to be."""
    is_free: bool
    """Whether it would be the same however much memory there was."""


class Refusal(NamedTuple):
    """Why a combination has no answer."""

    job: Job
    why: str


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    answers: tuple[Answer, ...]
    """The best ones, the fastest first, no two with the same outer choices."""
    combinations: int
    """That are legal."""
    tried: int
    """Of them; the others are slower by their bounds."""
    refusals: tuple[Refusal, ...]
    """Of those tried, what does not fit."""


def search(question: Question, *, count: int = 5) -> Found:
    """The fastest answers.

    Args:
        question: What is asked.
        count: How many to find.

    Raises:
        PlanError: Nothing is legal, or nothing fits.
    """
    jobs = list(legal_jobs(question))
    if not jobs:
        raise PlanError(_nothing_legal(question))
    work = Work(question)
    # What is likely to be fast comes first, so that the rest is soon known to be slower.
    likely = sorted(
        range(len(jobs)), key=lambda number: (work.likely_seconds(jobs[number]), number)
    )
    # A few more than are asked for: cutting layers in two may change their order.
    wanted = count + EXTRA
    answers: list[Answer] = []
    refusals: list[Refusal] = []
    free: set[Job] = set()
    tried = 0
    for number in likely:
        job = jobs[number]
        limit = answers[wanted - 1].seconds if len(answers) >= wanted else math.inf
        if work.least_seconds(job) > limit:
            continue
        tried += 1
        # To share more is only slower where memory did not matter.
        if job.zero > 1 and job.replace(zero=1) in free:
            continue
        if not work.may_fit(job, limit):
            refusals.append(Refusal(job, "it does not fit, or is slower if it does"))
            continue
        try:
            answer, is_free = work.tried(job, limit=limit)
        except PlanError as error:
            refusals.append(Refusal(job, str(error)))
            continue
        if is_free:
            free.add(job)
        if answer is not None:
            answers = sorted([*answers, answer], key=lambda a: a.seconds)[:wanted]
    if not answers:
        raise PlanError(_nothing_fits(question, refusals))
    best = sorted((work.halved(answer) for answer in answers), key=lambda a: a.seconds)
    best = [refined(best[0]), *best[1:]]
    return Found(tuple(best[:count]), len(jobs), tried, tuple(refusals))


def evaluate(
    question: Question,
    job: Job,
    stages: Sequence[Span],
    recompute: Mapping[int | str, Recompute],
    *,
    is_shortened: bool = False,
) -> Answer:
    """A given layout, whether it fits or not; `is_shortened` as in `predict`."""
    shape, cluster = question.shape, question.cluster
    prediction = predict(
        shape,
        job,
        cluster,
        stages=stages,
        recompute=recompute,
        table=question.table,
        is_shortened=is_shortened,
    )
    totals = [0.0] * job.pp
    for number, of in enumerate(prediction.stage_seconds):
        totals[owner(number, job)] += (
            of.forward + of.input_gradient + of.weight_gradient + of.recompute
        )
    return Answer(
        question,
        job,
        tuple(stages),
        dict(recompute),
        prediction,
        max(totals),
        0.0,
    )


def refined(answer: Answer, *, slack: float = 0.01, limit: int = 24) -> Answer:
    """The best, by the simulator, of the layouts whose bottleneck is nearly the least."""
    if answer.job.pp == 1:
        return answer
    question, job = answer.question, answer.job
    work = Work(question)
    best = answer
    for solution in near_optimal(work.problem(job), slack=slack, limit=limit):
        found = work.evaluated(job, solution)
        if found.seconds < best.seconds and max(found.excess) <= 0:
            best = found
    return best


def owner(stage: int, job: Job) -> int:
    """The pipeline rank that runs a stage."""
    if job.schedule in V_SHAPED and job.pp > 1:
        return min(stage, 2 * job.pp - 1 - stage)
    return stage % job.pp


class Work:
    """Costs and bytes of a question's units, kept from combination to combination."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._costs: dict[tuple[Any, ...], tuple[UnitCost, ...]] = {}
        self._sums: dict[tuple[Any, ...], float] = {}
        self._fixed: dict[Job, list[float]] = {}
        self._kept: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        layers = question.shape.layers
        self._kinds = list(dict.fromkeys(layers))
        self._places = [self._kinds.index(kind) for kind in layers]
        self._small = dataclasses.replace(question.shape, layers=tuple(self._kinds))
        heaviest = max(self._kinds, key=lambda kind: layers.count(kind))
        self._heaviest = heaviest, layers.count(heaviest)

    def costs(self, job: Job, rank: int = 0) -> tuple[UnitCost, ...]:
        """As `unit_costs`, on the device of a rank."""
        question = self.question
        key = self._key(job, rank)
        if key not in self._costs:
            self._costs[key] = unit_costs(
                question.shape, job, question.cluster, rank=rank, table=question.table
            )
            self._sums[key] = sum(unit.seconds for unit in self._costs[key])
        return self._costs[key]

    def whole(self, job: Job, rank: int = 0) -> float:
        """Seconds of all units of one micro-batch, on the device of a rank."""
        self.costs(job, rank)
        return self._sums[self._key(job, rank)]

    def _key(self, job: Job, rank: int) -> tuple[Any, ...]:
        """What the seconds of all units depend on."""
        key = (*_sizes(job), self.question.cluster.device(rank).name)
        # Measured seconds are the mean of a step's, the first of which adds to no gradient.
        if self.question.table is None:
            return key
        return (*key, job.micro_batches, job.pp > 1 and job.schedule in SPLIT)

    def speeds(self, job: Job) -> list[float]:
        """Of each pipeline rank, the slowest of its devices, relative to rank 0's."""
        cluster = self.question.cluster
        if cluster.is_uniform:
            return [1.0] * job.pp
        whole = self.whole(job)
        found = []
        for place in range(job.pp):
            kinds = cluster.kinds_of(place * job.stage_ranks, job.stage_ranks)
            found.append(min(whole / self.whole(job, rank) for rank in kinds))
        return found

    def least_seconds(self, job: Job) -> float:
        """No step of this job is shorter.

        With c_k the seconds of stage k and m micro-batches, 1F1B and gpipe take at least
        c_0 + ... + c_(k-1) + m c_k for each k: stage k waits for the first and is waited for after
        the last. The least that the largest of these can be is W / (1 - (1 - 1/m)^p).
        """
        m, whole, speeds = job.micro_batches, self.whole(job), sum(self.speeds(job))
        least = m * self.least_bottleneck(job)
        if job.interleave > 1 or job.pp == 1 or job.schedule not in ("1f1b", "gpipe"):
            return least
        return max(least, whole * job.pp / speeds / (1 - (1 - 1 / m) ** job.pp))

    def least_bottleneck(self, job: Job) -> float:
        """Seconds that some rank works on a micro-batch, at least, however much memory there is."""
        return max(self.whole(job) / sum(self.speeds(job)), self._fullest(job))

    def likely_seconds(self, job: Job) -> float:
        """What a step may take: its work, and the schedule's filling over equal stages."""
        filling = {"interleaved": 1 / job.interleave, "zb1p": 1 / 3, "zbv": 0.1, "dualpipev": 0.3}
        fill = (job.pp - 1) * filling.get(job.schedule, 1.0)
        return (job.micro_batches + fill) * self.whole(job) / sum(self.speeds(job))

    def _fullest(self, job: Job) -> float:
        """Seconds of the half layers that some rank has at least, of one micro-batch.

        In a stage the halves take turns, so with v stages a rank has at most v of one kind more.
        With several stages a rank layers are whole, as `answer` has them.
        """
        if not self.question.cluster.is_uniform:
            return 0.0
        if len(self._kinds) == 1 and (job.interleave > 1 or not self.question.half_layers):
            return self._fullest_of_whole(job)
        costs = self.costs(job)[1:-1]
        halves = -(-len(costs) // job.pp)
        cheap, dear = sorted(
            (min(c.seconds for c in costs[::2]), min(c.seconds for c in costs[1::2]))
        )
        of_cheap = min(halves, (halves + job.interleave) // 2)
        return of_cheap * cheap + (halves - of_cheap) * dear

    def _fullest_of_whole(self, job: Job) -> float:
        """The same where layers stay whole and are all alike: the best way to deal them out."""
        costs = self.costs(job)
        layer, count = costs[1].seconds + costs[2].seconds, len(self.question.shape.layers)
        ends = [0.0] * job.pp
        ends[0] += costs[0].seconds
        ends[owner(job.stages - 1, job)] += costs[-1].seconds
        # The slowest rank has some whole layers, with or without an end.
        for layers in range(count // job.pp, count + 1):
            for more in sorted(set(ends)):
                slowest = layers * layer + more
                room = sum(int((slowest - end) / layer + 1e-9) for end in ends if end <= slowest)
                if room >= count:
                    return slowest
        return 0.0

    def bytes_of(self, job: Job) -> tuple[tuple[UnitMemory, ...], Sequence[Mapping[Any, Kept]]]:
        """As `unit_memory` and `layer_memory`, of a model with one layer of each kind."""
        key = (*_sizes(job), job.zero, job.dp)
        if key not in self._kept:
            means = self.question.means
            self._kept[key] = (
                unit_memory(self._small, job, means),
                layer_memory(self._small, job, means),
            )
        return self._kept[key]

    def fixed(self, job: Job) -> list[float]:
        """As `fixed_memory`, of each pipeline rank; all but the first as the one in the middle."""
        if job not in self._fixed:
            shape, means = self.question.shape, self.question.means
            stages, middle = _any_stages(shape, job), job.pp // 2
            found = {place: fixed_memory(shape, job, stages, place, means) for place in {0, middle}}
            self._fixed[job] = [found.get(place, found[middle]) for place in range(job.pp)]
        return self._fixed[job]

    def may_fit(self, job: Job, limit: float) -> bool:
        """Whether layers of the most costly kind could be dealt out so that a step ends in time.

        Layers are taken as divisible, and each part may keep or recompute what it likes. A rank
        with bytes B and seconds T for one micro-batch then takes at most the part x of them with
        x (s + n a) <= B and x (t + r) <= T, where s, t are their states and seconds and (a, r)
        what is kept and recomputed: a linear program whose best point mixes two choices at most.
        What embedding and head need is taken from B and T before; whole layers are rounded down.
        """
        units, layers = self.bytes_of(job)
        costs = self.costs(job)
        kind, count = self._heaviest
        first = self._kinds.index(kind)
        layer = self.question.shape.layers.index(kind)
        attention, network = costs[2 * layer + 1], costs[2 * layer + 2]
        seconds = attention.seconds + network.seconds
        again = _recompute_seconds(attention, network)
        state = units[2 * first + 1].states.total + units[2 * first + 2].states.total
        flight = _in_flight(job)
        least = [
            min(n for stage, n in enumerate(flight) if owner(stage, job) == place)
            for place in range(job.pp)
        ]
        tau = [limit / job.micro_batches * speed for speed in self.speeds(job)]
        budgets = [
            budget - of
            for budget, of in zip(self.question.budgets(job), self.fixed(job), strict=True)
        ]
        for place, unit in ((0, 0), (owner(job.stages - 1, job), -1)):
            tau[place] -= costs[unit].seconds
            budgets[place] -= units[unit].states.total
        is_whole = job.interleave > 1 or not self.question.half_layers
        if job.interleave > 1:
            # No stage is empty, and not all have the fewest micro-batches in flight.
            kept = min(layers[first][choice].kept for choice in self.question.recompute)
            for stage, n in enumerate(flight[1:-1], 1):
                budgets[owner(stage, job)] -= (n - least[owner(stage, job)]) * kept
        room = 0.0
        for n, budget, seconds_left in zip(least, budgets, tau, strict=True):
            needs = [
                (seconds + again[choice], state + n * layers[first][choice].kept)
                for choice in self.question.recompute
            ]
            most = _most_layers(needs, seconds_left, budget) + 1e-9
            room += math.floor(most) if is_whole else most
            if room >= count:
                return True
        return False

    def problem(self, job: Job, *, is_bounded: bool = True, whole_layers: bool = False) -> Problem:
        """What the solver is asked.

        Args:
            job: Sizes and mesh.
            is_bounded: Whether memory counts.
            whole_layers: Whether to part no layer, whatever the question allows.
        """
        question, shape = self.question, self.question.shape
        costs = self.costs(job)
        of_units, of_layers = self.bytes_of(job)
        allowed = question.recompute
        units = [_unit(costs[0], of_units[0], allowed)]
        layers = {}
        made: dict[tuple[int, int, int], tuple[Unit, Unit, tuple[Choice, ...]]] = {}
        for layer, place in enumerate(self._places):
            attention, network = costs[2 * layer + 1], costs[2 * layer + 2]
            # Layers of one kind share what was worked out for the first of them.
            key = place, id(attention.recompute), id(network.recompute)
            if key not in made:
                again = _recompute_seconds(attention, network)
                made[key] = (
                    _unit(attention, of_units[2 * place + 1], allowed),
                    _unit(network, of_units[2 * place + 2], allowed),
                    tuple(
                        Choice(choice, again[choice], *of_layers[place][choice])
                        for choice in allowed
                    ),
                )
            first, second, layers[2 * layer + 1] = made[key]
            units.append(Unit(attention.name, attention.seconds, first.state_bytes, first.choices))
            units.append(Unit(network.name, network.seconds, second.state_bytes, second.choices))
        units.append(_unit(costs[-1], of_units[-1], allowed))
        step = 1 if question.half_layers and not whole_layers else 2
        budgets = question.budgets(job)
        if is_bounded:
            budgets = [budget - of for budget, of in zip(budgets, self.fixed(job), strict=True)]
        else:
            budgets = [UNBOUNDED] * job.pp
        return Problem(
            units=tuple(units),
            layers=layers,
            cuts=frozenset(range(1, 2 * len(shape.layers) + 2, step)),
            ranks=job.pp,
            interleave=job.interleave,
            v_shaped=job.schedule in V_SHAPED and job.pp > 1,
            in_flight=tuple(map(float, _in_flight(job))),
            budgets=tuple(budgets),
            speeds=tuple(self.speeds(job)),
        )

    def answer(self, job: Job, *, limit: float = math.inf) -> Answer | None:
        """The best cut and recompute of a job; None if its step is longer than `limit`.

        With several stages a rank, layers stay whole: `halved` cuts them.

        Raises:
            PlanError: Nothing fits.
        """
        return self.tried(job, limit=limit).answer

    def tried(self, job: Job, *, limit: float) -> Tried:
        """As `answer`, and whether more memory would help."""
        problem = self.problem(job, whole_layers=job.interleave > 1)
        found, bottleneck = self._fitted(job, problem, limit)
        return Tried(found, bottleneck <= self.least_bottleneck(job) * (1 + 1e-9))

    def halved(self, answer: Answer) -> Answer:
        """With several stages a rank, the best cut that may part layers, if that is faster."""
        if answer.job.interleave == 1 or not self.question.half_layers:
            return answer
        found, _ = self._fitted(answer.job, self.problem(answer.job), answer.seconds)
        return answer if found is None or found.seconds > answer.seconds else found

    def _fitted(self, job: Job, problem: Problem, limit: float) -> tuple[Answer | None, float]:
        """The answer, if its step is not longer than `limit`, and the least bottleneck if known."""
        least = sum(
            unit.state_bytes + min(choice.kept_bytes for choice in unit.choices)
            for unit in problem.units
        )
        if least > sum(problem.budgets):
            raise PlanError(f"All pipeline ranks together need at least {least / 2**30:.1f} GiB.")
        # What belongs to no unit depends on the stages, which are not known before.
        for _ in range(6):
            quick = job.interleave > 1 or limit < math.inf
            solution = solve_within(problem, limit / job.micro_batches, quick=quick)
            if solution is None:
                return None, math.inf
            found = self.evaluated(job, solution)
            if found.seconds > limit:
                return None, solution.bottleneck
            if max(found.excess) <= 0:
                return found, solution.bottleneck
            budgets = tuple(
                budget - max(0.0, 1.01 * excess)
                for budget, excess in zip(problem.budgets, found.excess, strict=True)
            )
            problem = dataclasses.replace(problem, budgets=budgets)
        place = found.excess.index(max(found.excess))
        raise PlanError(f"Rank {place} of the pipeline lacks {max(found.excess):.0f} bytes.")

    def evaluated(self, job: Job, solution: Solution) -> Answer:
        """What a solution takes."""
        recompute: dict[int | str, Recompute] = dict(solution.recompute)  # type: ignore[arg-type]
        found = evaluate(self.question, job, solution.stages, recompute, is_shortened=True)
        return dataclasses.replace(
            found, bottleneck=solution.bottleneck, bottleneck_bound=solution.bound
        )


def _sizes(job: Job) -> tuple[Any, ...]:
    """What the seconds of a unit depend on."""
    return (
        job.tp,
        job.cp,
        job.micro_batch,
        job.expert_ranks,
        job.expert_tensor_ranks,
        job.experts_over,
    )


def _unit(cost: UnitCost, memory: UnitMemory, allowed: Sequence[Recompute]) -> Unit:
    choices = tuple(
        Choice(kind, cost.recompute[kind], *memory.choices[kind])
        for kind in _of_unit(cost.name, allowed)
    )
    return Unit(cost.name, cost.seconds, memory.states.total, choices)


def _recompute_seconds(attention: UnitCost, network: UnitCost) -> dict[str, float]:
    """Of a layer in one stage, by choice."""
    return {
        "none": 0.0,
        "moe_activations": network.recompute["moe_activations"],
        "attention": attention.recompute["attention"],
        "full": attention.recompute["full"] + network.recompute["full"],
    }


def _most_layers(needs: Sequence[tuple[float, float]], seconds: float, budget: float) -> float:
    """The most layers, as a real number, that need no more seconds and bytes than there are."""
    if budget <= 0 or seconds <= 0:
        return 0.0
    best = max(min(seconds / t, budget / b) for t, b in needs)
    for (t1, b1), (t2, b2) in itertools.combinations(needs, 2):
        # Both limits met exactly by a mixture of the two.
        determinant = t1 * b2 - t2 * b1
        if determinant:
            x1 = (seconds * b2 - t2 * budget) / determinant
            x2 = (t1 * budget - seconds * b1) / determinant
            if x1 >= 0 and x2 >= 0:
                best = max(best, x1 + x2)
    return best


def _of_unit(name: str, allowed: Sequence[Recompute]) -> Sequence[Recompute]:
    """Choices that mean something for a unit by itself."""
    if name.endswith(".attention"):
        kinds: tuple[Recompute, ...] = ("none", "full")
    elif name.endswith(".feed_forward"):
        kinds = ("none", "moe_activations", "full")
    else:
        return ("none",)
    return [kind for kind in kinds if kind in allowed] or ("none",)


def _in_flight(job: Job) -> Sequence[int]:
    if job.pp == 1:
        return (1,) * job.interleave
    # More micro-batches than these change no peak.
    count, enough = job.micro_batches, 2 * job.stages
    if job.schedule != "gpipe" and count > enough:
        count = enough
    return _most_in_flight(job.schedule, job.pp, job.stages, count)


@functools.cache
def _most_in_flight(
    schedule: Schedule, ranks: int, stages: int, micro_batches: int
) -> tuple[int, ...]:
    return in_flight(schedule, ranks=ranks, stages=stages, micro_batches=micro_batches)


def _any_stages(shape: ModelShape, job: Job) -> tuple[Span, ...]:
    """Some stages, as equal as can be."""
    try:
        return default_stages(shape, job.stages)
    except PlanError:
        units = 2 * len(shape.layers) + 2
        edges = [round(units * n / job.stages) for n in range(job.stages + 1)]
        return tuple(itertools.pairwise(edges))


# --- What is legal ------------------------------------------------------------------------------


def legal_jobs(question: Question) -> Iterator[Job]:
    """Every combination that training could run, with the fixed fields as they are given."""
    fixed = dict(question.fixed)
    ranks = question.cluster.ranks
    # Where micro-batches were measured, no formula competes with them.
    sizes = (question.table and question.table.micro_batches) or MICRO_BATCHES
    for pp, tp, dp in _meshes(question):
        for experts in _expert_layouts(question, dp, tp):
            for micro_batch in _given(fixed, "micro_batch", sizes):
                if question.global_batch % (micro_batch * dp):
                    continue
                for schedule, interleave in _schedules(fixed, pp):
                    for zero in _given(fixed, "zero", (1, 2, 3) if dp > 1 else (1,)):
                        chosen = {
                            "pp": pp,
                            "tp": tp,
                            "dp": dp,
                            "micro_batch": micro_batch,
                            "schedule": schedule,
                            "interleave": interleave,
                            "zero": zero,
                            **experts,
                        }
                        job = _job(question, {**fixed, **chosen})
                        if job is not None and job.world_size == ranks * fixed.get("cp", 1):
                            yield job


def _job(question: Question, values: Mapping[str, Any]) -> Job | None:
    try:
        job = Job(sequence=question.sequence, global_batch=question.global_batch, **values)
    except PlanError:
        return None
    if job.schedule == "gpipe" and "schedule" not in question.fixed and job.micro_batches >= job.pp:
        return None  # 1f1b is as fast, and keeps less
    layers = len(question.shape.layers)
    # More stages than layers only where each rank has one.
    room = 2 * layers + 2 if question.half_layers and job.interleave == 1 else layers
    if job.stages > room or not can_run(
        job.schedule, job.micro_batches, ranks=job.pp, stages=job.stages
    ):
        return None
    return job


def _meshes(question: Question) -> Iterator[tuple[int, int, int]]:
    fixed, ranks = question.fixed, question.cluster.ranks // question.fixed.get("cp", 1)
    heads = min(layer.attention.kv_heads for layer in question.shape.layers)
    for tp in _given(fixed, "tp", _divisors(ranks)):
        # Tensor ranks talk four times a layer: never over the network.
        if "tp" not in fixed and (tp > heads or not _is_near(question.cluster, tp)):
            continue
        for pp in _given(fixed, "pp", _divisors(ranks // tp)):
            for dp in _given(fixed, "dp", (ranks // (tp * pp),)):
                if tp * pp * dp == ranks:
                    yield pp, tp, dp


def _expert_layouts(question: Question, dp: int, tp: int) -> Iterator[dict[str, Any]]:
    moe, fixed = question.moe, question.fixed
    if moe is None:
        yield {}
        return
    places = _given(fixed, "experts_over", ("edp", "ep", "etp"))
    for place in places:
        shared = {"edp": tp, "ep": dp * tp, "etp": dp}[place]
        if place == "etp" and tp == 1 and "experts_over" not in fixed:
            continue  # the same as ep
        sizes = (tp,) if place == "edp" else _divisors(shared)
        for ep in _given(fixed, "ep", sizes):
            if "ep" not in fixed:
                is_edp = place == "ep" and ep == tp and "edp" in places
                together = ep * (tp if place == "etp" else 1)
                if is_edp or ep > moe.experts or _straddles(question.cluster, together):
                    continue
            if ep <= moe.experts:
                yield {"experts_over": place, "ep": ep}


def _is_near(cluster: ClusterSpec, ranks: int) -> bool:
    """Whether every run of so many ranks, from a multiple of it on, lies in one node."""
    sizes = [node.count for node, _ in cluster.nodes]
    if sum(count for _, count in cluster.nodes) == 1:
        return ranks <= sizes[0]
    return all(size % ranks == 0 for size in sizes)


def _straddles(cluster: ClusterSpec, ranks: int) -> bool:
    """Whether such a run may begin inside of a node and end inside of another."""
    if _is_near(cluster, ranks):
        return False
    return any(ranks % node.count for node, _ in cluster.nodes)


def _schedules(fixed: Mapping[str, Any], pp: int) -> Iterator[tuple[Schedule, int]]:
    if pp == 1:
        yield "1f1b", 1
        return
    names: tuple[Schedule, ...] = ("1f1b", "gpipe", "interleaved", "zb1p", "zbv", "dualpipev")
    for name in _given(fixed, "schedule", names):
        if name in V_SHAPED:
            stages: Sequence[int] = (2,)
        elif name == "interleaved":
            stages = _given(fixed, "interleave", INTERLEAVES)
        elif name == "zb1p":
            stages = _given(fixed, "interleave", (1, *INTERLEAVES))
        else:
            stages = (1,)
        for interleave in stages:
            if fixed.get("interleave", interleave) == interleave:
                yield name, interleave


def _given(fixed: Mapping[str, Any], name: str, options: Sequence[Any]) -> Sequence[Any]:
    return (fixed[name],) if fixed.get(name) is not None else options


def _divisors(count: int) -> list[int]:
    return [divisor for divisor in range(1, count + 1) if count % divisor == 0]


def _nothing_legal(question: Question) -> str:
    given = ", ".join(f"{name}={value}" for name, value in question.fixed.items())
    return (
        f"No layout of {question.cluster.ranks} ranks deals out {question.global_batch} sequences "
        f"a step{f' with {given}' if given else ''}. Use a global batch with more divisors, more "
        f"sequences than ranks{', or fix less' if given else ''}."
    )


def _nothing_fits(question: Question, refusals: Sequence[Refusal]) -> str:
    device = question.cluster.device(0)
    last = refusals[-1]
    return (
        f"None of {len(refusals)} layouts of {question.shape.name} fits {question.cluster.name}, "
        f"whose devices have {question.usable * device.memory_bytes / 2**30:.1f} GiB to fill. With "
        f"pp {last.job.pp}, tp {last.job.tp}, dp {last.job.dp}: {last.why}"
    )


# --- The plan's file ----------------------------------------------------------------------------


def plan_of(answer: Answer) -> TrainPlan:
    """What training obeys."""
    job = answer.job
    if job.cp > 1 or job.zero == 0 or not job.sequence_parallel:
        raise PlanError(
            f"cp {job.cp}, zero {job.zero} and sequence_parallel {job.sequence_parallel} are of "
            f"other programs: Moesaic's training has cp 1, zero 1 to 3 and shares positions."
        )
    names = answer.unit_names
    is_moe = answer.question.moe is not None
    return TrainPlan(
        pp=job.pp,
        dp=job.dp,
        tp=job.tp,
        experts_over=job.experts_over if is_moe else "edp",
        ep=job.expert_ranks if is_moe else None,
        dispatch=job.dispatch,
        deduplicate=job.deduplicate,
        zero=job.zero,
        shard=job.shard,
        schedule=job.schedule,
        stages=tuple(Stage(names[first], names[end - 1]) for first, end in answer.stages),
        recompute={name: kind for name, kind in answer.recompute.items() if kind != "none"},
        micro_batch=job.micro_batch,
        about={
            "model": answer.question.shape.name,
            "cluster": answer.question.cluster.name,
            "sequence": job.sequence,
            "global_batch": job.global_batch,
            "step_seconds": answer.seconds,
            "largest_rank_bytes": max(ledger.total for ledger in answer.ledgers),
        },
    )
