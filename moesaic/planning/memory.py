"""How many bytes each rank of a job needs, line by line, and whether that fits.

A rank's peak is found by going through its actions in their order: a forward pass adds what its
stage keeps of a micro-batch, a backward pass takes it away unit by unit, and at every action the
worst moment inside of it counts too. The ledger says what was there at the highest of them.

    weights, gradients, optimizer    moesaic: float32, 16 bytes a parameter on one rank; megatron:
                                     2 + 4 + 12, the last over the data-parallel ranks (ZeRO-1)
    activations                      by stage: micro-batches in flight, times what one keeps
    logits                           what the head keeps for the loss, and takes while it finds it
    transients                       gradients and recomputed tensors of the unit at work
    communication                    what is sent, received, gathered and reduced
    workspaces                       of matrix products; Transformer Engine's spare gradients

Not counted, because none of it is allocated by the step itself: the device's context, buffers of
NCCL, and what the allocator cannot reuse. A budget must leave room for these.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from moesaic.planning.actions import Action, actions
from moesaic.planning.activations import (
    CHOICES,
    Activations,
    Held,
    Means,
    Routed,
    spare_gradients,
    stage_parts,
    unit_activations,
)
from moesaic.planning.job import Job
from moesaic.planning.plan import SPLIT, Recompute
from moesaic.planning.schedules import stages_of
from moesaic.planning.shape import AttentionShape, DenseShape, ModelShape, MoEShape
from moesaic.planning.split import Span

GIB = 2**30

MIB = 2**20

PRODUCT_WORKSPACE = 32 * MIB
"""Of one stream's matrix products on Hopper and later: of PyTorch (`CUBLAS_WORKSPACE_CONFIG`'s
default there) and, once more, of Transformer Engine (`get_cublas_workspace_size_bytes`)."""

GROUPED_STREAMS = 4
"""Streams over which Transformer Engine runs grouped products, each with a workspace."""


Recomputed = Mapping[Any, str]
"""What is recomputed: by layer, an int, or for a half of a layer that is cut by its unit's name."""


class States(NamedTuple):
    """Bytes that stay from step to step."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        """Their sum."""
        return self.weights + self.gradients + self.optimizer

    def plus(self, other: States) -> States:
        """Both."""
        return States(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Kept(NamedTuple):
    """What a choice of recomputing costs in bytes, of one micro-batch."""

    kept: float
    """From the forward to the backward pass."""
    transient: float
    """Beyond all that is kept, at the worst moment inside of it."""


@dataclass(frozen=True)
class UnitMemory:
    """Bytes of one unit on the rank that has most of it."""

    states: States
    choices: Mapping[Recompute, Kept]


class Count(NamedTuple):
    """Parameters of a unit on one rank, by how ranks share what belongs to them."""

    dense: float = 0.0
    experts: float = 0.0


class InFlight(NamedTuple):
    """What a stage keeps when its rank is fullest."""

    stage: int
    micro_batches: int
    bytes: float
    """Of all of them."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """What one rank holds at the moment when that is most, in bytes."""

    rank: int
    weights: float
    gradients: float
    optimizer: float
    activations: tuple[InFlight, ...]
    logits: float
    transients: float
    communication: float
    workspaces: float

    @property
    def total(self) -> float:
        """The sum of all lines."""
        return sum(bytes_ for _, bytes_ in self.lines())

    def lines(self) -> list[tuple[str, float]]:
        """Every line with its name."""
        return [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            *(
                (f"activations of stage {s.stage}, {s.micro_batches} in flight", s.bytes)
                for s in self.activations
            ),
            ("logits", self.logits),
            ("transients", self.transients),
            ("communication buffers", self.communication),
            ("workspaces", self.workspaces),
        ]


# --- Parameters and what belongs to them --------------------------------------------------------


def count_parameters(shape: ModelShape, held: Held, unit: int) -> Count:
    """Parameters of a unit that a rank holds, before data-parallel ranks share them."""
    hidden = shape.hidden
    last = 2 * len(shape.layers) + 1
    if unit == 0:
        return Count((held.vocab(shape.vocab) + shape.positions) * hidden)
    if unit == last:
        # A tied head has a copy of the table, which `rank_memory` leaves out beside the first.
        return Count(held.vocab(shape.vocab) * hidden + shape.norm_parameters)
    layer = shape.layers[(unit - 1) // 2]
    if unit % 2:
        return Count(shape.norm_parameters + _of_attention(layer.attention, hidden, held))
    network = layer.feed_forward
    if isinstance(network, DenseShape):
        count = network.parameters(hidden) * held.columns(network.ffn_dim) / network.ffn_dim
        return Count(count + shape.norm_parameters)
    dense = float(shape.norm_parameters + network.router_parameters(hidden))
    if network.shared_dim:
        shared = held.columns(network.shared_dim, shared=True)
        dense += network.matrices_count * hidden * shared
    experts, columns = held.experts(network)
    of_one = network.expert_parameters(hidden) * columns / network.expert_dim
    return Count(dense, experts * of_one)


def _of_attention(shape: AttentionShape, hidden: int, held: Held) -> float:
    heads, kv_heads = held.heads(shape)
    width = heads * shape.head_dim + kv_heads * (shape.head_dim + shape.value_dim)
    count = 0.0
    for matrix in shape.matrices(hidden):
        if matrix.name == "qkv":
            count += hidden * width
        elif matrix.shared == "whole":
            count += matrix.inputs * matrix.outputs
        else:
            count += matrix.inputs * matrix.outputs * heads / shape.heads
    whole = replace(shape, bias=False).vectors(hidden)
    return count + whole + (width if shape.bias else 0)


def states_of(job: Job, count: Count) -> States:
    """Bytes of the weights, gradients and optimizer of so many parameters."""
    narrow = 4 if job.dtype == "fp32" else 2
    dense = _states(job, count.dense, job.dense_shards, gathered=4)
    return dense.plus(_states(job, count.experts, job.expert_shards, gathered=narrow))


def _states(job: Job, parameters: float, shards: int, *, gathered: int) -> States:
    shards = 1 if job.zero == 0 else shards
    if job.framework == "megatron":
        weight, optimizer = (4, 8) if job.dtype == "fp32" else (2, 12)
        return States(
            parameters * weight / (shards if job.zero == 3 else 1),
            parameters * job.gradient_bytes / (shards if job.zero > 1 else 1),
            parameters * optimizer / shards,
        )
    # FSDP keeps gathered weights beside this rank's part until the step's last backward pass.
    whole = 0 if job.zero == 3 or shards == 1 else gathered
    return States(
        parameters * (4 / shards + whole),
        4 * parameters / (shards if job.zero > 1 else 1),
        8 * parameters / shards,
    )


# --- Units, for the solver ----------------------------------------------------------------------


def unit_memory(
    shape: ModelShape,
    job: Job,
    means: Means | None = None,
    *,
    routed: Mapping[int, Routed] | None = None,
) -> tuple[UnitMemory, ...]:
    """Bytes of every unit, on the tensor and expert rank that has most.

    Args:
        shape: The model.
        job: Sizes and mesh.
        means: What the job does not say.
        routed: Rows seen at the experts, by layer; else those to expect.
    """
    held = Held(job, means or Means())
    units = []
    for unit in range(2 * len(shape.layers) + 2):
        found = _activations(shape, held, unit, routed)
        units.append(
            UnitMemory(
                states_of(job, count_parameters(shape, held, unit)),
                {choice: _of_choice(found, choice) for choice in CHOICES},
            )
        )
    return tuple(units)


def layer_memory(
    shape: ModelShape,
    job: Job,
    means: Means | None = None,
    *,
    routed: Mapping[int, Routed] | None = None,
) -> tuple[Mapping[Recompute, Kept], ...]:
    """What each choice costs for both halves of a layer together, where one stage has both."""
    held = Held(job, means or Means())
    found = []
    for layer in range(len(shape.layers)):
        first, second = (
            _activations(shape, held, unit, routed) for unit in (2 * layer + 1, 2 * layer + 2)
        )
        found.append(
            {
                choice: Kept(item.kept, max(item.forward, item.backward))
                for choice in CHOICES
                for item in [_merged(_halves(first, second, choice))]
            }
        )
    return tuple(found)


def fixed_memory(
    shape: ModelShape,
    job: Job,
    stages: Sequence[Span],
    pipeline_rank: int,
    means: Means | None = None,
) -> float:
    """Bytes of a pipeline rank that belong to no unit: communication and workspaces."""
    held = Held(job, means or Means())
    own = stages_of(pipeline_rank, job.schedule, ranks=job.pp, stages=len(stages))
    units = [unit for stage in own for unit in range(*stages[stage])]
    total = _communication(shape, held, units) + _workspaces(shape, held, units)
    most = _most_in_flight(job, len(stages), pipeline_rank)
    for stage, count in zip(own, most, strict=True):
        layers = (unit // 2 for unit in range(*stages[stage]) if unit % 2)
        shared = stage_parts(shape, held, [n for n in layers if n < len(shape.layers)])
        each = _passing(shape, held, stage, len(stages)) + sum(part.bytes for part in shared)
        total += count * each
    return total


def _activations(
    shape: ModelShape, held: Held, unit: int, routed: Mapping[int, Routed] | None
) -> Activations:
    seen = None if routed is None else routed.get((unit - 1) // 2)
    return unit_activations(shape, held, unit, routed=seen)


def _of_choice(found: Activations, choice: str) -> Kept:
    return Kept(found.kept(choice), max(found.peaks.forward, _backward(found, choice)))


def _backward(found: Activations, choice: str) -> float:
    """The worst moment of a backward pass, beyond what is kept; it may have a forward in it."""
    again, peaks = found.again(choice), found.peaks
    return again + (max(peaks.forward, peaks.backward) if again else peaks.backward)


# --- One rank -----------------------------------------------------------------------------------


class _Item(NamedTuple):
    """What is kept, and computed again, as one: a unit or a layer."""

    kept: float
    forward: float
    backward: float
    logits: float = 0.0
    """Part of `kept`."""
    is_head: bool = False
    deferred: float = 0.0


def _halves(first: Activations, second: Activations, choice: str) -> list[_Item]:
    """Both halves of a layer in one stage."""
    if choice != "full":
        return [_item(first, choice), _item(second, choice, inside_layer=True)]
    kept = first.kept("full") + second.kept("full", inside_layer=True)
    again = first.kept() + second.kept() - kept
    worst = max(*second.peaks[:2], max(first.peaks[:2]) - second.kept())
    return [_Item(kept, max(first.peaks.forward, second.peaks.forward), again + worst)]


def _item(found: Activations, choice: str, *, inside_layer: bool = False) -> _Item:
    kept, peaks = found.kept(choice, inside_layer=inside_layer), found.peaks
    return _Item(kept, peaks.forward, _backward(found, choice), deferred=peaks.deferred)


def _merged(items: Sequence[_Item]) -> _Item:
    """Several in a row as one."""
    kept = sum(item.kept for item in items)
    after = kept
    forward = backward = -kept
    for item in items:
        after -= item.kept
        forward = max(forward, item.forward - after)
        backward = max(backward, item.backward - after)
    return _Item(kept, forward, backward, deferred=sum(item.deferred for item in items))


def _stage_items(
    shape: ModelShape,
    held: Held,
    units: Span,
    recompute: Recomputed,
    routed: Mapping[int, Routed] | None,
) -> list[_Item]:
    last = 2 * len(shape.layers) + 1
    items: list[_Item] = []
    unit = units[0]
    attention_kept: list[int] = []
    while unit < units[1]:
        found = _activations(shape, held, unit, routed)
        layer = (unit - 1) // 2
        if unit in (0, last):
            logits = sum(part.bytes for part in found.parts if part.name.startswith("loss"))
            item = _item(found, "none")
            items.append(item._replace(logits=logits, is_head=unit == last))
            unit += 1
        elif unit % 2 and unit + 1 < units[1]:
            choice = recompute.get(layer, "none")
            second = _activations(shape, held, unit + 1, routed)
            items += _halves(found, second, choice)
            if choice in ("none", "moe_activations"):
                attention_kept.append(layer)
            unit += 2
        else:
            half = "attention" if unit % 2 else "feed_forward"
            choice = recompute.get(f"{layer}.{half}", recompute.get(layer, "none"))
            items.append(_item(found, choice))
            if unit % 2 and choice in ("none", "moe_activations"):
                attention_kept.append(layer)
            unit += 1
    shared = sum(part.bytes for part in stage_parts(shape, held, attention_kept))
    return [_Item(shared, 0.0, 0.0), *items]


def rank_memory(
    shape: ModelShape,
    job: Job,
    stages: Sequence[Span],
    recompute: Recomputed,
    rank: int,
    means: Means | None = None,
    *,
    routed: Mapping[int, Routed] | None = None,
) -> Ledger:
    """The ledger of one rank.

    Args:
        shape: The model.
        job: Sizes and mesh.
        stages: Units of each stage, in the order that tokens pass.
        recompute: What is recomputed.
        rank: Which, numbered as in docs/plan.md.
        means: What the job does not say.
        routed: Rows seen at this rank's experts, by layer; else those to expect.
    """
    pipeline_rank, dense = divmod(rank, job.stage_ranks)
    expert_rank = dense // job.expert_tensor_ranks % job.expert_ranks
    held = Held(job, means or Means(), dense % job.tp, expert_rank)
    return _ledger(shape, held, stages, recompute, rank, pipeline_rank, routed)


def pipeline_memory(
    shape: ModelShape,
    job: Job,
    stages: Sequence[Span],
    recompute: Recomputed,
    means: Means | None = None,
    *,
    only: int | None = None,
) -> tuple[Ledger, ...]:
    """Of each pipeline rank, or of `only` one, the ledger of the fullest rank there could be."""
    held = Held(job, means or Means())
    return tuple(
        _ledger(shape, held, stages, recompute, place * job.stage_ranks, place, None)
        for place in (range(job.pp) if only is None else (only,))
    )


def kept_by_stage(
    shape: ModelShape,
    job: Job,
    units: Span,
    recompute: Recomputed,
    means: Means | None = None,
    *,
    tensor_rank: int | None = None,
    expert_rank: int | None = None,
    routed: Mapping[int, Routed] | None = None,
) -> float:
    """Bytes that a stage keeps of one micro-batch in flight; what it hands on is not among them."""
    held = Held(job, means or Means(), tensor_rank, expert_rank)
    return _merged(_stage_items(shape, held, units, recompute, routed)).kept


def _ledger(
    shape: ModelShape,
    held: Held,
    stages: Sequence[Span],
    recompute: Recomputed,
    rank: int,
    pipeline_rank: int,
    routed: Mapping[int, Routed] | None,
) -> Ledger:
    job = held.job
    own = stages_of(pipeline_rank, job.schedule, ranks=job.pp, stages=len(stages))
    units = [unit for stage in own for unit in range(*stages[stage])]
    items = {s: _stage_items(shape, held, stages[s], recompute, routed) for s in own}
    passing = {s: _passing(shape, held, s, len(stages)) for s in own}
    whole = frozenset(
        stage
        for stage in own
        if any(_is_recomputed(unit, recompute) for unit in range(*stages[stage]))
    )
    order = _order(job, len(stages), pipeline_rank, whole)
    peak = _peak(order, {s: _merged(of_stage) for s, of_stage in items.items()}, passing)
    states = _rank_states(shape, held, units)
    logits = sum(
        item.logits * peak.live.get(stage, 0)
        for stage, of_stage in items.items()
        for item in of_stage
    )
    of_logits, of_rest = _split_extra(items, peak)
    return Ledger(
        rank=rank,
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=tuple(
            InFlight(
                stage,
                peak.live.get(stage, 0),
                peak.live.get(stage, 0) * sum(item.kept - item.logits for item in of_stage),
            )
            for stage, of_stage in items.items()
        ),
        logits=logits + of_logits,
        transients=of_rest + peak.deferred,
        communication=_communication(shape, held, units)
        + sum(passing[stage] * count for stage, count in peak.live.items()),
        workspaces=_workspaces(shape, held, units),
    )


def _is_recomputed(unit: int, recompute: Recomputed) -> bool:
    layer, half = (unit - 1) // 2, "attention" if unit % 2 else "feed_forward"
    choice = recompute.get(f"{layer}.{half}", recompute.get(layer, "none"))
    return unit > 0 and choice != "none"


def _rank_states(shape: ModelShape, held: Held, units: Sequence[int]) -> States:
    total = States()
    last = 2 * len(shape.layers) + 1
    for unit, count in zip(units, _counts(shape, held, units), strict=True):
        if unit == last and shape.tied and 0 in units:
            count = Count(float(shape.norm_parameters))
        total = total.plus(states_of(held.job, count))
    return total


# --- The order of a rank's actions --------------------------------------------------------------


class _Peak(NamedTuple):
    live: Mapping[int, int]
    """Micro-batches that each stage keeps."""
    stage: int
    """The one at work."""
    kind: str
    extra: float
    """Beyond what is kept, of the stage at work."""
    deferred: float
    """Gradients that wait for a pass of their own."""


def _peak(
    order: Sequence[Action], of_stage: Mapping[int, _Item], passing: Mapping[int, float]
) -> _Peak:
    """The moment at which a rank holds most."""
    live = dict.fromkeys(of_stage, 0)
    waiting = dict.fromkeys(of_stage, 0)
    best, most = _Peak(dict(live), next(iter(of_stage)), "F", 0.0, 0.0), -1.0
    now = deferred = 0.0
    for kind, stage, _ in order:
        item = of_stage[stage]
        size = item.kept + passing[stage]
        if kind == "F":
            now, live[stage] = now + size, live[stage] + 1
        extra = 0.0 if kind == "W" else item.forward if kind == "F" else item.backward
        if now + deferred + extra > most:
            most = now + deferred + extra
            best = _Peak(dict(live), stage, kind, extra, deferred)
        if kind == "I":
            deferred, waiting[stage] = deferred + item.deferred, waiting[stage] + 1
        elif kind != "F":
            now, live[stage] = now - size, live[stage] - 1
            if waiting[stage]:
                deferred, waiting[stage] = deferred - item.deferred, waiting[stage] - 1
    return best


def _split_extra(items: Mapping[int, Sequence[_Item]], peak: _Peak) -> tuple[float, float]:
    """What the worst moment takes beyond what is kept: for logits, and for all else."""
    of_stage = items[peak.stage]
    if of_stage[-1].is_head:
        head = of_stage[-1].forward if peak.kind == "F" else of_stage[-1].backward
        if head >= peak.extra:
            return peak.extra, 0.0
    return 0.0, peak.extra


def _order(job: Job, stages: int, pipeline_rank: int, whole: frozenset[int]) -> list[Action]:
    if job.pp == 1:
        return [Action(kind, 0, 0) for kind in ("F", "B")]
    if job.schedule == "1f1b" and job.framework == "megatron":
        return list(_one_by_one(pipeline_rank, job.pp, job.micro_batches))
    count = _few_micro_batches(job, stages)
    of_all = _orders(job.schedule, job.pp, stages, count, whole)
    return of_all[pipeline_rank]


def _one_by_one(stage: int, ranks: int, micro_batches: int) -> Iterator[Action]:
    """1F1B, which Megatron runs with fewer micro-batches than stages too."""
    ahead = min(ranks - 1 - stage, micro_batches)
    for number in range(ahead):
        yield Action("F", stage, number)
    for number in range(min(micro_batches - ahead, ranks)):
        yield Action("F", stage, ahead + number)
        yield Action("B", stage, number)


def _few_micro_batches(job: Job, stages: int) -> int:
    """Fewer micro-batches with the same peaks: a pipeline that is full stays so."""
    enough = 2 * stages
    if job.schedule == "gpipe" or job.micro_batches <= enough:
        return job.micro_batches
    if job.schedule in ("interleaved", "zb1p") and job.micro_batches % job.pp:
        return job.micro_batches
    return enough


@functools.lru_cache(maxsize=64)
def _orders(
    schedule: str, ranks: int, stages: int, micro_batches: int, whole: frozenset[int]
) -> list[list[Action]]:
    return actions(
        schedule,  # type: ignore[arg-type]
        ranks=ranks,
        stages=stages,
        micro_batches=micro_batches,
        whole=whole,
    )


def _most_in_flight(job: Job, stages: int, pipeline_rank: int) -> list[int]:
    """Of each stage of a rank, the most micro-batches at once."""
    own = stages_of(pipeline_rank, job.schedule, ranks=job.pp, stages=stages)
    live, most = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
    for kind, stage, _ in _order(job, stages, pipeline_rank, frozenset()):
        live[stage] += {"F": 1, "I": 0}.get(kind, -1)
        most[stage] = max(most[stage], live[stage])
    return [most[stage] for stage in own]


# --- What belongs to no unit --------------------------------------------------------------------


def _passing(shape: ModelShape, held: Held, stage: int, stages: int) -> float:
    """Bytes that a micro-batch in flight keeps at a stage's ends, beside what its units keep.

    torch's pipeline keeps what a stage was given and what it returned; Megatron keeps only the
    former, which is the first residual, and frees the latter.
    """
    if held.job.framework == "megatron" or held.job.pp == 1:
        return 0.0
    return ((stage > 0) + (stage < stages - 1)) * held.width * held.rows * shape.hidden


def _counts(shape: ModelShape, held: Held, units: Sequence[int]) -> list[Count]:
    """Parameters of each unit; layers of one kind are counted once."""
    known: dict[tuple[object, int], Count] = {}
    found = []
    for unit in units:
        is_layer = 0 < unit < 2 * len(shape.layers) + 1
        key = (id(shape.layers[(unit - 1) // 2]), unit % 2) if is_layer else (None, unit)
        if key not in known:
            known[key] = count_parameters(shape, held, unit)
        found.append(known[key])
    return found


def _communication(shape: ModelShape, held: Held, units: Sequence[int]) -> float:
    job = held.job
    between = held.width * held.rows * shape.hidden
    total = 0.0
    if job.pp > 1:
        # One activation and one gradient are received while others are worked on.
        total += 2 * between
    if job.framework == "megatron":
        if job.tp > 1 and job.sequence_parallel:
            # The buffer into which Megatron gathers the input of its own products.
            total += held.width * held.tokens * shape.hidden
        return total
    if job.pp > 1 and held.means.device == "cpu" and job.schedule not in ("gpipe", "1f1b"):
        # gloo keeps what was sent until the step is over.
        total += 2 * between * job.micro_batches * job.interleave
    counts = _counts(shape, held, units)
    blocks = [_block(held, both) for both in zip(counts[::2], counts[1::2], strict=False)]
    total += max(blocks, default=0.0)
    if job.zero > 1 and job.schedule in SPLIT and job.pp > 1:
        # Where gradients are found in two passes, those of a whole stage wait to be reduced.
        whole = sum(4 * count.dense for count in counts if job.dense_shards > 1)
        whole += sum(4 * count.experts for count in counts if job.expert_shards > 1)
        total += whole / job.interleave
    return total


def _block(held: Held, halves: Sequence[Count]) -> float:
    """What FSDP takes while it is at a block: two units, which need not be of one layer."""
    job = held.job
    dense = sum(count.dense for count in halves) if job.dense_shards > 1 else 0.0
    experts = sum(count.experts for count in halves) if job.expert_shards > 1 else 0.0
    # Gradients are copied to be reduced; from ZeRO-2 on they are whole only meanwhile, and with
    # ZeRO-3 this block's weights are, and the next one's.
    total = 4 * (dense + experts)
    if job.zero > 1:
        total += 4 * dense
    if job.zero > 2:
        total += 2 * (4 * dense + held.width * experts)
    return total


def _workspaces(shape: ModelShape, held: Held, units: Sequence[int]) -> float:
    if held.means.device == "cpu":
        return 0.0
    total = float(PRODUCT_WORKSPACE)
    if held.job.framework == "megatron":
        total += spare_gradients(shape, held, units) + PRODUCT_WORKSPACE
        layers = {(unit - 1) // 2 for unit in units if 0 < unit < 2 * len(shape.layers) + 1}
        if any(isinstance(shape.layers[layer].feed_forward, MoEShape) for layer in layers):
            total += GROUPED_STREAMS * PRODUCT_WORKSPACE
    return total
