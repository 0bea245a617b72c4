"""The decoder-only transformer, dense or MoE.

Shapes.  B sequences    S positions    D model width    V vocabulary
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.model.attention import attention_mask
from moesaic.model.block import Block
from moesaic.model.cache import KVCache
from moesaic.model.linear import Linear
from moesaic.model.norm import RMSNorm
from moesaic.model.rope import rope_tables
from moesaic.moe.layer import RoutingStep
from moesaic.moe.statistics import RoutingStatistics
from moesaic.spec import ModelSpec


class Decoder(nn.Module):
    """Embedding, layers and final norm: the part that checkpoints call `model`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_dim)
        self.layers = nn.ModuleList(Block(spec, layer) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_dim, spec.norm_eps)


class Transformer(nn.Module):
    """A language model. Weights may be wider than the activations (`compute_dtype`)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Decoder(spec)
        self.lm_head = None if spec.tied_embeddings else Linear(spec.hidden_dim, spec.vocab_size)
        self.compute_dtype: torch.dtype | None = None
        """Dtype of the activations; None means the embedding's own."""

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output projection, (V, D); the embedding's when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids_BS: Tensor,
        *,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Score the next token at every position.

        Args:
            input_ids_BS: Token ids, (B, S).
            documents_BS: Ids, (B, S); attention stays within equal ids. None: one document.
            cache: Earlier positions, which is extended by these S.

        Returns:
            Logits, (B, S, V), at least float32.
        """
        hidden_BSD, _ = self.hidden(input_ids_BS, documents_BS=documents_BS, cache=cache)
        logits_BSV = F.linear(hidden_BSD, self.head_weight.to(hidden_BSD.dtype))
        return logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))

    def hidden(
        self,
        input_ids_BS: Tensor,
        *,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
        routing: Sequence[RoutingStep] | None = None,
        recompute: Collection[int] = (),
    ) -> tuple[Tensor, list[RoutingStatistics]]:
        """Everything before the output projection.

        Args:
            input_ids_BS: Token ids, (B, S).
            documents_BS: As in `forward`; not together with a cache.
            cache: As in `forward`.
            routing: What training asks of each MoE layer, in order; None at inference.
            recompute: Layers whose activations are computed again in the backward pass.

        Returns:
            hidden_BSD: Normed activations, (B, S, D), in the compute dtype.
            statistics: One a MoE layer, in order; empty when `routing` is None.
        """
        assert cache is None or documents_BS is None, "documents are for training, without a cache"
        start = 0
        new = input_ids_BS.shape[1]
        if cache is not None:
            cache.reserve(new)
            start = cache.length
        positions_S = torch.arange(start, start + new, device=input_ids_BS.device)
        rope = rope_tables(self.spec.rope, self.spec.head_dim, positions_S)
        masks = {
            window: attention_mask(
                positions_S, start + new, window=window, documents_BS=documents_BS
            )
            for window in {self.spec.window_of(layer) for layer in range(self.spec.num_layers)}
        }
        x_BSD = self.model.embed_tokens(input_ids_BS)
        x_BSD = x_BSD.to(self.compute_dtype or x_BSD.dtype)
        steps = iter(routing or ())
        statistics: list[RoutingStatistics] = []
        for layer, block in enumerate(self.model.layers):
            mask = masks[self.spec.window_of(layer)]
            step = next(steps, None) if self.spec.is_moe_layer(layer) else None
            if layer in recompute:
                x_BSD, layer_statistics = checkpoint(
                    block, x_BSD, rope, mask, routing=step, use_reentrant=False
                )
            else:
                x_BSD, layer_statistics = block(x_BSD, rope, mask, cache=cache, routing=step)
            if layer_statistics is not None:
                statistics.append(layer_statistics)
        if cache is not None:
            cache.advance(new)
        return self.model.norm(x_BSD), statistics
