"""Attention over a cache in blocks, for a prompt's chunks and for single tokens alike.

A program computes one tile: some new tokens of one sequence, with all query heads that share one
key-value head, as rows of the same products. It walks over the positions they may look at, looks
each block up in the sequence's table, and keeps a running softmax (arXiv 2307.08691).

A single token leaves most multiprocessors idle, so its positions are cut into parts, each with a
softmax of its own, and a second kernel joins them. Into how many parts depends on the number of
sequences only, never on their lengths: a CUDA graph captured once serves every length.

The cache of a layer is two pools, keys and values, each (blocks, G, P, C), in bfloat16, float32 or
e4m3.

Shapes.  T new tokens    S sequences    N tiles    R rows of a tile    L positions of a step
         H query heads and G key-value heads held here    C head width    P positions of a block
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Shape(NamedTuple):
    """The part of attention that one program works on at a time."""

    rows: int
    positions: int
    warps: int
    stages: int
    """Steps along the positions that are loaded ahead."""


SINGLE = Shape(16, 64, warps=4, stages=3)
"""One token: its query heads seldom fill the 16 rows that a product has at least, and time is
reading the cache."""

CHUNK = Shape(64, 64, warps=4, stages=2)
"""Some tokens: 64 rows use a tensor core fully; sums of 64 x 128 stay in four warps' registers."""

ENOUGH_PROGRAMS = 256
"""Two for each of the 128 to 132 multiprocessors of the cards this is for."""

MOST_PARTS = 32
"""Of one token's positions."""


class Tiles(NamedTuple):
    """What the programs of one launch compute."""

    where_N4: Tensor
    """Of each tile: sequence, first token among the step's, tokens, position of the first; int32,
    on the device."""
    is_single: bool
    """Whether each tile is one token."""


def cut(counts: Sequence[int], starts: Sequence[int], *, group: int) -> dict[bool, list[list[int]]]:
    """Cut the new tokens of a step into tiles.

    Args:
        counts: New tokens of each sequence, which follow one another in the step.
        starts: Position of each sequence's first new token.
        group: Query heads of a key-value head.

    Returns:
        Rows of `Tiles.where_N4`: of single tokens under True, of longer chunks under False.
    """
    tiles: dict[bool, list[list[int]]] = {True: [], False: []}
    most = max(1, CHUNK.rows // group)
    first = 0
    for sequence, (count, start) in enumerate(zip(counts, starts, strict=True)):
        for done in range(0, count, most):
            tokens = min(most, count - done)
            tiles[count == 1].append([sequence, first + done, tokens, start + done])
        first += count
    return tiles


def tiles_of(
    counts: Sequence[int], starts: Sequence[int], *, group: int, device: torch.device | str
) -> list[Tiles]:
    """The launches that a step needs, one at the most for each kind of tile."""
    return [
        Tiles(torch.tensor(rows, dtype=torch.int32, device=device), is_single)
        for is_single, rows in cut(counts, starts, group=group).items()
        if rows
    ]


def tiles_of_singles(positions_T: Tensor) -> Tiles:
    """The launch of a step in which every sequence has one token, made on the device."""
    numbers_T = torch.arange(len(positions_T), device=positions_T.device)
    columns = (numbers_T, numbers_T, torch.ones_like(numbers_T), positions_T)
    return Tiles(torch.stack(columns, dim=1).to(torch.int32), is_single=True)


def attend(
    q_THC: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    tables_SB: Tensor,
    tiles: Sequence[Tiles],
    *,
    window: int | None = None,
) -> Tensor:
    """What each query finds among its sequence's positions, up to its own, (T, H, C).

    Args:
        q_THC: Queries, rotated.
        k_pool: Keys, (blocks, G, P, C), those of the new tokens written already.
        v_pool: Values, likewise.
        tables_SB: Blocks of each sequence, int32.
        tiles: What `tiles_of` made of the step.
        window: A token looks at so many latest positions only, its own included.
    """
    q_THC = q_THC.contiguous()
    out_THC = torch.empty_like(q_THC)
    for launch in tiles:
        _attend_tiles(q_THC, k_pool, v_pool, tables_SB, launch, out_THC, window)
    return out_THC


def parts_for(programs: int) -> int:
    """Into how many parts the positions of single tokens are cut, a power of two."""
    wanted = max(1, ENOUGH_PROGRAMS // programs)
    return min(MOST_PARTS, 1 << (wanted.bit_length() - 1))


def _attend_tiles(
    q_THC: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    tables_SB: Tensor,
    tiles: Tiles,
    out_THC: Tensor,
    window: int | None,
) -> None:
    _, heads, width = q_THC.shape
    _, kv_heads, block_tokens, _ = k_pool.shape
    group = heads // kv_heads
    shape = SINGLE if tiles.is_single else CHUNK
    count = len(tiles.where_N4)
    parts = parts_for(count * kv_heads) if tiles.is_single else 1
    part_out = part_log = None
    if parts > 1:
        part_out = q_THC.new_empty(count, heads, parts, width, dtype=torch.float32)
        part_log = q_THC.new_empty(count, heads, parts, dtype=torch.float32)
    _attend[(count, kv_heads, parts)](
        q_THC,
        k_pool,
        v_pool,
        out_THC,
        part_out,
        part_log,
        tiles.where_N4,
        tables_SB,
        tables_SB.stride(0),
        kv_heads,
        block_tokens,
        math.log2(math.e) / math.sqrt(width),
        0 if window is None else window,
        GROUP=group,
        WIDTH=width,
        HAS_WINDOW=window is not None,
        PARTS=parts,
        ROWS=max(shape.rows, triton.next_power_of_2(group)),
        POSITIONS=shape.positions,
        CHANNELS=max(16, triton.next_power_of_2(width)),
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    if parts > 1:
        _join[(count, heads)](
            part_out,
            part_log,
            out_THC,
            tiles.where_N4,
            heads,
            WIDTH=width,
            PARTS=parts,
            CHANNELS=triton.next_power_of_2(width),
        )


# It changes from step to step; a kernel for each of 1, 16 n and others would be compiled.
@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    part_out_ptr,
    part_log_ptr,
    where_ptr,
    tables_ptr,
    table_stride,
    kv_heads,
    block_tokens,
    scale,
    window,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    sequence = tl.load(where_ptr + tile * 4)
    first_token = tl.load(where_ptr + tile * 4 + 1)
    tokens = tl.load(where_ptr + tile * 4 + 2)
    position = tl.load(where_ptr + tile * 4 + 3)

    rows_R = tl.arange(0, ROWS)
    channels_C = tl.arange(0, CHANNELS)
    in_C = channels_C < WIDTH
    in_RC = (rows_R // GROUP < tokens)[:, None] & in_C[None, :]
    position_R = position + rows_R // GROUP
    head_R = kv_head * GROUP + rows_R % GROUP
    q_row_R = (first_token + rows_R // GROUP).to(tl.int64) * (kv_heads * GROUP) + head_R
    q_RC = tl.load(q_ptr + q_row_R[:, None] * WIDTH + channels_C[None, :], mask=in_RC, other=0.0)

    end = position + tokens
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(position - window + 1, 0)
    if PARTS > 1:
        steps = (end - begin + PARTS * POSITIONS - 1) // (PARTS * POSITIONS)
        begin += part * steps * POSITIONS
        end = tl.minimum(begin + steps * POSITIONS, end)

    largest_R = tl.full((ROWS,), float("-inf"), tl.float32)
    total_R = tl.zeros((ROWS,), tl.float32)
    sum_RC = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(begin, end, POSITIONS):
        at_L = start + tl.arange(0, POSITIONS)
        in_L = at_L < end
        table_L = tables_ptr + sequence.to(tl.int64) * table_stride + at_L // block_tokens
        block_L = tl.load(table_L, mask=in_L, other=0).to(tl.int64)
        row_L = (block_L * kv_heads + kv_head) * block_tokens + at_L % block_tokens
        offsets_LC = row_L[:, None] * WIDTH + channels_C[None, :]
        in_LC = in_L[:, None] & in_C[None, :]
        k_LC = tl.load(k_ptr + offsets_LC, mask=in_LC, other=0.0).to(q_RC.dtype)
        scores_RL = tl.dot(q_RC, tl.trans(k_LC), input_precision="ieee") * scale
        may_RL = in_L[None, :] & (at_L[None, :] <= position_R[:, None])
        if HAS_WINDOW:
            may_RL = may_RL & (position_R[:, None] - at_L[None, :] < window)
        scores_RL = tl.where(may_RL, scores_RL, float("-inf"))
        higher_R = tl.maximum(largest_R, tl.max(scores_RL, 1))
        # A row may have seen nothing yet, and -inf - -inf is no number.
        base_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
        shrink_R = tl.exp2(largest_R - base_R)
        weights_RL = tl.exp2(scores_RL - base_R[:, None])
        total_R = total_R * shrink_R + tl.sum(weights_RL, 1)
        v_LC = tl.load(v_ptr + offsets_LC, mask=in_LC, other=0.0).to(q_RC.dtype)
        sum_RC = sum_RC * shrink_R[:, None]
        sum_RC = tl.dot(weights_RL.to(v_LC.dtype), v_LC, sum_RC, input_precision="ieee")
        largest_R = higher_R

    found_R = tl.where(total_R > 0, total_R, 1.0)
    result_RC = sum_RC / found_R[:, None]
    if PARTS == 1:
        out_ptrs_RC = out_ptr + q_row_R[:, None] * WIDTH + channels_C[None, :]
        tl.store(out_ptrs_RC, result_RC.to(out_ptr.dtype.element_ty), mask=in_RC)
    else:
        row_R = (tile.to(tl.int64) * (kv_heads * GROUP) + head_R) * PARTS + part
        is_real_R = rows_R // GROUP < tokens
        log_R = tl.where(total_R > 0, largest_R + tl.log2(found_R), float("-inf"))
        tl.store(part_log_ptr + row_R, log_R, mask=is_real_R)
        part_ptrs_RC = part_out_ptr + row_R[:, None] * WIDTH + channels_C[None, :]
        tl.store(part_ptrs_RC, result_RC, mask=in_RC)


@triton.jit
def _join(
    part_out_ptr,
    part_log_ptr,
    out_ptr,
    where_ptr,
    heads,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The mean of a token's parts, each weighted by the sum of its softmax."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(where_ptr + tile * 4 + 1).to(tl.int64)
    first = (tile.to(tl.int64) * heads + head) * PARTS
    parts_P = tl.arange(0, PARTS)
    channels_C = tl.arange(0, CHANNELS)
    in_C = channels_C < WIDTH
    log_P = tl.load(part_log_ptr + first + parts_P)
    weight_P = tl.exp2(log_P - tl.max(log_P, 0))  # a token sees itself, so one part is not empty
    part_ptrs_PC = part_out_ptr + (first + parts_P)[:, None] * WIDTH + channels_C[None, :]
    part_PC = tl.load(part_ptrs_PC, mask=in_C[None, :], other=0.0)
    mean_C = tl.sum(part_PC * weight_P[:, None], 0) / tl.sum(weight_P, 0)
    out_ptrs_C = out_ptr + (token * heads + head) * WIDTH + channels_C
    tl.store(out_ptrs_C, mean_C.to(out_ptr.dtype.element_ty), mask=in_C)
