"""How fast a model is served: seconds of a step, predicted from bytes, operations and messages.

Nothing here is measured. A step takes b tokens, one of each sequence while decoding, that look
back on S positions:

    attention     max over ranks of max(bytes of its weights + b S bytes of its keys and values
                  / bandwidth, operations / peak)
    experts       E (1 - (1 - k/E)^b) of E experts are read when tokens choose k of them evenly;
                  by columns each rank reads its part of those, whole experts have a fullest rank
    sum           2 (n - 1) hops + 2 (n - 1)/n b D bytes / bus, after each half of a layer
    head          its weights, and scores of b tokens gathered from n ranks

Ranks meet at each sum, so each half of a layer takes as long as on its slowest rank. Weights and
cache are streamed once a step, which is a roofline: kernels that reach less are slower, in the
parts `Machine` names. These are the formulas of the project's reference on serving, section 6.2,
with the layout's own spans in place of means; `roofline.py` there is the program they were first
computed with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from moesaic.planning.cluster import ClusterSpec
from moesaic.planning.serving.layout import LayerSplits, ServeLayout
from moesaic.planning.serving.ledger import Dtype, matrices
from moesaic.planning.serving.storage import ITEMSIZE, kv_bytes, stored_bytes
from moesaic.planning.split import Split

STREAM = 0.85
"""Part of the memory's bandwidth that a step reaches. Reference on serving, 6.2."""

PRODUCTS = 0.55
"""Part of the peak that a step's matrix products reach. Reference on serving, 6.2."""

SCORE_BYTES = 4
"""Scores are gathered in float32."""


class Link(NamedTuple):
    """What a rank exchanges with others through."""

    box: int
    """The machine that it is in."""
    bus: float
    """Bytes a second in a ring's sum."""
    hop: float
    """Seconds of one step of it."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a step runs on: each rank's device, and the links between them."""

    bandwidth: tuple[float, ...]
    """Bytes a second that each rank streams."""
    flops: tuple[float, ...]
    """Operations a second of each rank's products with weights."""
    attention_flops: tuple[float, ...]
    """The same of queries with keys, and of scores with values."""
    links: tuple[Link, ...]
    """Those of each rank to others of its box."""
    network: Link
    """Between boxes."""
    sum_bytes: float = 2
    """Bytes of one number that is summed."""
    host: float = 0.0
    """Seconds of a layer that no device works, because the host is late; 0 with CUDA graphs or
    C++ all through."""

    @cached_property
    def bus(self) -> float:
        """Bytes a second of each rank in a ring's sum over all."""
        return min(link.bus for link in self._ring)

    @cached_property
    def hop(self) -> float:
        """Seconds of one step of such a sum."""
        return max(link.hop for link in self._ring)

    @property
    def _ring(self) -> tuple[Link, ...]:
        """A ring is as slow as the slowest link on its way."""
        crosses = len({link.box for link in self.links}) > 1
        return (*self.links, self.network) if crosses else self.links

    def part(self, ranks: Sequence[int]) -> Machine:
        """The machine of some of its ranks."""

        def some(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[rank] for rank in ranks)

        return replace(
            self,
            bandwidth=some(self.bandwidth),
            flops=some(self.flops),
            attention_flops=some(self.attention_flops),
            links=some(self.links),
        )

    def sum_seconds(self, ranks: int, numbers: float) -> float:
        """A ring's sum of some numbers over ranks."""
        if ranks == 1:
            return 0.0
        part = 2 * (ranks - 1) / ranks
        return 2 * (ranks - 1) * self.hop + part * numbers * self.sum_bytes / self.bus


def machine_of(
    cluster: ClusterSpec,
    weights: str,
    *,
    dtype: Dtype,
    one_box: bool = False,
    peer_access: bool = False,
    bus: float | None = None,
    hop: float | None = None,
    stream: float = STREAM,
    products: float = PRODUCTS,
    sum_bytes: float = 2,
    host: float = 0.0,
) -> Machine:
    """A cluster as a step sees it.

    Args:
        cluster: Devices and links.
        weights: What matrices are stored in. Products run in FP8 where the device multiplies it.
        dtype: Of activations.
        one_box: All devices share one machine's links, whatever their kinds.
        peer_access: Take the links' `peer_bandwidth`.
        bus: In place of what the cluster says.
        hop: In place of what the cluster says.
        stream: Part of the memory's bandwidth.
        products: Part of the peak.
        sum_bytes: Bytes of one number that is summed.
        host: Seconds a layer.
    """
    nodes = [cluster.node(rank) for rank in range(cluster.ranks)]

    def link(box: int, bandwidth: float, latency: float) -> Link:
        return Link(box, bandwidth if bus is None else bus, latency if hop is None else hop)

    links = tuple(
        link(
            0 if one_box else cluster.node_number(rank),
            node.peer_bandwidth if peer_access and node.peer_bandwidth else node.sum_bandwidth,
            node.sum_latency,
        )
        for rank, node in enumerate(nodes)
    )

    def peak(rank: int, kinds: tuple[str, ...]) -> float:
        flops = nodes[rank].device.matmul_flops
        return products * next(flops[kind] for kind in (*kinds, *flops) if kind in flops)

    wide = ("bf16", "fp32") if dtype == "bfloat16" else ("fp32",)
    ranks = range(cluster.ranks)
    return Machine(
        bandwidth=tuple(stream * node.device.memory_bandwidth for node in nodes),
        flops=tuple(peak(rank, (*(["fp8"] * (weights == "float8")), *wide)) for rank in ranks),
        attention_flops=tuple(peak(rank, wide) for rank in ranks),
        links=links,
        network=link(-1, cluster.network_bandwidth, cluster.network_latency),
        sum_bytes=sum_bytes,
        host=host,
    )


class Step(NamedTuple):
    """Seconds of a step, by what they go to."""

    attention: float
    feed_forward: float
    head: float
    sums: float
    host: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self)


@dataclass(frozen=True)
class Stage:
    """Ranks that share every layer of a part of the model, as all ranks do without a pipeline."""

    layout: ServeLayout
    machine: Machine
    dtype: Dtype = "bfloat16"
    packed: bool = False
    has_embedding: bool = True
    has_head: bool = True

    @cached_property
    def kinds(self) -> dict[tuple[LayerSplits, int | None, bool], int]:
        """Layers that take the same time, and how many there are of each kind."""
        spec = self.layout.spec
        found: dict[tuple[LayerSplits, int | None, bool], int] = {}
        for layer, splits in enumerate(self.layout.layers):
            # Where spans begin does not matter, only how long they are.
            sizes = LayerSplits(*(_from_zero(split) for split in splits))
            key = (sizes, spec.window_of(layer), spec.is_moe_layer(layer))
            found[key] = found.get(key, 0) + 1
        return found

    @cached_property
    def head_bytes(self) -> tuple[int, ...]:
        """Weights of the head on each rank."""
        width, ranks = self.layout.spec.hidden_dim, self.layout.vocab.sizes
        return tuple(stored_bytes(self.dtype, rows, width, packed=self.packed) for rows in ranks)

    @cached_property
    def weight_bytes(self) -> tuple[int, ...]:
        """Weights of each rank."""
        return tuple(
            sum(
                matrix.num_bytes
                for matrix in matrices(self.layout, rank, dtype=self.dtype, packed=self.packed)
                if self._holds(matrix.part)
            )
            for rank in range(self.layout.plan.ranks)
        )

    def _holds(self, part: str) -> bool:
        if part == "embedding":
            is_head_too = self.layout.spec.tied_embeddings and not self.packed
            return self.has_embedding or (self.has_head and is_head_too)
        return self.has_head or part != "head"

    def step(
        self,
        tokens: float,
        context: float,
        *,
        sequences: float | None = None,
        scores: float | None = None,
    ) -> Step:
        """Seconds of a step.

        Args:
            tokens: New tokens.
            context: Positions that each looks back on, on average.
            sequences: That the tokens belong to, whose keys and values are read; None: each token
                to its own.
            scores: Tokens of which scores are wanted; None: all of them.
        """
        spec, machine = self.layout.spec, self.machine
        ranks = self.layout.plan.ranks
        attention = feed_forward = 0.0
        for (splits, window, is_moe), count in self.kinds.items():
            seen = context if window is None else min(context, window)
            read = seen * (tokens if sequences is None else sequences)
            attention += count * self._attention(splits, tokens, seen, read)
            half = self._experts if is_moe else self._dense
            feed_forward += count * half(splits, tokens)
        feed_forward += self.router_seconds
        sums = 2 * spec.num_layers * machine.sum_seconds(ranks, tokens * spec.hidden_dim)
        head = 0.0
        rows = tokens if scores is None else scores
        if self.has_head and rows:
            head = max(
                max(size / speed, 2 * rows * size / ITEMSIZE[self.dtype] / flops)
                for size, speed, flops in zip(
                    self.head_bytes, machine.bandwidth, machine.attention_flops, strict=True
                )
            )
            if ranks > 1:
                gathered = (ranks - 1) / ranks * rows * spec.vocab_size * SCORE_BYTES
                sums += (ranks - 1) * machine.hop + gathered / machine.bus
        return Step(attention, feed_forward, head, sums, machine.host * spec.num_layers)

    @property
    def router_seconds(self) -> float:
        """To read all routers, which every rank does."""
        spec = self.layout.spec
        if spec.moe is None:
            return 0.0
        numbers = len(spec.moe_layers) * spec.moe.num_experts * spec.hidden_dim
        return ITEMSIZE["float32"] * numbers / min(self.machine.bandwidth)

    def _attention(self, splits: LayerSplits, tokens: float, seen: float, read: float) -> float:
        spec, plan = self.layout.spec, self.layout.plan
        slowest = 0.0
        for rank, (heads, kv) in enumerate(
            zip(splits.heads.sizes, splits.kv_heads.sizes, strict=True)
        ):
            queries, rows = heads * spec.head_dim, (heads + 2 * kv) * spec.head_dim
            weights = self.matrix_bytes(rows, spec.hidden_dim) + self.matrix_bytes(
                spec.hidden_dim, queries
            )
            cached = read * kv_bytes(plan.kv_cache, kv, 1, spec.head_dim)
            products = 2 * tokens * spec.hidden_dim * (rows + queries)
            scores = 4 * tokens * seen * queries
            slowest = max(
                slowest,
                (weights + cached) / self.machine.bandwidth[rank],
                products / self.machine.flops[rank] + scores / self.machine.attention_flops[rank],
            )
        return slowest

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Of a matrix of a layer."""
        return stored_bytes(self.layout.plan.weights, rows, columns, packed=self.packed)

    def network_bytes(self, columns: int) -> int:
        """Of the three matrices of a feed-forward network of so many columns."""
        width = self.layout.spec.hidden_dim
        return 2 * self.matrix_bytes(columns, width) + self.matrix_bytes(width, columns)

    def _dense(self, splits: LayerSplits, tokens: float) -> float:
        return self._network(splits.ffn.sizes, tokens)

    def _network(self, sizes: Sequence[int], tokens: float) -> float:
        """A network that every token goes through."""
        width = self.layout.spec.hidden_dim
        return max(
            max(self.network_bytes(columns) / speed, 6 * tokens * width * columns / flops)
            for columns, speed, flops in zip(
                sizes, self.machine.bandwidth, self.machine.flops, strict=True
            )
        )

    def _experts(self, splits: LayerSplits, tokens: float) -> float:
        moe = self.layout.spec.moe
        assert moe is not None
        width, machine = self.layout.spec.hidden_dim, self.machine
        chosen = 1 - (1 - moe.top_k / moe.num_experts) ** tokens
        """Probability that some token of the step chooses a given expert."""
        shared = self._network(splits.shared_ffn.sizes, tokens) if moe.shared_expert_dim else 0.0
        columns = splits.expert_columns.sizes
        held = splits.experts.sizes
        read = [
            self.network_bytes(size) / speed
            for size, speed in zip(columns, machine.bandwidth, strict=True)
        ]
        worked = max(
            6 * tokens * moe.top_k * count / moe.num_experts * width * size / flops
            for count, size, flops in zip(held, columns, machine.flops, strict=True)
        )
        if self.layout.plan.experts == "whole":
            streamed = fullest(held, read, chosen)
        else:
            streamed = chosen * moe.num_experts * max(read)
        return shared + max(streamed, worked)


def fullest(experts: Sequence[int], seconds: Sequence[float], chosen: float) -> float:
    """Mean time of the rank that takes longest to read those of its experts that are chosen.

    The number chosen of a rank's experts is taken as binomial, and ranks as independent: the mean
    of the largest is the integral of the probability that some rank takes longer.

    Args:
        experts: Of each rank.
        seconds: To read one of them.
        chosen: Probability that an expert is chosen.
    """
    times = sorted(
        {
            number * each
            for count, each in zip(experts, seconds, strict=True)
            for number in range(count + 1)
        }
    )
    mean = 0.0
    for start, end in itertools.pairwise(times):
        at_most = math.prod(
            _binomial_up_to(min(count, math.floor(start / each + 1e-9)), count, chosen)
            for count, each in zip(experts, seconds, strict=True)
            if count
        )
        mean += (end - start) * (1 - at_most)
    return mean


def _binomial_up_to(number: int, count: int, chosen: float) -> float:
    """Probability that at most `number` of `count` are chosen."""
    return sum(
        math.comb(count, k) * chosen**k * (1 - chosen) ** (count - k) for k in range(number + 1)
    )


class Speed(NamedTuple):
    """Tokens a second, and what a step takes."""

    tokens_per_second: float
    token_seconds: float
    """From one token of a sequence to its next."""
    step: Step
    """Of the slowest stage."""


def decode(stages: Sequence[Stage], machine: Machine, batch: float, context: float) -> Speed:
    """Speed of one token a step of each of `batch` sequences.

    A pipeline of P stages takes the sequences in P groups, so that every stage has work; each
    streams its weights once for batch / P tokens. With fewer sequences than stages some wait.

    Args:
        stages: One behind the other.
        machine: Of all of them.
        batch: Sequences.
        context: Positions of each.
    """
    depth = len(stages)
    each = max(1.0, batch / depth)
    steps = _with_sends(stages, machine, [stage.step(each, context) for stage in stages], each)
    slowest = max(steps, key=lambda step: step.seconds)
    if batch < depth:
        once = sum(step.seconds for step in steps)
        return Speed(batch / once, once, slowest)
    return Speed(each / slowest.seconds, depth * slowest.seconds, slowest)


def prefill(stages: Sequence[Stage], machine: Machine, chunk: int, length: int) -> float:
    """Tokens a second of prompts of `length`, read in chunks; stages of a pipeline overlap."""
    steps = [stage.step(chunk, length / 2, sequences=1, scores=0) for stage in stages]
    return chunk / max(step.seconds for step in _with_sends(stages, machine, steps, chunk))


def _with_sends(
    stages: Sequence[Stage], machine: Machine, steps: list[Step], tokens: float
) -> list[Step]:
    """With what each stage of a pipeline sends to the next."""
    if len(stages) == 1:
        return steps
    sent = tokens * stages[0].layout.spec.hidden_dim * machine.sum_bytes / machine.bus
    return [step._replace(sums=step.sums + sent + machine.hop) for step in steps]


def _from_zero(split: Split) -> Split:
    return Split.from_counts(split.sizes)
