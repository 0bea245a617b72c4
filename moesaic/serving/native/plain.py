"""What the kernels compute, in torch's own operations: the reference, and the way without them.

Roundings stand where the C++ has them: activations are bfloat16 wherever they enter a matrix
product, products are summed in float32, and norms, rope, softmax and gates are float32.

Shapes.  T tokens, t of one sequence    S sequences    D model width    I, O of a matrix
         H query heads, R of one key-value head    G key-value heads    C head width
         L positions attended to    B blocks    P positions of a block
         E experts    K experts a token    F inner width
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.moe.router import normalise_logits
from moesaic.quantization import fp8, int8
from moesaic.spec import MoESpec

Kind = Literal["bfloat16", "float8", "int8"]

KINDS: tuple[Kind, ...] = ("bfloat16", "float8", "int8")

DTYPES: dict[Kind, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def stored(weight_OI: Tensor, kind: Kind, scale_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A weight in the type of `kind`, contiguous, and the float32 scale of each row, (O,)."""
    weight_OI = weight_OI.detach()
    if scale_O is not None:
        assert weight_OI.dtype == DTYPES[kind], f"{weight_OI.dtype=} has a scale, {kind=}"
        return weight_OI.contiguous(), scale_O.detach().float().reshape(-1).contiguous()
    if kind == "bfloat16":
        return weight_OI.to(torch.bfloat16).contiguous(), None
    quantize = (fp8 if kind == "float8" else int8).quantize_per_channel
    data, scale_O1 = quantize(weight_OI)
    return data.contiguous(), scale_O1.reshape(-1)


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    scale_O: Tensor | None,
    bias_O: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x (scale * weight)^T + bias."""
    y_TO = functional.linear(x_TI.to(torch.bfloat16).float(), weight_OI.float())
    if scale_O is not None:
        y_TO *= scale_O
    if bias_O is not None:
        y_TO += bias_O
    return y_TO.to(out_dtype)


def experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    gates_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    scale13: Tensor | None,
    scale2: Tensor | None,
) -> Tensor:
    """Sum of gate * expert(x) over the chosen experts from 0 to those held, (T, D), float32."""
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
    for expert in range(w13.shape[0]):
        tokens, choices = torch.where(experts_TK == expert)
        if tokens.numel() == 0:
            continue
        h1, h3 = (
            linear(
                x_TD[tokens],
                w13[expert, branch],
                None if scale13 is None else scale13[expert, branch],
                None,
                torch.float32,
            )
            for branch in (0, 1)
        )
        y_nD = linear(
            (functional.silu(h1) * h3).to(torch.bfloat16),
            w2[expert],
            None if scale2 is None else scale2[expert],
            None,
            torch.float32,
        )
        y_TD.index_add_(0, tokens, y_nD * gates_TK[tokens, choices, None].float())
    return y_TD


def norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, float32."""
    wide_TD = x_TD.float()
    return wide_TD * torch.rsqrt(wide_TD.square().mean(dim=-1, keepdim=True) + eps) * weight_D


def choose(
    x_TD: Tensor, router_ED: Tensor, bias_E: Tensor | None, moe: MoESpec
) -> tuple[Tensor, Tensor]:
    """Gates and experts of each token, best first, as `moesaic.moe.router` defines them."""
    logits_TE = functional.linear(x_TD.float(), router_ED)
    if moe.gate_norm_scale is not None:
        logits_TE = normalise_logits(logits_TE, moe.gate_norm_scale, moe.gate_norm_eps)
    probs_TE = logits_TE.softmax(dim=-1)
    biased_TE = probs_TE if bias_E is None else probs_TE + bias_E
    experts_TK = biased_TE.topk(moe.top_k, dim=-1).indices
    gates_TK = probs_TE.gather(-1, experts_TK)
    if moe.renormalize:
        tiny = torch.finfo(torch.float32).tiny
        gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True).clamp_min(tiny)
    return gates_TK, experts_TK


def rotate(x_THC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rope, half-split, float32."""
    first, second = x_THC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_THC * cos_TC[:, None] + turned * sin_TC[:, None]


def write(pool: Tensor, blocks_t: Tensor, rows_t: Tensor, x_tGC: Tensor) -> None:
    """Write keys or values of t tokens into a pool (blocks, G, P, C), in its type."""
    x_tGC = x_tGC.to(torch.bfloat16)
    if pool.dtype == torch.float8_e4m3fn:
        # What is too large for e4m3 becomes its largest number; the cast would make it NaN.
        x_tGC = x_tGC.float().clamp(-fp8.FP8_MAX, fp8.FP8_MAX).to(pool.dtype).view(torch.uint8)
        pool = pool.view(torch.uint8)
    pool[blocks_t, :, rows_t] = x_tGC.to(pool.dtype)


def read(pool: Tensor, blocks_B: Tensor) -> Tensor:
    """Blocks of a pool side by side, (G, B P, C), float32."""
    if pool.dtype == torch.float8_e4m3fn:
        parts = pool.view(torch.uint8)[blocks_B].view(pool.dtype).float()
    else:
        # Products take bfloat16 factors, whatever the pool keeps.
        parts = pool[blocks_B].to(torch.bfloat16).float()
    return parts.transpose(0, 1).flatten(1, 2)


def attend(
    q_tHC: Tensor,
    k_GLC: Tensor,
    v_GLC: Tensor,
    positions_t: Tensor,
    *,
    group_sizes: tuple[int, ...],
    window: int | None,
) -> Tensor:
    """Causal attention of one sequence's queries over its cached positions, (t, H, C), float32."""
    heads = torch.repeat_interleave(
        torch.arange(len(group_sizes)), torch.tensor(group_sizes, dtype=torch.int64)
    )
    distance_tL = positions_t[:, None] - torch.arange(k_GLC.shape[1])[None, :]
    mask_tL = distance_tL >= 0
    if window is not None:
        mask_tL &= distance_tL < window
    y_HtC = functional.scaled_dot_product_attention(
        q_tHC.to(torch.bfloat16).float().transpose(0, 1)[None],
        k_GLC[heads][None],
        v_GLC[heads][None],
        attn_mask=mask_tL,
    )[0]
    return y_HtC.transpose(0, 1)
