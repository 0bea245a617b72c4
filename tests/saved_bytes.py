"""What autograd keeps on real ranks: bytes of each stage and micro-batch, and how many at once.

A training step runs as it always does, with hooks around every forward pass of a stage. A storage
counts once for each micro-batch of a stage, parameters do not count, and what an MoE layer's
dispatch holds counts although autograd does not know of it.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.data.batches import Batch
from moesaic.moe.config import RoutingConfig
from moesaic.moe.dispatch import Dispatch, plan_dispatch
from moesaic.moe.experts import Experts
from moesaic.parallel.sharding import local_tensor
from moesaic.parallel.world import World
from moesaic.planning.activations import ROWS, Routed
from moesaic.planning.layout import fit
from moesaic.planning.plan import TrainPlan
from moesaic.spec import ModelSpec
from moesaic.training.sharded import ShardedModel, Stage
from moesaic.training.step import accumulate

Place = tuple[int, int]
"""A stage and a micro-batch."""


@dataclass
class Saved:
    """What was found on one rank."""

    kept: dict[Place, float] = field(default_factory=lambda: defaultdict(float))
    """Bytes kept of each micro-batch by each stage."""
    routed: dict[Place, dict[int, Routed]] = field(default_factory=lambda: defaultdict(dict))
    """Rows at the experts of each layer."""
    most: dict[int, int] = field(default_factory=dict)
    """Of each stage, the most micro-batches of which something was kept at once."""
    peak: float = 0.0
    """The most bytes kept at once, over all stages."""


class _Watch:
    """Counts what is kept while it is."""

    def __init__(self) -> None:
        self.saved = Saved()
        self.now: Place | None = None
        self.live: dict[Place, Counter[int]] = defaultdict(Counter)
        self.bytes_now = 0.0
        self.bytes_of: Counter[Place] = Counter()

    def add(self, holder: object, key: int, size: int) -> None:
        """Count `size` bytes under `key` until `holder` is gone."""
        assert self.now is not None
        of_place = self.live[self.now]
        weakref.finalize(holder, self._remove, self.now, key, size)
        of_place[key] += 1
        if of_place[key] > 1:
            return
        self.saved.kept[self.now] += size
        self.bytes_now += size
        self.bytes_of[self.now] += size
        self.saved.peak = max(self.saved.peak, self.bytes_now)

    def count(self, stage: int) -> None:
        """Note how many micro-batches a stage keeps; their graphs may outlive what is saved."""
        found = sum(
            size > self.saved.kept[place] / 2
            for place, size in self.bytes_of.items()
            if place[0] == stage
        )
        self.saved.most[stage] = max(self.saved.most.get(stage, 0), found)

    def _remove(self, place: Place, key: int, size: int) -> None:
        of_place = self.live[place]
        of_place[key] -= 1
        if of_place[key] == 0:
            self.bytes_now -= size
            self.bytes_of[place] -= size


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(
    plan: TrainPlan,
    spec: ModelSpec,
    *,
    sequence: int,
    micro_batch: int,
    micro_batches: int,
    dtype: torch.dtype = torch.bfloat16,
    documents: bool = False,
    routing: RoutingConfig | None = None,
) -> Saved:
    """Run a step of this rank's part of a plan, and count; called on every rank of a world."""
    model = _model(plan, spec, dtype)
    batches = _batches(spec, sequence, micro_batch, micro_batches, documents)
    watch = _Watch()
    with _hooks(watch, model):
        _step(model, batches, routing or RoutingConfig())
    return watch.saved


def allocated_bytes(
    plan: TrainPlan,
    spec: ModelSpec,
    *,
    sequence: int,
    micro_batch: int,
    micro_batches: int,
    dtype: torch.dtype,
) -> float:
    """The most bytes of torch's allocator at once, from making this rank's model to a step's end.

    There is no optimizer. Called on every rank of a world.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        model = _model(plan, spec, dtype)
        batches = _batches(spec, sequence, micro_batch, micro_batches, False)
        _step(model, batches, RoutingConfig())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    moments = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    _, total, first = moments[0]
    return float(max(total for _, total, _ in moments) - (total - first))


def _model(plan: TrainPlan, spec: ModelSpec, dtype: torch.dtype) -> ShardedModel:
    world = World.join(fit(plan, spec), torch.device("cpu"))
    model = ShardedModel.build(world, compute_dtype=dtype, recompute=plan.recompute)
    generator = torch.Generator().manual_seed(world.rank)
    for stage in model.stages:
        for parameter in stage.parameters():
            with torch.no_grad():
                if parameter.ndim > 1:
                    local_tensor(parameter).normal_(std=0.02, generator=generator)
                else:
                    local_tensor(parameter).fill_(1)
    return model


def _step(model: ShardedModel, batches: list[Batch], routing: RoutingConfig) -> None:
    accumulate(
        model,
        batches,
        routing=routing,
        coefficients_L=torch.full((len(model.spec.moe_layers),), 0.01),
    )


def _batches(
    spec: ModelSpec, sequence: int, micro_batch: int, count: int, documents: bool
) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        shape = (micro_batch, sequence)
        tokens = torch.randint(spec.vocab_size, shape, generator=generator)
        rows = torch.zeros(shape, dtype=torch.int64)
        if documents:
            rows[:, sequence // 2 :] = 1
        batches.append(Batch(tokens, tokens.roll(-1, dims=1), rows))
    return batches


@contextmanager
def _hooks(watch: _Watch, model: ShardedModel) -> Iterator[None]:
    own = {
        storage.data_ptr()
        for stage in model.stages
        for tensor in [*stage.parameters(), *stage.buffers()]
        for storage in [local_tensor(tensor).untyped_storage()]
    }
    numbers = {id(moe.experts): number for number, moe in model.moe_layers().items()}
    stages = {id(stage): n for stage, n in zip(model.stages, model.world.stages, strict=True)}
    calls: Counter[int] = Counter()
    arrived: list[int] = []
    modules: list[Any] = [
        importlib.import_module(f"moesaic.moe.{name}") for name in ("layer", "exchange")
    ]
    originals = Stage.forward, Experts.forward, plan_dispatch

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        base = tensor._base if tensor._base is not None else tensor
        if isinstance(base, nn.Parameter) or storage.data_ptr() in own or not storage.nbytes():
            return tensor
        holder = _Holder(tensor)
        watch.add(holder, storage.data_ptr(), storage.nbytes())
        return holder

    def unpack(packed: Any) -> Tensor:
        found: Tensor = packed.tensor if isinstance(packed, _Holder) else packed
        return found

    def forward(self: Stage, x: Tensor, **others: Any) -> Tensor:
        number = stages[id(self)]
        watch.now = number, calls[number]
        calls[number] += 1
        # Ids are a piece of the step's tensor, which is there anyway.
        x = x.clone() if not x.dtype.is_floating_point else x
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y = originals[0](self, x, **others)
        watch.count(number)
        watch.now = None
        return y

    def experts(self: Experts, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        if watch.now is not None:
            padded = sum(-(-count // ROWS) * ROWS for count in counts_E.tolist())
            found = Routed(arrived[-1], x_ND.shape[0], padded)
            watch.saved.routed[watch.now][numbers[id(self)]] = found
        return originals[1](self, x_ND, counts_E)

    def planned(experts_TK: Tensor, **others: Any) -> Dispatch:
        plan = originals[2](experts_TK, **others)
        if watch.now is not None:
            arrived.append(experts_TK.shape[0])
            tensors = [plan.tokens_N, plan.copies_N, plan.rows_TK, plan.keep_TK, plan.counts_E]
            size = sum(t.numel() * t.element_size() for t in tensors if t is not None)
            watch.add(plan, id(plan), size)
        return plan

    Stage.forward = forward  # type: ignore[method-assign,assignment]
    Experts.forward = experts  # type: ignore[method-assign,assignment]
    for module in modules:
        module.plan_dispatch = planned
    try:
        yield
    finally:
        Stage.forward, Experts.forward = originals[:2]  # type: ignore[method-assign]
        for module in modules:
            module.plan_dispatch = originals[2]
