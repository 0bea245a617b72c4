"""A serving plan fitted to a model: which span of each dimension of each layer each rank holds.

What does not divide leaves a remainder, and whoever holds it is the fullest rank: it has the least
room for keys and values, and all others wait for it. So the remainder goes to other ranks from
layer to layer. Over all layers no rank then holds more than one unit over what another holds, and
within each layer none holds more than one unit over its part.

Heads go by whole groups of query heads while there are at least as many key-value heads as ranks.
Where there are fewer, each rank has at most one key-value head, which several ranks hold, and
some of its query heads.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.serving.plan import ServePlan, facts_of
from moesaic.planning.split import Span, Split
from moesaic.spec import ModelSpec

COLUMN_UNITS = (128, 64, 32, 16)
"""Columns that stay together where they can: a block of FP8 scales is 128 wide, a tile of the CPU
kernels 32 by 64."""

UNIT_COST = Fraction(11, 10)
"""A larger unit is taken while its fullest rank holds at most this times what it would hold with
columns dealt out one by one. Ours."""


class LayerSplits(NamedTuple):
    """How the dimensions of one layer are cut; what the layer does not have is 0 long."""

    heads: Split
    """Query heads."""
    kv_heads: Split
    """Key-value heads; several ranks hold the same where there are more ranks than heads."""
    ffn: Split
    """Columns of the dense feed-forward network."""
    shared_ffn: Split
    """Columns of the shared expert."""
    experts: Split
    """Experts; every rank holds all of them where they are cut by columns."""
    expert_columns: Split
    """Columns of each expert held; all of them where experts are whole."""


class LayerShard(NamedTuple):
    """What one rank holds of a layer."""

    heads: Span
    kv_heads: Span
    ffn: Span
    shared_ffn: Span
    experts: Span
    expert_columns: Span


@dataclass(frozen=True)
class ServeLayout:
    """A plan that was held against a model; `fit` makes it."""

    spec: ModelSpec
    plan: ServePlan
    layers: tuple[LayerSplits, ...]
    vocab: Split
    """Rows of embedding and head."""

    def layer(self, rank: int, layer: int) -> LayerShard:
        """What a rank holds of a layer."""
        return LayerShard(*(split.spans[rank] for split in self.layers[layer]))

    def kv_heads_of(self, rank: int) -> int:
        """Key-value heads of a rank, summed over the layers."""
        return sum(splits.kv_heads.sizes[rank] for splits in self.layers)


def fit(plan: ServePlan, spec: ModelSpec) -> ServeLayout:
    """Work out who holds what.

    Raises:
        PlanError: The plan is for another model, or for experts that the model does not have.
    """
    _check_model(plan, spec)
    moe = spec.moe
    ranks, rotated = plan.ranks, plan.heads == "rotated"
    shares = _fractions(plan.shares, ranks)
    heads = _fit_heads(spec, _fractions(plan.head_shares or plan.shares, ranks), rotated)
    num_moe = len(spec.moe_layers)
    nothing = [_same(ranks, 0)] * spec.num_layers
    dense = deal_columns(spec.ffn_dim, shares, spec.num_layers - num_moe, rotated=rotated)
    shared, experts, columns = nothing, nothing, nothing
    if moe is not None:
        shared = deal_columns(moe.shared_expert_dim, shares, num_moe, rotated=rotated)
        if plan.experts == "whole":
            counts = deal(moe.num_experts, shares, num_moe, rotated=rotated)
            experts = [Split.from_counts(count) for count in counts]
            columns = [_same(ranks, moe.expert_dim)] * num_moe
        else:
            experts = [_same(ranks, moe.num_experts)] * num_moe
            columns = deal_columns(moe.expert_dim, shares, num_moe, rotated=rotated)
    layers, empty = [], _same(ranks, 0)
    for layer, (queries, kv) in enumerate(heads):
        # Counted among layers of the same kind, or else every second layer's remainder could
        # always meet the same ranks.
        before = sum(other < layer for other in spec.moe_layers)
        if spec.is_moe_layer(layer):
            splits = (empty, shared[before], experts[before], columns[before])
        else:
            splits = (dense[layer - before], empty, empty, empty)
        layers.append(LayerSplits(queries, kv, *splits))
    vocab = deal_columns(spec.vocab_size, shares, 1, rotated=False)[0]
    return ServeLayout(spec=spec, plan=plan, layers=tuple(layers), vocab=vocab)


def _check_model(plan: ServePlan, spec: ModelSpec) -> None:
    if spec.moe is None and plan.experts == "whole":
        raise PlanError(
            "The plan deals out whole experts, but the model is dense. Leave experts out."
        )
    facts = facts_of(spec)
    for name, value in (plan.model or {}).items():
        if name not in facts or facts[name] != value:
            raise PlanError(
                f"The plan is for another model: its {name} is {value!r}, this model's is "
                f"{facts.get(name)!r}. Make a plan for this one with moesaic plan serve."
            )
    for name in facts if plan.model else ():
        if name not in (plan.model or {}):
            raise PlanError(
                f"The plan is for another model: it says nothing of {name}, which is "
                f"{facts[name]!r} here. Make a plan for this one with moesaic plan serve."
            )


def _fractions(shares: Sequence[float] | None, ranks: int) -> list[Fraction]:
    """Exact, so that which rank gets the last unit never hangs on how a sum was rounded."""
    values = [Fraction(1)] * ranks if shares is None else [Fraction(share) for share in shares]
    total = sum(values)
    return [value / total for value in values]


def _same(ranks: int, total: int) -> Split:
    """All of a dimension on every rank."""
    return Split(((0, total),) * ranks)


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Deal `total` units so that the largest count over its share is as small as can be.

    Each unit goes to the rank that is the least full with it (D'Hondt's rule), which no other
    dealing beats: the last unit given sets the largest quotient, and every other rank would
    reach that quotient or more with one unit over what it has.
    """
    scale = sum(shares)
    counts = [math.floor(total * share / scale) for share in shares]
    heap = [
        ((count + 1) / share, rank)
        for rank, (count, share) in enumerate(zip(counts, shares, strict=True))
        if share
    ]
    heapq.heapify(heap)
    for _ in range(total - sum(counts)):
        _, rank = heapq.heappop(heap)
        counts[rank] += 1
        heapq.heappush(heap, ((counts[rank] + 1) / shares[rank], rank))
    return counts


def deal(total: int, shares: Sequence[Fraction], layers: int, *, rotated: bool) -> list[list[int]]:
    """Units of each rank in each of `layers` equal layers.

    Rotated: the units of all layers together are apportioned, and each rank has its mean number
    in every layer, rounded down or up. Both at once is always possible: with the parts after the
    point side by side on a line, every layer is a comb of distance 1 that meets each rank at most
    once, and the L combs, each 1/L further, meet it as often as it has units left.
    """
    if not layers:
        return []
    if not rotated:
        return [apportion(total, shares)] * layers
    # What is left over all layers goes to the last ranks: the first gathers the scores too.
    totals = apportion(total * layers, shares[::-1])[::-1]
    edges = [0, *itertools.accumulate(count % layers for count in totals)]
    stride = _stride(layers)
    dealt = []
    for layer in range(layers):
        offset = layer * stride % layers
        dealt.append(
            [
                # Teeth of the comb in [start, end): points congruent to the offset.
                count // layers + (end - offset - 1) // layers - (start - offset - 1) // layers
                for count, (start, end) in zip(totals, itertools.pairwise(edges), strict=True)
            ]
        )
    return dealt


def _stride(layers: int) -> int:
    """A step through the layers that meets each once and leaves no long gap on the way."""
    golden = round(layers * (math.sqrt(5) - 1) / 2)
    return next(
        step
        for distance in range(layers + 1)
        for step in (golden + distance, golden - distance)
        if step > 0 and math.gcd(step, layers) == 1
    )


def column_unit(
    total: int, shares: Sequence[Fraction], layers: int, *, rotated: bool = True
) -> int:
    """Columns that stay together when `total` of them are dealt out."""

    def fullest(unit: int) -> Fraction:
        """Largest count over its share in any layer."""
        counts = deal(total // unit, shares, layers, rotated=rotated)
        return max(
            Fraction(max(column) * unit) / share
            for column, share in zip(zip(*counts, strict=True), shares, strict=True)
            if share
        )

    least = fullest(1) * UNIT_COST
    return next((unit for unit in COLUMN_UNITS if total % unit == 0 and fullest(unit) <= least), 1)


def deal_columns(
    total: int, shares: Sequence[Fraction], layers: int, *, rotated: bool
) -> list[Split]:
    """Columns of each layer, in units that stay whole."""
    if not layers:
        return []
    unit = column_unit(total, shares, layers, rotated=rotated)
    return [
        Split.from_counts(counts, unit=unit)
        for counts in deal(total // unit, shares, layers, rotated=rotated)
    ]


def _fit_heads(
    spec: ModelSpec, shares: Sequence[Fraction], rotated: bool
) -> list[tuple[Split, Split]]:
    """Query heads and key-value heads of each layer."""
    group = spec.num_heads // spec.num_kv_heads
    if spec.num_kv_heads >= sum(share > 0 for share in shares):
        counts = deal(spec.num_kv_heads, shares, spec.num_layers, rotated=rotated)
        splits = [Split.from_counts(count) for count in counts]
        return [(split.scaled(group), split) for split in splits]
    first = _share_kv_heads(spec.num_kv_heads, group, shares)
    layers = [list(first) for _ in range(spec.num_layers)]
    if rotated:
        _rotate(layers, shares)
        _even_out(layers, shares)
    return [
        (Split(tuple(piece.heads for piece in pieces)), Split(tuple(piece.kv for piece in pieces)))
        for pieces in layers
    ]


class Piece(NamedTuple):
    """What a rank holds of a layer in which key-value heads are shared."""

    heads: Span = (0, 0)
    kv: Span = (0, 0)

    @property
    def size(self) -> int:
        """Query heads."""
        return self.heads[1] - self.heads[0]


def _share_kv_heads(kv_heads: int, group: int, shares: Sequence[Fraction]) -> list[Piece]:
    """One layer where ranks outnumber key-value heads: at most one such head a rank."""
    members = _members(kv_heads, group, shares)
    pieces = [Piece()] * len(shares)
    for head, ranks in enumerate(members):
        counts = dict(zip(ranks, apportion(group, [shares[rank] for rank in ranks]), strict=True))
        start = head * group
        for rank in sorted(ranks):
            if counts[rank]:
                pieces[rank] = Piece((start, start + counts[rank]), (head, head + 1))
                start += counts[rank]
    return pieces


def _rotate(layers: list[list[Piece]], shares: Sequence[Fraction]) -> None:
    """Pass what equal ranks hold of a layer on to the next of them, layer by layer."""
    for share in set(shares):
        equals = [rank for rank, other in enumerate(shares) if other == share]
        for layer, pieces in enumerate(layers):
            held = [pieces[rank] for rank in equals]
            for number, rank in enumerate(equals):
                pieces[rank] = held[(number + layer) % len(equals)]


def _even_out(layers: list[list[Piece]], shares: Sequence[Fraction]) -> None:
    """Exchange what two equal ranks hold of one layer or two, while that brings them closer.

    Sizes within a layer stay what they are, so only sums over layers change, and the sum of
    their squares falls with each exchange.
    """
    sums = [sum(piece.size for piece in rank) for rank in zip(*layers, strict=True)]
    pairs = [
        (full, free)
        for full, free in itertools.permutations(range(len(shares)), 2)
        if shares[full] == shares[free]
    ]
    while True:
        for full, free in pairs:
            moved = _exchange(layers, full, free, below=sums[full] - sums[free])
            if moved:
                break
        else:
            return
        for layer in moved:
            pieces = layers[layer]
            change = pieces[full].size - pieces[free].size
            sums[full], sums[free] = sums[full] - change, sums[free] + change
            pieces[full], pieces[free] = pieces[free], pieces[full]


def _exchange(layers: list[list[Piece]], full: int, free: int, *, below: int) -> tuple[int, ...]:
    """One or two layers over which `full` holds more than `free`, but by less than `below`."""
    if below < 2:
        return ()
    first: dict[int, int] = {}
    for layer, pieces in enumerate(layers):
        more = pieces[full].size - pieces[free].size
        if 0 < more < below:
            return (layer,)
        for other_more, other in first.items():
            if 0 < more + other_more < below:
                return (other, layer)
        first.setdefault(more, layer)
    return ()


def _members(kv_heads: int, group: int, shares: Sequence[Fraction]) -> list[list[int]]:
    """Ranks that hold each key-value head: the largest first, where shares add up to least."""
    active = [rank for rank, share in enumerate(shares) if share]
    assert len(active) > kv_heads, f"{active=}, {kv_heads=}"
    active.sort(key=lambda rank: (-shares[rank], rank))
    members: list[list[int]] = [[] for _ in range(kv_heads)]
    for rank in active[: kv_heads * group]:
        head = min(
            (head for head in range(kv_heads) if len(members[head]) < group),
            key=lambda head: (sum(shares[rank] for rank in members[head]), head),
        )
        members[head].append(rank)
    return members
