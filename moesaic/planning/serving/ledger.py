"""What each rank allocates: weights by kind, keys and values, and room to work in.

Weights and cache are exact, byte for byte what the execution allocates. Every matrix is listed
once, in `matrices`, with the rows and columns that this rank has of it. Workspace is a bound:
what a step of `max_step_tokens` holds at once at the most.

The cache has as many blocks on every rank, so the rank that runs out first sets its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.serving.layout import ServeLayout
from moesaic.planning.serving.storage import ITEMSIZE, kv_bytes, stored_bytes

GIB = 2**30

MAX_ROWS = 256
"""Positions of which a step gives scores at the most. Ours; the engine keeps to it."""

Dtype = Literal["float32", "bfloat16"]
"""Of activations."""

PARTS = (
    *("attention", "feed_forward", "experts", "shared_expert"),
    *("router", "norms", "embedding", "head"),
)
"""Kinds of weights, in the order in which a ledger shows them."""


class Matrix(NamedTuple):
    """Some equal matrices that one rank holds."""

    part: str
    """One of `PARTS`."""
    kind: str
    """What its numbers are stored in."""
    rows: int
    columns: int
    copies: int = 1
    packed: bool = False
    """Whether it is stored as the CPU kernels read it."""

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return self.copies * stored_bytes(self.kind, self.rows, self.columns, packed=self.packed)


@dataclass(frozen=True, kw_only=True)
class RankLedger:
    """Memory of one rank."""

    rank: int
    weights: Mapping[str, int]
    """Bytes of each of `PARTS`."""
    kv_block_bytes: int
    """Of one block of the cache, over all layers; 0 where this rank has no heads at all."""
    kv_blocks: int
    """Blocks of the cache; the same on every rank."""
    workspace_bytes: int
    """A bound of what a step needs."""
    budget_bytes: int | None
    """What the rank may allocate; None: no budget is held."""
    blocks_that_fit: int | None
    """Blocks that this rank's budget has room for; None: any number."""

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(self.weights.values())

    @property
    def kv_bytes(self) -> int:
        """Of the whole cache."""
        return self.kv_block_bytes * self.kv_blocks

    @property
    def total_bytes(self) -> int:
        """Weights, cache and workspace."""
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes


def ledger(
    layout: ServeLayout,
    *,
    dtype: Dtype,
    packed: bool,
    max_step_tokens: int,
    max_rows: int = MAX_ROWS,
    least_tokens: int = 1,
) -> tuple[RankLedger, ...]:
    """Memory of every rank, with as many blocks as the plan says or the smallest budget allows.

    Args:
        layout: Who holds what.
        dtype: Of activations, embedding and head.
        packed: Whether matrices are stored as the CPU kernels read them.
        max_step_tokens: Most new tokens of a step.
        max_rows: Most positions of which a step gives scores.
        least_tokens: Positions that the cache must have room for.

    Raises:
        PlanError: A rank's budget is too small for its weights and that many positions, or the
            plan has neither budgets nor a number of blocks.
    """
    plan = layout.plan
    ranks = range(plan.ranks)
    weights = [_weights(layout, rank, dtype=dtype, packed=packed) for rank in ranks]
    blocks = [kv_block_bytes(layout, rank) for rank in ranks]
    workspace = [
        workspace_bytes(
            layout, rank, dtype=dtype, max_step_tokens=max_step_tokens, max_rows=max_rows
        )
        for rank in ranks
    ]
    room = [
        _blocks_that_fit(plan.memory_bytes, rank, weights[rank], workspace[rank], blocks[rank])
        for rank in ranks
    ]
    needed = -(-least_tokens // plan.block_tokens)
    count = _count_blocks(layout, room, weights, workspace, blocks, needed)
    return tuple(
        RankLedger(
            rank=rank,
            weights=weights[rank],
            kv_block_bytes=blocks[rank],
            kv_blocks=count,
            workspace_bytes=workspace[rank],
            budget_bytes=None if plan.memory_bytes is None else plan.memory_bytes[rank],
            blocks_that_fit=room[rank],
        )
        for rank in ranks
    )


def binding_rank(ledgers: tuple[RankLedger, ...]) -> int | None:
    """The rank whose memory sets the number of blocks; None where no budget is held."""
    bounded = [one for one in ledgers if one.blocks_that_fit is not None]
    return min(bounded, key=lambda one: one.blocks_that_fit or 0).rank if bounded else None


def matrices(layout: ServeLayout, rank: int, *, dtype: Dtype, packed: bool) -> Iterator[Matrix]:
    """Every weight that a rank holds. Norms, router and gates are float32 and whole everywhere."""
    spec, kind = layout.spec, layout.plan.weights
    width = spec.hidden_dim
    yield Matrix("norms", "float32", 1, width)
    vocab = layout.vocab.sizes[rank]
    yield Matrix("embedding", dtype, vocab, width)
    if packed or not spec.tied_embeddings:
        yield Matrix("head", dtype, vocab, width, packed=packed)
    for layer in range(spec.num_layers):
        shard = layout.layer(rank, layer)
        heads, kv_heads, ffn, shared, experts, columns = (end - start for start, end in shard)
        queries, rows = heads * spec.head_dim, (heads + 2 * kv_heads) * spec.head_dim
        yield Matrix("norms", "float32", 2, width)
        if spec.qk_norm:
            yield Matrix("norms", "float32", 2, spec.head_dim)
        yield Matrix("attention", kind, rows, width, packed=packed)
        yield Matrix("attention", kind, width, queries, packed=packed)
        if spec.qkv_bias:
            yield Matrix("attention", "float32", 1, rows)
        if spec.out_bias and rank == 0:
            # One rank adds it before the sum over all of them.
            yield Matrix("attention", "float32", 1, width)
        yield Matrix("feed_forward", kind, ffn, width, 2, packed=packed)
        yield Matrix("feed_forward", kind, width, ffn, packed=packed)
        if spec.moe is None or not spec.is_moe_layer(layer):
            continue
        yield Matrix("router", "float32", spec.moe.num_experts, width)
        if spec.moe.selection_bias:
            yield Matrix("router", "float32", 1, spec.moe.num_experts)
        yield Matrix("experts", kind, columns, width, 2 * experts, packed=packed)
        yield Matrix("experts", kind, width, columns, experts, packed=packed)
        if spec.moe.shared_expert_dim:
            yield Matrix("shared_expert", kind, shared, width, 2, packed=packed)
            yield Matrix("shared_expert", kind, width, shared, packed=packed)
            yield Matrix("shared_expert", "float32", 1, width)


def kv_block_bytes(layout: ServeLayout, rank: int) -> int:
    """Bytes of one block of the cache on a rank, keys and values of all layers."""
    plan, spec = layout.plan, layout.spec
    return kv_bytes(plan.kv_cache, layout.kv_heads_of(rank), plan.block_tokens, spec.head_dim)


def workspace_bytes(
    layout: ServeLayout, rank: int, *, dtype: Dtype, max_step_tokens: int, max_rows: int
) -> int:
    """A bound of what a step holds beside weights and cache.

    Of T new tokens: the residual stream, its normed copy, the half's result and what is summed
    over ranks (4 rows of the width, float32 at the most); queries, keys, values and the result
    of attention; three rows of columns and one of the width for each copy of a token that goes to
    an expert; the keys and values of one sequence of the longest context, gathered; scores of R
    positions over this rank's vocabulary, and on rank 0 over all of it, where they are gathered;
    and the table of rope.
    """
    spec, item = layout.spec, ITEMSIZE[dtype]
    tokens, width = max_step_tokens, spec.hidden_dim
    halves = [0]
    for layer in range(spec.num_layers):
        shard = layout.layer(rank, layer)
        heads, kv_heads, ffn, shared, experts, columns = (end - start for start, end in shard)
        gathered = 2 * kv_heads * spec.max_positions * spec.head_dim
        halves.append(tokens * 2 * (heads + kv_heads) * spec.head_dim + gathered)
        halves.append(tokens * 3 * ffn)
        if spec.moe is not None and spec.is_moe_layer(layer):
            copies = tokens * min(spec.moe.top_k, experts)
            halves.append(copies * (3 * columns + width) + tokens * 3 * shared)
    rows = min(max_rows, max_step_tokens)
    scores = rows * (layout.vocab.sizes[rank] + (spec.vocab_size if rank == 0 else 0)) * 4
    rope = spec.max_positions * spec.head_dim * 4
    return tokens * 4 * width * 4 + max(halves) * item + scores + rope


def _weights(layout: ServeLayout, rank: int, *, dtype: Dtype, packed: bool) -> dict[str, int]:
    found = dict.fromkeys(PARTS, 0)
    for matrix in matrices(layout, rank, dtype=dtype, packed=packed):
        found[matrix.part] += matrix.num_bytes
    return found


def _blocks_that_fit(
    budgets: tuple[int, ...] | None,
    rank: int,
    weights: Mapping[str, int],
    workspace: int,
    block: int,
) -> int | None:
    if budgets is None:
        return None
    room = budgets[rank] - sum(weights.values()) - workspace
    if block == 0:
        return None if room >= 0 else -1
    return math.floor(room / block)


def _count_blocks(
    layout: ServeLayout,
    room: list[int | None],
    weights: list[dict[str, int]],
    workspace: list[int],
    blocks: list[int],
    needed: int,
) -> int:
    plan = layout.plan
    bounded = [(fits, rank) for rank, fits in enumerate(room) if fits is not None]
    needed = max(needed, plan.kv_blocks or 1)
    if bounded:
        fits, rank = min(bounded)
        if fits < needed:
            held = sum(weights[rank].values())
            need = held + workspace[rank] + needed * blocks[rank]
            budget = (plan.memory_bytes or ())[rank]
            raise PlanError(
                f"Rank {rank} needs {need / GIB:.2f} GiB: {held / GIB:.2f} of weights, "
                f"{needed * blocks[rank] / GIB:.2f} for {needed * plan.block_tokens} positions of "
                f"cache and {workspace[rank] / GIB:.2f} to work in, but may allocate "
                f"{budget / GIB:.2f} GiB. Use more ranks, smaller weights or cache, or more memory."
            )
        return plan.kv_blocks or fits
    if plan.kv_blocks is None:
        raise PlanError(
            "The plan has neither kv_blocks nor memory_bytes, so nothing says how large the cache "
            "is. Give one of them."
        )
    return plan.kv_blocks
