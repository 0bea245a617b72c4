"""The layers over `serving.native`: packed weights, and each half of a layer in one call.

Whether C++ computes or, where it cannot, the torch path beside it, is `serving.native`'s business;
with `native` False these layers show what the kernels are meant to compute.

Shapes.  T tokens    D model width    N rows of scores    v vocabulary of this rank
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from moesaic.serving.execution.layers import Pools, Step, look_up
from moesaic.serving.execution.weights import Matrix, MoEWeights, Network, RankReader
from moesaic.serving.native import halves
from moesaic.serving.native.matrices import PackedExperts, PackedLinear
from moesaic.serving.native.plain import Kind


class NativeLayers:
    """A rank's part of a model in packed form, on a CPU, with activations in bfloat16.

    Args:
        reader: The weights of this rank.
        native: Whether for the C++ kernels; None: where they are available.
    """

    def __init__(self, reader: RankReader, *, native: bool | None = None) -> None:
        assert reader.dtype == torch.bfloat16, f"{reader.dtype=}"
        assert reader.kind != "float32", f"{reader.kind=}"
        self.spec = spec = reader.spec
        self.device = torch.device("cpu")
        self.kind: Kind = reader.kind
        self.native = native
        self.nbytes = 0
        """Of all weights."""
        self._vocab = reader.layout.vocab.spans[reader.rank]
        self._embedding = self._count(reader.embedding())
        self._norm_D = self._count(reader.norm())
        self._head = self._head_of(reader)
        self._attention: list[_Attention] = []
        self._feed_forward: list[_Dense | _Experts] = []
        for layer in range(spec.num_layers):
            self._attention.append(_Attention(self, reader, layer))
            kind = _Experts if spec.is_moe_layer(layer) else _Dense
            self._feed_forward.append(kind(self, reader, layer))
        self._step: tuple[Step, halves.Step] | None = None
        self._whole: halves.WholeLayers | None = None

    def through_all(
        self, x_TD: Tensor, step: Step, k_pools: list[Tensor], v_pools: list[Tensor]
    ) -> list[Tensor]:
        """Add what every layer makes of x_TD to it, in one call; for a rank that holds everything.

        Returns:
            The experts of each MoE layer, (T, K).
        """
        if self._whole is None:
            pairs = []
            for first, second in zip(self._attention, self._feed_forward, strict=True):
                assert second.half is not None, "this rank holds only a part"
                pairs.append((first.half, second.half))
            self._whole = halves.WholeLayers(pairs)
        return self._whole(x_TD, _native_step(step), k_pools, v_pools)

    def embed(self, step: Step) -> Tensor:
        """As `Layers.embed`."""
        return look_up(step.tokens_T, self._embedding, self._vocab)

    def attend(self, layer: int, x_TD: Tensor, step: Step, pools: Pools) -> Tensor:
        """As `Layers.attend`."""
        if self._step is None or self._step[0] is not step:
            self._step = step, _native_step(step)
        return self._attention[layer].forward(x_TD, self._step[1], pools)

    def feed_forward(self, layer: int, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Layers.feed_forward`."""
        return self._feed_forward[layer].forward(x_TD)

    def logits(self, x_ND: Tensor) -> Tensor:
        """As `Layers.logits`."""
        if self._head is None:
            return torch.zeros(x_ND.shape[0], 0)
        return self._head(x_ND)

    def hidden(self, x_ND: Tensor) -> Tensor:
        """As `Layers.hidden`."""
        wide_ND = x_ND.float()
        variance_N1 = wide_ND.square().mean(dim=-1, keepdim=True)
        return wide_ND * torch.rsqrt(variance_N1 + self.spec.norm_eps) * self._norm_D

    def _head_of(self, reader: RankReader) -> halves.HeadHalf | None:
        weight_vD = reader.head()
        if not weight_vD.shape[0]:
            return None
        head = PackedLinear.pack(weight_vD, "bfloat16", native=self.native)
        self.nbytes += head.nbytes
        return halves.HeadHalf(norm_D=self._norm_D, norm_eps=self.spec.norm_eps, head=head)

    def _count(self, tensor: Tensor) -> Tensor:
        self.nbytes += tensor.nbytes
        return tensor

    def _vector(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self._count(tensor)

    def _linear(self, matrix: Matrix | None, bias_O: Tensor | None) -> PackedLinear | None:
        if matrix is None:
            return None
        packed = PackedLinear.pack(
            matrix.data, self.kind, scale_O=matrix.scale_O, bias_O=bias_O, native=self.native
        )
        self.nbytes += packed.nbytes
        return packed

    def _network(self, network: Network | None) -> PackedExperts | None:
        """A network that every token visits, as one expert."""
        if network is None:
            return None
        packed = self._experts(1, network.w1.data.shape[0])
        self._fill(packed, 0, network)
        return packed

    def _experts(self, count: int, expert_dim: int) -> PackedExperts:
        packed = PackedExperts(
            count,
            self.spec.hidden_dim,
            expert_dim=expert_dim,
            kind=self.kind,
            native=self.native,
        )
        self.nbytes += packed.nbytes
        return packed

    @staticmethod
    def _fill(packed: PackedExperts, expert: int, network: Network) -> None:
        scales = [matrix.scale_O for matrix in network]
        given = None if scales[0] is None else cast(Any, tuple(scales))
        packed.fill(expert, *(matrix.data for matrix in network), scales=given)


class _Attention:
    def __init__(self, layers: NativeLayers, reader: RankReader, layer: int) -> None:
        spec, weights, shard = layers.spec, reader.attention(layer), reader.shard(layer)
        heads, groups = (end - start for start, end in (shard.heads, shard.kv_heads))
        bias_D = layers._vector(weights.out_bias_D)
        self.half = halves.AttentionHalf(
            norm_D=layers._count(weights.norm_D),
            norm_eps=spec.norm_eps,
            qkv=layers._linear(weights.qkv, layers._vector(weights.qkv_bias_O)),
            out=layers._linear(weights.out, bias_D),
            group_sizes=(heads // groups,) * groups if groups else (),
            head_dim=spec.head_dim,
            q_norm_C=layers._vector(weights.q_norm_C),
            k_norm_C=layers._vector(weights.k_norm_C),
            window=spec.window_of(layer),
        )
        self.bias_D = bias_D if weights.out is None else None
        """What a rank without heads still has to add."""

    def forward(self, x_TD: Tensor, step: halves.Step, pools: Pools) -> Tensor:
        y_TD = self.half(x_TD, step, pools.k, pools.v)
        return y_TD if self.bias_D is None else y_TD + self.bias_D.to(y_TD.dtype)


class _Dense:
    def __init__(self, layers: NativeLayers, reader: RankReader, layer: int) -> None:
        weights = reader.dense(layer)
        norm_D, network = layers._count(weights.norm_D), layers._network(weights.network)
        self.half = None
        if network is not None:
            self.half = halves.DenseHalf(
                norm_D=norm_D, norm_eps=layers.spec.norm_eps, network=network
            )

    def forward(self, x_TD: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(x_TD) if self.half is None else self.half(x_TD), None


class _Experts:
    def __init__(self, layers: NativeLayers, reader: RankReader, layer: int) -> None:
        spec, weights = layers.spec, reader.moe(layer)
        assert spec.moe is not None, f"{layer=}"
        self.half = halves.ExpertsHalf(
            norm_D=layers._count(weights.norm_D),
            norm_eps=spec.norm_eps,
            router_ED=layers._count(weights.router_ED),
            moe=spec.moe,
            bias_E=layers._vector(weights.selection_bias_E),
            experts=self._packed(layers, reader, weights, layer),
            first_expert=weights.experts.start,
            shared=layers._network(weights.shared),
            shared_gate_D=layers._vector(weights.shared_gate_D),
        )

    @staticmethod
    def _packed(
        layers: NativeLayers, reader: RankReader, weights: MoEWeights, layer: int
    ) -> PackedExperts:
        held = weights.experts
        packed = layers._experts(len(held), weights.expert_dim if held else 0)
        for place, expert in enumerate(held):
            layers._fill(packed, place, reader.expert(layer, expert))
        return packed

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return self.half(x_TD)


def _native_step(step: Step) -> halves.Step:
    return halves.Step(
        starts_S=step.starts_S,
        counts_S=step.counts_S,
        tables_SB=step.tables_SB,
        cos_TC=step.cos_TC,
        sin_TC=step.sin_TC,
    )
