"""One decoder layer: norm, attention, residual; norm, feed-forward or MoE, residual.

A pipeline stage may hold only one of the two halves.

Shapes.  B sequences    S positions, s of them this rank's    D model width
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.model.attention import Attention
from moesaic.model.cache import KVCache
from moesaic.model.mlp import MLP
from moesaic.model.norm import RMSNorm
from moesaic.moe.layer import MoELayer, RoutingStep
from moesaic.moe.statistics import RoutingStatistics
from moesaic.parallel.group import Groups
from moesaic.planning.layout import Shard
from moesaic.planning.plan import Recompute
from moesaic.planning.split import Split
from moesaic.spec import ModelSpec


class Block(nn.Module):
    """Layer `layer` of the model that `spec` describes.

    Args:
        spec: The model.
        layer: The layer's number.
        shard: What this rank holds of it.
        groups: Ranks that hold the rest.
        has_attention: Whether the first half is here.
        has_feed_forward: Whether the second half is here.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        shard: Shard,
        groups: Groups,
        *,
        has_attention: bool = True,
        has_feed_forward: bool = True,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm: RMSNorm | None = None
        self.self_attn: Attention | None = None
        self.post_attention_layernorm: RMSNorm | None = None
        self.block_sparse_moe: MoELayer | None = None
        self.mlp: MLP | None = None
        if has_attention:
            start, end = shard.kv_heads
            self.input_layernorm = RMSNorm(spec.hidden_dim, spec.norm_eps)
            self.self_attn = Attention(spec, end - start, groups.tp)
        if has_feed_forward:
            self.post_attention_layernorm = RMSNorm(spec.hidden_dim, spec.norm_eps)
            if spec.is_moe_layer(layer):
                assert spec.moe is not None, f"{layer=}"
                self.block_sparse_moe = MoELayer(
                    spec.moe, spec.hidden_dim, shard=shard, groups=groups
                )
            else:
                start, end = shard.ffn
                self.mlp = MLP(spec.hidden_dim, end - start, groups.tp)

    def forward(
        self,
        x_BsD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        parts: Split,
        cache: KVCache | None = None,
        routing: RoutingStep | None = None,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """Compute the halves that are here.

        Args:
            x_BsD: Activations of this rank's positions, (B, s, D).
            rope: As in `Attention`.
            mask: As in `Attention`.
            parts: Which of the S positions are which rank's.
            cache: As in `Attention`.
            routing: What training asks of an MoE layer; None at inference.
            recompute: What is computed again in the backward pass.

        Returns:
            The activations, (B, s, D), and what the router did when `routing` is given.
        """
        if recompute == "full":
            return checkpoint(  # type: ignore[no-any-return]
                self._halves, x_BsD, rope, mask, parts, None, routing, "none", use_reentrant=False
            )
        return self._halves(x_BsD, rope, mask, parts, cache, routing, recompute)

    def _halves(
        self,
        x_BsD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        parts: Split,
        cache: KVCache | None,
        routing: RoutingStep | None,
        recompute: Recompute,
    ) -> tuple[Tensor, RoutingStatistics | None]:
        if self.self_attn is not None:
            if recompute == "attention":
                x_BsD = checkpoint(
                    self._attend, x_BsD, rope, mask, parts, None, use_reentrant=False
                )
            else:
                x_BsD = self._attend(x_BsD, rope, mask, parts, cache)
        if self.post_attention_layernorm is None:
            return x_BsD, None
        normed = self.post_attention_layernorm(x_BsD)
        inside = recompute == "moe_activations"
        if self.block_sparse_moe is not None:
            y_BsD, statistics = self.block_sparse_moe(normed, routing, parts, recompute=inside)
            return x_BsD + y_BsD, statistics
        assert self.mlp is not None, f"{self.layer=}"
        return x_BsD + self.mlp(normed, parts, recompute=inside), None

    def _attend(
        self,
        x_BsD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        parts: Split,
        cache: KVCache | None,
    ) -> Tensor:
        assert self.input_layernorm is not None, f"{self.layer=}"
        assert self.self_attn is not None, f"{self.layer=}"
        normed = self.input_layernorm(x_BsD)
        y_BsD = self.self_attn(normed, rope, mask, parts=parts, cache=cache, layer=self.layer)
        return x_BsD + y_BsD  # type: ignore[no-any-return]
