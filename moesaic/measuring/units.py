"""Each kind of unit of a model, with weights and inputs of training's sizes, ready to be timed.

Weights are random, and so are activations: what is computed does not depend on them, but for the
rows that each expert gets, of which random routers give all experts nearly as many.

    case          what it times
    none          forward; backward in one pass, which adds to the gradients of a micro-batch before
    first         the same where there is no gradient to add to
    split         backward in two passes, as zero-bubble schedules run it
    others        forward and backward where this is recomputed
    update        the gradient's norm and the optimizer

Shapes.  B sequences of a micro-batch    S positions, s of them this rank's    D model width
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.measuring.rounds import Action, Case, Samples, summary
from moesaic.model.attention import attention_mask
from moesaic.model.build import allocate
from moesaic.model.rope import rope_tables
from moesaic.model.transformer import Transformer
from moesaic.moe.config import RoutingConfig
from moesaic.moe.layer import RoutingStep
from moesaic.parallel.gradients import gradient_norm, update
from moesaic.parallel.world import World
from moesaic.planning.layout import num_units
from moesaic.planning.measured import MeasuredUnit, UnitKind, unit_shape
from moesaic.planning.plan import Recompute
from moesaic.planning.shape import shape_of, unit_names
from moesaic.planning.split import Split
from moesaic.spec import ModelSpec

RECOMPUTED: Mapping[UnitKind, tuple[Recompute, ...]] = {
    "attention": ("attention", "full"),
    "dense": ("moe_activations", "full"),
    "experts": ("moe_activations", "full"),
}
"""Choices that mean something for one half of a layer."""


class Rows(NamedTuple):
    """What the units are given, (B, S) each."""

    tokens_BS: Tensor
    targets_BS: Tensor
    documents_BS: Tensor | None
    """None: every row is of one document."""
    share: float = 1.0
    """Of a training's micro-batches that are of this sort."""


class UnitAt(NamedTuple):
    """One unit that stands for all that compute the same."""

    name: str
    kind: UnitKind
    shape: Mapping[str, Any]
    layers: tuple[int, ...]
    """Layers that it stands for; none where these are all of its kind."""


def distinct_units(spec: ModelSpec) -> list[UnitAt]:
    """One unit of each kind, and of each size where a kind has several."""
    shape = shape_of(spec)
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in unit_names(shape):
        kind, sizes = unit_shape(name, shape)
        alike.setdefault((kind, *sizes.items()), []).append(name)
    kinds = [key[0] for key in alike]
    return [
        UnitAt(
            name=names[0],
            kind=kind,
            shape=dict(sizes),
            layers=tuple(int(name.partition(".")[0]) for name in names)
            if kinds.count(kind) > 1
            else (),
        )
        for (kind, *sizes), names in alike.items()
    ]


class Workload:
    """A unit as this rank has it.

    Args:
        unit: Which.
        world: This rank's.
        rows: Of one sort.
        dtype: Of activations.
        routing: As training has it.
        model: The module of an earlier workload of the same unit; None: a new one.
    """

    def __init__(
        self,
        unit: UnitAt,
        world: World,
        rows: Rows,
        *,
        dtype: torch.dtype,
        routing: RoutingConfig,
        model: Transformer | None = None,
    ) -> None:
        spec, device = world.layout.spec, world.device
        self.unit, self.rows = unit, rows
        self.model = model or _module(unit, world, dtype)
        batch, length = rows.tokens_BS.shape
        self.parts = Split.balanced(length, world.groups.tp.size)
        positions_S = torch.arange(length, device=device)
        self.rope = rope_tables(spec.rope, spec.head_dim, positions_S)
        self.mask = None
        if unit.kind == "attention":
            layer = int(unit.name.partition(".")[0])
            self.mask = attention_mask(
                positions_S,
                length,
                window=spec.window_of(layer),
                documents_BS=rows.documents_BS,
            )
        self.routing = RoutingStep(
            config=routing, coefficient=torch.tensor(routing.coefficient_max, device=device)
        )
        shape = (batch, self.parts.sizes[world.groups.tp.rank], spec.hidden_dim)
        generator = torch.Generator(device=device).manual_seed(1)
        self.x_BsD, self.gradient_BsD = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)
        )
        if unit.kind == "embedding":
            self.gradient_BsD *= 1e-3

    def forward(self, recompute: Recompute) -> tuple[Tensor | None, Tensor]:
        """The input, a leaf that wants a gradient, and what comes out."""
        model = self.model
        if self.unit.kind == "embedding":
            assert model.model.embed_tokens is not None
            dtype = model.compute_dtype
            return None, model.model.embed_tokens(self.rows.tokens_BS, self.parts, dtype=dtype)
        x_BsD = self.x_BsD.detach().requires_grad_()
        if self.unit.kind == "head":
            assert model.model.norm is not None
            targets_BS = self.rows.targets_BS
            loss = model.loss(model.model.norm(x_BsD), targets_BS)
            return x_BsD, loss / targets_BS.numel()
        (block,) = model.model.layers.values()
        y_BsD, _ = block(
            x_BsD,
            self.rope,
            self.mask,
            parts=self.parts,
            routing=self.routing,
            recompute=recompute,
        )
        return x_BsD, y_BsD

    def gradient(self) -> Tensor | None:
        """Of what comes out; a loss needs none."""
        return None if self.unit.kind == "head" else self.gradient_BsD


def _module(unit: UnitAt, world: World, dtype: torch.dtype) -> Transformer:
    spec = world.layout.spec
    number = unit_names(shape_of(spec)).index(unit.name)
    assert 0 <= number < num_units(spec), f"{number=}"
    with torch.device("meta"):
        model = Transformer(
            spec, world.layout.shard(world.rank), world.groups, (number, number + 1)
        )
    model.compute_dtype = dtype
    allocate(model, dtype=torch.float32, device=world.device)
    generator = torch.Generator(device=world.device).manual_seed(number)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
        for buffer in model.buffers():
            buffer.zero_()
    return model


@dataclass
class Pass:
    """Forward and backward of a unit, in one of the ways that training has."""

    workload: Workload
    way: str
    name: str
    _x: Tensor | None = None
    _y: Tensor | None = None
    _rest: Any = None

    def prepare(self) -> None:
        """Gradients of a micro-batch before, or none."""
        self._rest = None
        for parameter in self.workload.model.parameters():
            if self.way == "first":
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def forward(self) -> Sequence[Action]:
        """The forward pass."""
        return (Action("forward", self._forward),)

    def backward(self) -> Sequence[Action]:
        """The backward pass, in one or in two."""
        if self.way == "split":
            return (
                Action("input_gradient", self._input_gradient),
                Action("weight_gradient", self._weight_gradient),
            )
        return (Action("backward", self._backward),)

    def _forward(self) -> None:
        is_choice = self.way in ("moe_activations", "attention", "full")
        choice: Any = self.way if is_choice else "none"
        self._x, self._y = self.workload.forward(choice)

    def _backward(self) -> None:
        assert self._y is not None, f"{self.name=}"
        self._y.backward(self.workload.gradient())
        self._x = self._y = None

    def _input_gradient(self) -> None:
        from moesaic.parallel.schedule import input_gradient

        assert self._x is not None, f"{self.name=}"
        assert self._y is not None, f"{self.name=}"
        # What is freed in training goes with a copy there: a view cannot.
        y = self._y.clone() if self._y._is_view() else self._y
        model = self.workload.model
        self._rest = input_gradient(y, self.workload.gradient(), self._x, model)

    def _weight_gradient(self) -> None:
        from moesaic.parallel.schedule import weight_gradient

        weight_gradient(self.workload.model, self._rest)
        self._x = self._y = self._rest = None


@dataclass
class Update:
    """The optimizer over a unit's weights."""

    model: nn.Module
    name: str
    _optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        # So small that weights stay what they are.
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-12, fused=True)

    def prepare(self) -> None:
        """A gradient for each weight."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def forward(self) -> Sequence[Action]:
        """Nothing."""
        return ()

    def backward(self) -> Sequence[Action]:
        """The update."""
        return (Action("update", self._update),)

    def _update(self) -> None:
        norm = gradient_norm(dict(self.model.named_parameters()))
        update(self._optimizer, norm=norm, clip=1.0)


@dataclass
class Timed:
    """A unit, and the cases that time it."""

    unit: UnitAt
    hidden: int
    conditions: Mapping[str, Any]
    """As `MeasuredUnit` has them."""
    shares: Mapping[str, float]
    """By the beginning of the cases' names, how many micro-batches are of that sort."""
    cases: list[Case]

    @classmethod
    def of(
        cls,
        unit: UnitAt,
        world: World,
        sorts: Sequence[Rows],
        *,
        dtype: torch.dtype,
        routing: RoutingConfig,
    ) -> Timed:
        """All cases of a unit. Only attention looks at which rows belong together."""
        wanted = sorts if unit.kind == "attention" else [sorts[0]._replace(share=1.0)]
        shares: dict[str, float] = {}
        cases: list[Case] = []
        model: Transformer | None = None
        for number, rows in enumerate(wanted):
            workload = Workload(unit, world, rows, dtype=dtype, routing=routing, model=model)
            model = workload.model
            label = f"{unit.name} {number}"
            shares[label] = rows.share
            cases += [Pass(workload, way, f"{label} {way}") for way in ways(unit.kind)]
        assert model is not None, f"{sorts=}"
        cases.append(Update(model, f"{unit.name} update"))
        plan = world.layout.plan
        batch, length = sorts[0].tokens_BS.shape
        conditions = {
            "sequence": length,
            "micro_batch": batch,
            "tp": plan.tp,
            "cp": 1,
            "dtype": {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype],
        }
        if unit.kind == "experts":
            conditions["expert_ranks"] = plan.expert_ranks
            conditions["expert_tensor_ranks"] = plan.expert_tensor_ranks
        return cls(unit, world.layout.spec.hidden_dim, conditions, shares, cases)

    def measured(self, samples: Samples) -> MeasuredUnit:
        """Medians and spreads of what was found."""
        found: dict[str, float] = {}
        spread: dict[str, float] = {}
        for label, share in self.shares.items():
            for name, values in _quantities(samples, label, self.unit.kind):
                middle, width = summary(values)
                found[name] = found.get(name, 0.0) + share * middle
                spread[name] = spread.get(name, 0.0) + share * width
        update_seconds, spread["update"] = summary(samples[f"{self.unit.name} update", "update"])
        again: dict[str, float] = {
            choice: max(0.0, found.pop(choice)) for choice in RECOMPUTED.get(self.unit.kind, ())
        }
        found["summing"] = min(max(0.0, found["summing"]), found["backward"])
        return MeasuredUnit(
            kind=self.unit.kind,
            conditions=self.conditions,
            hidden=self.hidden,
            shape=self.unit.shape,
            layers=self.unit.layers,
            recompute=again,
            update=update_seconds,
            spread=spread,
            **found,
        )


def ways(kind: UnitKind) -> tuple[str, ...]:
    """In which a unit is timed. A table of tokens has no input that wants a gradient."""
    split = () if kind == "embedding" else ("split",)
    return ("none", "first", *split, *RECOMPUTED.get(kind, ()))


def _quantities(samples: Samples, label: str, kind: UnitKind) -> Iterator[tuple[str, list[float]]]:
    """What a table says of a unit, round by round; differences are taken within a round."""

    def of(way: str, action: str) -> list[float]:
        return samples[f"{label} {way}", action]

    forward, backward = of("none", "forward"), of("none", "backward")
    # All forward passes that keep everything are the same.
    same = [way for way in ways(kind) if way in ("none", "first", "split")]
    rounds = zip(*(of(way, "forward") for way in same), strict=True)
    yield "forward", [statistics.fmean(row) for row in rounds]
    yield "backward", backward
    if kind == "embedding":
        yield "input_gradient", [0.0] * len(backward)
        yield "weight_gradient", backward
    else:
        yield "input_gradient", of("split", "input_gradient")
        yield "weight_gradient", of("split", "weight_gradient")
    yield "summing", [a - b for a, b in zip(backward, of("first", "backward"), strict=True)]
    for choice in RECOMPUTED.get(kind, ()):
        both = zip(of(choice, "forward"), of(choice, "backward"), forward, backward, strict=True)
        yield choice, [f + b - f0 - b0 for f, b, f0, b0 in both]
