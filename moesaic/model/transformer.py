"""The decoder-only transformer, dense or MoE: all of it, or the units that one rank holds.

Shapes.  B sequences    S positions, s of them this rank's    D model width    V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.model.attention import attention_mask
from moesaic.model.block import Block
from moesaic.model.cache import KVCache
from moesaic.model.embedding import Embedding
from moesaic.model.linear import Linear
from moesaic.model.loss import linear_cross_entropy
from moesaic.model.norm import RMSNorm
from moesaic.model.rope import rope_tables
from moesaic.moe.layer import RoutingStep
from moesaic.moe.statistics import RoutingStatistics
from moesaic.parallel.collectives import gather
from moesaic.parallel.group import Groups
from moesaic.planning.layout import (
    Shard,
    attention_unit,
    feed_forward_unit,
    holds,
    layers_of,
    num_units,
    whole,
)
from moesaic.planning.plan import Recompute
from moesaic.planning.split import Span, Split
from moesaic.spec import ModelSpec


class Decoder(nn.Module):
    """Embedding, layers and final norm: the part that checkpoints call `model`."""

    def __init__(self, spec: ModelSpec, shard: Shard, groups: Groups, units: Span) -> None:
        super().__init__()
        has_head = holds(units, num_units(spec) - 1)
        needs_table = holds(units, 0) or (has_head and spec.tied_embeddings)
        self.embed_tokens = (
            Embedding(shard.vocab, spec.hidden_dim, groups.tp) if needs_table else None
        )
        self.layers = nn.ModuleDict(
            {
                str(layer): Block(
                    spec,
                    layer,
                    shard,
                    groups,
                    has_attention=holds(units, attention_unit(layer)),
                    has_feed_forward=holds(units, feed_forward_unit(layer)),
                )
                for layer in layers_of(units, spec)
            }
        )
        self.norm = RMSNorm(spec.hidden_dim, spec.norm_eps) if has_head else None


class Transformer(nn.Module):
    """A language model, or a stage of one. Weights may be wider than the activations.

    Args:
        spec: The model.
        shard: What this rank holds of every layer; None: everything.
        groups: Ranks that hold the rest.
        units: The stage, as units of `planning.layout`; None: from embedding to head.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shard: Shard | None = None,
        groups: Groups | None = None,
        units: Span | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.shard = whole(spec) if shard is None else shard
        self.groups = groups or Groups()
        self.units = units or (0, num_units(spec))
        self.model = Decoder(spec, self.shard, self.groups, self.units)
        first, end = self.shard.vocab
        self.lm_head = None
        if self.has_head and not spec.tied_embeddings:
            self.lm_head = Linear(spec.hidden_dim, end - first)
        self.compute_dtype: torch.dtype | None = None
        """Dtype of the activations; None means the weights' own."""

    @property
    def has_embedding(self) -> bool:
        """Whether tokens come in here."""
        return holds(self.units, 0)

    @property
    def has_head(self) -> bool:
        """Whether logits or a loss come out here."""
        return holds(self.units, num_units(self.spec) - 1)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output projection, (v, D); the embedding's when tied."""
        if self.lm_head is not None:
            return self.lm_head.weight
        assert self.model.embed_tokens is not None, f"{self.units=}"
        return self.model.embed_tokens.weight

    def forward(
        self,
        input_ids_BS: Tensor,
        *,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Score the next token at every position, in a model that is all here.

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
        x: Tensor,
        *,
        length: int | None = None,
        documents_BS: Tensor | None = None,
        cache: KVCache | None = None,
        routing: Mapping[int, RoutingStep] | None = None,
        recompute: Mapping[int, Recompute] | None = None,
    ) -> tuple[Tensor, dict[int, RoutingStatistics]]:
        """Everything before the output projection, or this stage's share of it.

        Args:
            x: Token ids, (B, S), where the embedding is here; else what the stage before
                returned, (B, s, D).
            length: S; None: as long as `x`.
            documents_BS: As in `forward`; not together with a cache.
            cache: As in `forward`.
            routing: What training asks of each MoE layer, by layer; None at inference.
            recompute: What of each layer is computed again in the backward pass; a layer
                that is not named keeps everything.

        Returns:
            hidden_BsD: Activations of this rank's positions, (B, s, D), in the compute dtype,
                normed where the head is here.
            statistics: By MoE layer; empty when `routing` is None.
        """
        assert cache is None or documents_BS is None, "documents are for training, without a cache"
        start = 0
        new = x.shape[1] if length is None else length
        if cache is not None:
            cache.reserve(new)
            start = cache.length
        positions_S = torch.arange(start, start + new, device=x.device)
        parts = Split.balanced(new, self.groups.tp.size)
        rope = rope_tables(self.spec.rope, self.spec.head_dim, positions_S)
        masks = {
            window: attention_mask(
                positions_S, start + new, window=window, documents_BS=documents_BS
            )
            for window in {self.spec.window_of(int(layer)) for layer in self.model.layers}
        }
        x_BsD = x
        if self.has_embedding:
            assert self.model.embed_tokens is not None, f"{self.units=}"
            x_BsD = self.model.embed_tokens(x, parts, dtype=self.compute_dtype)
        statistics: dict[int, RoutingStatistics] = {}
        for name, block in self.model.layers.items():
            layer = int(name)
            x_BsD, of_layer = block(
                x_BsD,
                rope,
                masks[self.spec.window_of(layer)],
                parts=parts,
                cache=cache,
                routing=(routing or {}).get(layer),
                recompute=(recompute or {}).get(layer, "none"),
            )
            if of_layer is not None:
                statistics[layer] = of_layer
        if cache is not None:
            cache.advance(new)
        return (x_BsD if self.model.norm is None else self.model.norm(x_BsD)), statistics

    def loss(self, hidden_BsD: Tensor, targets_BS: Tensor) -> Tensor:
        """Sum over targets of -log p, in nats, (), from what `hidden` returned.

        Args:
            hidden_BsD: Normed activations, (B, s, D).
            targets_BS: Next tokens of all positions, (B, S); -100 where nothing is predicted.
        """
        parts = Split.balanced(targets_BS.shape[1], self.groups.tp.size)
        hidden_BSD = gather(hidden_BsD, parts, self.groups.tp, dim=1)
        return linear_cross_entropy(
            hidden_BSD.flatten(0, 1),
            self.head_weight,
            targets_BS.flatten(),
            first=self.shard.vocab[0],
            group=self.groups.tp,
        )
