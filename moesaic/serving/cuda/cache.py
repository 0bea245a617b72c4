"""Between the projection and attention, in one kernel: head norms, rope, and into the cache.

Shapes.  T tokens    H query heads and G key-value heads held here    C head width
         P positions of a block
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.quantization.fp8 import FP8_MAX


class Places(NamedTuple):
    """Where each token stands."""

    cos_TC: Tensor
    """Cosines of its rope angles, float32, the second half like the first."""
    sin_TC: Tensor
    blocks_T: Tensor
    """The block that its key and value are written to, any integers."""
    rows_T: Tensor
    """The row of that block."""


class HeadNorms(NamedTuple):
    """RMSNorm of every query and key head before rope."""

    q_C: Tensor
    k_C: Tensor
    eps: float


def rotate_and_store(
    qkv_TO: Tensor, places: Places, k_pool: Tensor, v_pool: Tensor, norms: HeadNorms | None = None
) -> Tensor:
    """Write keys and values of new tokens into the cache, and return the queries, (T, H, C).

    Args:
        qkv_TO: Query heads, then key heads, then value heads of each token, (T, (H + 2 G) C).
        places: Where the tokens stand.
        k_pool: Keys, (blocks, G, P, C); written.
        v_pool: Values, likewise. What is too large for e4m3 becomes its largest number.
        norms: Of the heads, where the model has them.
    """
    qkv_TO = qkv_TO.contiguous()
    tokens, rows = qkv_TO.shape
    _, kv_heads, block_tokens, width = k_pool.shape
    heads = rows // width - 2 * kv_heads
    q_THC = qkv_TO.new_empty(tokens, heads, width)
    if tokens:
        _rotate_and_store[(tokens, heads + 2 * kv_heads)](
            qkv_TO,
            *places,
            None if norms is None else norms.q_C,
            None if norms is None else norms.k_C,
            q_THC,
            k_pool,
            v_pool,
            heads,
            kv_heads,
            block_tokens,
            0.0 if norms is None else norms.eps,
            WIDTH=width,
            HALF=triton.next_power_of_2(width // 2),
            LARGEST=FP8_MAX if k_pool.dtype == torch.float8_e4m3fn else float("inf"),
            num_warps=1,  # a head is 64 to 128 numbers
        )
    return q_THC


@triton.jit
def _rotate_and_store(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    blocks_ptr,
    rows_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    heads,
    kv_heads,
    block_tokens,
    eps,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    LARGEST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    halves: tl.constexpr = WIDTH // 2
    channels_C = tl.arange(0, HALF)
    in_C = channels_C < halves
    from_ptr = qkv_ptr + (token * (heads + 2 * kv_heads) + head) * WIDTH + channels_C
    a_C = tl.load(from_ptr, mask=in_C, other=0.0).to(tl.float32)
    b_C = tl.load(from_ptr + halves, mask=in_C, other=0.0).to(tl.float32)
    if head < heads + kv_heads:
        if q_norm_ptr is not None:
            mean = (tl.sum(a_C * a_C, 0) + tl.sum(b_C * b_C, 0)) / WIDTH
            norm_ptr = k_norm_ptr
            if head < heads:
                norm_ptr = q_norm_ptr
            shrink = tl.rsqrt(mean + eps)
            a_C = a_C * shrink * tl.load(norm_ptr + channels_C, mask=in_C, other=0.0)
            b_C = b_C * shrink * tl.load(norm_ptr + halves + channels_C, mask=in_C, other=0.0)
            # The model's norm hands on numbers of the activations' type.
            a_C = a_C.to(qkv_ptr.dtype.element_ty).to(tl.float32)
            b_C = b_C.to(qkv_ptr.dtype.element_ty).to(tl.float32)
        cos_C = tl.load(cos_ptr + token * WIDTH + channels_C, mask=in_C, other=0.0)
        sin_C = tl.load(sin_ptr + token * WIDTH + channels_C, mask=in_C, other=0.0)
        turned_C = a_C * cos_C - b_C * sin_C
        b_C = b_C * cos_C + a_C * sin_C
        a_C = turned_C
    if head < heads:
        q_to_ptr = q_ptr + (token * heads + head) * WIDTH + channels_C
        tl.store(q_to_ptr, a_C.to(q_ptr.dtype.element_ty), mask=in_C)
        tl.store(q_to_ptr + halves, b_C.to(q_ptr.dtype.element_ty), mask=in_C)
    else:
        block = tl.load(blocks_ptr + token).to(tl.int64)
        row = tl.load(rows_ptr + token).to(tl.int64)
        pool_ptr = k_ptr
        kv_head = head - heads
        if kv_head >= kv_heads:
            pool_ptr = v_ptr
            kv_head -= kv_heads
        # Rounded to the activations' type first, as keys and values are where no cache is.
        a_C = a_C.to(qkv_ptr.dtype.element_ty).to(tl.float32)
        b_C = b_C.to(qkv_ptr.dtype.element_ty).to(tl.float32)
        a_C = tl.minimum(tl.maximum(a_C, -LARGEST), LARGEST)
        b_C = tl.minimum(tl.maximum(b_C, -LARGEST), LARGEST)
        pool_to_ptr = (
            pool_ptr + ((block * kv_heads + kv_head) * block_tokens + row) * WIDTH + channels_C
        )
        tl.store(pool_to_ptr, a_C.to(k_ptr.dtype.element_ty), mask=in_C)
        tl.store(pool_to_ptr + halves, b_C.to(k_ptr.dtype.element_ty), mask=in_C)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in x's dtype; torch has one kernel for each of these."""
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    tokens, width = x_TD.shape
    if tokens:
        step = min(1024, triton.next_power_of_2(width))
        _rms_norm[(tokens,)](x_TD, weight_D, y_TD, width, eps, STEP=step)
    return y_TD


@triton.jit
def _rms_norm(x_ptr, weight_ptr, y_ptr, width, eps, STEP: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns_S = tl.arange(0, STEP)
    squares_S = tl.zeros((STEP,), tl.float32)
    for start in range(0, width, STEP):
        in_S = start + columns_S < width
        x_S = tl.load(x_ptr + token * width + start + columns_S, mask=in_S, other=0.0)
        squares_S += x_S.to(tl.float32) * x_S.to(tl.float32)
    shrink = tl.rsqrt(tl.sum(squares_S, 0) / width + eps)
    for start in range(0, width, STEP):
        in_S = start + columns_S < width
        x_S = tl.load(x_ptr + token * width + start + columns_S, mask=in_S, other=0.0)
        weight_S = tl.load(weight_ptr + start + columns_S, mask=in_S, other=0.0)
        y_S = x_S.to(tl.float32) * shrink * weight_S.to(tl.float32)
        at_S = y_ptr + token * width + start + columns_S
        tl.store(at_S, y_S.to(y_ptr.dtype.element_ty), mask=in_S)
