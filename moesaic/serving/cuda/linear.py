"""Few rows through a matrix of 8-bit weights, or with a float32 result; else torch's own product.

At few rows the time is that of reading the weights, and half the bytes are half the time. A
matrix with fewer tiles than the GPU has multiprocessors is also cut along its depth, so that all
of them read; the parts are added up afterwards, always in the same order.

Shapes.  T rows of x     O rows of W, columns of y     I depth
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from moesaic.serving.cuda.tiles import (
    SCALE_BLOCK,
    Activations,
    Weight,
    add_step,
    apply_scales,
    round_rows,
    tile_for,
)

ENOUGH_PROGRAMS = 256
"""Two for each of the 128 to 132 multiprocessors of the cards this is for."""

MOST_PARTS = 8
"""Of the depth. Each is a float32 copy of y to write and add up."""


def linear(
    x_TI: Tensor,
    weight: Weight,
    bias_O: Tensor | None = None,
    *,
    activations: Activations = "wide",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + bias, (T, O).

    Args:
        x_TI: Rows, (T, I).
        weight: 8-bit numbers with scales, or wide ones without.
        bias_O: Float32 or x's dtype; added before the one rounding at the end.
        activations: Whether rows of x are rounded to e4m3 too, for weights in e4m3.
        out_dtype: Of the result; None for x's.
    """
    out_dtype = x_TI.dtype if out_dtype is None else out_dtype
    columns = weight.values.shape[0]
    if weight.values.dtype == x_TI.dtype == out_dtype:
        bias = None if bias_O is None else bias_O.to(x_TI.dtype)
        return functional.linear(x_TI, weight.values, bias)
    if len(x_TI) == 0 or columns == 0:
        return x_TI.new_zeros(len(x_TI), columns, dtype=out_dtype)
    tile = tile_for(len(x_TI))
    x_scale_T = None
    if activations == "float8" and weight.values.dtype == torch.float8_e4m3fn:
        x_TI, x_scale_T = round_rows(x_TI)
    grid = (triton.cdiv(len(x_TI), tile.rows), triton.cdiv(columns, tile.columns))
    parts, depth = _cut_depth(grid[0] * grid[1], x_TI.shape[1], step=tile.depth)
    if parts == 1:
        y = torch.empty(1, len(x_TI), columns, dtype=out_dtype, device=x_TI.device)
    else:
        y = torch.empty(parts, len(x_TI), columns, dtype=torch.float32, device=x_TI.device)
    _, scale_column, scale_depth = weight.scale_strides
    _linear[(*grid, parts)](
        x_TI.contiguous(),
        x_scale_T,
        weight.values,
        weight.scales,
        bias_O,
        y,
        len(x_TI),
        columns,
        x_TI.shape[1],
        depth,
        scale_column,
        scale_depth,
        HAS_TAIL=x_TI.shape[1] % tile.depth != 0,
        SCALE_BLOCK=SCALE_BLOCK if weight.is_scaled_by_block else 0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEP=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y[0] if parts == 1 else y.sum(0).to(out_dtype)


def _cut_depth(programs: int, depth: int, *, step: int) -> tuple[int, int]:
    """How many parts the depth is cut into, and how long they are, in whole steps."""
    wanted = min(MOST_PARTS, -(-ENOUGH_PROGRAMS // programs), -(-depth // step))
    length = -(-depth // (wanted * step)) * step
    return -(-depth // length), length


# They change from step to step; a kernel for each of 1, 16 n and others would be compiled.
@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    num_columns,
    num_depths,
    part_depths,
    scale_column,
    scale_depth,
    HAS_TAIL: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    rows_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    in_R = rows_R < num_rows
    x_ptrs_R = x_ptr + rows_R.to(tl.int64) * num_depths
    sum_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum((part + 1) * part_depths, num_depths)
    for start in range(part * part_depths, end, STEP):
        depths_S = start + tl.arange(0, STEP)
        in_RS = in_R[:, None]
        if HAS_TAIL:
            in_RS = in_RS & (depths_S < num_depths)[None, :]
        x_RS = tl.load(x_ptrs_R[:, None] + depths_S[None, :], mask=in_RS, other=0.0)
        sum_RC = add_step(
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
            HAS_TAIL,
            SCALE_BLOCK,
        )
    sum_RC = apply_scales(
        sum_RC,
        x_scale_ptr,
        w_scale_ptr,
        rows_R,
        columns_C,
        in_R,
        num_columns,
        scale_column,
        SCALE_BLOCK,
    )
    in_RC = in_R[:, None] & (columns_C < num_columns)[None, :]
    if bias_ptr is not None:
        in_C = (columns_C < num_columns) & (part == 0)  # once, and not in every part of the depth
        sum_RC += tl.load(bias_ptr + columns_C, mask=in_C, other=0.0).to(tl.float32)[None, :]
    y_row_R = part.to(tl.int64) * num_rows + rows_R
    y_ptrs_RC = y_ptr + y_row_R[:, None] * num_columns + columns_C[None, :]
    tl.store(y_ptrs_RC, sum_RC.to(y_ptr.dtype.element_ty), mask=in_RC)
