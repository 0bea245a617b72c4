"""Weights packed so that one layout serves one row of activations and many.

A matrix (O, I) is cut into panels of 32 rows, one behind the other; a panel holds blocks of
32 columns in the order in which the processor's products want them. One row of activations
streams through every byte once; many rows meet a panel while it stays in the core's cache.

    bfloat16   2 bytes a weight
    float8     e4m3, 1 byte, and a float32 scale for each row of the matrix
    int8       1 byte, and a float32 scale for each row of the matrix

8-bit weights are widened to bfloat16 on their way into the product, which is exact, and the scale
multiplies the sum. Activations are bfloat16 and sums float32 in every kind.

Rows are padded to 32 and columns to 64, with zeros. `nbytes` counts padding and scales. Where the
C++ cannot be used (`native` is False), weights stay as they are and `plain` computes with them.

Shapes.  T rows of activations    I, O columns and rows of a matrix    K experts a row
         E experts held here    D model width    F inner width of an expert
"""

from __future__ import annotations

import functools
from typing import Any, Self

import torch
from torch import Tensor

from moesaic.serving.native import build, plain
from moesaic.serving.native.plain import Kind

ROW_MULTIPLE = 32
COLUMN_MULTIPLE = 64


class PackedLinear:
    """x W^T + b for a weight (O, I) of one kind; made by `pack`."""

    def __init__(
        self,
        data: Tensor,
        scale_O: Tensor | None,
        bias_O: Tensor | None,
        *,
        kind: Kind,
        shape: tuple[int, int],
        native: bool,
    ) -> None:
        self.data, self.scale_O, self.bias_O = data, scale_O, bias_O
        self.kind: Kind = kind
        self.shape = shape
        self.native = native

    @classmethod
    def pack(
        cls,
        weight_OI: Tensor,
        kind: Kind,
        *,
        bias_O: Tensor | None = None,
        scale_O: Tensor | None = None,
        native: bool | None = None,
    ) -> Self:
        """Pack a weight, which is not kept.

        Args:
            weight_OI: Of any float type, rounded here where `kind` has 8 bits; or already
                float8_e4m3fn or int8, with `scale_O`.
            kind: What to store.
            bias_O: Added to the product; kept in float32.
            scale_O: Multiplies each row, (O,) or (O, 1); only with 8-bit weights.
            native: Pack for the C++ kernels; None: where they are available.
        """
        native = build.available() if native is None else native
        data, scale = plain.stored(weight_OI, kind, scale_O)
        if native:
            data, scale = _pack(data, scale)
        bias = None if bias_O is None else bias_O.detach().float().contiguous()
        rows, columns = weight_OI.shape
        return cls(data, scale, bias, kind=kind, shape=(rows, columns), native=native)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and scales; the bias is not counted."""
        return self.data.nbytes + (0 if self.scale_O is None else self.scale_O.nbytes)

    def __call__(self, x_TI: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """(T, I), bfloat16 -> (T, O), `out_dtype` being bfloat16 or float32."""
        if not self.native:
            return plain.linear(x_TI, self.data, self.scale_O, self.bias_O, out_dtype)
        y_TO: Tensor = torch.ops.moesaic_serving.linear(
            self.handle, x_TI, out_dtype == torch.float32
        )
        return y_TO

    @functools.cached_property
    def handle(self) -> Any:
        """The C++ object that reads these weights."""
        return torch.classes.moesaic_serving.Matrix(
            self.data, self.scale_O, self.bias_O, *self.shape, plain.KINDS.index(self.kind)
        )


class PackedExperts:
    """The SwiGLU experts that this rank holds, or as many of their columns as it holds.

    Made empty, then filled expert by expert, so that no second copy of a layer is ever in memory.
    A dense network is one expert that every token visits.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        *,
        expert_dim: int,
        kind: Kind,
        native: bool | None = None,
    ) -> None:
        self.num_experts, self.hidden_dim, self.expert_dim = num_experts, hidden_dim, expert_dim
        self.kind: Kind = kind
        self.native = build.available() if native is None else native
        dtype = plain.DTYPES[kind]
        wide = kind == "bfloat16"
        if self.native:
            rows, width = _round_up(expert_dim, ROW_MULTIPLE), _round_up(expert_dim)
            outer, depth = _round_up(hidden_dim, ROW_MULTIPLE), _round_up(hidden_dim)
            # Panels of w1 and w3 take turns, so that both halves of an activation stream together.
            like = torch.empty(0, dtype=dtype)
            empty = torch.ops.moesaic_serving.empty_weights
            self.w13 = empty([num_experts, 2 * rows * depth], like)
            self.w2 = empty([num_experts, outer * width], like)
        else:
            rows, outer = expert_dim, hidden_dim
            self.w13 = torch.empty(num_experts, 2, expert_dim, hidden_dim, dtype=dtype)
            self.w2 = torch.empty(num_experts, hidden_dim, expert_dim, dtype=dtype)
        self.scale13 = None if wide else torch.empty(num_experts, 2, rows)
        self.scale2 = None if wide else torch.empty(num_experts, outer)

    @classmethod
    def pack(
        cls,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
        kind: Kind,
        *,
        scales: tuple[Tensor, Tensor, Tensor] | None = None,
        native: bool | None = None,
    ) -> Self:
        """Pack stacked experts; `scales` are those of w1, w3 and w2, (E, F), (E, F) and (E, D)."""
        experts, inner, width = w1_EFD.shape
        packed = cls(experts, width, expert_dim=inner, kind=kind, native=native)
        for expert in range(experts):
            packed.fill(
                expert,
                w1_EFD[expert],
                w3_EFD[expert],
                w2_EDF[expert],
                scales=None if scales is None else (*(scale[expert] for scale in scales),),  # type: ignore[arg-type]
            )
        return packed

    def fill(
        self,
        expert: int,
        w1_FD: Tensor,
        w3_FD: Tensor,
        w2_DF: Tensor,
        *,
        scales: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Set the weights of one expert, counted among those held here.

        Args:
            expert: Which.
            w1_FD: Weight of the SiLU branch, as `PackedLinear.pack` takes it.
            w3_FD: Weight of the linear branch.
            w2_DF: Weight of the way back.
            scales: Of w1, w3 and w2, where they are 8-bit already.
        """
        scale1, scale3, scale2 = scales or (None, None, None)
        w1, scale1 = plain.stored(w1_FD, self.kind, scale1)
        w3, scale3 = plain.stored(w3_FD, self.kind, scale3)
        w2, scale2 = plain.stored(w2_DF, self.kind, scale2)
        if self.native:
            w1, scale1 = _pack(w1, scale1)
            w3, scale3 = _pack(w3, scale3)
            w2, scale2 = _pack(w2, scale2)
            panels = _round_up(self.expert_dim, ROW_MULTIPLE) // ROW_MULTIPLE
            both = self.w13[expert].view(panels, 2, -1)
            both[:, 0], both[:, 1] = w1.view(panels, -1), w3.view(panels, -1)
        else:
            self.w13[expert, 0], self.w13[expert, 1] = w1, w3
        self.w2[expert] = w2
        if self.scale13 is not None and self.scale2 is not None:
            assert scale1 is not None
            assert scale3 is not None
            assert scale2 is not None
            self.scale13[expert, 0], self.scale13[expert, 1] = scale1, scale3
            self.scale2[expert] = scale2

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales."""
        tensors = (self.w13, self.w2, self.scale13, self.scale2)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(
        self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor, first_expert: int = 0
    ) -> Tensor:
        """Sum over the chosen experts that are held here of gate * expert(x).

        Args:
            x_TD: Normed activations, bfloat16.
            experts_TK: Chosen experts, counted over all ranks, int64.
            gates_TK: Their weights, float32.
            first_expert: Which of all experts is the first one here; copies for others are skipped.

        Returns:
            (T, D), float32.
        """
        if not self.native:
            return plain.experts(
                x_TD,
                experts_TK - first_expert,
                gates_TK,
                *(self.w13, self.w2, self.scale13, self.scale2),
            )
        y_TD: Tensor = torch.ops.moesaic_serving.experts(
            self.handle, x_TD, experts_TK, gates_TK, first_expert
        )
        return y_TD

    @functools.cached_property
    def handle(self) -> Any:
        """The C++ object that reads these weights."""
        return torch.classes.moesaic_serving.Experts(
            *(self.w13, self.scale13, self.w2, self.scale2),
            *(self.num_experts, self.hidden_dim, self.expert_dim, plain.KINDS.index(self.kind)),
        )


def _round_up(size: int, multiple: int = COLUMN_MULTIPLE) -> int:
    return -(-size // multiple) * multiple


def _pack(weight_OI: Tensor, scale_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The packed weight, flat, and its scale padded to whole panels."""
    data = torch.ops.moesaic_serving.pack(weight_OI)
    if scale_O is None:
        return data, None
    padded = scale_O.new_zeros(_round_up(scale_O.shape[0], ROW_MULTIPLE))
    padded[: scale_O.shape[0]] = scale_O
    return data, padded
