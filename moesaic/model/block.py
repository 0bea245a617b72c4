"""One decoder layer: norm, attention, residual; norm, feed-forward or MoE, residual."""

from __future__ import annotations

from torch import Tensor, nn

from moesaic.model.attention import Attention
from moesaic.model.cache import KVCache
from moesaic.model.mlp import MLP
from moesaic.model.norm import RMSNorm
from moesaic.moe.layer import MoELayer, RoutingStep
from moesaic.moe.statistics import RoutingStatistics
from moesaic.spec import ModelSpec


class Block(nn.Module):
    """Layer `layer` of the model that `spec` describes."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(spec.hidden_dim, spec.norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_dim, spec.norm_eps)
        self.block_sparse_moe: MoELayer | None = None
        self.mlp: MLP | None = None
        if spec.is_moe_layer(layer):
            assert spec.moe is not None, f"{layer=}"
            self.block_sparse_moe = MoELayer(spec.moe, spec.hidden_dim)
        else:
            self.mlp = MLP(spec.hidden_dim, spec.ffn_dim)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        cache: KVCache | None = None,
        routing: RoutingStep | None = None,
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """Returns the activations, (B, S, D), and what the router did when `routing` is given."""
        normed = self.input_layernorm(x_BSD)
        x_BSD = x_BSD + self.self_attn(normed, rope, mask, cache=cache, layer=self.layer)
        normed = self.post_attention_layernorm(x_BSD)
        if self.block_sparse_moe is not None:
            y_BSD, statistics = self.block_sparse_moe(normed, routing)
            return x_BSD + y_BSD, statistics
        assert self.mlp is not None, f"{self.layer=}"
        return x_BSD + self.mlp(normed), None
