"""What the halves of a layer compute in one step, over a cache in blocks: in torch's operations.

Each half returns what it adds to the residual stream, summed over the heads, columns or experts
that this rank holds; whoever calls it adds up the ranks. A half of which a rank holds nothing
returns zeros.

The cache of a layer is two pools, keys and values, each (blocks, G, P, C).

Shapes.  T tokens of the step, sequence by sequence    S sequences    D model width
         N rows of scores asked for    V vocabulary, v of it this rank's    C head width
         H query heads and G key-value heads held here    P positions of a block
         B sequences attended together, t new tokens of each, L positions attended to
         E experts    e held here    K experts a token    F inner width
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.model.norm import RMSNorm
from moesaic.model.rope import rope_frequencies, rotate
from moesaic.moe.dispatch import combine, gather, plan_dispatch
from moesaic.moe.experts import grouped_swiglu
from moesaic.moe.router import Router, sum_to_one
from moesaic.planning.serving.layout import ServeLayout
from moesaic.planning.split import Span
from moesaic.quantization.fp8 import FP8_MAX
from moesaic.serving.execution.batch import Batch, Chunk
from moesaic.serving.execution.weights import (
    DTYPES,
    AttentionWeights,
    Matrix,
    MoEWeights,
    Network,
    RankReader,
)
from moesaic.spec import ModelSpec

_HEAD_ROWS = 8192
"""Rows of the head that are widened at a time."""


class Pools(NamedTuple):
    """The cache of one layer on one rank."""

    k: Tensor
    v: Tensor


def allocate_cache(
    layout: ServeLayout, rank: int, num_blocks: int, device: torch.device | str = "cpu"
) -> list[Pools]:
    """Empty pools of every layer, as many heads in each as this rank holds there."""
    spec, plan = layout.spec, layout.plan
    pools = []
    for layer in range(spec.num_layers):
        start, end = layout.layer(rank, layer).kv_heads
        shape = (num_blocks, end - start, plan.block_tokens, spec.head_dim)
        # Zeros: a row that was never written is masked out, but NaN times 0 is NaN.
        pools.append(
            Pools(*(torch.zeros(shape, dtype=DTYPES[plan.kv_cache], device=device) for _ in "kv"))
        )
    return pools


class Together(NamedTuple):
    """Sequences of a step that are attended to in one call, each with as many new tokens."""

    tokens_Bt: Tensor
    """Which of the step's tokens they are."""
    tables_Bn: Tensor
    """Their blocks; block 0 stands for none."""
    masks: dict[int | None, Tensor | None]
    """Where they may look, by window, (B, 1, t, L); None: plain causal attention says the same."""


@dataclass(frozen=True)
class Step:
    """Where the tokens of one step stand; the same for every layer."""

    tokens_T: Tensor
    """Token ids, int64."""
    positions_T: Tensor
    """Their positions, int64."""
    cos_TC: Tensor
    """Cosines and sines of each token's rope angles, float32."""
    sin_TC: Tensor
    starts_S: Tensor
    """Position of each sequence's first new token, int64."""
    counts_S: Tensor
    """New tokens of each sequence, int64."""
    tables_SB: Tensor
    """Blocks of each sequence, int32, the shorter tables filled up with 0."""
    wanted_N: Tensor
    """The tokens of which scores are wanted."""
    blocks_T: Tensor
    """The block that each token is written to, int64."""
    rows_T: Tensor
    """The row of that block, int64."""
    chunks: tuple[Chunk, ...]
    block_tokens: int
    _groups: list[Together] = field(default_factory=list)

    @classmethod
    def of(
        cls, batch: Batch, *, frequencies: Tensor, block_tokens: int, device: torch.device
    ) -> Step:
        """Lay a batch out.

        Args:
            batch: What is asked.
            frequencies: Of rope, (C / 2,), float32.
            block_tokens: P.
            device: Where to compute.
        """
        chunks = batch.chunks
        tables = [chunk.blocks[: -(-chunk.end // block_tokens)] for chunk in chunks]
        longest = max(map(len, tables))
        positions = [p for chunk in chunks for p in range(chunk.start, chunk.end)]
        blocks = [
            table[p // block_tokens]
            for chunk, table in zip(chunks, tables, strict=True)
            for p in range(chunk.start, chunk.end)
        ]
        ends = itertools.accumulate(len(chunk.tokens) for chunk in chunks)
        wanted = [
            token
            for chunk, end in zip(chunks, ends, strict=True)
            for token in range(end - chunk.logits, end)
        ]

        def numbers(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        positions_T = numbers(positions)
        angles_TC = torch.outer(positions_T.float(), frequencies).repeat(1, 2)
        filled = [number for table in tables for number in (*table, *(0,) * (longest - len(table)))]
        return cls(
            tokens_T=numbers([token for chunk in chunks for token in chunk.tokens]),
            positions_T=positions_T,
            cos_TC=angles_TC.cos(),
            sin_TC=angles_TC.sin(),
            starts_S=numbers([chunk.start for chunk in chunks]),
            counts_S=numbers([len(chunk.tokens) for chunk in chunks]),
            tables_SB=numbers(filled, torch.int32).view(len(chunks), longest),
            wanted_N=numbers(wanted),
            blocks_T=numbers(blocks),
            rows_T=positions_T % block_tokens,
            chunks=chunks,
            block_tokens=block_tokens,
        )

    def together(self, most_positions: int) -> list[Together]:
        """The sequences in groups: long chunks alone, single tokens as many as may be gathered.

        Args:
            most_positions: At most so many positions of all sequences of a group, padding
                counted, unless it is one sequence.
        """
        if not self._groups:
            ends = [0, *itertools.accumulate(len(chunk.tokens) for chunk in self.chunks)]
            singles = [s for s, chunk in enumerate(self.chunks) if len(chunk.tokens) == 1]
            singles.sort(key=lambda s: self.chunks[s].end)
            members: list[int] = []
            for s in reversed(singles):  # the longest first: it says how long the others' rows are
                longest = self.chunks[(members or [s])[0]].end
                if members and (len(members) + 1) * longest > most_positions:
                    self._groups.append(self._together(members, ends))
                    members = []
                members.append(s)
            if members:
                self._groups.append(self._together(members, ends))
            for s, chunk in enumerate(self.chunks):
                if len(chunk.tokens) > 1:
                    self._groups.append(self._together([s], ends))
        return self._groups

    def _together(self, members: list[int], ends: list[int]) -> Together:
        first = self.chunks[members[0]]
        blocks = -(-first.end // self.block_tokens)
        tokens = [range(ends[s], ends[s + 1]) for s in members]
        device = self.tokens_T.device
        return Together(
            tokens_Bt=torch.tensor([list(span) for span in tokens], device=device),
            tables_Bn=self.tables_SB[members, :blocks].long(),
            masks={},
        )


class Layers(Protocol):
    """A rank's part of a model. Tensors are on the device of the layers."""

    device: torch.device

    def embed(self, step: Step) -> Tensor:
        """Vectors of the step's tokens, (T, D); zeros for those of other ranks."""

    def attend(self, layer: int, x_TD: Tensor, step: Step, pools: Pools) -> Tensor:
        """First half of a layer; writes the new keys and values."""

    def feed_forward(self, layer: int, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Second half of a layer, and the experts of each token, (T, K), where it is an MoE."""

    def logits(self, x_ND: Tensor) -> Tensor:
        """Scores over this rank's vocabulary, (N, v), float32."""

    def hidden(self, x_ND: Tensor) -> Tensor:
        """What the last norm makes of these rows, float32."""

    @property
    def nbytes(self) -> int:
        """Of all weights."""


def look_up(tokens_T: Tensor, rows_vD: Tensor, vocab: Span) -> Tensor:
    """Vectors of tokens, (T, D), from the rows of the vocabulary held here; zeros for others."""
    if rows_vD.shape[0] == 0:
        return rows_vD.new_zeros(tokens_T.shape[0], rows_vD.shape[1])
    is_ours_T = (tokens_T >= vocab[0]) & (tokens_T < vocab[1])
    ids_T = (tokens_T - vocab[0]).where(is_ours_T, 0)
    return F.embedding(ids_T, rows_vD).masked_fill_(~is_ours_T[:, None], 0)


class TorchLayers:
    """The layers in torch's own operations, on any device, in float32 or bfloat16.

    Args:
        reader: The weights of this rank.
        device: Where they go.
    """

    def __init__(self, reader: RankReader, device: torch.device | str = "cpu") -> None:
        self.spec = spec = reader.spec
        self.device = torch.device(device)
        self.dtype = reader.dtype
        self._held: list[Tensor] = []
        """Every weight once."""
        self._vocab = reader.layout.vocab.spans[reader.rank]
        self._embedding = self._keep(reader.embedding())
        self._norm = self._norm_of(reader.norm())
        self._head = self._embedding if spec.tied_embeddings else self._keep(reader.head())
        self._attention: list[_Attention] = []
        self._feed_forward: list[_Dense | _MoE] = []
        for layer in range(spec.num_layers):
            shard = reader.shard(layer)
            group_heads = _heads_of_a_group(shard.heads, shard.kv_heads)
            self._attention.append(
                _Attention(self, reader.attention(layer), spec.window_of(layer), group_heads)
            )
            if spec.is_moe_layer(layer):
                self._feed_forward.append(_MoE(self, reader, layer))
            else:
                weights = reader.dense(layer)
                norm, network = self._norm_of(weights.norm_D), self._network(weights.network)
                self._feed_forward.append(_Dense(norm, network))

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return sum(tensor.nbytes for tensor in self._held)

    def embed(self, step: Step) -> Tensor:
        """As `Layers.embed`."""
        return look_up(step.tokens_T, self._embedding, self._vocab)

    def attend(self, layer: int, x_TD: Tensor, step: Step, pools: Pools) -> Tensor:
        """As `Layers.attend`."""
        return self._attention[layer].forward(x_TD, step, pools)

    def feed_forward(self, layer: int, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Layers.feed_forward`."""
        return self._feed_forward[layer].forward(x_TD)

    def logits(self, x_ND: Tensor) -> Tensor:
        """As `Layers.logits`."""
        hidden_ND = self.hidden(x_ND)
        if self._head.dtype == torch.float32:
            return F.linear(hidden_ND, self._head)
        # In bfloat16 a score near 25 is known to 0.1 only, and the best two are often nearer.
        parts = [F.linear(hidden_ND, rows.float()) for rows in self._head.split(_HEAD_ROWS)]
        return torch.cat(parts, dim=-1) if parts else hidden_ND.new_zeros(x_ND.shape[0], 0)

    def hidden(self, x_ND: Tensor) -> Tensor:
        """As `Layers.hidden`."""
        normed_ND: Tensor = self._norm(x_ND)
        return normed_ND.float()

    def _keep(self, tensor: Tensor) -> Tensor:
        kept = tensor.to(self.device)
        self._held.append(kept)
        return kept

    def _norm_of(self, weight: Tensor) -> RMSNorm:
        norm = RMSNorm(weight.shape[0], self.spec.norm_eps)
        norm.weight = _fixed(self._keep(weight))
        return norm

    def _matrix(self, matrix: Matrix | None) -> Matrix | None:
        if matrix is None:
            return None
        scale_O = None if matrix.scale_O is None else self._keep(matrix.scale_O)
        return Matrix(self._keep(matrix.data), scale_O)

    def _network(self, network: Network | None) -> Network | None:
        if network is None:
            return None
        w1, w3, w2 = (self._matrix(matrix) for matrix in network)
        assert w1 is not None and w3 is not None and w2 is not None  # noqa: PT018
        return Network(w1, w3, w2)


class _Attention:
    def __init__(
        self, layers: TorchLayers, weights: AttentionWeights, window: int | None, group_heads: int
    ) -> None:
        self.spec: ModelSpec = layers.spec
        self.window, self.group_heads = window, group_heads
        self.norm = layers._norm_of(weights.norm_D)
        self.qkv, self.out = layers._matrix(weights.qkv), layers._matrix(weights.out)
        self.qkv_bias_O, self.out_bias_D = (
            None if bias is None else layers._keep(bias)
            for bias in (weights.qkv_bias_O, weights.out_bias_D)
        )
        self.q_norm, self.k_norm = (
            None if weight is None else layers._norm_of(weight)
            for weight in (weights.q_norm_C, weights.k_norm_C)
        )

    def forward(self, x_TD: Tensor, step: Step, pools: Pools) -> Tensor:
        if self.qkv is None or self.out is None:
            y_TD = torch.zeros_like(x_TD)
            return y_TD if self.out_bias_D is None else y_TD + self.out_bias_D.to(x_TD.dtype)
        width, kv_heads = self.spec.head_dim, pools.k.shape[1]
        keys = kv_heads * width
        rows_TO = _linear(self.norm(x_TD), self.qkv, self.qkv_bias_O)
        q_THC, k_TGC, v_TGC = (
            part.unflatten(-1, (-1, width))
            for part in rows_TO.split([rows_TO.shape[1] - 2 * keys, keys, keys], dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_THC, k_TGC = self.q_norm(q_THC), self.k_norm(k_TGC)
        q_THC, k_TGC = (
            rotate(part.transpose(0, 1), step.cos_TC, step.sin_TC).transpose(0, 1)
            for part in (q_THC, k_TGC)
        )
        for pool, new_TGC in ((pools.k, k_TGC), (pools.v, v_TGC)):
            pool[step.blocks_T, :, step.rows_T] = _to_cache(new_TGC, pool.dtype)
        y_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
        for group in step.together(self.spec.max_positions):
            y_THC[group.tokens_Bt] = self._look(q_THC[group.tokens_Bt], step, group, pools)
        return _linear(y_THC.flatten(1), self.out, self.out_bias_D)

    def _look(self, q_BtHC: Tensor, step: Step, group: Together, pools: Pools) -> Tensor:
        k_BGLC, v_BGLC = (
            # (B, n, G, P, C) -> (B, G, n P, C)
            pool[group.tables_Bn].transpose(1, 2).flatten(2, 3).to(q_BtHC.dtype)
            for pool in pools
        )
        length = k_BGLC.shape[2]
        if q_BtHC.shape[1] > 1:  # one sequence: what lies behind its end need not be looked at
            length = int(step.positions_T[group.tokens_Bt[0, -1]]) + 1
            k_BGLC, v_BGLC = k_BGLC[:, :, :length], v_BGLC[:, :, :length]
        if self.window not in group.masks:
            positions_Bt = step.positions_T[group.tokens_Bt]
            group.masks[self.window] = _mask(positions_Bt, length, self.window)
        mask = group.masks[self.window]
        y_BHtC = F.scaled_dot_product_attention(
            q_BtHC.transpose(1, 2),
            k_BGLC,
            v_BGLC,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.group_heads > 1,
        )
        return y_BHtC.transpose(1, 2)


class _Dense:
    def __init__(self, norm: RMSNorm, network: Network | None) -> None:
        self.norm, self.network = norm, network

    def forward(self, x_TD: Tensor) -> tuple[Tensor, None]:
        if self.network is None:
            return torch.zeros_like(x_TD), None
        return _swiglu(self.norm(x_TD), self.network), None


class _MoE:
    def __init__(self, layers: TorchLayers, reader: RankReader, layer: int) -> None:
        weights: MoEWeights = reader.moe(layer)
        assert layers.spec.moe is not None, f"{layer=}"
        self.moe = layers.spec.moe
        self.norm = layers._norm_of(weights.norm_D)
        with torch.device("meta"):
            self.router = Router(self.moe, layers.spec.hidden_dim)
        self.router.weight = _fixed(layers._keep(weights.router_ED))
        if weights.selection_bias_E is not None:
            bias_E = layers._keep(weights.selection_bias_E)
            self.router.register_buffer("e_score_correction_bias", bias_E)
        self.held = weights.experts
        self.shared = layers._network(weights.shared)
        self.shared_gate_D = None
        if weights.shared_gate_D is not None:
            self.shared_gate_D = layers._keep(weights.shared_gate_D)
        experts = [reader.expert(layer, expert) for expert in self.held]
        self.w1, self.w3, self.w2 = (layers._matrix(_stack(experts, part)) for part in range(3))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        normed_TD: Tensor = self.norm(x_TD)
        routed = self.router(normed_TD)
        gates_TK = routed.gates_TK
        if self.moe.renormalize and x_TD.dtype == torch.float32:
            gates_TK = sum_to_one(gates_TK)
        y_TD = self._experts(normed_TD, routed.experts_TK, gates_TK)
        if self.shared is not None and self.shared_gate_D is not None:
            gate_weight_1D = self.shared_gate_D[None].to(x_TD.dtype)
            gate_T1 = F.linear(normed_TD, gate_weight_1D).sigmoid()
            y_TD = y_TD + gate_T1 * _swiglu(normed_TD, self.shared)
        return y_TD, routed.experts_TK

    def _experts(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        if self.w1 is None or self.w3 is None or self.w2 is None:
            return torch.zeros_like(x_TD)
        count = len(self.held)
        keep_TK = None
        if count < self.moe.num_experts:
            experts_TK = experts_TK - self.held.start
            keep_TK = (experts_TK >= 0) & (experts_TK < count)
        plan = plan_dispatch(experts_TK, num_experts=count, keep_TK=keep_TK)
        x_ND = gather(x_TD, plan)
        if self.w1.scale_O is None:
            y_ND = grouped_swiglu(x_ND, plan.counts_E, self.w1.data, self.w3.data, self.w2.data)
        else:
            y_ND = torch.empty_like(x_ND)
            start = 0
            for expert, rows in enumerate(plan.counts_E.tolist()):
                if rows:
                    part = x_ND[start : start + rows]
                    network = Network(*(_of(w, expert) for w in (self.w1, self.w3, self.w2)))
                    y_ND[start : start + rows] = _swiglu(part, network)
                start += rows
        return combine(y_ND, gates_TK, plan)


def _linear(x_TI: Tensor, matrix: Matrix, bias_O: Tensor | None = None) -> Tensor:
    # 8-bit numbers are exact in bfloat16, and the scale multiplies the sum.
    y_TO = F.linear(x_TI, matrix.data.to(x_TI.dtype))
    if matrix.scale_O is not None:
        y_TO = y_TO * matrix.scale_O
    if bias_O is not None:
        y_TO = y_TO + bias_O
    return y_TO.to(x_TI.dtype)


def _swiglu(x_TD: Tensor, network: Network) -> Tensor:
    h_TF = F.silu(_linear(x_TD, network.w1)) * _linear(x_TD, network.w3)
    return _linear(h_TF, network.w2)


def _stack(experts: list[Network], part: int) -> Matrix | None:
    """One of the three matrices of all experts."""
    if not experts:
        return None
    matrices = [network[part] for network in experts]
    scales = [matrix.scale_O for matrix in matrices if matrix.scale_O is not None]
    data = torch.stack([matrix.data for matrix in matrices])
    return Matrix(data, torch.stack(scales) if scales else None)


def _of(stack: Matrix, expert: int) -> Matrix:
    return Matrix(stack.data[expert], None if stack.scale_O is None else stack.scale_O[expert])


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _heads_of_a_group(heads: tuple[int, int], kv_heads: tuple[int, int]) -> int:
    """Query heads of each key-value head here, the same for all of them."""
    count, groups = heads[1] - heads[0], kv_heads[1] - kv_heads[0]
    assert count % max(groups, 1) == 0, f"{heads=}, {kv_heads=}"
    return count // groups if groups else 0


def _to_cache(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        # No scale: what e4m3 costs (0.009 nats on the demo's MoE) it costs by its three bits of
        # mantissa, and a scale that brings small values into its range changes that by less than
        # the error of the measurement. What is too large becomes the largest number, not NaN.
        rows = rows.float().clamp(-FP8_MAX, FP8_MAX)
    return rows.to(dtype)


def _mask(positions_Bt: Tensor, length: int, window: int | None) -> Tensor | None:
    """Where each token may look among `length` positions, (B, 1, t, L)."""
    batch, new = positions_Bt.shape
    if batch == 1 and new == length and (window is None or window >= length):
        return None
    keys_L = torch.arange(length, device=positions_Bt.device)
    distance_BtL = positions_Bt[:, :, None] - keys_L
    mask_BtL = distance_BtL >= 0
    if window is not None:
        mask_BtL &= distance_BtL < window
    return mask_BtL[:, None]


def frequencies_of(spec: ModelSpec, device: torch.device | str = "cpu") -> Tensor:
    """Of rope, (C / 2,), float32.

    One table serves all positions: `dynamic` scaling begins to stretch beyond max_positions, where
    no step goes.
    """
    return rope_frequencies(spec.rope, spec.head_dim, 0).to(device)
