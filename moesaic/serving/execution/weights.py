"""Read what one rank holds of a model, and nothing else, in the form in which it is stored.

Matrices come as the plan says: in 16 or 32 bits, or in 8 with a float32 scale a row. What a folder
already has in that form is taken as it is; anything else is widened, or rounded row by row as
`moesaic quantize` does. The scale of a row is that of the whole row, however its columns are cut,
so what a model answers does not depend on the number of ranks. Norms, biases and routers are
float32, embedding and head in the type of the activations.

A tensor is mapped from its file and only the rows that are wanted are touched; but to find the
scale of rows of which this rank holds some columns, all of them are read.

Shapes.  O rows and I columns of a matrix    D model width    V vocabulary    E experts
         H query heads and G key-value heads held here    C head width    F inner width
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from moesaic.checkpoint.folder import check_complete, refuse_infinite
from moesaic.checkpoint.names import disk_entries
from moesaic.planning.serving.layout import LayerShard, ServeLayout
from moesaic.planning.serving.ledger import Dtype
from moesaic.planning.split import Span
from moesaic.quantization import fp8, int8
from moesaic.quantization.reader import WideReader
from moesaic.spec import ModelSpec, MoESpec

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
"""Of every kind that a plan names."""

_QUANTIZE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "float8": fp8.quantize_per_channel,
    "int8": int8.quantize_per_channel,
}


class Matrix(NamedTuple):
    """What this rank holds of a weight."""

    data: Tensor
    """(O, I), in the plan's kind."""
    scale_O: Tensor | None = None
    """What multiplies each row, float32; only with 8 bits."""

    @property
    def nbytes(self) -> int:
        """With scales."""
        return self.data.nbytes + (0 if self.scale_O is None else self.scale_O.nbytes)


class AttentionWeights(NamedTuple):
    """Of the attention half of a layer."""

    norm_D: Tensor
    qkv: Matrix | None
    """Rows of the query heads, then of the key heads, then of the value heads; None where this
    rank holds no head."""
    qkv_bias_O: Tensor | None
    out: Matrix | None
    """(D, H C)"""
    out_bias_D: Tensor | None
    """On rank 0 only: it is to be added once."""
    q_norm_C: Tensor | None
    k_norm_C: Tensor | None


class Network(NamedTuple):
    """A SwiGLU network: w2(silu(w1 x) * w3 x)."""

    w1: Matrix
    w3: Matrix
    w2: Matrix


class DenseWeights(NamedTuple):
    """Of the second half of a dense layer."""

    norm_D: Tensor
    network: Network | None
    """None where this rank holds no column."""


class MoEWeights(NamedTuple):
    """Of the second half of an MoE layer, the experts left out: they are read one by one."""

    norm_D: Tensor
    router_ED: Tensor
    selection_bias_E: Tensor | None
    experts: range
    """Those that this rank holds, or of which it holds columns."""
    expert_dim: int
    """Columns of each."""
    shared: Network | None
    shared_gate_D: Tensor | None


class RankReader:
    """What one rank holds of a model folder.

    Args:
        folder: The folder.
        layout: Who holds what.
        rank: Whose part to read.
        dtype: Of the activations.

    Raises:
        FolderError: A file is missing or damaged, or a tensor is missing, extra, or of another
            shape. No weight was read.
        SpecError: The folder is quantised in a way that is not read.
    """

    def __init__(
        self, folder: Path | str, layout: ServeLayout, *, rank: int = 0, dtype: Dtype = "bfloat16"
    ) -> None:
        self.spec: ModelSpec = layout.spec
        self.layout, self.rank = layout, rank
        self.dtype = DTYPES[dtype]
        self.kind = layout.plan.weights
        self._names = {(entry.param, entry.expert): entry.name for entry in disk_entries(self.spec)}
        self._reader = WideReader(folder)
        try:
            check_complete(self._reader, self.spec)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the files."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def shard(self, layer: int) -> LayerShard:
        """What this rank holds of a layer."""
        return self.layout.layer(self.rank, layer)

    def embedding(self) -> Tensor:
        """This rank's rows, (v, D), in the activations' type."""
        return self._vocabulary("model.embed_tokens.weight")

    def head(self) -> Tensor:
        """This rank's rows of the output projection; the embedding's when tied."""
        tied = self.spec.tied_embeddings
        return self._vocabulary("model.embed_tokens.weight" if tied else "lm_head.weight")

    def norm(self) -> Tensor:
        """Weight of the last norm, (D,), float32."""
        return self._vector("model.norm.weight")

    def attention(self, layer: int) -> AttentionWeights:
        """The first half of a layer."""
        spec, shard, prefix = self.spec, self.shard(layer), f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        queries, keys = (_scaled(span, spec.head_dim) for span in (shard.heads, shard.kv_heads))
        parts = (("q", queries), ("k", keys), ("v", keys))
        bias = None
        if spec.qkv_bias:
            biases = [self._vector(f"{attention}.{part}_proj.bias", rows) for part, rows in parts]
            bias = torch.cat(biases)
        has_out_bias = spec.out_bias and self.rank == 0
        return AttentionWeights(
            norm_D=self._vector(f"{prefix}.input_layernorm.weight"),
            qkv=_below(
                [self._matrix(f"{attention}.{part}_proj.weight", rows) for part, rows in parts]
            ),
            qkv_bias_O=bias,
            out=self._matrix(f"{attention}.o_proj.weight", columns=queries),
            out_bias_D=self._vector(f"{attention}.o_proj.bias") if has_out_bias else None,
            q_norm_C=self._vector(f"{attention}.q_norm.weight") if spec.qk_norm else None,
            k_norm_C=self._vector(f"{attention}.k_norm.weight") if spec.qk_norm else None,
        )

    def dense(self, layer: int) -> DenseWeights:
        """The second half of a dense layer."""
        prefix = f"model.layers.{layer}"
        return DenseWeights(
            norm_D=self._vector(f"{prefix}.post_attention_layernorm.weight"),
            network=self._network(f"{prefix}.mlp", self.shard(layer).ffn),
        )

    def moe(self, layer: int) -> MoEWeights:
        """The second half of an MoE layer, without its experts."""
        moe, shard, prefix = self._moe_spec, self.shard(layer), f"model.layers.{layer}"
        part = f"{prefix}.block_sparse_moe"
        shared, shared_gate = None, None
        if moe.shared_expert_dim:
            shared = self._network(f"{part}.shared_expert", shard.shared_ffn)
            shared_gate = self._vector(f"{part}.shared_expert_gate.weight").view(-1)
        columns = shard.expert_columns[1] - shard.expert_columns[0]
        bias = f"{part}.gate.e_score_correction_bias"
        return MoEWeights(
            norm_D=self._vector(f"{prefix}.post_attention_layernorm.weight"),
            router_ED=self._vector(f"{part}.gate.weight"),
            selection_bias_E=self._vector(bias) if moe.selection_bias else None,
            experts=range(*shard.experts) if columns else range(shard.experts[0], shard.experts[0]),
            expert_dim=columns,
            shared=shared,
            shared_gate_D=shared_gate,
        )

    def expert(self, layer: int, expert: int) -> Network:
        """One of the experts that `moe` says this rank holds, or its columns here."""
        columns = self.shard(layer).expert_columns
        part = f"model.layers.{layer}.block_sparse_moe.experts"
        found = (
            self._matrix(f"{part}.w1", columns, expert=expert),
            self._matrix(f"{part}.w3", columns, expert=expert),
            self._matrix(f"{part}.w2", columns=columns, expert=expert),
        )
        return Network(*_there(found))

    @property
    def _moe_spec(self) -> MoESpec:
        assert self.spec.moe is not None, f"{self.spec=}"
        return self.spec.moe

    def _network(self, part: str, columns: Span) -> Network | None:
        if columns[0] == columns[1]:
            return None
        found = (
            self._matrix(f"{part}.gate_proj.weight", columns),
            self._matrix(f"{part}.up_proj.weight", columns),
            self._matrix(f"{part}.down_proj.weight", columns=columns),
        )
        return Network(*_there(found))

    def _vocabulary(self, param: str) -> Tensor:
        return self._wide(self._names[param, None], self.layout.vocab.spans[self.rank], self.dtype)

    def _vector(self, param: str, rows: Span | None = None) -> Tensor:
        return self._wide(self._names[param, None], rows, torch.float32)

    def _wide(self, name: str, rows: Span | None, dtype: torch.dtype) -> Tensor:
        tensor = self._reader.read(name)[_slice(rows)]
        refuse_infinite(self._reader, name, tensor)
        # A copy, though it may have the type already: what lies in the file is not ours to keep.
        return tensor.to(dtype, copy=True)

    def _matrix(
        self,
        param: str,
        rows: Span | None = None,
        columns: Span | None = None,
        *,
        expert: int | None = None,
    ) -> Matrix | None:
        """Rows and columns of a weight, as the plan stores them; None where there are none."""
        name = self._names[param, expert]
        data, scale = self._reader.read_stored(name)
        data = data[_slice(rows)]
        scale_O = None if scale is None else _of_rows(scale, rows, data.shape[0])
        held = data[:, _slice(columns)]
        if held.numel() == 0:
            return None
        for tensor in (held, scale_O):
            if tensor is not None:
                refuse_infinite(self._reader, name, tensor)
        if scale_O is not None and data.dtype == DTYPES[self.kind]:
            return Matrix(held.clone(memory_format=torch.contiguous_format), scale_O.clone())
        if self.kind in _QUANTIZE:
            wide = data if scale_O is None else fp8.dequantize(data, scale_O[:, None])
            rounded, scale_O1 = _QUANTIZE[self.kind](wide)
            return Matrix(rounded[:, _slice(columns)].contiguous(), scale_O1.view(-1))
        if scale_O is not None:
            held = fp8.dequantize(held, scale_O[:, None])
        kept = held.to(DTYPES[self.kind], copy=True, memory_format=torch.contiguous_format)
        return Matrix(kept)


def _slice(span: Span | None) -> slice:
    return slice(None) if span is None else slice(*span)


def _scaled(span: Span, unit: int) -> Span:
    return span[0] * unit, span[1] * unit


def _of_rows(scale: Tensor, rows: Span | None, count: int) -> Tensor:
    """The scale of each of some rows, whether the matrix has one for each or one for all."""
    scale = scale.float().reshape(-1)
    return scale.expand(count) if scale.numel() == 1 else scale[_slice(rows)]


def _below(parts: list[Matrix | None]) -> Matrix | None:
    """Matrices one below the other."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    scales = [part.scale_O for part in there if part.scale_O is not None]
    return Matrix(torch.cat([part.data for part in there]), torch.cat(scales) if scales else None)


def _there(found: tuple[Matrix | None, ...]) -> tuple[Any, ...]:
    assert all(part is not None for part in found), "a network of which a rank holds some matrices"
    return found
