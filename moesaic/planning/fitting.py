"""Whether a job fits into the devices' memory, and if not, the nearest change that makes it fit.

"Nearest" is in this order, and the first that fits is told: recompute the insides of as few layers
as are needed, then attention, then whole layers; share more over the data-parallel ranks; a smaller
micro-batch; the same ranks with more of them tensor-parallel, or in more stages; these two with
everything recomputed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.activations import Means
from moesaic.planning.cost import default_stages
from moesaic.planning.job import Job
from moesaic.planning.memory import GIB, Ledger, Recomputed, pipeline_memory
from moesaic.planning.schedules import can_run, stages_of
from moesaic.planning.shape import ModelShape
from moesaic.planning.split import Span


class Way(NamedTuple):
    """A job with all that its memory depends on."""

    words: str
    """What was changed to come here."""
    job: Job
    stages: tuple[Span, ...]
    recompute: Recomputed


def check_fit(
    shape: ModelShape,
    job: Job,
    stages: Sequence[Span],
    recompute: Recomputed,
    budgets: Sequence[float],
    means: Means | None = None,
) -> tuple[Ledger, ...]:
    """The ledger of each pipeline rank's fullest rank.

    Args:
        shape: The model.
        job: Sizes and mesh.
        stages: Units of each stage.
        recompute: As `rank_memory` has it.
        budgets: Bytes of each pipeline rank.
        means: What the job does not say.

    Raises:
        PlanError: A rank needs more than it has. The error names the worst one, what takes most,
            and the nearest change with which all fit.
    """
    way = Way("", job, tuple(stages), recompute)
    ledgers = pipeline_memory(shape, job, stages, recompute, means)
    over = [ledger.total - budget for ledger, budget in zip(ledgers, budgets, strict=True)]
    if max(over) <= 0:
        return ledgers
    place = over.index(max(over))
    ledger, budget = ledgers[place], budgets[place]
    name, most = max(ledger.lines(), key=lambda line: line[1])
    found = nearest_change(shape, way, budgets, means)
    advice = (
        f"The nearest change that fits: {found.words}."
        if found
        else "No change of recomputing, sharing, micro-batch, tp or pp makes it fit: "
        "use more devices, or larger ones."
    )
    raise PlanError(
        f"Rank {ledger.rank} needs {ledger.total / GIB:.1f} GiB, but has {budget / GIB:.1f} GiB; "
        f"{name} alone take {most / GIB:.1f} GiB. {advice}"
    )


def nearest_change(
    shape: ModelShape, way: Way, budgets: Sequence[float], means: Means | None = None
) -> Way | None:
    """The first change in this module's order with which every rank fits; None if none does."""
    found = _recompute_more(shape, way, budgets, means)
    if found is not None:
        return found
    least = min(budgets)
    for other in itertools.chain(_smaller(way), _other_meshes(shape, way)):
        room = budgets if len(budgets) == other.job.pp else [least] * other.job.pp
        if _fits(shape, other, room, means):
            return other
        everything = _recompute_all(shape, other)
        if other.job.pp * other.job.tp > way.job.pp * way.job.tp and _fits(
            shape, everything, room, means
        ):
            return everything
    return None


def _fits(shape: ModelShape, way: Way, budgets: Sequence[float], means: Means | None) -> bool:
    try:
        ledgers = pipeline_memory(shape, way.job, way.stages, way.recompute, means)
    except PlanError:
        return False
    return all(ledger.total <= budget for ledger, budget in zip(ledgers, budgets, strict=True))


_CHOICES = {
    "moe_activations": "the inside of the feed-forward networks",
    "attention": "attention",
    "full": "all",
}


def _recompute_more(
    shape: ModelShape, way: Way, budgets: Sequence[float], means: Means | None
) -> Way | None:
    for choice, words in _CHOICES.items():
        recompute = dict(way.recompute)
        changed: list[int] = []
        for place in range(way.job.pp):
            mine = _layers_of(shape, way, place)
            free = [layer for layer in mine if _is_less(way.recompute.get(layer, "none"), choice)]
            count = _fewest(shape, way, place, recompute, free, choice, budgets, means)
            if count is None:
                break
            changed += free[:count]
            recompute |= dict.fromkeys(free[:count], choice)
        else:
            if not changed:
                continue
            other = way._replace(
                words=f"recompute {words} of {_layer_words(changed)}", recompute=recompute
            )
            if _fits(shape, other, budgets, means):
                return other
    return None


def _is_less(now: str, choice: str) -> bool:
    order = ("none", "moe_activations", "attention", "full")
    return order.index(now) < order.index(choice)


def _fewest(
    shape: ModelShape,
    way: Way,
    place: int,
    recompute: Recomputed,
    free: Sequence[int],
    choice: str,
    budgets: Sequence[float],
    means: Means | None,
) -> int | None:
    """How many of the layers must recompute for one pipeline rank to fit; None: all do not do."""

    def fits(count: int) -> bool:
        tried = {**recompute, **dict.fromkeys(free[:count], choice)}
        ledgers = pipeline_memory(shape, way.job, way.stages, tried, means, only=place)
        return ledgers[0].total <= budgets[place]

    if fits(0):
        return 0
    if not fits(len(free)):
        return None
    low, high = 0, len(free)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _layers_of(shape: ModelShape, way: Way, place: int) -> list[int]:
    """Layers of which a pipeline rank has a part."""
    own = stages_of(place, way.job.schedule, ranks=way.job.pp, stages=len(way.stages))
    last = 2 * len(shape.layers) + 1
    units = [unit for stage in own for unit in range(*way.stages[stage]) if 0 < unit < last]
    return list(dict.fromkeys((unit - 1) // 2 for unit in units))


def _layer_words(layers: Sequence[int]) -> str:
    """As in `layers 0 to 3, 8, 12 to 14`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(words)}"


def _recompute_all(shape: ModelShape, way: Way) -> Way:
    full = dict.fromkeys(range(len(shape.layers)), "full")
    return way._replace(words=f"{way.words} and recompute all layers", recompute=full)


def _smaller(way: Way) -> Iterator[Way]:
    """The same mesh, sharing more or taking fewer sequences at a time."""
    job = way.job
    for zero in range(job.zero + 1, 4):
        if max(job.dense_shards, job.expert_shards) > 1:
            yield way._replace(words=f"zero {zero}", job=job.replace(zero=zero))
    micro = job.micro_batch
    while micro % 2 == 0:
        micro //= 2
        yield way._replace(words=f"micro_batch {micro}", job=job.replace(micro_batch=micro))


def _other_meshes(shape: ModelShape, way: Way) -> Iterator[Way]:
    """As many ranks, with more of them for tensors or stages and fewer for data."""
    job = way.job
    heads = min(layer.attention.kv_heads for layer in shape.layers)
    for factor in (2, 4, 8, 16):
        if job.dp % factor:
            break
        for name in ("tp", "pp"):
            if name == "tp" and job.framework == "moesaic" and job.tp * factor > heads:
                continue
            size = getattr(job, name) * factor
            try:
                other = job.replace(**{name: size, "dp": job.dp // factor, "shard": None})
                stages = way.stages if name == "tp" else default_stages(shape, other.stages)
            except PlanError:
                continue
            if not can_run(
                other.schedule, other.micro_batches, ranks=other.pp, stages=other.stages
            ):
                continue
            yield way._replace(words=f"{name} {size} and dp {other.dp}", job=other, stages=stages)
