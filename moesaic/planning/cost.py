"""How many seconds a unit takes on one rank, and the rest of a step.

Each kernel is bound by one of four things, and a unit is the sum of its kernels:

    products        operations over the rate that products of this size reach
    attention       operations of scores and values over the rate of fused attention
    memory          bytes read and written, by norms, activations, routing, permutes and the loss
    communication   bytes over links, where nothing else runs meanwhile

and the whole of it by the host, which must start every kernel. The rate of a product is the peak,
times what the best-shaped product reaches on that device (measured, and published), times

    sustained       what the device's power limit leaves of it in a step: calibrated, one number for
                    each generation of devices, and the only one that comes from step times
    tiles           the part of the last tiles, and of the last wave of tiles, that does work
    depth           what filling and draining a tile's pipeline leaves of it

Time of a step: the pipeline as the simulator has it, what of the gradients' reduction and the
weights' gathering is not hidden, and the optimizer. A measured table, where there is one for these
sizes, takes the place of the formulas of a unit.

Letters. T positions of a tensor-parallel group, R of one rank between layers (R = T / t where the
sequence is parallel too), H model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.cluster import ClusterSpec, DeviceSpec
from moesaic.planning.job import Job
from moesaic.planning.measured import (
    LinkKind,
    MeasuredLink,
    MeasuredTable,
    MeasuredUnit,
    unit_shape,
)
from moesaic.planning.plan import V_SHAPED
from moesaic.planning.schedules import can_run
from moesaic.planning.shape import (
    AttentionShape,
    DenseShape,
    Matrix,
    ModelShape,
    MoEShape,
    unit_names,
)
from moesaic.planning.simulate import StageSeconds, simulate
from moesaic.planning.split import Span, Split

NETWORK = 0.85
"""Part of the network's bandwidth that collectives reach. DeepEP: 43 to 58 of 50 GB/s, some of it
inside nodes; NCCL over InfiniBand: 0.8 to 0.92."""

START_SECONDS = 23e-6
"""That any exchange needs, besides its steps. SimuMax v1.2, gathers over NVLink: 23 to 26 us."""

TILE = (128, 256)
"""Rows and columns of the result that one multiprocessor computes at once, either way round: what
vendors' libraries take for large products (NVIDIA, Matrix Multiplication Background)."""

DEPTH = 128
"""Inputs for whose products a tile could have been computed while it is filled and drained. Ours:
a product of depth 1,024 reaches some 0.9 of one of depth 8,192."""

GROUP_SECONDS = 3.3e-6
"""That each expert's product needs besides, where they are not one kernel. SimuMax v1.2 on a B200:
36 grouped products of 128 to 2,460 rows an expert take 0 to 10 us more each, 3.3 in the median."""

RAMP = 512
"""Positions at which fused attention reaches half of its rate on long sequences; causal blocks on
the diagonal are half wasted (FlashAttention-2 and -3: 2k positions reach 0.75 to 0.8 of 16k)."""

FLASH_BACKWARD = 2.5
"""Operations of fused attention's backward pass over its forward: five products for two."""

BUCKET = 40e6
"""Gradients that travel at once, at least: Megatron's default, a million for each rank or this."""

STEP_SECONDS = 0.01
"""Of each step, for what is not counted: the norm's reduction, the data, the log. Ours."""

RECOMPUTE = ("none", "moe_activations", "attention", "full")


@dataclass(frozen=True)
class UnitCost:
    """Seconds of one unit on one rank for one micro-batch."""

    name: str
    forward: float
    input_gradient: float
    weight_gradient: float
    recompute: Mapping[str, float]
    """By choice, the seconds of computing again."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of forward and backward, what binds: products, attention, memory, communication, launch."""

    @property
    def seconds(self) -> float:
        """Forward and backward, nothing computed again."""
        return self.forward + self.input_gradient + self.weight_gradient


class Group(NamedTuple):
    """Ranks that talk to each other, and how many of them share a node."""

    ranks: int
    near: int

    @property
    def nodes(self) -> int:
        """Nodes that they are in."""
        return -(-self.ranks // self.near)


class _Cost:
    """Seconds of kernels, by what binds them, and the kernels' number."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.kernels = 0

    def add(self, part: str, seconds: float, kernels: int = 1) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds
        self.kernels += kernels

    def total(self, launch_seconds: float) -> float:
        """With what the host needs to start the kernels, where that is more."""
        busy = sum(self.parts.values())
        idle = self.kernels * launch_seconds - busy
        if idle > 0:
            self.parts["launch"] = self.parts.get("launch", 0.0) + idle
        return busy + max(0.0, idle)


@dataclass(frozen=True)
class Machine:
    """One rank's device and links, and how fast they do what a job asks."""

    job: Job
    device: DeviceSpec
    node_size: int
    link_bandwidth: float
    link_latency: float
    network_bandwidth: float
    network_latency: float
    table: MeasuredTable | None = None
    """Whose exchanges take the place of bandwidths and latencies."""

    @classmethod
    def of(
        cls, cluster: ClusterSpec, job: Job, rank: int = 0, table: MeasuredTable | None = None
    ) -> Machine:
        """What a rank of a cluster has."""
        node = cluster.node(rank)
        return cls(
            job=job,
            device=node.device,
            node_size=node.count,
            link_bandwidth=node.link_bandwidth * node.link_efficiency,
            link_latency=node.link_latency,
            network_bandwidth=cluster.network_bandwidth * NETWORK,
            network_latency=cluster.network_latency,
            table=table,
        )

    @property
    def width(self) -> int:
        """Bytes of an activation between kernels."""
        return 4 if self.job.dtype == "fp32" else 2

    def group(self, ranks: int, *, stride: int = 1) -> Group:
        """Ranks a stride apart."""
        return Group(ranks, max(1, min(ranks, self.node_size // stride)))

    @cached_property
    def tensor(self) -> Group:
        """Ranks that share heads and columns."""
        return self.group(self.job.tp)

    @cached_property
    def context(self) -> Group:
        """Ranks that share a sequence's positions."""
        return self.group(self.job.cp, stride=self.job.tp)

    @cached_property
    def data(self) -> Group:
        """Ranks that hold the same part of dense weights."""
        return self.group(self.job.dense_data_ranks, stride=self.job.tp)

    @cached_property
    def experts(self) -> Group:
        """Ranks that share one set of experts."""
        return self.group(self.job.expert_ranks, stride=self.job.expert_tensor_ranks)

    @cached_property
    def expert_columns(self) -> Group:
        """Ranks that share one expert's columns."""
        return self.group(self.job.expert_tensor_ranks)

    @cached_property
    def expert_data(self) -> Group:
        """Ranks that hold the same part of the same experts."""
        stride = self.job.expert_ranks * self.job.expert_tensor_ranks
        return self.group(self.job.expert_data_ranks, stride=stride)

    def product(
        self, rows: float, inputs: float, outputs: float, *, dtype: str | None = None, many: int = 1
    ) -> float:
        """Seconds of `many` products of (rows, inputs) and (inputs, outputs), done as one."""
        if rows <= 0 or inputs <= 0 or outputs <= 0:
            return 0.0
        dtype = dtype or self.job.dtype
        device = self.device
        rate = device.peak(dtype) * device.matmul_efficiency[dtype] * device.sustained
        rate *= self._filled(rows, outputs, many) * inputs / (inputs + DEPTH)
        size = {"fp8": 1, "bf16": 2}.get(dtype, 4)
        result = min(size, 2) if size < 4 else 4
        moved = size * (rows * inputs + inputs * outputs) + max(result, 2) * rows * outputs
        return max(2 * many * rows * inputs * outputs / rate, self.moved(many * moved))

    def _filled(self, rows: float, outputs: float, many: int) -> float:
        """Part of the tiles' work that is asked for, the better way round."""
        if not self.device.units:
            return 1.0
        best = 0.0
        for high, wide in (TILE, TILE[::-1], (TILE[0], TILE[0])):
            tiles = many * math.ceil(rows / high) * math.ceil(outputs / wide)
            waves = math.ceil(tiles / self.device.units)
            used = many * rows * outputs / (waves * self.device.units * high * wide)
            # Square tiles read more for each product than oblong ones.
            best = max(best, used * (0.9 if high == wide else 1.0))
        return min(best, 1.0)

    def moved(self, count: float) -> float:
        """Seconds of reading and writing so many bytes."""
        return count / (self.device.memory_bandwidth * self.device.memory_efficiency)

    def flash(self, flops: float, *, sequence: int, head_dim: int, backward: bool) -> float:
        """Seconds of fused attention."""
        if flops <= 0:
            return 0.0
        best = self.device.flash_efficiency[backward]
        if not self.device.units:
            return flops / (self.device.peak("fp32" if self.job.dtype == "fp32" else "bf16") * best)
        dtype = "fp32" if self.job.dtype == "fp32" else "bf16"
        # Narrow heads multiply less for each softmax: 64 reach some 0.75 of 128.
        narrow = min(1.0, 1.5 * head_dim / (head_dim + 64))
        return flops / (self.device.peak(dtype) * best * narrow * sequence / (sequence + RAMP))

    def bandwidth(self, group: Group) -> float:
        """Bytes a second that a ring over a group moves through each rank.

        Between nodes a ring's bytes pass once, over the ports of all its ranks in a node.
        """
        if group.nodes == 1:
            return self.link_bandwidth
        return min(self.link_bandwidth, group.near * self.network_bandwidth)

    def latency(self, group: Group) -> float:
        """Seconds of an exchange of nothing."""
        steps = (group.near - 1) * self.link_latency + (group.nodes - 1) * self.network_latency
        return START_SECONDS + steps

    def link(self, kind: LinkKind, group: Group) -> MeasuredLink | None:
        """What was measured of such exchanges."""
        return None if self.table is None else self.table.link(kind, *group)

    def gather(
        self, count: float, group: Group, *, times: int = 1, kind: LinkKind = "gather"
    ) -> float:
        """Seconds of gathering `count` bytes on each rank, or of summing and dealing them out."""
        if group.ranks == 1:
            return 0.0
        moved = count * (group.ranks - 1) / group.ranks
        if link := self.link(kind, group):
            return link.seconds(moved, times=times)
        return moved / self.bandwidth(group) + times * self.latency(group)

    def sum(self, count: float, group: Group) -> float:
        """Seconds of summing `count` bytes, of which every rank keeps all."""
        if link := self.link("sum", group):
            return link.seconds(count * (group.ranks - 1) / group.ranks)
        return 2 * self.gather(count, group)

    def all_to_all(self, count: float, group: Group) -> float:
        """Seconds in which each rank sends `count` bytes, equally many to every rank."""
        if group.ranks == 1:
            return 0.0
        if link := self.link("all_to_all", group):
            return link.seconds(count * (group.ranks - 1) / group.ranks)
        near = count * (group.near - 1) / group.ranks / self.link_bandwidth
        far = count * (group.ranks - group.near) / group.ranks / self.network_bandwidth
        return max(near, far) + self.latency(group)

    def send(self, count: float, distance: int) -> float:
        """Seconds of sending bytes to the rank so many further."""
        is_near = 2 * distance <= self.node_size
        if link := self.link("send", Group(2, 2 if is_near else 1)):
            return link.seconds(count)
        if is_near:
            return count / self.link_bandwidth + START_SECONDS + self.link_latency
        return count / self.network_bandwidth + START_SECONDS + self.network_latency


def unit_costs(
    shape: ModelShape,
    job: Job,
    cluster: ClusterSpec,
    *,
    rank: int = 0,
    table: MeasuredTable | None = None,
) -> tuple[UnitCost, ...]:
    """Seconds of every unit, as if on the device of `rank`.

    Args:
        shape: The model.
        job: The step and its mesh.
        cluster: Where it runs.
        rank: Whose device and links.
        table: What was measured; it replaces the formulas of the units that it has.
    """
    machine = Machine.of(cluster, job, rank, table)
    known: dict[Any, UnitCost] = {}
    found = []
    for name in unit_names(shape):
        layer, _, part = name.partition(".")
        kind: Any = name if not part else shape.layers[int(layer)]
        measured = table.find(name, shape, job) if table else None
        key = (kind, part) if measured is None else id(measured)
        if key not in known:
            known[key] = (
                _unit(machine, shape, name) if measured is None else _measured(measured, job)
            )
        found.append(dataclasses.replace(known[key], name=name))
    return tuple(found)


def _measured(unit: MeasuredUnit, job: Job) -> UnitCost:
    forward, inputs, weights = unit.in_step(job)
    again = {choice: unit.recompute.get(choice, 0.0) for choice in RECOMPUTE}
    return UnitCost(
        unit.kind, forward, inputs, weights, again, {"measured": forward + inputs + weights}
    )


def _unit(machine: Machine, shape: ModelShape, name: str) -> UnitCost:
    if name == "embedding":
        return _embedding(machine, shape)
    if name == "head":
        return _head(machine, shape)
    number, _, part = name.partition(".")
    layer = shape.layers[int(number)]
    if part == "attention":
        return _attention(machine, shape, layer.attention)
    if isinstance(layer.feed_forward, MoEShape):
        return _experts(machine, shape, layer.feed_forward)
    return _network(machine, shape, layer.feed_forward)


class _Passes:
    """The three passes of a unit, filled kernel by kernel."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.forward, self.inputs, self.weights = _Cost(), _Cost(), _Cost()

    def matrix(
        self, rows: float, matrix: Matrix, *, over: int, many: int = 1, dtype: str | None = None
    ) -> float:
        """A weight matrix that `over` ranks share; returns the seconds of its forward product."""
        inputs, outputs = float(matrix.inputs), float(matrix.outputs)
        if matrix.shared == "columns":
            outputs /= over
        elif matrix.shared == "rows":
            inputs /= over
        machine, job = self.machine, self.machine.job
        # Megatron's grouped product is one product after the other, on a few streams.
        start = GROUP_SECONDS * many if many > 1 and job.framework == "megatron" else 0.0
        forward = machine.product(rows, inputs, outputs, many=many, dtype=dtype) + start
        self.forward.add("products", forward)
        backward = machine.product(rows, outputs, inputs, many=many, dtype=dtype) + start
        self.inputs.add("products", backward)
        summed = machine.moved(2 * many * job.gradient_bytes * inputs * outputs)
        product = machine.product(inputs, rows, outputs, many=many, dtype=dtype)
        self.weights.add("products", max(product, summed) + start)
        if (dtype or job.dtype) == "fp8":
            # Cast of the input and of the gradient, each also transposed, and of the weight.
            self.forward.add("memory", machine.moved(many * rows * inputs * 4), 2)
            self.forward.add("memory", machine.moved(many * inputs * outputs * 4), 1)
            self.inputs.add("memory", machine.moved(many * rows * outputs * 4), 2)
        return forward

    def memory(self, forward: float, backward: float, *, kernels: int = 1) -> None:
        """Bytes that kernels move which do nothing else."""
        self.forward.add("memory", self.machine.moved(forward), kernels)
        self.inputs.add("memory", self.machine.moved(backward), kernels)

    def exchange(self, seconds: float, *, beside: float = 0.0, overlap: bool = False) -> None:
        """Communication of the forward pass, and as much of the backward.

        Where it overlaps with a product, it goes in as many pieces as there are ranks: the first
        one is not hidden, nor what takes longer than the product.
        """
        if overlap and seconds > 0:
            ranks = self.machine.job.tp
            seconds = seconds / ranks + max(0.0, seconds * (ranks - 1) / ranks - beside)
        self.forward.add("communication", seconds)
        self.inputs.add("communication", seconds)

    def cost(self, name: str, recompute: Mapping[str, float]) -> UnitCost:
        """The unit; `recompute` may name the choice "full" as the whole forward pass."""
        launch = self.machine.device.launch_seconds
        passes = (self.forward, self.inputs, self.weights)
        forward, inputs, weights = (cost.total(launch) for cost in passes)
        parts: dict[str, float] = {}
        for cost in passes:
            for part, seconds in cost.parts.items():
                parts[part] = parts.get(part, 0.0) + seconds
        extra = {choice: recompute.get(choice, 0.0) for choice in RECOMPUTE}
        extra["full"] = forward
        if math.isinf(extra["attention"]):
            extra["attention"] = forward
        return UnitCost(name, forward, inputs, weights, extra, parts)


def _attention(machine: Machine, shape: ModelShape, attention: AttentionShape) -> UnitCost:
    job, hidden = machine.job, shape.hidden
    passes = _Passes(machine)
    matrices = attention.matrices(hidden)
    _norm_and_residual(passes, shape)
    width = hidden
    if attention.kv_rank is not None:
        # Latents are computed of a rank's own positions, and they are what travels.
        width = sum(matrix.outputs for matrix in matrices if matrix.shared == "whole")
    first = last = 0.0
    for matrix in matrices:
        rows = job.rows if matrix.shared == "whole" else job.tokens
        last = passes.matrix(rows, matrix, over=job.tp)
        first = first or last
    _enter(passes, width, beside=first)
    _leave(passes, hidden, beside=last)
    heads = attention.heads + attention.kv_heads
    turned = job.tokens * heads * (attention.rope_dim or attention.head_dim) / job.tp
    if not shape.positions:
        passes.memory(2 * machine.width * turned, 2 * machine.width * turned, kernels=2)
    core = _core(passes, attention)
    again = core if job.framework == "megatron" else math.inf
    return passes.cost("attention", {"attention": again})


def _core(passes: _Passes, attention: AttentionShape) -> float:
    """Scores, softmax and values; returns the seconds of computing them again."""
    machine = passes.machine
    job = machine.job
    heads = attention.heads / job.tp
    if job.attention_core == "fused":
        flops = job.tokens * attention.core_flops(job.sequence) / job.tp
        width = (attention.score_dim + attention.value_dim) // 2
        size = {"sequence": job.sequence, "head_dim": width}
        forward = machine.flash(flops, **size, backward=False)
        backward = machine.flash(FLASH_BACKWARD * flops, **size, backward=True)
        _pass_round(passes, attention, forward, backward)
    else:
        # Every score is written: products of whole squares, softmax and dropout between them.
        squares = heads * job.tokens * job.sequence
        count, length = max(1, round(heads * job.micro_batch)), job.sequence
        scores = machine.product(length, attention.score_dim, length, many=count, dtype="bf16")
        values = machine.product(length, length, attention.value_dim, many=count, dtype="bf16")
        forward = scores + values + machine.moved(9 * squares)
        backward = 2 * (scores + values) + machine.moved(11 * squares)
    passes.forward.add("attention", forward, 2)
    passes.inputs.add("attention", backward, 3)
    return forward


def _pass_round(
    passes: _Passes, attention: AttentionShape, forward: float, backward: float
) -> None:
    """Keys and values on their way round the context-parallel ranks, hidden behind the core."""
    machine, job = passes.machine, passes.machine.job
    if job.cp == 1:
        return
    width = attention.kv_heads * (attention.score_dim + attention.value_dim) / job.tp
    around = machine.gather(
        machine.width * job.tokens * job.cp * width, machine.context, times=job.cp
    )
    for cost, seconds, core in (
        (passes.forward, around, forward),
        (passes.inputs, 2 * around, backward),
    ):
        hidden = min(seconds, core) * (job.cp - 1) / job.cp
        cost.add("communication", seconds - hidden, job.cp)


def _network(machine: Machine, shape: ModelShape, network: DenseShape) -> UnitCost:
    job = machine.job
    passes = _Passes(machine)
    _norm_and_residual(passes, shape)
    up, down = network.matrices(shape.hidden)
    first = passes.matrix(job.tokens, up, over=job.tp)
    columns = job.tokens * network.ffn_dim / job.tp
    activation = _activation(passes, columns, network.matrices_count)
    last = passes.matrix(job.tokens, down, over=job.tp)
    _enter(passes, shape.hidden, beside=first)
    _leave(passes, shape.hidden, beside=last)
    inside = activation + (first if job.framework == "moesaic" else 0.0)
    return passes.cost("feed_forward", {"moe_activations": inside})


def _experts(machine: Machine, shape: ModelShape, moe: MoEShape) -> UnitCost:
    job, hidden = machine.job, shape.hidden
    passes = _Passes(machine)
    _norm_and_residual(passes, shape)
    router = Matrix("router", hidden, moe.experts, "whole")
    passes.matrix(job.rows, router, over=1, dtype="bf16" if job.dtype == "fp8" else None)
    # Logits in fp32: softmax, top-k, the balance loss.
    passes.memory(job.rows * moe.experts * 24, job.rows * moe.experts * 24, kernels=16)

    load = job.load_mean
    if job.capacity_factor is not None:
        load = min(load, job.capacity_factor)
    _dispatch(passes, moe, hidden, load)
    received = job.rows * moe.top_k * job.expert_tensor_ranks * load
    held = max(1, round(moe.experts / job.expert_ranks))
    up, down = moe.expert(hidden)
    rows = received / held
    first = passes.matrix(rows, up, over=job.expert_tensor_ranks, many=held)
    columns = received * moe.expert_dim / job.expert_tensor_ranks
    activation = _activation(passes, columns, moe.matrices_count)
    passes.matrix(rows, down, over=job.expert_tensor_ranks, many=held)
    # Rows into the order of experts and back, and weighted on the way.
    for count in (job.rows * moe.top_k, received):
        passes.memory(
            4 * machine.width * count * hidden, 4 * machine.width * count * hidden, kernels=8
        )
    if moe.shared_dim:
        shared_up, shared_down = moe.shared(hidden)
        beside = passes.matrix(job.tokens, shared_up, over=job.tp)
        _activation(passes, job.tokens * moe.shared_dim / job.tp, moe.matrices_count)
        last = passes.matrix(job.tokens, shared_down, over=job.tp)
        _enter(passes, hidden, beside=beside)
        _leave(passes, hidden, beside=last)
    inside = activation + (first if job.framework == "moesaic" else 0.0)
    return passes.cost("feed_forward", {"moe_activations": inside})


def _dispatch(passes: _Passes, moe: MoEShape, hidden: int, load: float) -> None:
    """Rows to the ranks that hold their experts, and back."""
    machine, job = passes.machine, passes.machine.job
    ranks = job.expert_ranks
    row = machine.width * hidden
    kind = job.dispatch
    if kind == "auto":
        kind = "all_to_all" if moe.top_k < ranks or job.framework == "megatron" else "all_gather"
    if kind == "all_to_all":
        one_way = _copies(machine, moe, row * load)
    else:
        one_way = machine.gather(job.rows * ranks * row, machine.experts)
    if job.overlap_experts:
        one_way *= 1 - HIDDEN_DISPATCH
    passes.exchange(2 * one_way)
    if job.expert_tensor_ranks > 1:
        rows = job.rows * moe.top_k * job.expert_tensor_ranks * load
        passes.exchange(2 * machine.gather(rows * row, machine.expert_columns))


def _copies(machine: Machine, moe: MoEShape, row: float) -> float:
    """Seconds of an all-to-all of all copies of a rank's positions, `row` bytes each."""
    job, group = machine.job, machine.experts
    if not job.deduplicate:
        return machine.all_to_all(job.rows * moe.top_k * row, group)
    copies = distinct_ranks(moe.experts, moe.top_k, group.ranks)
    if job.framework == "moesaic" or group.nodes == 1:
        return machine.all_to_all(job.rows * copies * row, group)
    # DeepEP and HybridEP: once to each node over the network, from there on over links.
    far = distinct_ranks(moe.experts, moe.top_k, group.nodes) * (group.nodes - 1) / group.nodes
    near = copies * (group.near - 1) / group.near
    return max(
        job.rows * far * row / machine.network_bandwidth,
        job.rows * near * row / machine.link_bandwidth,
    ) + machine.latency(group)


HIDDEN_DISPATCH = 0.8
"""Part of the experts' exchange that runs beside another micro-batch's products where a framework
does that. Theory says all of it; Tessera (OSDI'26) sees products lose 0.1 to 0.2 meanwhile."""


def distinct_ranks(experts: int, top_k: int, ranks: int) -> float:
    """Ranks that a token goes to on average, if its experts are any of equally many a rank."""
    elsewhere = experts - experts // ranks
    if elsewhere < top_k:
        return float(ranks) if ranks > 1 else 1.0
    return ranks * (1 - math.comb(elsewhere, top_k) / math.comb(experts, top_k))


def _norm_and_residual(passes: _Passes, shape: ModelShape) -> None:
    elements = passes.machine.job.rows * shape.hidden
    # Norm: read and write; backward it reads the input too. The residual is read and added.
    passes.memory(2 * passes.machine.width * elements, 3 * passes.machine.width * elements)
    passes.memory(3 * passes.machine.width * elements, 2 * passes.machine.width * elements)


def _activation(passes: _Passes, columns: float, matrices: int) -> float:
    """The activation over so many elements; returns the seconds of computing it again."""
    before = len(("gate", "up")[: matrices - 1])
    forward = passes.machine.width * columns * (before + 1)
    passes.memory(forward, passes.machine.width * columns * (2 * before + 1))
    return passes.machine.moved(forward)


def _enter(passes: _Passes, width: int, *, beside: float) -> None:
    """Bring the positions of all tensor-parallel ranks together before a split matrix."""
    machine, job = passes.machine, passes.machine.job
    if not job.sequence_parallel:
        return
    seconds = machine.gather(machine.width * job.tokens * width, machine.tensor)
    passes.exchange(seconds, beside=beside, overlap=job.overlap_tensor)


def _leave(passes: _Passes, width: int, *, beside: float) -> None:
    """Sum over the tensor-parallel ranks, and share out the positions where they are shared."""
    machine, job = passes.machine, passes.machine.job
    seconds = machine.gather(machine.width * job.tokens * width, machine.tensor)
    if not job.sequence_parallel:
        seconds *= 2
    passes.exchange(seconds, beside=beside, overlap=job.overlap_tensor)


def _embedding(machine: Machine, shape: ModelShape) -> UnitCost:
    job = machine.job
    passes = _Passes(machine)
    elements = job.tokens * shape.hidden
    passes.memory(
        2 * machine.width * elements, (machine.width + 2 * job.gradient_bytes) * elements, kernels=3
    )
    _leave(passes, shape.hidden, beside=0.0)
    return passes.cost("embedding", {})


def _head(machine: Machine, shape: ModelShape) -> UnitCost:
    job = machine.job
    passes = _Passes(machine)
    elements = job.rows * shape.hidden
    passes.memory(2 * machine.width * elements, 3 * machine.width * elements)
    head = Matrix("head", shape.hidden, shape.vocab, "columns")
    # Kept out of fp8, as every recipe does.
    dtype = "bf16" if job.dtype == "fp8" else None
    beside = passes.matrix(job.tokens, head, over=job.tp, dtype=dtype)
    logits = job.tokens * shape.vocab / job.tp
    forward, backward = FUSED_LOGIT_BYTES if job.fused_loss else LOGIT_BYTES
    if job.framework == "moesaic":
        forward, backward = CHUNKED_LOGIT_BYTES, 0
    passes.memory(forward * logits, backward * logits, kernels=8)
    _enter(passes, shape.hidden, beside=beside)
    if job.framework != "moesaic":
        return passes.cost("head", {})
    # Gradients are found chunk by chunk with the loss, and only scaled in the backward pass.
    weights = shape.hidden * shape.vocab / job.tp
    chunks = math.ceil(job.tokens / CHUNK_TOKENS)
    passes.forward.add("memory", machine.moved(12 * weights * chunks), chunks)
    cost = passes.cost("head", {})
    inputs = machine.moved(2 * machine.width * job.tokens * shape.hidden)
    scaled = machine.moved(3 * 4 * weights)
    return dataclasses.replace(
        cost, forward=cost.seconds, input_gradient=inputs, weight_gradient=scaled
    )


CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once in Moesaic's loss (model/loss.py)."""

CHUNKED_LOGIT_BYTES = 28
"""Bytes moved for each logit there: read in bf16 and written in fp32 as a log-softmax, its exponent
and its mask in place, and narrowed again."""

LOGIT_BYTES = (38, 22)
"""Bytes moved for each logit, forward and backward. As Megatron-Core's loss over a split vocabulary
does without fusion: widened to fp32, its largest found and taken off, exponents, their sum, and
divided by it; backward the difference, scaled and narrowed again."""

FUSED_LOGIT_BYTES = (16, 8)
"""The same with fusion: the product's result and its largest; then once more for exponents and
their sum; backward read once and written once in bf16, beside what fp32 remains."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step on one rank outside of its passes."""

    reduce: float
    """Summing gradients over data-parallel ranks."""
    gather: float
    """Gathering weights."""
    buckets: int
    """Pieces in which both travel."""
    optimizer: float


def step_costs(
    shape: ModelShape,
    job: Job,
    cluster: ClusterSpec,
    units: Span,
    *,
    rank: int = 0,
    table: MeasuredTable | None = None,
) -> StepCost:
    """What a rank that holds a run of units does beside its passes; nothing hidden yet."""
    machine = Machine.of(cluster, job, rank, table)
    dense, experts = held_parameters(shape, job, units)
    buckets = max(1, math.ceil((dense + experts) / max(BUCKET, 1e6 * job.dense_data_ranks)))
    reduce = gather = 0.0
    # Moesaic keeps weights in fp32, and rounds only experts before it gathers them.
    widths = (4 if job.framework == "moesaic" else machine.width, machine.width)
    if not job.zero:
        # Sums stay whole on every rank: the second half of an all-reduce.
        widths = (job.gradient_bytes, job.gradient_bytes)
    parts = (dense, machine.data, widths[0]), (experts, machine.expert_data, widths[1])
    for count, group, width in parts:
        pieces = max(1, math.ceil(buckets * count / max(1.0, dense + experts)))
        reduce += machine.gather(
            job.gradient_bytes * count, group, times=pieces, kind="scatter_sum"
        )
        gather += machine.gather(width * count, group, times=pieces)
    return StepCost(reduce, gather, buckets, _update_seconds(machine, shape, units))


def _update_seconds(machine: Machine, shape: ModelShape, units: Span) -> float:
    """Of the optimizer, over what a rank holds of a run of units."""
    job, table = machine.job, machine.table
    shards = (job.dense_shards, job.expert_shards) if job.zero else (1, 1)
    seconds = moved = 0.0
    names = unit_names(shape) if table else []
    for span in [(unit, unit + 1) for unit in range(*units)] if table else [units]:
        dense, experts = held_parameters(shape, job, span, beside=units)
        updated = dense / shards[0] + experts / shards[1]
        found = table.find(names[span[0]], shape, job) if table else None
        if found is not None and found.update is not None:
            # Of a unit that holds nothing here, as a tied head, nothing was measured either.
            whole = sum(held_parameters(shape, job, span))
            seconds += found.update * updated / whole
        else:
            moved += OPTIMIZER_BYTES * updated + job.gradient_bytes * (dense + experts)
    return seconds + machine.moved(moved)


OPTIMIZER_BYTES = 34
"""Bytes that AdamW moves for each parameter: weight and two moments in fp32 read and written, the
gradient read twice, once for its norm, and the weight written in bf16."""


def held_parameters(
    shape: ModelShape, job: Job, units: Span, *, beside: Span | None = None
) -> tuple[float, float]:
    """Parameters that one rank holds of a run of units: dense ones, and experts'.

    A tied table counts once where the rank has both ends, here or in the units `beside` these.
    """
    hidden = shape.hidden
    first = min(units[0], units[0] if beside is None else beside[0])
    dense = experts = 0.0
    last = 2 * len(shape.layers) + 1
    for unit in range(*units):
        if unit == 0:
            dense += shape.vocab * hidden / job.tp + shape.positions * hidden
        elif unit == last:
            has_table = not (shape.tied and first == 0)
            dense += has_table * shape.vocab * hidden / job.tp + shape.norm_parameters
        else:
            number, second = divmod(unit - 1, 2)
            layer = shape.layers[number]
            part = layer.feed_forward if second else layer.attention
            dense += shape.norm_parameters
            if isinstance(part, MoEShape):
                over = job.expert_ranks * job.expert_tensor_ranks
                experts += part.experts * part.expert_parameters(hidden) / over
                shared = part.parameters(hidden, experts=0) - part.router_parameters(hidden)
                dense += part.router_parameters(hidden) + shared / job.tp
            else:
                dense += part.parameters(hidden) / job.tp
    return dense, experts


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step and what they are made of."""

    seconds: float
    pipeline: float
    """From the first pass to the end of the last."""
    communication: float
    """Of gradients and weights, what is not hidden."""
    optimizer: float
    stage_seconds: tuple[StageSeconds, ...]
    is_bound: bool
    """Whether the pipeline's time is the upper bound (m - 1) max + sum, not simulated."""
    measured: tuple[str, ...] = ()
    """What came from a measured table."""
    by_formulas: tuple[str, ...] = ()
    """What did not."""

    def tokens_per_second(self, job: Job) -> float:
        """Of each rank."""
        return job.step_tokens / self.seconds / job.world_size


def default_stages(shape: ModelShape, count: int) -> tuple[Span, ...]:
    """Whole layers over stages: equally many, or with embedding and head counted as a layer each,
    or as equal as can be.

    Raises:
        PlanError: There are fewer layers than stages.
    """
    layers = len(shape.layers)
    last = 2 * layers + 2
    if layers % count and (layers + 2) % count == 0:
        size = (layers + 2) // count
        sizes = [size - 1, *[size] * (count - 2), size - 1]
    else:
        sizes = list(Split.balanced(layers, count).sizes)
    if 0 in sizes[1:-1] or (0 in sizes and layers < count):
        raise PlanError(f"There are {count} stages, but {layers} layers. Use fewer stages.")
    edges, done = [0], 0
    for size in sizes[:-1]:
        done += size
        edges.append(1 + 2 * done)
    return tuple(zip(edges, [*edges[1:], last], strict=True))


def predict(
    shape: ModelShape,
    job: Job,
    cluster: ClusterSpec,
    *,
    stages: Sequence[Span] | None = None,
    recompute: Mapping[int | str, str] | str = "none",
    table: MeasuredTable | None = None,
    is_shortened: bool = False,
) -> Prediction:
    """Seconds of a step.

    Args:
        shape: The model.
        job: The step and its mesh.
        cluster: Where it runs.
        stages: Units of each stage; None: `default_stages`.
        recompute: By layer or by unit name, or one choice for all layers.
        table: What was measured.
        is_shortened: Simulate a long step's beginning and end, and count what lies between.

    Raises:
        PlanError: The cluster is too small, or the stages do not belong to the model.
    """
    if job.world_size > cluster.ranks:
        raise PlanError(
            f"The plan needs {job.world_size} devices, but {cluster.name} has {cluster.ranks}."
        )
    stages = tuple(stages or default_stages(shape, job.stages))
    if len(stages) != job.stages or stages[-1][1] != 2 * len(shape.layers) + 2:
        raise PlanError(
            f"{len(stages)} stages to unit {stages[-1][1]} are not {job.stages} stages of "
            f"{2 * len(shape.layers) + 2} units."
        )
    owners = [rank_of(stage, job) for stage in range(len(stages))]
    costs: dict[str, tuple[UnitCost, ...]] = {}
    seconds = []
    for span, owner in zip(stages, owners, strict=True):
        # A stage over devices of two kinds waits for the slower one.
        found = []
        for rank in cluster.kinds_of(owner * job.stage_ranks, job.stage_ranks):
            key = cluster.device(rank).name
            if key not in costs:
                costs[key] = unit_costs(shape, job, cluster, rank=rank, table=table)
            found.append(_stage_seconds(costs[key], span, recompute))
        seconds.append(max(found, key=_whole))
    send = send_seconds(shape, job, cluster, table=table)
    pipeline, ends, is_bound = pipeline_seconds(job, seconds, send, is_shortened=is_shortened)
    finish, gathered, optimizer = _finish(shape, job, cluster, stages, owners, seconds, ends, table)
    if owners[0] != owners[-1]:
        finish += tied_seconds(shape, job, cluster, table=table)
    total = finish + gathered + optimizer + STEP_SECONDS
    measured, by_formulas = _sources(shape, job, cluster, table)
    return Prediction(
        seconds=total,
        pipeline=pipeline,
        communication=finish - pipeline + gathered,
        optimizer=optimizer,
        stage_seconds=tuple(seconds),
        is_bound=is_bound,
        measured=measured,
        by_formulas=by_formulas,
    )


def _sources(
    shape: ModelShape, job: Job, cluster: ClusterSpec, table: MeasuredTable | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Parts of a prediction that were measured, and those that follow from formulas."""
    if table is None:
        return (), ()
    machine = Machine.of(cluster, job, table=table)
    is_measured: dict[str, list[bool]] = {}
    for name in unit_names(shape):
        kind, _ = unit_shape(name, shape)
        found = table.find(name, shape, job)
        is_measured.setdefault(kind, []).append(found is not None)
        has_update = found is not None and found.update is not None
        is_measured.setdefault("optimizer", []).append(has_update)
    if job.pp > 1:
        distance = job.stage_ranks
        near = 2 if 2 * distance <= machine.node_size else 1
        is_measured["sends to the next stage"] = [machine.link("send", Group(2, near)) is not None]
        if shape.tied:
            link = machine.link("sum", _ends(machine))
            is_measured["sum of the tied table's gradients"] = [link is not None]
    if job.dense_data_ranks > 1:
        for words, link_kind in _OF_GRADIENTS.items():
            is_measured[words] = [machine.link(link_kind, machine.data) is not None]
    return (
        tuple(name for name, found in is_measured.items() if all(found)),
        tuple(name for name, found in is_measured.items() if not all(found)),
    )


_OF_GRADIENTS: Mapping[str, LinkKind] = {
    "sums of gradients": "scatter_sum",
    "gathers of weights": "gather",
}


def _ends(machine: Machine) -> Group:
    """The first stage and the last, which both have a tied table."""
    return Group(2, 2 if machine.job.world_size <= machine.node_size else 1)


def tied_seconds(
    shape: ModelShape, job: Job, cluster: ClusterSpec, *, table: MeasuredTable | None = None
) -> float:
    """Seconds of summing a tied table's gradients over the first and the last stage."""
    if not shape.tied:
        return 0.0
    machine = Machine.of(cluster, job, table=table)
    return machine.sum(job.gradient_bytes * shape.vocab * shape.hidden / job.tp, _ends(machine))


def send_seconds(
    shape: ModelShape, job: Job, cluster: ClusterSpec, *, table: MeasuredTable | None = None
) -> float:
    """Seconds of a stage's result on its way to the next."""
    if job.pp == 1:
        return 0.0
    machine = Machine.of(cluster, job, table=table)
    elements = job.tokens * shape.hidden
    if job.framework == "moesaic" and not job.sequence_parallel:
        return machine.send(machine.width * elements, job.stage_ranks)
    seconds = machine.send(machine.width * elements / job.tp, job.stage_ranks)
    if not job.sequence_parallel:
        # Each tensor-parallel rank sends a part of what all have, and the receivers gather them.
        seconds += machine.gather(machine.width * elements, machine.tensor)
    return seconds


def rank_of(stage: int, job: Job) -> int:
    """The pipeline rank that runs a stage."""
    if job.schedule in V_SHAPED and job.pp > 1:
        return stage if stage < job.pp else 2 * job.pp - 1 - stage
    return stage % job.pp


def _stage_seconds(
    costs: Sequence[UnitCost], span: Span, recompute: Mapping[int | str, str] | str
) -> StageSeconds:
    sums = [0.0, 0.0, 0.0, 0.0]
    for unit in costs[span[0] : span[1]]:
        layer, _, part = unit.name.partition(".")
        choice = "none"
        if part:
            choice = (
                recompute
                if isinstance(recompute, str)
                else recompute.get(unit.name, recompute.get(int(layer), "none"))
            )
        again = unit.recompute[choice]
        for place, value in enumerate(
            (unit.forward, unit.input_gradient, unit.weight_gradient, again)
        ):
            sums[place] += value
    forward, inputs, weights, again = sums
    return StageSeconds(
        forward=forward, input_gradient=inputs, weight_gradient=weights, recompute=again
    )


def _whole(stage: StageSeconds) -> float:
    return stage.forward + stage.input_gradient + stage.weight_gradient + stage.recompute


class PipelineSeconds(NamedTuple):
    """How long all passes of a step take."""

    seconds: float
    ends: list[float]
    """When each pipeline rank is done."""
    is_bound: bool
    """Whether it is only the upper bound (m - 1) max + sum."""


def pipeline_seconds(
    job: Job, seconds: Sequence[StageSeconds], send: float, *, is_shortened: bool = False
) -> PipelineSeconds:
    """All passes of a step over stages of these seconds; `is_shortened` as in `predict`."""
    if job.pp == 1:
        one = sum(map(_whole, seconds)) * job.micro_batches
        return PipelineSeconds(one, [one], False)
    # With few micro-batches 1F1B fills and drains as gpipe does.
    schedule = job.schedule
    can = can_run(schedule, job.micro_batches, ranks=job.pp, stages=job.stages)
    if schedule == "1f1b" and not can:
        schedule, can = "gpipe", True
    if not can:
        rank = [0.0] * job.pp
        for stage, of in enumerate(seconds):
            rank[rank_of(stage, job)] += _whole(of)
        bound = (job.micro_batches - 1) * max(rank) + sum(rank) / job.interleave
        return PipelineSeconds(bound, [bound] * job.pp, True)

    def ends(micro_batches: int) -> list[float]:
        line = simulate(
            schedule, seconds, ranks=job.pp, micro_batches=micro_batches, send_seconds=send
        )
        return list(line.ends)

    if is_shortened and schedule != "gpipe" and job.micro_batches > 6 * job.stages:
        # Once the pipeline is full, each micro-batch more takes as long as the one before.
        fewer, more = ends(3 * job.stages), ends(4 * job.stages)
        rounds = (job.micro_batches - 4 * job.stages) / job.stages
        found = [late + rounds * (late - early) for early, late in zip(fewer, more, strict=True)]
    else:
        found = ends(job.micro_batches)
    return PipelineSeconds(max(found), found, False)


def _finish(
    shape: ModelShape,
    job: Job,
    cluster: ClusterSpec,
    stages: Sequence[Span],
    owners: Sequence[int],
    seconds: Sequence[StageSeconds],
    ends: Sequence[float],
    table: MeasuredTable | None,
) -> tuple[float, float, float]:
    """When the last gradient is summed, and seconds of gathering and of the optimizer then."""
    finish = gathered = optimizer = 0.0
    for pipeline_rank in range(job.pp):
        reduce = gather = update = forward = backward = 0.0
        buckets = 1
        for span, owner, of in zip(stages, owners, seconds, strict=True):
            if owner != pipeline_rank:
                continue
            rank = owner * job.stage_ranks
            cost = step_costs(shape, job, cluster, span, rank=rank, table=table)
            reduce += cost.reduce
            gather += cost.gather
            update += cost.optimizer
            buckets = max(buckets, cost.buckets)
            forward += of.forward
            backward += of.input_gradient + of.weight_gradient + of.recompute
        end = ends[pipeline_rank]
        micro_batches = job.micro_batches
        if job.zero == 3:
            # Gathered for every forward and again for every backward pass, beside the reduction.
            end += micro_batches * _shown(gather, forward, buckets, job)
            reduce += gather
            gather = 0.0
        if job.zero >= 2:
            # Reduced after every micro-batch, each behind its own backward pass.
            end += (micro_batches - 1) * _shown(reduce, backward, buckets, job)
        finish = max(finish, end + _shown(reduce, backward, buckets, job))
        gathered = max(gathered, _shown(gather, forward, buckets, job))
        optimizer = max(optimizer, update)
    return finish, gathered, optimizer


def _shown(seconds: float, beside: float, buckets: int, job: Job) -> float:
    """Communication that is not hidden behind a pass: all, or the rest and one bucket."""
    if not job.overlap_gradients:
        return seconds
    return max(seconds - beside, seconds / (buckets + 1))
