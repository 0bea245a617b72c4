"""Causal self-attention with grouped queries.

Shapes.  B sequences    S new positions, s of them this rank's    D model width
         L positions attended to (cached ones and new)
         H query heads and G key-value heads that this rank holds    C head width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.model.cache import KVCache
from moesaic.model.linear import Linear, SummedLinear
from moesaic.model.norm import RMSNorm
from moesaic.model.rope import rotate
from moesaic.parallel.collectives import gather
from moesaic.parallel.group import ALONE, Group
from moesaic.planning.split import Split
from moesaic.spec import ModelSpec


class Attention(nn.Module):
    """Projections, optional per-head norms, rope, scaled dot-product attention, output.

    Args:
        spec: The model.
        kv_heads: Key-value heads that this rank holds, with their query heads; None: all. A
            rank may hold none.
        group: Ranks that hold the others.
    """

    def __init__(self, spec: ModelSpec, kv_heads: int | None = None, group: Group = ALONE) -> None:
        super().__init__()
        kv_heads = spec.num_kv_heads if kv_heads is None else kv_heads
        kv_dim = kv_heads * spec.head_dim
        query_dim = kv_dim * (spec.num_heads // spec.num_kv_heads)
        self.group = group
        self.head_dim = spec.head_dim
        self.q_proj = Linear(spec.hidden_dim, query_dim, bias=spec.qkv_bias)
        self.k_proj = Linear(spec.hidden_dim, kv_dim, bias=spec.qkv_bias)
        self.v_proj = Linear(spec.hidden_dim, kv_dim, bias=spec.qkv_bias)
        self.o_proj = SummedLinear(query_dim, spec.hidden_dim, bias=spec.out_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None

    def forward(
        self,
        x_BsD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        parts: Split | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Mix positions.

        Args:
            x_BsD: Normed activations of this rank's positions, (B, s, D).
            rope: Cosines and sines of the S positions, each (S, C).
            mask: True where a query may look, broadcastable to (B, 1, S, L); None means
                plain causal attention, or everything cached when S is 1.
            parts: Which of the S positions are which rank's; None: all are this one's.
            cache: Where earlier keys and values are, and these go.
            layer: Which part of the cache is this layer's.

        Returns:
            (B, s, D).
        """
        parts = Split.from_counts([x_BsD.shape[1]]) if parts is None else parts
        x_BSD = gather(x_BsD, parts, self.group, dim=1)
        batch, length, _ = x_BSD.shape
        heads, kv_heads = (
            projection.weight.shape[0] // self.head_dim for projection in (self.q_proj, self.k_proj)
        )
        q_BSHC = self.q_proj(x_BSD).view(batch, length, heads, self.head_dim)
        k_BSGC = self.k_proj(x_BSD).view(batch, length, kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHC, k_BSGC = self.q_norm(q_BSHC), self.k_norm(k_BSGC)
        q_BHSC = rotate(q_BSHC.transpose(1, 2), *rope)
        k_BGLC = rotate(k_BSGC.transpose(1, 2), *rope)
        v_BGLC = self.v_proj(x_BSD).view(k_BSGC.shape).transpose(1, 2)
        if cache is not None:
            k_BGLC, v_BGLC = cache.extend(layer, k_BGLC, v_BGLC)
        if heads == 0:
            y_BHSC = q_BHSC + k_BGLC + v_BGLC  # all empty, but part of the graph
        else:
            y_BHSC = F.scaled_dot_product_attention(
                q_BHSC,
                k_BGLC,
                v_BGLC,
                attn_mask=mask,
                is_causal=mask is None and length > 1,
                enable_gqa=heads != kv_heads,
            )
        y_BSF = y_BHSC.transpose(1, 2).reshape(batch, length, heads * self.head_dim)
        return self.o_proj(y_BSF, parts, self.group)  # type: ignore[no-any-return]


def attention_mask(
    positions_S: Tensor,
    length: int,
    *,
    window: int | None,
    documents_BS: Tensor | None,
) -> Tensor | None:
    """Where each of S queries may look among `length` positions.

    Args:
        positions_S: Position of each query; the last is length - 1.
        length: Positions attended to, from 0.
        window: Only this many latest positions, the query's own included; None for all.
        documents_BS: Tokens see only tokens of an equal id; given only without a cache.

    Returns:
        (B or 1, 1, S, length) bool, or None where plain causal attention says the same.
    """
    new = positions_S.shape[0]
    if window is not None and window >= length:
        window = None
    if documents_BS is not None and bool((documents_BS == documents_BS[:, :1]).all()):
        documents_BS = None
    if window is None and documents_BS is None and (new == 1 or new == length):
        return None
    keys_L = torch.arange(length, device=positions_S.device)
    distance_SL = positions_S[:, None] - keys_L[None, :]
    mask_SL = distance_SL >= 0
    if window is not None:
        mask_SL &= distance_SL < window
    mask = mask_SL[None, None]
    if documents_BS is not None:
        same_BSL = documents_BS[:, :, None] == documents_BS[:, None, :]
        mask = mask & same_BSL[:, None]
    return mask
