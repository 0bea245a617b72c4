"""Half layers of a decoder, each in one call, so that a step of thirty layers costs Python little.

    AttentionHalf   norm, q k v (+ bias), q/k norms, rope, write to the cache, attend, project
    ExpertsHalf     norm, router, experts held here, shared expert
    DenseHalf       norm, SwiGLU
    HeadHalf        norm, logits in float32
    WholeLayers     both halves of every layer, for a rank that holds all of them

Each half returns what the residual stream adds, and leaves the stream alone. With several ranks the
results are partial sums, each over the heads, columns or experts that a rank holds; a bias of the
output projection must be given to one rank only. A rank that holds nothing of a layer returns
zeros.

Activations come in bfloat16 or float32 and go out in the same type. Weights decide whether C++ or
torch computes: all matrices of a half are packed the same way (`native`).

The cache of a layer, keys and values alike: (blocks, G, P, C), bfloat16, float8_e4m3fn or float32.

Shapes.  T tokens of the step, sequence by sequence    S sequences    D model width    V vocabulary
         H query heads and G key-value heads held here    C head width
         B blocks of the longest table    P positions of a block
         E experts of the layer    K experts a token    F inner width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.serving.native import plain
from moesaic.serving.native.matrices import PackedExperts, PackedLinear
from moesaic.spec import MoESpec


@dataclass(frozen=True)
class Step:
    """Where the tokens of one step stand; the same for every layer.

    Position p of sequence s lies in block tables_SB[s, p // P], row p % P. Blocks that hold the
    new positions must be in the table and belong to this sequence alone.
    """

    starts_S: Tensor
    """Position of each sequence's first new token, int64."""

    counts_S: Tensor
    """New tokens of each sequence, int64, at least 1; they sum to T."""

    tables_SB: Tensor
    """Blocks of each sequence, int32; entries behind its last block may hold anything."""

    cos_TC: Tensor
    """Cosines of each token's rope angles, float32, as `model.rope.rope_tables` makes them."""

    sin_TC: Tensor
    """Their sines."""


class AttentionHalf:
    """The attention half of a layer.

    Args:
        norm_D: Weight of the norm, kept in float32.
        norm_eps: Its epsilon.
        qkv: Query heads, then key heads, then value heads, (H C + 2 G C, D), with their bias. None
            where this rank holds no head; then `out` is None, too.
        out: Output projection, (D, H C).
        group_sizes: Query heads of each key-value head held here; they need not be equal.
        head_dim: C.
        q_norm_C: Weight of the norm over each query head; None for none.
        k_norm_C: The same for keys.
        window: A token attends to this many latest positions, itself included; None for all.
    """

    def __init__(
        self,
        *,
        norm_D: Tensor,
        norm_eps: float,
        qkv: PackedLinear | None,
        out: PackedLinear | None,
        group_sizes: tuple[int, ...],
        head_dim: int,
        q_norm_C: Tensor | None = None,
        k_norm_C: Tensor | None = None,
        window: int | None = None,
    ) -> None:
        self.norm_D, self.norm_eps = _float32(norm_D), norm_eps
        self.qkv, self.out = qkv, out
        self.group_sizes, self.head_dim, self.window = group_sizes, head_dim, window
        self.q_norm_C, self.k_norm_C = _float32(q_norm_C), _float32(k_norm_C)
        self._native: Any = None
        if qkv is not None and out is not None and qkv.native:
            self._native = torch.classes.moesaic_serving.AttentionHalf(
                *(self.norm_D, norm_eps, qkv.handle, out.handle, list(group_sizes), head_dim),
                *(self.q_norm_C, self.k_norm_C, 0 if window is None else window),
            )

    def __call__(self, x_TD: Tensor, step: Step, k_pool: Tensor, v_pool: Tensor) -> Tensor:
        """(T, D) -> (T, D); writes the new keys and values into the pools."""
        if self.qkv is None or self.out is None:
            return torch.zeros_like(x_TD)
        if self._native is not None:
            y_TD: Tensor = self._native.forward(
                *(x_TD, step.starts_S, step.counts_S, step.tables_SB, step.cos_TC, step.sin_TC),
                *(k_pool, v_pool),
            )
            return y_TD
        return self._forward(x_TD, step, k_pool, v_pool, self.qkv, self.out)

    def _forward(
        self,
        x_TD: Tensor,
        step: Step,
        k_pool: Tensor,
        v_pool: Tensor,
        qkv: PackedLinear,
        out: PackedLinear,
    ) -> Tensor:
        heads, kv_heads, width = sum(self.group_sizes), len(self.group_sizes), self.head_dim
        rows = qkv(plain.norm(x_TD, self.norm_D, self.norm_eps), torch.float32)
        q_THC, k_TGC, v_TGC = (
            part.unflatten(-1, (-1, width))
            for part in rows.split([heads * width, kv_heads * width, kv_heads * width], dim=-1)
        )
        if self.q_norm_C is not None:
            q_THC = plain.norm(q_THC, self.q_norm_C, self.norm_eps)
        if self.k_norm_C is not None:
            k_TGC = plain.norm(k_TGC, self.k_norm_C, self.norm_eps)
        q_THC = plain.rotate(q_THC, step.cos_TC, step.sin_TC)
        k_TGC = plain.rotate(k_TGC, step.cos_TC, step.sin_TC)
        size = k_pool.shape[2]
        y_THC = torch.empty_like(q_THC)
        begin = 0
        for start, count, table_B in zip(
            step.starts_S.tolist(), step.counts_S.tolist(), step.tables_SB, strict=True
        ):
            end = begin + count
            positions = torch.arange(start, start + count)
            blocks = table_B[: -(-(start + count) // size)].long()
            for pool, rows_TGC in ((k_pool, k_TGC), (v_pool, v_TGC)):
                plain.write(pool, blocks[positions // size], positions % size, rows_TGC[begin:end])
            k_GLC, v_GLC = (
                plain.read(pool, blocks)[:, : start + count] for pool in (k_pool, v_pool)
            )
            y_THC[begin:end] = plain.attend(
                *(q_THC[begin:end], k_GLC, v_GLC, positions),
                group_sizes=self.group_sizes,
                window=self.window,
            )
            begin = end
        return out(y_THC.flatten(1), x_TD.dtype)


class ExpertsHalf:
    """The mixture of experts of a layer.

    Args:
        norm_D: Weight of the norm, kept in float32.
        norm_eps: Its epsilon.
        router_ED: Weight of the router over all experts, kept in float32.
        moe: How experts are chosen.
        bias_E: Added for selection only; None for none.
        experts: Those held here, or their columns; may hold none.
        first_expert: Which of all experts is the first one here.
        shared: Columns of the shared expert held here, as one expert; None for none.
        shared_gate_D: Weight of its sigmoid gate; None leaves it ungated.
    """

    def __init__(
        self,
        *,
        norm_D: Tensor,
        norm_eps: float,
        router_ED: Tensor,
        moe: MoESpec,
        bias_E: Tensor | None = None,
        experts: PackedExperts,
        first_expert: int = 0,
        shared: PackedExperts | None = None,
        shared_gate_D: Tensor | None = None,
    ) -> None:
        self.norm_D, self.norm_eps = _float32(norm_D), norm_eps
        self.router_ED, self.bias_E, self.moe = _float32(router_ED), _float32(bias_E), moe
        self.experts, self.first_expert, self.shared = experts, first_expert, shared
        self.shared_gate_D = None if shared_gate_D is None else _float32(shared_gate_D.reshape(-1))
        self._native: Any = None
        if experts.native:
            norm_scale = 0.0 if moe.gate_norm_scale is None else moe.gate_norm_scale
            self._native = torch.classes.moesaic_serving.ExpertsHalf(
                *(self.norm_D, norm_eps, self.router_ED, self.bias_E, moe.top_k, moe.renormalize),
                *(norm_scale, moe.gate_norm_eps, experts.handle, first_expert),
                *(None if shared is None else shared.handle, self.shared_gate_D),
            )

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) -> (T, D), and the experts chosen, best first, (T, K), int64."""
        if self._native is not None:
            y_TD, experts_TK = self._native.forward(x_TD)
            return y_TD, experts_TK
        normed_TD = plain.norm(x_TD, self.norm_D, self.norm_eps).to(torch.bfloat16)
        gates_TK, experts_TK = plain.choose(normed_TD, self.router_ED, self.bias_E, self.moe)
        y_TD = self.experts(normed_TD, experts_TK, gates_TK, self.first_expert)
        if self.shared is not None:
            zeros_T1 = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64)
            gates_T1 = torch.ones(x_TD.shape[0], 1)
            if self.shared_gate_D is not None:
                gates_T1 = functional.linear(normed_TD.float(), self.shared_gate_D[None]).sigmoid()
            y_TD += self.shared(normed_TD, zeros_T1, gates_T1)
        return y_TD.to(x_TD.dtype), experts_TK


class DenseHalf:
    """The dense feed-forward network of a layer: its norm, and the columns held here."""

    def __init__(self, *, norm_D: Tensor, norm_eps: float, network: PackedExperts) -> None:
        self.norm_D, self.norm_eps, self.network = _float32(norm_D), norm_eps, network
        self._native: Any = None
        if network.native:
            self._native = torch.classes.moesaic_serving.DenseHalf(
                self.norm_D, norm_eps, network.handle
            )

    def __call__(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        if self._native is not None:
            y_TD: Tensor = self._native.forward(x_TD)
            return y_TD
        normed_TD = plain.norm(x_TD, self.norm_D, self.norm_eps).to(torch.bfloat16)
        zeros_T1 = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64)
        return self.network(normed_TD, zeros_T1, torch.ones(x_TD.shape[0], 1)).to(x_TD.dtype)


class WholeLayers:
    """All layers of a model in one call, where one rank holds all of it.

    Results are those of the halves one by one, but for one rounding: what a half adds meets the
    residual stream in float32.
    """

    def __init__(self, layers: Sequence[tuple[AttentionHalf, ExpertsHalf | DenseHalf]]) -> None:
        self.layers = layers
        self._native: Any = None
        if all(half._native is not None for pair in layers for half in pair):
            self._native = torch.classes.moesaic_serving.Layers()
            for first, second in layers:
                add = "add_dense" if isinstance(second, DenseHalf) else "add_experts"
                getattr(self._native, add)(first._native, second._native)

    def __call__(
        self, x_TD: Tensor, step: Step, k_pools: list[Tensor], v_pools: list[Tensor]
    ) -> list[Tensor]:
        """Add to the stream x_TD, in place, what every layer makes of it.

        Returns:
            The experts that each MoE layer chose, (T, K), int64.
        """
        if self._native is not None:
            chosen: list[Tensor] = self._native.forward(
                *(x_TD, step.starts_S, step.counts_S, step.tables_SB, step.cos_TC, step.sin_TC),
                *(k_pools, v_pools),
            )
            return chosen
        chosen = []
        for (attention, second), k_pool, v_pool in zip(self.layers, k_pools, v_pools, strict=True):
            x_TD += attention(x_TD, step, k_pool, v_pool)
            if isinstance(second, DenseHalf):
                x_TD += second(x_TD)
            else:
                y_TD, experts_TK = second(x_TD)
                x_TD += y_TD
                chosen.append(experts_TK)
        return chosen


class HeadHalf:
    """The last norm and the rows of the vocabulary held here."""

    def __init__(self, *, norm_D: Tensor, norm_eps: float, head: PackedLinear) -> None:
        self.norm_D, self.norm_eps, self.head = _float32(norm_D), norm_eps, head
        self._native: Any = None
        if head.native:
            self._native = torch.classes.moesaic_serving.HeadHalf(
                self.norm_D, norm_eps, head.handle
            )

    def __call__(self, x_ND: Tensor) -> Tensor:
        """(N, D) -> (N, V), float32."""
        if self._native is not None:
            logits_NV: Tensor = self._native.forward(x_ND)
            return logits_NV
        return self.head(plain.norm(x_ND, self.norm_D, self.norm_eps), torch.float32)


def _float32(weight: Tensor | None) -> Any:
    return None if weight is None else weight.detach().float().contiguous()
