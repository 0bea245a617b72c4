"""The experts of a layer on a GPU: rows stay where they are, and a schedule says who reads which.

    h = silu(x w1^T) * (x w3^T)      for every copy: a token at one of its experts
    y = h w2^T
    out = sum over a token's copies of gate * y

The copies of an expert are listed side by side in blocks of a tile's rows, the last block filled
up with copies that do not exist. How many blocks there are depends on the routing, which only
the device knows, so as many programs start as there could be and those without a block end at
once: no number travels to the host, and a CUDA graph can hold the whole. Copies whose expert is
held elsewhere stand in no block and in no sum.

Shapes.
    T tokens     K experts per token     N = T * K copies     e experts held here
    D model width     F inner width held here     B blocks     R rows of a tile
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.serving.cuda.tiles import (
    SCALE_BLOCK,
    Activations,
    Tile,
    Weight,
    add_step,
    apply_scales,
    round_rows,
    tile_for,
)


class Schedule(NamedTuple):
    """Which copies each block of programs computes, on the device."""

    order_BR: Tensor
    """Copies, those of an expert side by side; N where a block is not full. Int32."""

    expert_B: Tensor
    """The expert of a block, counted among those held here; -1 where there is no block. Int32."""


def experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    gates_TK: Tensor,
    w1: Weight,
    w3: Weight,
    w2: Weight,
    *,
    first_expert: int = 0,
    activations: Activations = "wide",
) -> Tensor:
    """What the experts (or columns of them) held here add to each token, (T, D) in x's dtype.

    Args:
        x_TD: Tokens, bfloat16 (or float32, slowly).
        experts_TK: Which experts each token goes to, counted over all ranks; int32 or int64.
        gates_TK: How much each counts, float32.
        w1: Of the SiLU branch, (e, F, D).
        w3: Of the linear branch, (e, F, D).
        w2: Of the way back, (e, D, F).
        first_expert: The number of the first expert held here.
        activations: Whether rows are rounded to e4m3 before both products, for e4m3 weights.
    """
    held, inner, _ = w1.values.shape
    tokens, top_k = experts_TK.shape
    if held == 0 or inner == 0 or tokens == 0:
        return torch.zeros_like(x_TD)
    if w1.values.dtype != torch.float8_e4m3fn:
        activations = "wide"
    tile = tile_for(-(-tokens * top_k // held))
    chosen_TK = experts_TK.contiguous()
    schedule = schedule_blocks(chosen_TK, held, first_expert=first_expert, rows=tile.rows)
    x_TD = x_TD.contiguous()
    x, x_scale = x_TD, None
    if activations == "float8":
        x, x_scale = round_rows(x_TD)
    h_NF = x_TD.new_empty(tokens * top_k, inner)
    _launch(x, x_scale, w1, w3, h_NF, schedule, copies_per_row=top_k, tile=tile)
    h, h_scale = h_NF, None
    if activations == "float8":
        h, h_scale = round_rows(h_NF, chosen_TK, first_expert=first_expert, held=held)
    y_ND = x_TD.new_empty(tokens * top_k, x_TD.shape[1])
    _launch(h, h_scale, w2, None, y_ND, schedule, copies_per_row=1, tile=tile)
    return _add_up(y_ND, chosen_TK, gates_TK, held, first_expert=first_expert)


def schedule_blocks(experts_TK: Tensor, held: int, *, first_expert: int, rows: int) -> Schedule:
    """List the copies of the `held` experts from `first_expert` on in blocks of `rows`."""
    copies = experts_TK.numel()
    # Each expert that has copies begins at most one block that it does not fill.
    blocks = copies // rows + min(held, copies)
    device = experts_TK.device
    order_BR = torch.empty(blocks, rows, dtype=torch.int32, device=device)
    expert_B = torch.empty(blocks, dtype=torch.int32, device=device)
    _schedule[(held,)](
        experts_TK,
        order_BR,
        expert_B,
        copies,
        first_expert,
        held,
        blocks,
        ROWS=rows,
        EXPERTS=triton.next_power_of_2(held),
        STEP=min(256, triton.next_power_of_2(copies)),
    )
    return Schedule(order_BR, expert_B)


# They change from step to step; a kernel for each of 1, 16 n and others would be compiled.
@triton.jit(do_not_specialize=["num_copies", "num_blocks"])
def _schedule(
    experts_ptr,
    order_ptr,
    block_expert_ptr,
    num_copies,
    first_expert,
    held,
    num_blocks,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    STEP: tl.constexpr,
):
    # Every program counts the copies of all experts: cheaper than a second launch, and no atomics.
    mine = tl.program_id(0)
    numbers_E = tl.arange(0, EXPERTS)
    counts_E = tl.zeros((EXPERTS,), tl.int32)
    copies_S = tl.arange(0, STEP)
    for start in range(0, num_copies, STEP):
        in_S = start + copies_S < num_copies
        expert_S = tl.load(experts_ptr + start + copies_S, mask=in_S, other=-1).to(tl.int32)
        expert_S = tl.where(in_S, expert_S - first_expert, -1)
        counts_E += tl.sum((expert_S[:, None] == numbers_E[None, :]).to(tl.int32), 0)
    blocks_E = (counts_E + ROWS - 1) // ROWS
    first = tl.sum(tl.where(numbers_E < mine, blocks_E, 0), 0)
    blocks = tl.sum(tl.where(numbers_E == mine, blocks_E, 0), 0)
    count = tl.sum(tl.where(numbers_E == mine, counts_E, 0), 0)
    listed = first * ROWS
    for start in range(0, num_copies, STEP):
        in_S = start + copies_S < num_copies
        expert_S = tl.load(experts_ptr + start + copies_S, mask=in_S, other=-1).to(tl.int32)
        is_mine_S = in_S & (expert_S - first_expert == mine)
        place_S = listed + tl.cumsum(is_mine_S.to(tl.int32), 0) - 1
        tl.store(order_ptr + place_S, start + copies_S, mask=is_mine_S)
        listed += tl.sum(is_mine_S.to(tl.int32), 0)
    rest_R = first * ROWS + count + tl.arange(0, ROWS)
    nobody_R = tl.zeros((ROWS,), tl.int32) + num_copies
    tl.store(order_ptr + rest_R, nobody_R, mask=rest_R < (first + blocks) * ROWS)
    for block in range(first, first + blocks):
        tl.store(block_expert_ptr + block, mine)
    if mine == held - 1:
        for block in range(first + blocks, num_blocks):
            tl.store(block_expert_ptr + block, -1)


def _launch(
    x: Tensor,
    x_scale: Tensor | None,
    w: Weight,
    gated: Weight | None,
    y: Tensor,
    schedule: Schedule,
    *,
    copies_per_row: int,
    tile: Tile,
) -> None:
    _, columns, depth = w.values.shape
    scale_expert, scale_column, scale_depth = w.scale_strides
    _grouped[(len(schedule.expert_B), triton.cdiv(columns, tile.columns))](
        x,
        x_scale,
        w.values,
        w.scales,
        None if gated is None else gated.values,
        None if gated is None else gated.scales,
        y,
        schedule.order_BR,
        schedule.expert_B,
        len(y),
        columns,
        depth,
        scale_expert,
        scale_column,
        scale_depth,
        COPIES_PER_ROW=copies_per_row,
        HAS_TAIL=depth % tile.depth != 0,
        SCALE_BLOCK=SCALE_BLOCK if w.is_scaled_by_block else 0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEP=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


# They change from step to step; a kernel for each of 1, 16 n and others would be compiled.
@triton.jit(do_not_specialize=["num_copies"])
def _grouped(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    v_ptr,
    v_scale_ptr,
    y_ptr,
    order_ptr,
    block_expert_ptr,
    num_copies,
    num_columns,
    num_depths,
    scale_expert,
    scale_column,
    scale_depth,
    COPIES_PER_ROW: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """y[copy] = x[copy's row] W^T; with a second matrix V, silu of that times x V^T."""
    # Blocks of one expert are neighbours in time, so its weights come from the cache again.
    block = tl.program_id(0)
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    if expert < 0:
        return
    copies_R = tl.load(order_ptr + block * ROWS + tl.arange(0, ROWS))
    in_R = copies_R < num_copies
    rows_R = (copies_R // COPIES_PER_ROW).to(tl.int64)
    columns_C = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w_ptr += expert * num_columns * num_depths
    if w_scale_ptr is not None:
        w_scale_ptr += expert * scale_expert
    sum_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    if v_ptr is not None:
        v_ptr += expert * num_columns * num_depths
        if v_scale_ptr is not None:
            v_scale_ptr += expert * scale_expert
        linear_RC = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_depths, STEP):
        depths_S = start + tl.arange(0, STEP)
        in_RS = in_R[:, None]
        if HAS_TAIL:
            in_RS = in_RS & (depths_S < num_depths)[None, :]
        x_ptrs_RS = x_ptr + rows_R[:, None] * num_depths + depths_S[None, :]
        x_RS = tl.load(x_ptrs_RS, mask=in_RS, other=0.0)
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
        if v_ptr is not None:
            linear_RC = add_step(
                linear_RC,
                x_RS,
                v_ptr,
                v_scale_ptr,
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
    if v_ptr is not None:
        linear_RC = apply_scales(
            linear_RC,
            x_scale_ptr,
            v_scale_ptr,
            rows_R,
            columns_C,
            in_R,
            num_columns,
            scale_column,
            SCALE_BLOCK,
        )
        sum_RC = sum_RC * tl.sigmoid(sum_RC) * linear_RC
    y_ptrs_RC = y_ptr + copies_R.to(tl.int64)[:, None] * num_columns + columns_C[None, :]
    in_RC = in_R[:, None] & (columns_C < num_columns)[None, :]
    tl.store(y_ptrs_RC, sum_RC.to(y_ptr.dtype.element_ty), mask=in_RC)


def _add_up(
    y_ND: Tensor, experts_TK: Tensor, gates_TK: Tensor, held: int, *, first_expert: int
) -> Tensor:
    tokens, top_k = experts_TK.shape
    width = y_ND.shape[1]
    out_TD = y_ND.new_empty(tokens, width)
    step = min(1024, triton.next_power_of_2(width))
    _gated_sum[(tokens, triton.cdiv(width, step))](
        y_ND,
        experts_TK,
        gates_TK.float().contiguous(),
        out_TD,
        width,
        first_expert,
        held,
        TOP_K=top_k,
        STEP=step,
    )
    return out_TD


@triton.jit
def _gated_sum(
    y_ptr,
    experts_ptr,
    gates_ptr,
    out_ptr,
    width,
    first_expert,
    held,
    TOP_K: tl.constexpr,
    STEP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns_S = tl.program_id(1) * STEP + tl.arange(0, STEP)
    in_S = columns_S < width
    sum_S = tl.zeros((STEP,), tl.float32)
    for k in tl.static_range(TOP_K):
        copy = token * TOP_K + k
        expert = tl.load(experts_ptr + copy).to(tl.int32) - first_expert
        if (expert >= 0) & (expert < held):  # nobody wrote the rows of others
            y_S = tl.load(y_ptr + copy * width + columns_S, mask=in_S, other=0.0)
            sum_S += tl.load(gates_ptr + copy) * y_S.to(tl.float32)
    tl.store(out_ptr + token * width + columns_S, sum_S.to(out_ptr.dtype.element_ty), mask=in_S)
