"""Compare ways to share a model over the ranks of a cluster, and choose the fastest that can run.

    rotated          heads and columns over all ranks, the remainder passed on from layer to layer
    weighted         the same, in shares that fit devices of several kinds
    fixed            the remainder always on the first ranks
    whole experts    heads over all ranks, and whole experts dealt out
    padded           heads and columns filled up with zeros until every rank has as many
    TP t x PP p      p stages of t ranks

The last two are compared but cannot be run: padding, because a layout that needs none is never
worse, and pipelines, because the server has none. The fastest is the one with most tokens a second
at the batch that is asked for, or else at the largest batch whose keys and values fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple, NoReturn

from moesaic.errors import PlanError
from moesaic.planning.serving.layout import ServeLayout, apportion, column_unit, fit
from moesaic.planning.serving.ledger import (
    MAX_ROWS,
    Dtype,
    RankLedger,
    kv_block_bytes,
    ledger,
    matrices,
    workspace_bytes,
)
from moesaic.planning.serving.plan import KVKind, ServePlan, Weights, facts_of
from moesaic.planning.serving.speed import Machine, Speed, Stage, decode, prefill
from moesaic.planning.serving.storage import kv_bytes
from moesaic.planning.serving.weighted import Shares, Sharing, bound, could_fit, share
from moesaic.planning.split import Split
from moesaic.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Question:
    """A model, what its numbers are stored in, the ranks it shall run on, and what is asked."""

    spec: ModelSpec
    machine: Machine
    budgets: tuple[int, ...]
    """Bytes that each rank may allocate."""
    weights: Weights
    kv_cache: KVKind
    dtype: Dtype
    packed: bool
    """Whether matrices are stored as the CPU kernels read them."""
    block_tokens: int
    max_step_tokens: int
    context: int
    """Positions of a sequence, on average, while it is answered."""
    batch: int | None
    """Sequences at once; None: as many as the cache has room for."""
    max_batch: int
    """Most of them."""
    kv_tokens: int | None = None
    """Positions that the cache shall have; None: as many as fit."""

    @property
    def ranks(self) -> int:
        """Devices."""
        return len(self.budgets)

    @property
    def is_uniform(self) -> bool:
        """Whether all ranks are alike."""
        return all(
            len(set(values)) == 1
            for values in (self.budgets, self.machine.bandwidth, self.machine.flops)
        )

    def plan(self, **changes: object) -> ServePlan:
        """A plan for all ranks."""
        return ServePlan(
            ranks=self.ranks,
            weights=self.weights,
            kv_cache=self.kv_cache,
            block_tokens=self.block_tokens,
            memory_bytes=self.budgets,
            model=facts_of(self.spec),
            **changes,  # type: ignore[arg-type]
        )

    def stage(self, layout: ServeLayout, machine: Machine, **ends: bool) -> Stage:
        """Ranks that share a layout."""
        return Stage(layout, machine, dtype=self.dtype, packed=self.packed, **ends)


@dataclass(frozen=True)
class Arrangement:
    """One way to share a model, and what is predicted of it."""

    name: str
    question: Question
    stages: tuple[Stage, ...]
    plan: ServePlan | None = None
    """What the server would be given; None where it cannot do this."""
    bound: float | None = None
    """Tokens a second that no other shares of heads and columns can reach, for weighted ones."""

    @cached_property
    def kv_tokens(self) -> int:
        """Positions that the caches have room for: of the rank that has least. 0: it does not fit.

        The same sum as the ledger's, over the ranks of all stages.
        """
        fits = self._blocks_that_fit() * self.question.block_tokens
        wanted = self.question.kv_tokens
        return fits if wanted is None or fits < wanted else wanted

    def _blocks_that_fit(self) -> int:
        question, fits, first = self.question, [], 0
        for stage in self.stages:
            layout = stage.layout
            for rank, held in enumerate(stage.weight_bytes):
                work = workspace_bytes(
                    layout,
                    rank,
                    dtype=question.dtype,
                    max_step_tokens=question.max_step_tokens,
                    max_rows=MAX_ROWS,
                )
                room = question.budgets[first + rank] - held - work
                block = kv_block_bytes(layout, rank)
                if block or room < 0:
                    fits.append(math.floor(room / block) if room >= 0 else 0)
            first += layout.plan.ranks
        return min(fits)

    @cached_property
    def fullest(self) -> tuple[int, ...]:
        """Weights of each rank."""
        return tuple(held for stage in self.stages for held in stage.weight_bytes)

    def batch_at(self, context: float) -> int:
        """Sequences of this length that the cache has room for."""
        return min(self.question.max_batch, int(self.kv_tokens // context))

    def decode(self, batch: float, context: float) -> Speed:
        """Speed of answering, whether the cache has room for it or not."""
        return decode(self.stages, self.question.machine, batch, context)

    def has_room(self, batch: float, context: float) -> bool:
        """Whether the keys and values of so many sequences fit."""
        return batch * context <= self.kv_tokens

    @cached_property
    def asked(self) -> tuple[int, Speed | None]:
        """Batch and speed by which arrangements are compared; no speed where it does not fit."""
        question = self.question
        batch = self.batch_at(question.context) if question.batch is None else question.batch
        if not batch or not self.has_room(batch, question.context):
            return batch, None
        return batch, self.decode(batch, question.context)

    @property
    def tokens_per_second(self) -> float:
        """At that batch; 0 where it does not fit."""
        speed = self.asked[1]
        return 0.0 if speed is None else speed.tokens_per_second

    def prefill(self, length: int) -> float:
        """Tokens a second of prompts."""
        chunk = min(self.question.max_step_tokens, length)
        return prefill(self.stages, self.question.machine, chunk, length)

    def longest_context(self, tokens_per_second: float) -> int:
        """The longest mean context at which the cache allows that speed; 0: none does."""
        longest = self.question.spec.max_positions

        def reaches(context: int) -> bool:
            batch = self.batch_at(context)
            return batch > 0 and (
                self.decode(batch, context).tokens_per_second >= tokens_per_second
            )

        # Not quite monotone, because batches are whole: the last step that reaches it counts.
        steps = range(16, longest + 1, 16)
        return next((context for context in reversed(steps) if reaches(context)), 0)

    def ledgers(self) -> tuple[RankLedger, ...]:
        """Memory of every rank. Raises PlanError where it does not fit."""
        assert self.plan is not None, self.name
        (stage,) = self.stages
        # With the cache that was asked for; where none fits, the ledger says which rank lacks it.
        plan = replace(self.plan, kv_blocks=self.kv_tokens // self.question.block_tokens or None)
        return ledger(
            replace(stage.layout, plan=plan),
            dtype=self.question.dtype,
            packed=self.question.packed,
            max_step_tokens=self.question.max_step_tokens,
        )


def arrangements(question: Question) -> list[Arrangement]:
    """Every way that is compared, those that the server can run first."""
    found = [_of_plan("rotated", question, question.plan())]
    fixed = _of_plan("fixed", question, question.plan(heads="fixed"))
    if fixed.stages[0].layout.layers != found[0].stages[0].layout.layers:
        found.append(fixed)
    weighted = None if question.is_uniform else _weighted(question)
    if weighted is not None:
        found.append(weighted)
    if question.spec.moe is not None and question.ranks > 1:
        shares = {}
        if weighted is not None and weighted.plan is not None:
            shares = {"shares": weighted.plan.shares, "head_shares": weighted.plan.head_shares}
        plan = question.plan(experts="whole", **shares)
        found.append(_of_plan("whole experts", question, plan))
    padded = _padded(question)
    if padded is not None:
        found.append(padded)
    return [*found, *_pipelines(question)]


def choose(found: Sequence[Arrangement]) -> Arrangement:
    """The fastest that the server can run.

    What is predicted to a thousandth is the same: then the one with the larger cache, and where
    that is the same to a hundredth the first, which is the simplest.

    Raises:
        PlanError: None fits.
    """
    runnable = [one for one in found if one.plan is not None]
    fastest = max(one.tokens_per_second for one in runnable)
    if fastest == 0:
        _refuse(max(runnable, key=lambda one: one.kv_tokens))
    near = [one for one in runnable if one.tokens_per_second >= 0.999 * fastest]
    largest = max(one.kv_tokens for one in near)
    return next(one for one in near if one.kv_tokens >= 0.99 * largest)


def _refuse(best: Arrangement) -> NoReturn:
    """Say why the arrangement with most room does not do."""
    question = best.question
    best.ledgers()  # Where not even one block fits, its line says which rank lacks how much.
    batch = question.batch or 1
    raise PlanError(
        f"{batch} sequences of {question.context} positions need a cache of "
        f"{batch * question.context} positions, but the best layout has room for "
        f"{best.kv_tokens}. Lower batch or context, use a smaller cache or smaller weights, or "
        f"more ranks."
    )


def _of_plan(name: str, question: Question, plan: ServePlan) -> Arrangement:
    stage = question.stage(fit(plan, question.spec), question.machine)
    return Arrangement(name, question, (stage,), plan)


def _padded(question: Question) -> Arrangement | None:
    """Zeros until ranks divide everything; None where they do already."""
    spec, ranks = question.spec, question.ranks
    shares = [Fraction(1, ranks)] * ranks

    def up(count: int, unit: int) -> int:
        return -(-count // unit) * unit

    def columns(count: int) -> int:
        return up(count, ranks * column_unit(count, shares, 1)) if count else 0

    kv_heads = up(spec.num_kv_heads, ranks)
    filled = spec.replace(
        family="skywork",  # Which can say any widths.
        num_kv_heads=kv_heads,
        num_heads=kv_heads * (spec.num_heads // spec.num_kv_heads),
        ffn_dim=columns(spec.ffn_dim),
        vocab_size=columns(spec.vocab_size),
    )
    if spec.moe is not None:
        moe = replace(
            spec.moe,
            expert_dim=columns(spec.moe.expert_dim),
            shared_expert_dim=columns(spec.moe.shared_expert_dim),
        )
        filled = filled.replace(moe=moe)
    if filled == spec.replace(family="skywork"):
        return None
    plan = replace(question.plan(), model=None)
    stage = question.stage(fit(plan, filled), question.machine)
    return Arrangement("padded", question, (stage,))


def _pipelines(question: Question) -> Iterator[Arrangement]:
    """Stages one behind the other, in ranks' order; layers by the memory of each stage."""
    spec = question.spec
    for depth in range(2, min(question.ranks, spec.num_layers) + 1):
        width, rest = divmod(question.ranks, depth)
        if rest:
            continue
        ranks = [range(stage * width, (stage + 1) * width) for stage in range(depth)]
        memory = [Fraction(sum(question.budgets[rank] for rank in group)) for group in ranks]
        counts = apportion(spec.num_layers - depth, memory)
        spans = Split.from_counts([count + 1 for count in counts]).spans
        stages = []
        for number, (group, span) in enumerate(zip(ranks, spans, strict=True)):
            plan = ServePlan(
                ranks=width,
                weights=question.weights,
                kv_cache=question.kv_cache,
                block_tokens=question.block_tokens,
            )
            stages.append(
                question.stage(
                    fit(plan, layers_of(spec, *span)),
                    question.machine.part(group),
                    has_embedding=number == 0,
                    has_head=number == depth - 1,
                )
            )
        name = f"TP {width} x PP {depth}" if width > 1 else f"PP {depth}"
        yield Arrangement(name, question, tuple(stages))


def layers_of(spec: ModelSpec, start: int, end: int) -> ModelSpec:
    """The model that some layers would be."""

    def within(layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(layer - start for layer in layers if start <= layer < end)

    moe_layers, sliding = within(spec.moe_layers), within(spec.sliding_layers)
    return spec.replace(
        num_layers=end - start,
        moe_layers=moe_layers,
        moe=spec.moe if moe_layers else None,
        sliding_layers=sliding,
        sliding_window=spec.sliding_window if sliding else None,
    )


# --- Devices of several kinds ------------------------------------------------------------------


def _weighted(question: Question) -> Arrangement | None:
    """The best shares of heads and columns; None where no shares fit.

    Larger batches first: once a batch would be no faster even if memory were no matter, smaller
    ones are not either.
    """
    plain = question.stage(fit(question.plan(), question.spec), question.machine)
    if question.batch is None:
        batches: Sequence[int] = range(question.max_batch, 0, -1)
    else:
        batches = (question.batch,)
    given = _Rest(
        room=tuple(
            question.budgets[rank] - _fixed_bytes(question, plain, rank)
            for rank in range(question.ranks)
        ),
        vocabulary=_vocabulary_bytes(plain),
    )
    best: Arrangement | None = None
    fastest = highest = 0.0
    for batch in batches:
        sharing, rest = _sharing(question, plain, batch, given)
        layers = question.spec.num_layers
        if best is not None and batch / (layers * _free_seconds(sharing) + rest) <= fastest:
            break
        if not could_fit(sharing):
            continue
        limit = batch / (layers * bound(sharing) + rest)
        highest = max(highest, limit)
        if limit <= fastest:
            continue
        found = share(sharing)
        if found is None:
            continue
        tried = _of_plan("weighted", question, _weighted_plan(question, found))
        if tried.tokens_per_second > fastest:
            best, fastest = tried, tried.tokens_per_second
    return None if best is None else replace(best, bound=max(highest, fastest))


def _free_seconds(question: Sharing) -> float:
    """Seconds of a layer if memory were no matter: every rank equally long at both halves."""
    return question.heads / sum(1 / each for each in question.head_seconds) + (
        question.units / sum(1 / each for each in question.unit_seconds)
    )


def _weighted_plan(question: Question, found: Shares) -> ServePlan:
    """Shares as whole heads and units over all layers, which a reader can check."""
    spec, layers = question.spec, question.spec.num_layers

    def counts(means: Sequence[float]) -> tuple[int, ...]:
        total = round(sum(means)) * layers
        return tuple(apportion(total, [Fraction(mean) for mean in means]))

    heads = counts(found.heads) if spec.num_kv_heads >= question.ranks else (1,) * question.ranks
    return question.plan(shares=counts(found.units), head_shares=heads)


class _Rest(NamedTuple):
    """What shares depend on at every batch alike."""

    room: tuple[float, ...]
    """Bytes of each rank for heads and columns."""
    vocabulary: int
    """Bytes of embedding and head."""


def _sharing(question: Question, plain: Stage, batch: int, given: _Rest) -> tuple[Sharing, float]:
    """What shares depend on at one batch, and the seconds of a step that they leave alone.

    Seconds and bytes of a head or a unit are means over the layers; a unit of columns takes with
    it its part of dense networks, shared experts and vocabulary.
    """
    spec, machine, layers = question.spec, question.machine, question.spec.num_layers
    moe, width, ranks = spec.moe, spec.hidden_dim, range(question.ranks)
    is_shared = spec.num_kv_heads < question.ranks
    group = spec.num_heads / (question.ranks if is_shared else spec.num_kv_heads)
    rows, queries = (group + 2) * spec.head_dim, group * spec.head_dim
    per_number = plain.matrix_bytes(width, spec.head_dim) / (width * spec.head_dim)
    head_weights = per_number * width * (rows + queries)
    seen = sum(min(question.context, spec.window_of(layer) or math.inf) for layer in range(layers))
    seen /= layers
    position = kv_bytes(question.kv_cache, 1, 1, spec.head_dim)
    head_seconds = tuple(
        max(
            (head_weights + batch * seen * position) / machine.bandwidth[rank],
            2 * batch * width * (rows + queries) / machine.flops[rank]
            + 4 * batch * seen * queries / machine.attention_flops[rank],
        )
        for rank in ranks
    )
    # Bytes of every column; bytes read and operations done in a step, each over all layers.
    networks: list[tuple[float, float, float]] = []
    dense = layers - len(spec.moe_layers)
    if dense:
        size = dense * plain.network_bytes(spec.ffn_dim)
        networks.append((size, size, dense * 6.0 * batch * width * spec.ffn_dim))
    if moe is not None:
        size = len(spec.moe_layers) * moe.num_experts * plain.network_bytes(moe.expert_dim)
        chosen = 1 - (1 - moe.top_k / moe.num_experts) ** batch
        work = 6.0 * batch * moe.top_k * width * moe.expert_dim * len(spec.moe_layers)
        networks.append((size, chosen * size, work))
        if moe.shared_expert_dim:
            size = len(spec.moe_layers) * plain.network_bytes(moe.shared_expert_dim)
            work = 6.0 * batch * width * moe.shared_expert_dim * len(spec.moe_layers)
            networks.append((size, size, work))
    head = float(sum(plain.head_bytes))
    networks.append((head, head, 2.0 * batch * width * spec.vocab_size))
    columns = spec.ffn_dim if moe is None else moe.expert_dim
    units = columns // column_unit(columns, [Fraction(1, len(ranks))] * len(ranks), layers)
    unit_seconds = tuple(
        sum(
            max(read / machine.bandwidth[rank], work / machine.flops[rank])
            for _, read, work in networks
        )
        / (layers * units)
        for rank in ranks
    )
    embedding = given.vocabulary - head
    sharing = Sharing(
        heads=question.ranks if is_shared else spec.num_kv_heads,
        most_heads=1 if is_shared else spec.num_kv_heads,
        units=units,
        head_seconds=(max(head_seconds),) * len(ranks) if is_shared else head_seconds,
        unit_seconds=unit_seconds,
        head_bytes=layers * (head_weights + batch * question.context * position),
        unit_bytes=(sum(size for size, _, _ in networks) + embedding) / units,
        room=given.room,
    )
    step = plain.step(batch, question.context)
    return sharing, step.sums + step.host + plain.router_seconds


def _vocabulary_bytes(stage: Stage) -> int:
    """Embedding and head, of all ranks."""
    return sum(
        matrix.num_bytes
        for rank in range(stage.layout.plan.ranks)
        for matrix in matrices(stage.layout, rank, dtype=stage.dtype, packed=stage.packed)
        if matrix.part in ("embedding", "head")
    )


def _fixed_bytes(question: Question, stage: Stage, rank: int) -> int:
    """What a rank allocates whatever its shares: norms, routers, and at the most to work in."""
    held = sum(
        matrix.num_bytes
        for matrix in matrices(stage.layout, rank, dtype=stage.dtype, packed=stage.packed)
        if matrix.part in ("norms", "router")
    )
    return held + workspace_bytes(
        stage.layout,
        rank,
        dtype=question.dtype,
        max_step_tokens=question.max_step_tokens,
        max_rows=MAX_ROWS,
    )
