"""Why a plan takes as long as it takes: a chain of bounds, the obvious plan, and fair baselines.

Each link of the chain adds one thing that keeps a step from being shorter:

    work           the micro-batches' seconds dealt evenly over the ranks
    schedule       stages of exactly equal length, which fill and drain as the schedule does
    granularity    units are not cut: the best stages if memory did not count
    memory         this plan: what fits, and what is recomputed for it
    step           and gradients, weights and the optimizer, as far as they are not hidden

"Within x %" of one of them says nothing about another.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.cost import default_stages, pipeline_seconds, send_seconds
from moesaic.planning.plan import Recompute
from moesaic.planning.problem import Problem
from moesaic.planning.search import (
    RECOMPUTE,
    Answer,
    Question,
    Work,
    evaluate,
    owner,
    refined,
)
from moesaic.planning.simulate import StageSeconds
from moesaic.planning.solve import solve
from moesaic.planning.split import Span


class Bound(NamedTuple):
    """One link."""

    name: str
    seconds: float
    words: str


def bounds(answer: Answer) -> list[Bound]:
    """The chain, from the least to this plan's step."""
    question, job = answer.question, answer.job
    work = Work(question)
    whole, speeds = work.whole(job), sum(work.speeds(job))
    costs = work.costs(job)
    equal = [
        StageSeconds(
            forward=sum(unit.forward for unit in costs) / job.interleave / speeds,
            input_gradient=sum(unit.input_gradient for unit in costs) / job.interleave / speeds,
            weight_gradient=sum(unit.weight_gradient for unit in costs) / job.interleave / speeds,
        )
    ] * job.stages
    send = send_seconds(question.shape, job, question.cluster, table=question.table)
    free = solve(work.problem(job, is_bounded=False))
    granular = evaluate(question, job, free.stages, {})
    return [
        Bound("work", job.micro_batches * whole / speeds, "dealt evenly, no rank ever waits"),
        Bound(
            "schedule",
            pipeline_seconds(job, equal, send).seconds,
            f"{job.schedule} fills and drains, over stages of equal length",
        ),
        Bound("granularity", granular.prediction.pipeline, "the best cut if memory did not count"),
        Bound("memory", answer.prediction.pipeline, "this plan: what fits and is recomputed"),
        Bound("step", answer.seconds, "with gradients, weights and the optimizer"),
    ]


class StageRow(NamedTuple):
    """One stage of a plan."""

    stage: int
    rank: int
    first: str
    last: str
    layers: float
    recompute: str
    seconds: float
    """Of forward, backward and what is computed again, for one micro-batch."""
    share: float
    """Of the slowest pipeline rank's seconds."""


def stage_rows(answer: Answer) -> list[StageRow]:
    """The plan, stage by stage."""
    job, names = answer.job, answer.unit_names
    rows = []
    for stage, (span, of) in enumerate(
        zip(answer.stages, answer.prediction.stage_seconds, strict=True)
    ):
        seconds = of.forward + of.input_gradient + of.weight_gradient + of.recompute
        units = range(max(span[0], 1), min(span[1], len(names) - 1))
        rows.append(
            StageRow(
                stage,
                owner(stage, job),
                names[span[0]],
                names[span[1] - 1],
                len(units) / 2,
                _recompute_words(answer, span),
                seconds,
                seconds / answer.bottleneck if answer.bottleneck else 0.0,
            )
        )
    return rows


def _recompute_words(answer: Answer, span: Span) -> str:
    counts: dict[str, float] = {}
    for unit in range(*span):
        name = answer.unit_names[unit]
        layer, _, half = name.partition(".")
        if half:
            kind = answer.recompute.get(name, answer.recompute.get(int(layer), "none"))
            counts[kind] = counts.get(kind, 0.0) + 0.5
    counts.pop("none", None)
    words = [f"{count:g} {kind}" for kind, count in counts.items()]
    return ", ".join(words) or "nothing"


def uniform(answer: Answer) -> Answer | None:
    """The obvious plan on the same mesh: layers as equal as can be, all recomputing the same.

    Recomputes as little as fits; None if everything recomputed does not fit either.
    """
    question, job = answer.question, answer.job
    try:
        stages = default_stages(question.shape, job.stages)
    except PlanError:
        return None
    for kind in RECOMPUTE:
        recompute: dict[int | str, Recompute] = {}
        if kind != "none":
            recompute = dict.fromkeys(range(len(question.shape.layers)), kind)
        found = evaluate(question, job, stages, recompute)
        if max(found.excess) <= 0:
            return found
    return None


# --- Gain against memory ------------------------------------------------------------------------


class Gain(NamedTuple):
    """Seconds of a step with so much memory; infinite where nothing fits."""

    budget_bytes: float
    """Of each device, all of it to fill."""
    flags: float
    """First and last stage of a length of their own, the others alike, and one number of layers
    of which every stage recomputes the same: what Megatron's flags can say."""
    free: float
    """Any whole layers on any stage, and one such number and choice."""
    whole: float
    """This solver with whole layers."""
    halves: float
    """This solver with layers cut in two."""


def gains(answer: Answer, budgets: Sequence[float]) -> list[Gain]:
    """What joint layout and recompute are worth on a plan's mesh, by the memory of a device.

    Raises:
        PlanError: The plan runs several stages a rank, which the baselines have no word for.
    """
    job = answer.job
    if job.interleave > 1 or job.pp == 1:
        raise PlanError(
            f"The curve compares cuts of one stage a rank, and this plan has pp {job.pp} with "
            f"{job.interleave}. Fix schedule=1f1b and pp above 1."
        )
    return [_gain(answer, budget) for budget in budgets]


def _gain(answer: Answer, budget: float) -> Gain:
    job = answer.job
    question = _with_memory(answer.question, budget)
    work = Work(question)
    problem = work.problem(job, whole_layers=True)
    found = [
        _best(question, answer, _flag_layouts(question, job.pp), problem),
        _best(question, answer, None, problem),
    ]
    for halves in (False, True):
        asked = dataclasses.replace(question, half_layers=halves)
        try:
            solved = Work(asked).answer(job)
            found.append(math.inf if solved is None else refined(solved).seconds)
        except PlanError:
            found.append(math.inf)
    return Gain(budget, *found)


def _with_memory(question: Question, budget: float) -> Question:
    cluster = question.cluster
    nodes = tuple(
        (
            dataclasses.replace(node, device=dataclasses.replace(node.device, memory_bytes=budget)),
            count,
        )
        for node, count in cluster.nodes
    )
    return dataclasses.replace(
        question, cluster=dataclasses.replace(cluster, nodes=nodes), usable=1.0
    )


def _flag_layouts(question: Question, ranks: int) -> Iterator[list[int]]:
    """Layers of each stage, where only the first and the last may differ from the rest."""
    layers = len(question.shape.layers)
    for first in range(1, layers):
        for last in range(1, layers - first + 1):
            between = layers - first - last
            if ranks == 2 and between == 0:
                yield [first, last]
            elif ranks > 2 and between > 0 and between % (ranks - 2) == 0:
                yield [first, *[between // (ranks - 2)] * (ranks - 2), last]


class _Span(NamedTuple):
    seconds: float
    bytes: float


def _best(
    question: Question,
    answer: Answer,
    layouts: Iterator[list[int]] | None,
    problem: Problem,
) -> float:
    """Seconds of the best layout, of those given or of all, with one count of recomputed layers."""
    layers = len(question.shape.layers)
    given = None if layouts is None else list(layouts)
    best = math.inf
    for choice in range(1, len(question.recompute)):
        for count in range(layers + 1):
            rule = _Rule(choice, count)
            tried: list[list[int]] = []
            if given is None:
                free = _free_layout(problem, layers, rule)
                tried = [] if free is None else [free]
            else:
                tried = [sizes for sizes in given if _all_fit(problem, sizes, rule)]
            tried.sort(key=lambda sizes: _slowest(problem, sizes, rule))
            for sizes in tried[:3]:
                best = min(best, _seconds_of(question, answer, sizes, rule))
            if tried and count >= max(max(sizes) for sizes in tried):
                break
    return best


def _seconds_of(question: Question, answer: Answer, sizes: Sequence[int], rule: _Rule) -> float:
    """Of a step with these layers on the stages."""
    kind = question.recompute[rule.choice]
    recompute: dict[int | str, Recompute] = {}
    for start, size in _starts(sizes):
        recompute |= dict.fromkeys(range(start, start + min(rule.layers, size)), kind)
    stages = _stages_of_sizes(sizes, len(question.shape.layers))
    return evaluate(question, answer.job, stages, recompute, is_shortened=True).seconds


class _Rule(NamedTuple):
    """What every stage recomputes alike."""

    choice: int
    """Which of the question's, from 1."""
    layers: int
    """Of how many of its first layers."""


def _starts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in sizes:
        yield start, size
        start += size


def _stages_of_sizes(sizes: Sequence[int], layers: int) -> tuple[Span, ...]:
    edges = [0]
    for start, size in _starts(sizes):
        edges.append(1 + 2 * (start + size))
    edges[-1] = 2 * layers + 2
    return tuple(itertools.pairwise(edges))


def _span(problem: Problem, place: int, start: int, size: int, rule: _Rule) -> _Span:
    """What a stage of whole layers takes under a rule."""
    seconds = state = kept = transient = 0.0
    units = problem.units
    last = (len(units) - 2) // 2
    ends = ([0] if start == 0 else []) + ([len(units) - 1] if start + size == last else [])
    for unit in ends:
        seconds += units[unit].seconds
        state += units[unit].state_bytes
        kept += units[unit].choices[0].kept_bytes
        transient = max(transient, units[unit].choices[0].transient_bytes)
    for number in range(size):
        first = 1 + 2 * (start + number)
        choices = problem.layers[first]
        choice = choices[rule.choice] if number < rule.layers else choices[0]
        seconds += units[first].seconds + units[first + 1].seconds + choice.seconds
        state += units[first].state_bytes + units[first + 1].state_bytes
        kept += choice.kept_bytes
        transient = max(transient, choice.transient_bytes)
    return _Span(
        seconds / problem.speeds[place], state + problem.in_flight[place] * kept + transient
    )


def _all_fit(problem: Problem, sizes: Sequence[int], rule: _Rule) -> bool:
    return all(
        _span(problem, place, start, size, rule).bytes <= problem.budgets[place]
        for place, (start, size) in enumerate(_starts(sizes))
    )


def _slowest(problem: Problem, sizes: Sequence[int], rule: _Rule) -> float:
    return max(
        _span(problem, place, start, size, rule).seconds
        for place, (start, size) in enumerate(_starts(sizes))
    )


def _free_layout(problem: Problem, layers: int, rule: _Rule) -> list[int] | None:
    """Whole layers with the least bottleneck, by dynamic programming; None if nothing fits."""
    ranks = problem.ranks
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for place in range(ranks):
        row: dict[int, tuple[float, int]] = {}
        left = ranks - 1 - place
        for start, (slowest, _) in best[place].items():
            for end in range(start + 1, layers - left + 1):
                if left == 0 and end != layers:
                    continue
                span = _span(problem, place, start, end - start, rule)
                if span.bytes > problem.budgets[place]:
                    break
                worst = max(slowest, span.seconds)
                if end not in row or worst < row[end][0]:
                    row[end] = (worst, start)
        best.append(row)
    if layers not in best[ranks]:
        return None
    edges = [layers]
    for place in range(ranks, 0, -1):
        edges.append(best[place][edges[-1]][1])
    edges.reverse()
    return [end - start for start, end in itertools.pairwise(edges)]


def as_json(answer: Answer) -> dict[str, Any]:
    """What programs are told of an answer."""
    job, prediction = answer.job, answer.prediction
    budgets = answer.question.budgets(job)
    return {
        "job": dataclasses.asdict(job),
        "step_seconds": answer.seconds,
        "tokens_per_second_per_rank": answer.tokens_per_second,
        "mfu": answer.mfu,
        "pipeline_seconds": prediction.pipeline,
        "communication_seconds": prediction.communication,
        "optimizer_seconds": prediction.optimizer,
        "measured": _measured(answer),
        "bottleneck_seconds": answer.bottleneck,
        "bottleneck_gap": answer.gap,
        "stages": [row._asdict() for row in stage_rows(answer)],
        "recompute": {str(name): kind for name, kind in answer.recompute.items()},
        "memory": [
            {
                "pipeline_rank": place,
                "budget_bytes": budget,
                "total_bytes": ledger.total,
                "lines": dict(ledger.lines()),
            }
            for place, (ledger, budget) in enumerate(zip(answer.ledgers, budgets, strict=True))
        ],
    }


def _measured(answer: Answer) -> dict[str, Any] | None:
    """What of a prediction was measured, and where; None: nothing."""
    table, prediction = answer.question.table, answer.prediction
    if table is None:
        return None
    return {
        "table": table.path,
        "device": table.device,
        "when": table.about.get("when"),
        "parts": list(prediction.measured),
        "by_formulas": list(prediction.by_formulas),
    }
