"""The serving plan: how a model is cut over ranks, kept as JSON that a person can write.

Every rank works on every token: it holds some of the heads, the columns and the vocabulary of
each layer, and the results are summed after each half of a layer. docs/serving-plan.md
specifies the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from moesaic.errors import PlanError
from moesaic.files import write_text_atomic
from moesaic.planning.plan_file import read_plan_file
from moesaic.spec import ModelSpec

FORMAT = "moesaic-serve-plan"
VERSION = 1

Heads = Literal["rotated", "fixed"]
"""Where the remainder goes when heads or columns do not divide: to other ranks from layer to layer,
or always to the first ones."""

Experts = Literal["columns", "whole"]
"""Whether every expert is cut by columns over all ranks, or whole experts are dealt out."""

Weights = Literal["float32", "bfloat16", "float8", "int8"]
"""What matrices are stored in; 8-bit ones have a float32 scale a row."""

KVKind = Literal["float32", "bfloat16", "float8"]
"""What keys and values are stored in."""

MAX_RANKS = 2**12
"""More are taken for a damaged file, before anything is counted rank by rank."""


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """Which rank holds what while a model is served."""

    ranks: int = 1
    """Processes, one a device, that share every layer."""

    heads: Heads = "rotated"
    """Where the remainder of heads and columns goes, layer by layer."""

    experts: Experts = "columns"
    """How experts are shared."""

    shares: tuple[float, ...] | None = None
    """Relative weight of each rank, for boxes of several kinds of device; 0: it holds nothing.
    None: all the same."""

    head_shares: tuple[float, ...] | None = None
    """The same for heads and their keys and values; None: as `shares`."""

    weights: Weights = "bfloat16"
    """What the matrices of attention, feed-forward networks and experts are stored in."""

    kv_cache: KVKind = "bfloat16"
    """What keys and values are stored in."""

    block_tokens: int = 16
    """Positions in one block of the cache."""

    kv_blocks: int | None = None
    """Blocks of the cache; None: as many as the smallest rank's memory allows."""

    memory_bytes: tuple[int, ...] | None = None
    """What each rank may allocate; None: no budget is held."""

    model: Mapping[str, Any] | None = None
    """Facts of the model that the plan is for, as `facts_of` has them; None: any model."""

    about: Mapping[str, Any] = field(default_factory=dict)
    """What whoever made the plan says about it; serving does not read it."""

    def __post_init__(self) -> None:
        for name in ("ranks", "block_tokens", "kv_blocks"):
            value = getattr(self, name)
            if value is None and name == "kv_blocks":
                continue
            if type(value) is not int or value < 1:
                raise PlanError(f"The plan's {name} is {value!r}. It must be 1 or more.")
        if self.ranks > MAX_RANKS:
            raise PlanError(f"The plan has {self.ranks} ranks. It may have up to {MAX_RANKS}.")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                options = ", ".join(map(repr, get_args(kind)))
                raise PlanError(
                    f"The plan's {name} is {getattr(self, name)!r}. It must be one of {options}."
                )
        for name in ("shares", "head_shares", "memory_bytes"):
            self._check_list(name)
        if self.head_shares is not None and self.shares is None:
            object.__setattr__(self, "shares", (1.0,) * self.ranks)

    def _check_list(self, name: str) -> None:
        values = getattr(self, name)
        if values is None:
            return
        if len(values) != self.ranks:
            raise PlanError(
                f"The plan's {name} has {len(values)} numbers, but the plan {self.ranks} ranks. "
                f"Give one a rank."
            )
        for value in values:
            is_number = type(value) is int or (name != "memory_bytes" and type(value) is float)
            if not is_number or not 0 <= value < math.inf:
                raise PlanError(f"The plan's {name} has {value!r}. Give numbers, 0 or more.")
        if not any(values):
            raise PlanError(f"The plan's {name} is 0 for every rank, so none could hold anything.")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a plan; docs/serving-plan.md specifies the file.

        Raises:
            PlanError: The file cannot be read, holds what no plan has, or contradicts itself.
        """
        return read_plan_file(path, cls.from_json)

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """A plan from what its file holds. Raises PlanError."""
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise PlanError(f'No plan for serving: it does not say "format": "{FORMAT}".')
        version = raw.get("version")
        if type(version) is not int or version != VERSION:
            raise PlanError(f"Version {version!r} is unknown; this reads {VERSION}.")
        known = {f.name for f in fields(cls)} | {"format", "version"}
        for key in raw:
            if key not in known:
                raise PlanError(f"{key!r} is unknown. A plan has {', '.join(sorted(known))}.")
        values = {key: value for key, value in raw.items() if key not in ("format", "version")}
        for name in ("shares", "head_shares", "memory_bytes"):
            if values.get(name) is not None:
                if not isinstance(values[name], list):
                    raise PlanError(f"{name} must be a list with one number a rank.")
                values[name] = tuple(values[name])
        if not isinstance(values.get("model"), dict | None):
            raise PlanError("model must be an object.")
        if not isinstance(values.get("about", {}), dict):
            raise PlanError("about must be an object.")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """What the plan's file holds."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def save(self, path: Path | str) -> None:
        """Write the plan's file, whole or not at all. Raises FolderError."""
        write_text_atomic(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


_CHOICES: dict[str, Any] = {
    "heads": Heads,
    "experts": Experts,
    "weights": Weights,
    "kv_cache": KVKind,
}


def facts_of(spec: ModelSpec) -> dict[str, Any]:
    """What of a model decides how it is cut and how much memory it takes."""
    facts: dict[str, Any] = {
        name: getattr(spec, name)
        for name in (
            *("vocab_size", "hidden_dim", "ffn_dim", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "tied_embeddings"),
        )
    }
    if spec.moe is not None:
        for name in ("num_experts", "top_k", "expert_dim", "shared_expert_dim"):
            facts[name] = getattr(spec.moe, name)
        facts["moe_layers"] = list(spec.moe_layers)
    return facts
