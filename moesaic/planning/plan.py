"""The training plan: a decision about layout, kept as JSON that a person can write.

A model is a row of units, cut into stages anywhere between two of them:

    embedding   0.attention  0.feed_forward   1.attention  1.feed_forward   ...   head

The head is final norm, output projection and loss. Ranks form a mesh (pp, dp, tp), tp fastest:
rank = (pp * DP + dp) * TP + tp. Experts see the ranks of one stage as (expert-dp, ep, etp), etp
fastest, over the same numbers. docs/plan.md specifies the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from moesaic.errors import PlanError
from moesaic.files import write_text_atomic
from moesaic.planning.plan_file import read_plan_file
from moesaic.planning.split import Split

FORMAT = "moesaic-train-plan"
VERSION = 1

ExpertsOver = Literal["edp", "ep", "etp"]
"""Experts split over the tensor-parallel ranks; over data and tensor ranks; over data ranks with
each expert's columns over the tensor ranks."""

Dispatch = Literal["auto", "all_to_all", "all_gather"]

Schedule = Literal["gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev"]

Recompute = Literal["none", "moe_activations", "attention", "full"]
"""What of a layer is computed again in the backward pass instead of kept. `moe_activations`: the
inside of the experts, or of the dense feed-forward network."""

V_SHAPED = ("zbv", "dualpipev")
"""Schedules with two stages a rank, the first and the last on the same one."""

SPLIT = ("zb1p", "zbv", "dualpipev")
"""Schedules that find gradients of inputs and of weights in two passes."""

MAX_RANKS = 2**20
"""More are taken for a damaged file, before anything is counted rank by rank."""


class Stage(NamedTuple):
    """A run of units, by name, both ends included."""

    first: str
    last: str


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Which span of each dimension each rank holds; None: as equal as can be."""

    kv_heads: Split | None = None
    """Key-value heads over tensor ranks; their query heads go with them."""

    ffn: Split | None = None
    """Columns of dense feed-forward networks, over tensor ranks."""

    shared_ffn: Split | None = None
    """Columns of shared experts, over tensor ranks."""

    vocab: Split | None = None
    """Rows of embedding and head, over tensor ranks."""

    experts: Split | None = None
    """Experts, over the ranks of an expert-parallel group."""

    expert_columns: Split | None = None
    """Columns of every expert, over its expert-tensor-parallel group."""


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """Which rank holds and does what in training."""

    pp: int = 1
    """Pipeline ranks."""

    dp: int = 1
    """Data-parallel ranks: each takes its share of a step's micro-batches."""

    tp: int = 1
    """Tensor-parallel ranks: each takes its share of heads, columns and vocabulary."""

    experts_over: ExpertsOver = "edp"
    """Which ranks the experts are split over."""

    ep: int | None = None
    """Ranks that share one set of experts. None: as many as there are, which are tp for edp,
    dp * tp for ep, and dp for etp."""

    dispatch: Dispatch = "auto"
    """How tokens reach experts. auto: all-to-all where top-k is below the group's size."""

    deduplicate: bool = True
    """Send a token once to a rank that holds several of its experts (all-to-all only)."""

    splits: Splits = field(default_factory=Splits)
    """Who holds which span of each dimension."""

    zero: Literal[1, 2, 3] = 1
    """What data-parallel ranks share: 1 the optimizer state, and gradients are reduced once a step;
    2 also gradients, reduced after every micro-batch; 3 also weights, gathered layer by layer."""

    shard: int | None = None
    """Data-parallel ranks over which that is shared, the rest being copies; None: all of them."""

    schedule: Schedule = "1f1b"
    """The order of forward and backward passes on each pipeline rank."""

    stages: tuple[Stage, ...] | None = None
    """The stages in order, from embedding to head; None: layers as equal as can be."""

    recompute: Mapping[int | str, Recompute] = field(default_factory=dict)
    """By layer, or by unit for the half of a layer that stages cut in two, which comes before what
    is said of the layer. What is not named keeps everything."""

    micro_batch: int | None = None
    """Sequences that go through a stage at once; None: as the recipe says."""

    about: Mapping[str, Any] = field(default_factory=dict)
    """What whoever made the plan says about it; training does not read it."""

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "tp", "ep", "shard", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"The plan's {name} is {value}. It must be at least 1.")
        if self.world_size > MAX_RANKS:
            raise PlanError(
                f"The plan has pp {self.pp}, dp {self.dp} and tp {self.tp}. Together these must "
                f"not be more than {MAX_RANKS} ranks."
            )
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                options = ", ".join(map(repr, get_args(kind)))
                raise PlanError(
                    f"The plan's {name} is {getattr(self, name)!r}. It must be one of {options}."
                )
        ranks = {"edp": self.tp, "ep": self.dp * self.tp, "etp": self.dp}[self.experts_over]
        if self.ep is not None and (
            ranks % self.ep or (self.experts_over == "edp" and self.ep != ranks)
        ):
            rule = f"{ranks}" if self.experts_over == "edp" else f"a divisor of {ranks}"
            raise PlanError(
                f"The plan's ep is {self.ep} with experts over {self.experts_over}, dp {self.dp} "
                f"and tp {self.tp}. It must be {rule}."
            )
        if self.shard is not None and self.dp % self.shard:
            raise PlanError(
                f"The plan shards over {self.shard} of {self.dp} data-parallel ranks. "
                f"It must be a divisor."
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp * self.tp

    @property
    def expert_ranks(self) -> int:
        """Ranks that share one set of experts, each holding some of them whole or in part."""
        default = {"edp": self.tp, "ep": self.dp * self.tp, "etp": self.dp}[self.experts_over]
        return default if self.ep is None else self.ep

    @property
    def expert_tensor_ranks(self) -> int:
        """Ranks over which the columns of one expert are split."""
        return self.tp if self.experts_over == "etp" else 1

    @property
    def expert_data_ranks(self) -> int:
        """Ranks of a stage that hold the same part of the same experts."""
        return self.dp * self.tp // (self.expert_ranks * self.expert_tensor_ranks)

    @property
    def dense_shards(self) -> int:
        """Data-parallel ranks over which a dense weight is shared."""
        return self.dp if self.shard is None else self.shard

    @property
    def expert_shards(self) -> int:
        """Expert-data-parallel ranks over which an expert's weight is shared."""
        return math.gcd(self.dense_shards, self.expert_data_ranks)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a plan; docs/plan.md specifies the file.

        Raises:
            PlanError: The file cannot be read, holds what no plan has, or contradicts itself.
        """
        return read_plan_file(path, cls.from_json)

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """A plan from what its file holds. Raises PlanError."""
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise PlanError(f'No plan: it does not say "format": "{FORMAT}".')
        version = raw.get("version")
        if type(version) is not int or version != VERSION:
            raise PlanError(f"Version {version!r} is unknown; this reads {VERSION}.")
        known = {f.name for f in fields(cls)} | {"format", "version"}
        for key in raw:
            if key not in known:
                raise PlanError(f"{key!r} is unknown. A plan has {', '.join(sorted(known))}.")
        values = {key: value for key, value in raw.items() if key not in ("format", "version")}
        for name in ("pp", "dp", "tp", "zero", *_OPTIONAL_NUMBERS):
            value = values.get(name, 1)
            if type(value) is not int and (value is not None or name not in _OPTIONAL_NUMBERS):
                raise PlanError(f"{name} is {value!r}. It must be a whole number.")
        if type(values.get("deduplicate", True)) is not bool:
            raise PlanError(f"deduplicate is {values['deduplicate']!r}. It must be true or false.")
        if not isinstance(values.get("about", {}), dict):
            raise PlanError("about must be an object.")
        if "splits" in values:
            values["splits"] = _read_splits(values["splits"])
        if values.get("stages") is not None:
            values["stages"] = _read_stages(values["stages"])
        if "recompute" in values:
            values["recompute"] = _read_recompute(values["recompute"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """What the plan's file holds."""
        raw = {"format": FORMAT, "version": VERSION, **asdict(self)}
        raw["splits"] = {
            f.name: [list(span) for span in split.spans]
            for f in fields(self.splits)
            if (split := getattr(self.splits, f.name)) is not None
        }
        if self.stages is not None:
            raw["stages"] = [stage._asdict() for stage in self.stages]
        raw["recompute"] = {str(layer): kind for layer, kind in self.recompute.items()}
        return raw

    def save(self, path: Path | str) -> None:
        """Write the plan's file, whole or not at all. Raises FolderError."""
        write_text_atomic(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


_OPTIONAL_NUMBERS = ("ep", "shard", "micro_batch")
"""These may be null."""

_CHOICES: dict[str, Any] = {
    "experts_over": ExpertsOver,
    "dispatch": Dispatch,
    "schedule": Schedule,
    "zero": Literal[1, 2, 3],
}


def _read_stages(raw: Any) -> tuple[Stage, ...]:
    if not isinstance(raw, list) or not all(
        isinstance(stage, dict)
        and stage.keys() == {"first", "last"}
        and all(isinstance(unit, str) for unit in stage.values())
        for stage in raw
    ):
        raise PlanError('stages must be a list of objects, each with "first" and "last".')
    return tuple(Stage(**stage) for stage in raw)


def _read_splits(raw: Any) -> Splits:
    known = [f.name for f in fields(Splits)]
    if not isinstance(raw, dict) or not raw.keys() <= set(known):
        raise PlanError(f"splits must be an object with some of {', '.join(known)}.")
    splits = {}
    for name, spans in raw.items():
        if not isinstance(spans, list) or not all(
            isinstance(span, list) and len(span) == 2 and all(type(edge) is int for edge in span)
            for span in spans
        ):
            raise PlanError(f"splits.{name} must be a list of [start, end], one for each rank.")
        try:
            splits[name] = Split(tuple((start, end) for start, end in spans))
        except PlanError as error:
            raise PlanError(f"splits.{name}: {error}") from None
    return Splits(**splits)


_LAYER = re.compile(r"(0|[1-9][0-9]{0,8})(\.attention|\.feed_forward)?")


def _read_recompute(raw: Any) -> dict[int | str, Recompute]:
    options = get_args(Recompute)
    if not isinstance(raw, dict):
        raise PlanError("recompute must be an object from layers to what is recomputed.")
    for layer, kind in raw.items():
        if not _LAYER.fullmatch(str(layer)) or kind not in options:
            raise PlanError(
                f"recompute has {layer!r}: {kind!r}. It goes from a layer's number, or a half of "
                f"it such as '7.attention', to one of {', '.join(options)}."
            )
    return {int(layer) if layer.isdecimal() else layer: kind for layer, kind in raw.items()}
