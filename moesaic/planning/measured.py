"""What `moesaic measure` found: seconds of units and of exchanges, in the place of formulas.

The file is JSON; docs/measure.md specifies it. A unit's seconds hold for the sizes and conditions
that stand beside them and for no others: `find` looks for exactly these, and `check` says in one
line what differs where a table is for something else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from moesaic.errors import PlanError
from moesaic.files import write_text_atomic
from moesaic.planning.job import Job
from moesaic.planning.plan import SPLIT
from moesaic.planning.shape import ModelShape, MoEShape, unit_names

MEASURED_FORMAT = "moesaic-measured"
MEASURED_VERSION = 1

UnitKind = Literal["embedding", "attention", "dense", "experts", "head"]

LinkKind = Literal["gather", "scatter_sum", "all_to_all", "sum", "send"]
"""Exchanges of training: all parts to every rank; a sum of which each keeps a part; a part for
each; a sum that each keeps whole; to the next stage."""

_CONDITIONS = (
    "sequence",
    "micro_batch",
    "tp",
    "cp",
    "expert_ranks",
    "expert_tensor_ranks",
    "dtype",
)
"""What a unit was measured under; a job with other values is not served by it."""


@dataclass(frozen=True, kw_only=True)
class MeasuredUnit:
    """Seconds of one kind of unit on one rank, for one micro-batch."""

    kind: UnitKind
    conditions: Mapping[str, Any]
    """By name, a field of `Job` and its value; what is left out does not matter."""
    hidden: int
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Sizes of the unit, as `unit_shape` says them; none: any."""
    layers: tuple[int, ...] = ()
    """Layers of this kind that are meant; none: all."""

    forward: float
    input_gradient: float
    """Where gradients of inputs and of weights are found in two passes: the first."""
    weight_gradient: float
    """The second, which adds to the gradients of an earlier micro-batch."""
    backward: float | None = None
    """Both in one pass, adding too; None: their sum."""
    summing: float = 0.0
    """Of that, what adding takes: the first micro-batch of a step has nothing to add to."""
    recompute: Mapping[str, float] = field(default_factory=dict)
    """By choice, what forward and backward together take longer."""
    update: float | None = None
    """Of the unit's whole parameters on this rank: the gradient's norm and the optimizer."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """By name of the above, between the quartiles of what was measured."""

    def in_step(self, job: Job) -> tuple[float, float, float]:
        """Forward, input and weight gradient of the mean micro-batch of a job's step."""
        inputs, weights = self.input_gradient, self.weight_gradient
        saved = self.summing / job.micro_batches
        if not (job.pp > 1 and job.schedule in SPLIT) and self.backward is not None:
            # In one pass, which takes less than two: only the sum of both matters.
            whole = max(0.0, self.backward - saved)
            inputs = whole * inputs / (inputs + weights) if inputs else 0.0
            return self.forward, inputs, whole - inputs
        return self.forward, inputs, max(0.0, weights - saved)


@dataclass(frozen=True, kw_only=True)
class MeasuredLink:
    """How long a kind of exchange takes over so many ranks: latency + bytes / bandwidth."""

    kind: LinkKind
    ranks: int
    near: int
    """Of these, on one machine."""
    latency: float
    """Seconds of an exchange of nothing."""
    bandwidth: float
    """Bytes a second that each rank gets from others, or gives them."""
    points: tuple[tuple[float, float, float], ...] = ()
    """Bytes each rank got, seconds, and seconds between the quartiles."""
    residual: float = 0.0
    """Median over the points of how far the line is from them, relative."""
    largest_residual: float = 0.0

    def seconds(self, moved: float, *, times: int = 1) -> float:
        """Of `times` exchanges of so many bytes together."""
        return moved / self.bandwidth + times * self.latency


@dataclass(frozen=True, kw_only=True)
class MeasuredTable:
    """Everything that one run of `moesaic measure` found."""

    device: str
    units: tuple[MeasuredUnit, ...]
    links: tuple[MeasuredLink, ...] = ()
    ranks: int | None = None
    """Ranks that measured at the same time; where they share a processor, a job of more or fewer
    is not served. None: it does not matter."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """When, with what, and how busy the machine was; `device_type` is `cpu` or `cuda`."""
    path: str = field(default="The measured table", compare=False)
    """What to call it."""

    @classmethod
    def load(cls, path: Path | str) -> MeasuredTable:
        """Read a table.

        Raises:
            PlanError: The file cannot be read, or is no such table.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"{path} is not readable JSON: {error}.") from None
        if not isinstance(raw, dict) or raw.get("format") != MEASURED_FORMAT:
            raise PlanError(f'{path} does not say "format": "{MEASURED_FORMAT}".')
        if raw.get("version") != MEASURED_VERSION:
            raise PlanError(
                f"{path} has version {raw.get('version')!r}; this reads {MEASURED_VERSION}."
            )
        try:
            return cls(
                device=str(raw.get("device", "")),
                units=tuple(map(read_unit, raw["units"])),
                links=tuple(map(_link, raw.get("links", ()))),
                ranks=None if raw.get("ranks") is None else int(raw["ranks"]),
                about=dict(raw.get("about", {})),
                path=str(path),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{path}: a measurement lacks or garbles {error}.") from None

    def save(self, path: Path | str) -> None:
        """Write the file, whole or not at all. Raises FolderError."""
        write_text_atomic(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "format": MEASURED_FORMAT,
            "version": MEASURED_VERSION,
            "device": self.device,
            "ranks": self.ranks,
            "about": dict(self.about),
            "units": [unit_json(unit) for unit in self.units],
            "links": [dataclasses.asdict(link) for link in self.links],
        }

    def find(self, name: str, shape: ModelShape, job: Job) -> MeasuredUnit | None:
        """The unit as measured under the job's conditions; None: it was not."""
        kind, sizes = unit_shape(name, shape)
        layer = name.partition(".")[0]
        for unit in self.units:
            if (
                unit.kind == kind
                and unit.hidden == shape.hidden
                and not (unit.shape and _differences(unit.shape, sizes))
                and (not unit.layers or int(layer) in unit.layers)
                and all(getattr(job, key) == value for key, value in unit.conditions.items())
            ):
                return unit
        return None

    def link(self, kind: LinkKind, ranks: int, near: int) -> MeasuredLink | None:
        """How long exchanges of a kind take over such ranks; None: it was not measured."""
        of_all = ((link.kind, link.ranks, link.near) for link in self.links)
        found = dict(zip(of_all, self.links, strict=True))
        return found.get((kind, ranks, near))

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Sequences of a micro-batch under which units were measured."""
        found = {unit.conditions.get("micro_batch") for unit in self.units}
        return tuple(sorted(size for size in found if size is not None))

    def check(
        self,
        shape: ModelShape,
        *,
        sequence: int,
        dtype: str,
        micro_batch: int | None = None,
        ranks: int | None = None,
        on_cpu: bool | None = None,
    ) -> None:
        """Refuse a table that is for something else.

        Args:
            shape: The model.
            sequence: Positions in a sequence.
            dtype: What matrix products run in.
            micro_batch: Sequences at once; None: any that were measured.
            ranks: Of the job; None: not known.
            on_cpu: Whether it runs on processors, not GPUs; None: not known.

        Raises:
            PlanError: The model, or one of these, is another than was measured.
        """
        advice = "Measure that with `moesaic measure`, or leave the table out."
        if difference := self._other_model(shape):
            raise PlanError(f"{self.path} was measured for another model: {difference}. {advice}")
        wanted = {"sequence": sequence, "dtype": dtype, "micro_batch": micro_batch}
        for name, value in wanted.items():
            stated = {unit.conditions[name] for unit in self.units if name in unit.conditions}
            if value is not None and stated and value not in stated:
                known = " and ".join(str(size) for size in sorted(stated))
                words = name.replace("_", "-")
                raise PlanError(
                    f"{self.path} was measured with {words} {known}, but {words} {value} is asked "
                    f"for. {advice}"
                )
        was_on_cpu = {"cpu": True, "cuda": False}.get(str(self.about.get("device_type")))
        if None not in (on_cpu, was_on_cpu) and on_cpu != was_on_cpu:
            raise PlanError(
                f"{self.path} was measured on {self.device}, but "
                f"{'a processor' if on_cpu else 'a GPU'} is asked for. {advice}"
            )
        if ranks is not None and self.ranks is not None and ranks != self.ranks:
            raise PlanError(
                f"{self.path} was measured by {self.ranks} rank{'s' * (self.ranks > 1)} at once on "
                f"{self.device}, but {ranks} are asked for, which share the processor otherwise. "
                f"Measure with --ranks {ranks}, or leave the table out."
            )

    def _other_model(self, shape: ModelShape) -> str:
        """How the model differs from the one that was measured; empty: it does not."""
        for unit in self.units:
            if unit.hidden != shape.hidden:
                return f"hidden {unit.hidden}, not {shape.hidden}"
        parts = [unit_shape(name, shape) for name in unit_names(shape)]
        if not {unit.kind for unit in self.units} & {kind for kind, _ in parts}:
            return f"it has no {' and no '.join(sorted({unit.kind for unit in self.units}))}"
        for kind, sizes in parts:
            found = [_differences(unit.shape, sizes) for unit in self.units if unit.kind == kind]
            if found and all(found):
                return f"{kind} with {found[0]}"
        return ""


def unit_shape(name: str, shape: ModelShape) -> tuple[UnitKind, dict[str, Any]]:
    """Kind of a unit, and the sizes on which its seconds depend."""
    if name in ("embedding", "head"):
        kind: UnitKind = "embedding" if name == "embedding" else "head"
        return kind, {"vocab": shape.vocab}
    number, _, part = name.partition(".")
    layer = shape.layers[int(number)]
    if part == "attention":
        return "attention", dataclasses.asdict(layer.attention)
    network = layer.feed_forward
    return "experts" if isinstance(network, MoEShape) else "dense", dataclasses.asdict(network)


def _differences(measured: Mapping[str, Any], sizes: Mapping[str, Any]) -> str:
    """What sizes differ, in words; empty: none."""
    return ", ".join(
        f"{name} {measured[name]}, not {value}"
        for name, value in sizes.items()
        if name in measured and measured[name] != value
    )


_SECONDS = ("forward", "input_gradient", "weight_gradient")
_MORE_SECONDS = ("backward", "summing", "update")


def unit_json(unit: MeasuredUnit) -> dict[str, Any]:
    """What the file holds of a unit."""
    raw = {**dataclasses.asdict(unit), **unit.conditions}
    del raw["conditions"]
    return raw


def read_unit(raw: Mapping[str, Any]) -> MeasuredUnit:
    """A unit from what the file holds. Raises KeyError, TypeError or ValueError."""
    seconds = {key: float(raw[key]) for key in _SECONDS}
    more = {key: float(raw[key]) for key in _MORE_SECONDS if raw.get(key) is not None}
    again = {str(key): float(value) for key, value in raw.get("recompute", {}).items()}
    for value in (*seconds.values(), *more.values(), *again.values()):
        if not 0 <= value < math.inf:
            raise ValueError("seconds, which must be 0 or more")
    if raw["kind"] not in get_args(UnitKind):
        raise ValueError(f"kind, which is {raw['kind']!r} and not of {get_args(UnitKind)}")
    conditions = {key: raw[key] for key in _CONDITIONS if raw.get(key) is not None}
    for key, value in conditions.items():
        if type(value) is not (str if key == "dtype" else int):
            raise ValueError(f"{key}, which is {value!r}")
    return MeasuredUnit(
        kind=raw["kind"],
        conditions=conditions,
        hidden=int(raw["hidden"]),
        shape=dict(raw.get("shape", {})),
        layers=tuple(raw.get("layers", ())),
        recompute=again,
        spread={str(key): float(value) for key, value in raw.get("spread", {}).items()},
        **seconds,
        **more,
    )


def _link(raw: Mapping[str, Any]) -> MeasuredLink:
    latency, bandwidth = float(raw["latency"]), float(raw["bandwidth"])
    if not (0 <= latency < math.inf and 0 < bandwidth < math.inf):
        raise ValueError("latency or bandwidth, of which the one must be 0 or more, the other more")
    if raw["kind"] not in get_args(LinkKind):
        raise ValueError(f"kind, which is {raw['kind']!r} and not of {get_args(LinkKind)}")
    return MeasuredLink(
        kind=raw["kind"],
        ranks=int(raw["ranks"]),
        near=int(raw["near"]),
        latency=latency,
        bandwidth=bandwidth,
        points=tuple((float(a), float(b), float(c)) for a, b, c in raw.get("points", ())),
        residual=float(raw.get("residual", 0.0)),
        largest_residual=float(raw.get("largest_residual", 0.0)),
    )
