"""How a matrix product is cut up for a GPU, and rows rounded to e4m3 on the way into it.

A program makes one tile of y = x W^T: some rows of x by some rows of W, walking along their
common depth. W may be stored as it is computed with, or in 8 bits (e4m3 or int8) with float32
scales: one a row of W, one for all of it (a stride of 0), or one for each 128 x 128 of it.

    W8A16   8-bit weights are widened to x's dtype as they arrive; the products are bfloat16
    W8A8    rows of x are rounded to e4m3 with a scale each, and the products are 8-bit

Sums are float32 in both. Scales leave the sum at its end, those of 128 x 128 after every step.

Shapes.  T rows of x     O rows of W, columns of y     I depth
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Activations = Literal["wide", "float8"]
"""What meets the weights: rows as they are, or rounded to e4m3."""

SCALE_BLOCK = 128
"""Rows and columns of a weight under one scale, where scales are by block."""


class Tile(NamedTuple):
    """The part of a product that one program works on at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Steps along the depth that are loaded ahead."""


TILES = (
    # One to 16 rows: time is reading weights. Narrow tiles give even a small matrix a program for
    # every multiprocessor; four steps ahead keep enough bytes under way. 16 is the least of a dot.
    Tile(16, 32, 128, warps=4, stages=4),
    # Some rows an expert: weights and rows cost alike.
    Tile(64, 64, 64, warps=4, stages=3),
    # Long prompts: time is multiplying. Two sums of 128 x 64 leave registers for two tiles in
    # flight, and three stages of bfloat16 fit the 99 KiB that a block has on sm89.
    Tile(128, 64, 64, warps=8, stages=3),
)
"""Written down from the sizes of memory and registers, not tuned on a GPU."""


def tile_for(rows: int) -> Tile:
    """The smallest tile that `rows` rows fill, or the largest."""
    return next((tile for tile in TILES if rows <= tile.rows), TILES[-1])


class Weight(NamedTuple):
    """Matrices of one shape, and how their numbers are scaled."""

    values: Tensor
    """(O, I), or (E, O, I) for one an expert; the depth is contiguous."""

    scales: Tensor | None = None
    """Float32. By row: (O, 1); of all: (1,); by block: (O / 128, I / 128), rounded up. With
    experts (E, O, 1), (E, 1, 1) and (E, O / 128, I / 128)."""

    @property
    def is_scaled_by_block(self) -> bool:
        """Whether one scale holds for 128 x 128 numbers only."""
        if self.scales is None or self.scales.dim() == 1:
            return False
        rows, columns = self.scales.shape[-2:]
        return columns > 1 or rows not in (1, self.values.shape[-2])

    @property
    def scale_strides(self) -> tuple[int, int, int]:
        """How far apart scales of two experts, two rows (or blocks of them) and two columns lie."""
        if self.scales is None:
            return (0, 0, 0)
        shape = (1, 1, 1, *self.scales.shape)[-3:]
        strides = (0, 0, 0, *self.scales.stride())[-3:]
        if self.scales.dim() == 1:  # (1,): of all rows alike
            shape, strides = (1, 1, 1), (0, 0, 0)
        kept = [stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
        return (kept[0], kept[1], kept[2])


@triton.jit
def add_step(
    sum_RC,
    x_RS,
    w_ptr,
    w_scale_ptr,
    columns_C,
    depths_S,
    num_columns,
    num_depths,
    scale_column,
    scale_depth,
    HAS_TAIL: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    """One step along the depth: sum_RC + x_RS W_CS^T."""
    pointers_SC = w_ptr + columns_C[None, :].to(tl.int64) * num_depths + depths_S[:, None]
    in_SC = (columns_C < num_columns)[None, :]
    if HAS_TAIL:
        in_SC = in_SC & (depths_S < num_depths)[:, None]
    w_SC = tl.load(pointers_SC, mask=in_SC, other=0.0).to(x_RS.dtype)
    if SCALE_BLOCK == 0:
        # On sm90 the sum of an 8-bit product is kept in 14 bits; the limit adds it up every step.
        sum_RC = tl.dot(
            x_RS, w_SC, sum_RC, input_precision="ieee", max_num_imprecise_acc=x_RS.shape[1]
        )
    else:
        part_RC = tl.dot(x_RS, w_SC, input_precision="ieee")
        depth_block = tl.min(depths_S, 0) // SCALE_BLOCK
        at_C = columns_C // SCALE_BLOCK * scale_column + depth_block * scale_depth
        scale_C = tl.load(w_scale_ptr + at_C, mask=columns_C < num_columns, other=0.0)
        sum_RC += part_RC * scale_C[None, :]
    return sum_RC


@triton.jit
def apply_scales(
    sum_RC,
    x_scale_ptr,
    w_scale_ptr,
    rows_R,
    columns_C,
    in_R,
    num_columns,
    scale_column,
    SCALE_BLOCK: tl.constexpr,
):
    """What the sum owes to the scales of its rows and columns."""
    if w_scale_ptr is not None and SCALE_BLOCK == 0:
        at_C = columns_C * scale_column
        scale_C = tl.load(w_scale_ptr + at_C, mask=columns_C < num_columns, other=0.0)
        sum_RC = sum_RC * scale_C[None, :]
    if x_scale_ptr is not None:
        sum_RC = sum_RC * tl.load(x_scale_ptr + rows_R, mask=in_R, other=0.0)[:, None]
    return sum_RC


@triton.jit
def _round_rows(
    x_ptr,
    q_ptr,
    scale_ptr,
    expert_ptr,
    first_expert,
    held,
    num_columns,
    LARGEST: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if expert_ptr is not None:
        expert = tl.load(expert_ptr + row).to(tl.int32) - first_expert
        if (expert < 0) | (expert >= held):
            return
    columns_S = tl.arange(0, STEP)
    largest_S = tl.zeros((STEP,), tl.float32)
    for start in range(0, num_columns, STEP):
        in_S = start + columns_S < num_columns
        x_S = tl.load(x_ptr + row * num_columns + start + columns_S, mask=in_S, other=0.0)
        largest_S = tl.maximum(largest_S, tl.abs(x_S.to(tl.float32)))
    # Not 0 / 0 for a row of zeros: the smallest normal number, as quantization/fp8.py has it.
    scale = tl.maximum(tl.div_rn(tl.max(largest_S, 0), LARGEST), 1.1754943508222875e-38)
    tl.store(scale_ptr + row, scale)
    for start in range(0, num_columns, STEP):
        in_S = start + columns_S < num_columns
        x_S = tl.load(x_ptr + row * num_columns + start + columns_S, mask=in_S, other=0.0)
        q_S = tl.div_rn(x_S.to(tl.float32), tl.zeros((STEP,), tl.float32) + scale)
        q_S = tl.minimum(tl.maximum(q_S, -LARGEST), LARGEST)
        tl.store(
            q_ptr + row * num_columns + start + columns_S, q_S.to(q_ptr.dtype.element_ty), mask=in_S
        )


def round_rows(
    x_TI: Tensor, experts_T: Tensor | None = None, *, first_expert: int = 0, held: int = 0
) -> tuple[Tensor, Tensor]:
    """Round each row to e4m3 with its own scale, as `quantization.fp8.quantize_per_channel` does.

    Args:
        x_TI: Rows, (T, I).
        experts_T: The expert of each row; None: all rows are rounded.
        first_expert: With `experts_T`: rows of other experts than these are left alone.
        held: With `experts_T`: how many these are.

    Returns:
        (T, I) float8_e4m3fn, and the scales, (T,) float32.
    """
    x_TI = x_TI.contiguous()
    q_TI = torch.empty_like(x_TI, dtype=torch.float8_e4m3fn)
    scale_T = torch.empty(len(x_TI), dtype=torch.float32, device=x_TI.device)
    width = x_TI.shape[1]
    if len(x_TI):
        step = min(1024, triton.next_power_of_2(width))
        _round_rows[(len(x_TI),)](
            x_TI, q_TI, scale_T, experts_T, first_expert, held, width, LARGEST=448.0, STEP=step
        )
    return q_TI, scale_T
