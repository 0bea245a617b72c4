"""Which part of every tensor a rank holds, by the tensor's name. Pure Python.

The one table from names to the dimension that is cut. Allocation, reading of weights, checkpoints,
the gradient norm and the sums over tensor-parallel ranks all read it.

Letters: V vocabulary, D model width, F inner width, E experts, H query heads, G key-value heads,
C head width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from moesaic.checkpoint.names import disk_entries
from moesaic.planning.layout import (
    Shard,
    attention_unit,
    feed_forward_unit,
    holds,
    num_units,
)
from moesaic.planning.split import Span, cut
from moesaic.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


_BUFFER = "e_score_correction_bias"
"""The one tensor that is saved but not trained by gradients."""


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: one span of each of its dims."""

    shape: tuple[int, ...]
    """Of the whole tensor."""

    spans: tuple[Span, ...]
    """What is held of each dim."""

    is_cut: bool
    """Whether ranks of a stage hold different spans; if not, each holds the whole tensor."""

    is_expert: bool
    """Whether it is seen through the experts' view of the ranks."""

    is_parameter: bool = True
    """Whether gradients are for it; a buffer is whole on every rank."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of what is held."""
        return tuple(end - start for start, end in self.spans)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where it begins in the whole tensor."""
        return tuple(start for start, _ in self.spans)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What to index the whole tensor with."""
        return tuple(slice(*span) for span in self.spans)

    def part_of(self, dim: int, position: int) -> int | None:
        """Where a position of the whole dim lies in what is held; None if it is not held."""
        start, end = self.spans[dim]
        return position - start if start <= position < end else None

    @property
    def numel(self) -> int:
        """Values held."""
        return math.prod(self.local_shape)

    def share(self, shards: int, shard: int) -> Piece:
        """What is left when FSDP deals dim 0 out once more."""
        return replace(self, spans=(cut(self.spans[0], shards, shard), *self.spans[1:]))


SCALAR = Piece((), (), is_cut=False, is_expert=False)
"""A single number, which every rank holds."""


def whole_piece(shape: tuple[int, ...]) -> Piece:
    """All of a tensor that every rank holds."""
    return Piece(shape, tuple((0, size) for size in shape), is_cut=False, is_expert=False)


class Held(NamedTuple):
    """A piece, and the tensor that holds it: training changes it in place."""

    tensor: Tensor
    piece: Piece


def model_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter and saved buffer of a whole model, by name, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in disk_entries(spec):
        stack = () if entry.expert is None or spec.moe is None else (spec.moe.num_experts,)
        shapes[entry.param] = (*stack, *entry.shape)
    return shapes


def parameter_names(spec: ModelSpec) -> list[str]:
    """Every parameter of a whole model, buffers left out."""
    return [name for name in model_shapes(spec) if not name.endswith(_BUFFER)]


def pieces(spec: ModelSpec, shard: Shard, units: Span) -> dict[str, Piece]:
    """What a stage of a rank holds of each tensor that it holds at all."""
    return {
        name: _piece(name, shape, spec, shard)
        for name, shape in model_shapes(spec).items()
        if any(holds(units, unit) for unit in _units_of(name, spec))
    }


def _units_of(name: str, spec: ModelSpec) -> Iterator[int]:
    head = num_units(spec) - 1
    if name.startswith("model.embed_tokens."):
        yield 0
        if spec.tied_embeddings:
            yield head
    elif (found := re.match(r"model\.layers\.(\d+)\.(\w+)", name)) is None:
        yield head
    elif found[2] in ("input_layernorm", "self_attn"):
        yield attention_unit(int(found[1]))
    else:
        yield feed_forward_unit(int(found[1]))


def _piece(name: str, shape: tuple[int, ...], spec: ModelSpec, shard: Shard) -> Piece:
    spans: list[Span] = [(0, size) for size in shape]
    is_expert = ".experts." in name
    for dim, span in _cuts(name, spec, shard).items():
        spans[dim] = span
    return Piece(
        shape,
        tuple(spans),
        is_cut=bool(_cuts(name, spec, shard)),
        is_expert=is_expert,
        is_parameter=not name.endswith(_BUFFER),
    )


def _cuts(name: str, spec: ModelSpec, shard: Shard) -> dict[int, Span]:
    """The span of each dim that is cut."""
    query, key = (
        (start * spec.head_dim, end * spec.head_dim) for start, end in (shard.heads, shard.kv_heads)
    )
    owner, _, kind = name.rpartition(".")
    part = owner.rpartition(".")[2]
    if ".experts" in owner:  # w1, w3 (E, F, D) and w2 (E, D, F)
        return {0: shard.experts, (2 if kind == "w2" else 1): shard.expert_columns}
    if part in ("embed_tokens", "lm_head"):  # (V, D)
        return {0: shard.vocab}
    if part == "q_proj":  # (HC, D), (HC)
        return {0: query}
    if part in ("k_proj", "v_proj"):  # (GC, D), (GC)
        return {0: key}
    if part == "o_proj":  # (D, HC); its bias is whole
        return {1: query} if kind == "weight" else {}
    columns = shard.shared_ffn if "shared_expert" in owner else shard.ffn
    if part in ("gate_proj", "up_proj"):  # (F, D)
        return {0: columns}
    if part == "down_proj":  # (D, F)
        return {1: columns}
    return {}
