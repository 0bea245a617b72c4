"""What each unit keeps from its forward to its backward pass, tensor by tensor.

Every tensor is named, with its bytes and the recompute choices under which it stays. Two
implementations differ in what they keep:

    moesaic    this project's training. Norms, router and rope compute in float32 and keep that.
               Weights are float32 and are rounded where they are used, and each micro-batch keeps
               the rounded copy beside its activations. Tests hold this part against what autograd
               saves on real ranks, byte for byte
    megatron   Megatron-Core on Transformer Engine: what arXiv 2205.05198 counts, less what
               FlashAttention and fused activations need not keep, and with it what the modules
               of both libraries hand to `save_for_backward`

Shapes.  T tokens of a micro-batch in a tensor-parallel group, t of them here between the layers
         R rows that arrive for the experts here     N copies of them that these compute
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from moesaic.planning.job import Job
from moesaic.planning.plan import Recompute, Splits
from moesaic.planning.shape import AttentionShape, DenseShape, ModelShape, MoEShape
from moesaic.planning.split import Split

Device = Literal["cpu", "gpu"]
"""Where training runs: its experts are computed by another operation on each."""

CHOICES: tuple[Recompute, ...] = get_args(Recompute)

ALWAYS = frozenset(CHOICES)
UNLESS_FULL = frozenset({"none", "moe_activations", "attention"})
NOT_INSIDE = frozenset({"none", "attention"})
"""Tensors inside a feed-forward network or inside the experts."""
NOT_ATTENTION = frozenset({"none", "moe_activations"})
WHEN_ATTENTION = frozenset({"attention", "full"})
WHEN_FULL = frozenset({"full"})

PANEL = 128
"""Columns that the compiled experts keep side by side; the last panel is filled up."""

ROWS = 64
"""Rows to which the padded experts fill up each expert."""

CHUNK = 1024
"""Tokens whose logits training makes at once."""

INPUT = "input"
"""The part that the second half of a layer does not keep where the whole layer is recomputed."""


class Part(NamedTuple):
    """A tensor, or some of a kind, kept from forward to backward."""

    name: str
    bytes: float
    kept: frozenset[str] = UNLESS_FULL
    """Recompute choices under which it is."""


class Peaks(NamedTuple):
    """Bytes beyond what is kept, at the worst moment inside of one unit."""

    forward: float
    """Beyond what the stage keeps up to the end of this unit."""
    backward: float
    """Beyond what the stage keeps when the backward pass comes to this unit."""
    deferred: float = 0.0
    """Gradients that wait where those of weights are found in a pass of their own."""


@dataclass(frozen=True)
class Activations:
    """What one unit keeps of one micro-batch on one rank."""

    parts: tuple[Part, ...]
    peaks: Peaks
    """With nothing recomputed."""

    def kept(self, choice: str = "none", *, inside_layer: bool = False) -> float:
        """Bytes kept.

        Args:
            choice: What of the layer is recomputed.
            inside_layer: Whether this is a second half whose first is in the same stage.
        """
        return sum(
            part.bytes
            for part in self.parts
            if choice in part.kept and not (inside_layer and part.name == INPUT)
        )

    def again(self, choice: str) -> float:
        """Bytes that are back while the unit is recomputed."""
        return max(0.0, self.kept("none") - self.kept(choice))


class Routed(NamedTuple):
    """Rows of one micro-batch at the experts of one rank."""

    arrived: float
    """Distinct rows; those of the rank itself where nothing travels."""
    computed: float
    """Copies that the experts here compute."""
    padded: float
    """The same with each expert's filled up to a multiple of `ROWS`."""


@dataclass(frozen=True, kw_only=True)
class Megatron:
    """In what versions of Megatron differ, and choices that a `Job` has no word for."""

    fused_activation: bool = True
    """SwiGLU is one operation. Else it keeps the SiLU of the gate too."""

    spare_gradients: bool = True
    """Transformer Engine keeps an unused gradient for each shape of weight, which it hands to
    autograd where the true one was added to the buffer already (`get_dummy_wgrad`), and the head
    makes one each time. Versions before 1.0 and Megatron's own layers do not."""

    context_all_to_all: bool = False
    """Context-parallel ranks exchange heads for positions (`cp_comm_type a2a`): what attention
    returned is then kept twice, before the exchange and after it. Else keys go round in a ring."""

    again: frozenset[str] = frozenset()
    """What every layer computes again, in the words of `--recompute-modules`: core_attn, layernorm,
    mlp, moe, moe_act, shared_experts, mla_up_proj. Beside these `activation` and `norm`: those of
    all networks, and all of them."""

    dropout: bool = False
    """A mask of one byte is kept where each half of a layer joins the residual."""

    loss: Literal["native", "fused", "old"] = "native"
    """native: the loss holds bfloat16 logits while it makes their float32 softmax, and keeps that.
    fused (`cross_entropy_fusion_impl te` of Transformer Engine 2.11): it keeps the bfloat16 logits
    and writes their gradient over them. old: as native, with float32 logits beside (2023)."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a `Job` does not say of how a step is run."""

    device: Device = "gpu"
    """Where."""

    splits: Splits = field(default_factory=Splits)
    """Who holds which span of each dimension, as in a plan; moesaic only."""

    masked: bool = False
    """Whether sequences hold several documents that do not see each other; moesaic only."""

    megatron: Megatron = field(default_factory=Megatron)
    """Which Megatron."""


@dataclass(frozen=True)
class Held:
    """What one rank has of the layers and of the tokens."""

    job: Job
    means: Means
    tensor_rank: int | None = None
    """None: the one that has most of each dimension."""
    expert_rank: int | None = None
    """None: the one that has most experts."""

    @property
    def tokens(self) -> float:
        """T."""
        return float(self.job.tokens)

    @property
    def rows(self) -> float:
        """t."""
        job = self.job
        if not job.sequence_parallel:
            return self.tokens
        if job.framework == "megatron":
            return self.tokens / job.tp
        positions = job.sequence // job.cp
        return job.micro_batch * float(self.share(positions, None, job.tp, self.tensor_rank))

    @property
    def width(self) -> int:
        """Bytes of one activation."""
        return 4 if self.job.dtype == "fp32" else 2

    @staticmethod
    def share(total: int, split: Split | None, ranks: int, rank: int | None) -> int:
        """Positions of a dimension that one rank holds."""
        sizes = (split or Split.balanced(total, ranks)).sizes
        return max(sizes) if rank is None else sizes[rank]

    def heads(self, shape: AttentionShape) -> tuple[float, float]:
        """Query and key-value heads held."""
        tp = self.job.tp
        if self.job.framework == "megatron":
            # A key-value head that is shared by several ranks is held by each of them.
            return shape.heads / tp, max(1.0, shape.kv_heads / tp)
        kv_heads = self.share(shape.kv_heads, self.means.splits.kv_heads, tp, self.tensor_rank)
        return kv_heads * shape.heads / shape.kv_heads, float(kv_heads)

    def columns(self, total: int, *, shared: bool = False) -> float:
        """Columns of a dense network, or of the shared experts."""
        tp = self.job.tp
        if self.job.framework == "megatron":
            return total / tp
        split = self.means.splits.shared_ffn if shared else self.means.splits.ffn
        return float(self.share(total, split, tp, self.tensor_rank))

    def vocab(self, total: int) -> float:
        """Rows of the embedding and of the head."""
        tp = self.job.tp
        if self.job.framework == "megatron":
            # Megatron fills the vocabulary up to a multiple of 128 for each tensor rank.
            return math.ceil(total / (128 * tp)) * 128.0
        return float(self.share(total, self.means.splits.vocab, tp, self.tensor_rank))

    def experts(self, shape: MoEShape) -> tuple[float, float]:
        """Experts held, and columns of each."""
        job = self.job
        ranks, parts = job.expert_ranks, job.expert_tensor_ranks
        if job.framework == "megatron":
            return shape.experts / ranks, shape.expert_dim / parts
        columns = self.share(shape.expert_dim, self.means.splits.expert_columns, parts, None)
        return (
            float(self.share(shape.experts, self.means.splits.experts, ranks, self.expert_rank)),
            float(columns),
        )

    @property
    def shares_experts(self) -> bool:
        """Whether FSDP gathers the experts' weights, which moesaic has it do rounded."""
        return self.job.dp > 1 and self.job.expert_data_ranks > 1

    def gathers(self, shape: MoEShape) -> bool:
        """Whether every rank that shares the experts gets every row."""
        job = self.job
        if job.dispatch != "auto":
            return job.dispatch == "all_gather"
        return shape.top_k >= job.expert_ranks

    def routed(self, shape: MoEShape) -> Routed:
        """Rows to expect at the fullest rank: the mean times `load_tail`, or the capacity."""
        job = self.job
        held, _ = self.experts(shape)
        ranks = job.expert_ranks * job.expert_tensor_ranks
        tokens = self.tokens / job.tp * ranks
        mean = tokens * shape.top_k * held / shape.experts
        computed = min(mean * job.load_tail, tokens * min(shape.top_k, held))
        if job.capacity_factor is not None:
            # Each group of the job's tokens gives an expert a whole number of rows.
            most = math.ceil(job.capacity_factor * shape.top_k * self.tokens / shape.experts)
            full = held * most * tokens / self.tokens
            computed = full if job.framework == "megatron" else min(computed, full)
        padded = computed + min(held * ROWS / 2, computed)
        if job.expert_ranks == 1:
            return Routed(tokens, computed, padded)
        if self.gathers(shape):
            return Routed(tokens, computed, padded)
        if not job.deduplicate:
            return Routed(computed, computed, padded)
        elsewhere = _none_of(shape.experts, held, shape.top_k)
        return Routed(min(computed, tokens * (1 - elsewhere) * job.load_tail), computed, padded)


def _none_of(experts: int, held: float, top_k: int) -> float:
    """Chance that none of `top_k` different experts is among `held` of them."""
    chance = 1.0
    for drawn in range(top_k):
        chance *= max(0.0, experts - held - drawn) / (experts - drawn)
    return chance


def stage_parts(shape: ModelShape, held: Held, layers: Iterable[int]) -> tuple[Part, ...]:
    """What a stage keeps once for all of its layers."""
    if held.job.framework == "megatron":
        return ()
    first = next(iter(layers), None)
    if first is None:
        return ()
    attention = shape.layers[first].attention
    positions = held.job.sequence // held.job.cp
    return (Part("rope tables", 2 * 4.0 * positions * attention.head_dim),)


def unit_activations(
    shape: ModelShape, held: Held, unit: int, *, routed: Routed | None = None
) -> Activations:
    """What one unit keeps.

    Args:
        shape: The model.
        held: What the rank has of it.
        unit: Number of the unit, as `planning.layout` counts.
        routed: Rows that its experts were seen to get; None: those to expect.
    """
    is_ours = held.job.framework == "moesaic"
    last = 2 * len(shape.layers) + 1
    if unit == 0:
        return _our_embedding(shape, held) if is_ours else _embedding(shape, held)
    if unit == last:
        return _our_head(shape, held) if is_ours else _head(shape, held)
    layer = shape.layers[(unit - 1) // 2]
    if unit % 2:
        of_attention = _our_attention if is_ours else _attention
        return of_attention(shape.hidden, layer.attention, held)
    network = layer.feed_forward
    if isinstance(network, DenseShape):
        of_dense = _our_dense if is_ours else _dense
        return of_dense(shape.hidden, network, held)
    rows = held.routed(network) if routed is None else routed
    of_experts = _our_experts if is_ours else _experts
    return of_experts(shape.hidden, network, held, rows)


# --- moesaic ------------------------------------------------------------------------------------


def _our_norm(hidden: int, held: Held, kept: frozenset[str]) -> list[Part]:
    rows = held.rows
    return [
        # In float32 the wide copy is the input itself, which the norm keeps just as well.
        Part("norm: input in float32", 4 * rows * hidden, kept),
        Part("norm: inverse root", 4 * rows, kept),
        Part("norm: normed, before its weight", 4 * rows * hidden, kept),
    ]


def _rounded(held: Held, numbers: float, kept: frozenset[str]) -> list[Part]:
    """Copies of weights in the activations' dtype."""
    return [Part("weights, rounded", 2 * numbers, kept)] if held.width == 2 else []


def _weight_gradient(held: Held, numbers: float) -> float:
    """Of one weight, in both dtypes while it is widened."""
    return numbers * (6 if held.width == 2 else 4)


def _our_attention(hidden: int, shape: AttentionShape, held: Held) -> Activations:
    tokens, rows, width = held.tokens, held.rows, held.width
    heads, kv_heads = held.heads(shape)
    queries, keys = heads * shape.head_dim, kv_heads * shape.head_dim
    kept = NOT_ATTENTION
    parts = _our_norm(hidden, held, kept)
    parts.append(Part("normed, all positions", width * tokens * hidden, kept))
    weights = hidden * (2 * queries + 2 * keys)
    parts += _rounded(held, weights, kept)
    if shape.norms:
        for name, dim, count in (("query", queries, heads), ("key", keys, kv_heads)):
            parts.append(Part(f"{name} norm", (2 * 4 * dim + 4 * count) * tokens, kept))
    parts.append(Part("queries, keys, values", width * tokens * (queries + 2 * keys), kept))
    parts.append(Part("attended values", width * tokens * queries, kept))
    parts.append(Part("log of the softmax's sums", 4 * tokens * heads, kept))
    length = held.job.sequence
    is_windowed = shape.window is not None and shape.window < length
    if (held.means.masked or is_windowed) and heads:
        sequences = held.job.micro_batch if held.means.masked else 1
        parts.append(Part("mask", width * sequences * float(length) ** 2, kept))
    parts.append(Part(INPUT, width * rows * hidden, WHEN_ATTENTION))
    backward = (
        width * tokens * (2 * queries + 2 * keys)
        + 2 * width * tokens * hidden
        + _weight_gradient(held, hidden * queries)
    )
    # The queries' rotation: they, turned, both products and their sum in float32, beside what they
    # are made from; keys, values and what comes of them are not there yet.
    rotation = (20 if width == 2 else 16) * tokens * queries
    forward = rotation - width * tokens * (queries + 2 * keys)
    deferred = width * (tokens * (queries + 2 * keys) + rows * hidden)
    return Activations(tuple(parts), Peaks(max(forward, 8 * rows * hidden), backward, deferred))


def _our_dense(hidden: int, shape: DenseShape, held: Held) -> Activations:
    tokens, rows, width = held.tokens, held.rows, held.width
    columns = held.columns(shape.ffn_dim)
    inner = width * tokens * columns
    parts = _our_norm(hidden, held, UNLESS_FULL)
    parts.append(Part("normed, all positions", width * tokens * hidden))
    parts += _rounded(held, 2 * hidden * columns, NOT_INSIDE)
    parts += _rounded(held, hidden * columns, UNLESS_FULL)
    parts.append(Part("gate, its SiLU, up", 3 * inner, NOT_INSIDE))
    parts.append(Part("product", inner))
    parts.append(Part(INPUT, width * rows * hidden, WHEN_FULL))
    backward = 3 * inner + 2 * width * tokens * hidden + _weight_gradient(held, hidden * columns)
    deferred = 2 * inner + width * tokens * hidden
    return Activations(tuple(parts), Peaks(8 * rows * hidden, backward, deferred))


def _our_experts(hidden: int, shape: MoEShape, held: Held, routed: Routed) -> Activations:
    job, tokens, rows, width = held.job, held.tokens, held.rows, held.width
    copies, count = routed.computed, shape.experts
    experts, columns = held.experts(shape)
    named = shape.top_k
    if job.expert_ranks > 1 and not held.gathers(shape) and not job.deduplicate:
        named = 1
    parts = _our_norm(hidden, held, UNLESS_FULL)
    # In float32 this is the normed input itself.
    parts.append(Part("router: input in float32", 4 * rows * hidden))
    parts += _our_router(shape, tokens)
    parts.append(Part("gates of rows that arrived", 4 * routed.arrived * named))
    # Not among autograd's saved tensors: the dispatch holds them whatever is recomputed.
    is_masked = job.expert_ranks > 1 or job.capacity_factor is not None
    index = 16 * copies + (9 if is_masked else 8) * routed.arrived * named
    if job.expert_ranks > 1 and not held.gathers(shape):
        index += 16 * routed.arrived + 9 * rows * shape.top_k
    parts.append(Part("which copy is in which row", index + 8 * experts, ALWAYS))
    if experts:
        parts += _our_expert_rows(hidden, held, routed, experts=experts, columns=columns)
    parts.append(Part("results of the experts", width * copies * hidden))
    if shape.shared_dim:
        parts += _our_shared(hidden, shape, held)
    parts.append(Part(INPUT, width * rows * hidden, WHEN_FULL))
    backward = (
        width * copies * (2 * columns + 2 * hidden)
        + (4 + width) * copies * hidden
        + 3 * (width if held.shares_experts else 4) * experts * hidden * columns
    )
    forward = width * (copies * (hidden + columns) + tokens * hidden) + 4 * count * tokens
    return Activations(tuple(parts), Peaks(forward, backward, width * copies * hidden))


def _our_router(shape: MoEShape, tokens: float) -> list[Part]:
    experts, top_k = shape.experts, shape.top_k
    return [
        Part("router: logits, centred logits, probabilities", 3 * 4 * experts * tokens),
        # Variance's sign, its root twice and the factor; the gates' sum twice; the log-sum.
        Part("router: numbers of each token", (1 + 3 * 4 + 2 * 4 + 4) * tokens),
        Part("router: chosen experts and gates", (8 + 4) * top_k * tokens),
    ]


def _our_expert_rows(
    hidden: int, held: Held, routed: Routed, *, experts: float, columns: float
) -> list[Part]:
    """What the operation that computes the experts keeps; `moe.experts` has the three."""
    width, copies = held.width, routed.computed
    weights = 3 * experts * hidden * columns
    again = frozenset({"moe_activations"})
    if held.width == 2 and held.means.device == "cpu":
        panels = math.ceil(columns / PANEL) * PANEL
        return [
            Part("rows of the experts", 2 * copies * hidden),
            Part("gate and up of the experts", 2 * 2 * copies * panels, NOT_INSIDE),
        ]
    if held.width == 2:
        return [
            Part("rows of the experts", 2 * copies * hidden),
            *_rounded(held, 0 if held.shares_experts else weights, NOT_INSIDE),
            Part("gate, its SiLU, up, product of the experts", 8 * copies * columns, NOT_INSIDE),
        ]
    return [
        Part("rows of the experts, filled up", 4 * routed.padded * hidden, NOT_INSIDE),
        Part("rows of the experts", 4 * copies * hidden, again),
        Part("gate and up of the experts", 2 * width * routed.padded * columns, NOT_INSIDE),
    ]


def _our_shared(hidden: int, shape: MoEShape, held: Held) -> list[Part]:
    tokens, rows, width = held.tokens, held.rows, held.width
    columns = held.columns(shape.shared_dim, shared=True)
    parts = [
        *_rounded(held, 3 * hidden * columns + hidden, UNLESS_FULL),
        Part("shared expert: gate", width * rows),
        Part("shared expert: gate, its SiLU, up, product", 4 * width * tokens * columns),
        Part("shared expert: result", width * rows * hidden),
    ]
    if held.width == 2:
        parts.append(Part("shared expert: input", width * rows * hidden))
    if held.job.tp > 1:
        parts.append(Part("shared expert: input, all positions", width * tokens * hidden))
    return parts


def _our_embedding(shape: ModelShape, held: Held) -> Activations:
    job, tokens = held.job, held.tokens
    parts = [Part("token ids", 8 * tokens, ALWAYS)]
    if job.tp > 1:
        parts.append(Part("whose token", tokens, ALWAYS))
    vocab = held.vocab(shape.vocab)
    # The gradient of the table is a table.
    backward = 4 * vocab * shape.hidden + 2 * 4 * tokens * shape.hidden
    return Activations(tuple(parts), Peaks(8 * tokens * shape.hidden, backward))


def _our_head(shape: ModelShape, held: Held) -> Activations:
    hidden, tokens, width = shape.hidden, held.tokens, held.width
    vocab = held.vocab(shape.vocab)
    parts = [
        *_our_norm(hidden, held, ALWAYS),
        Part("loss: gradient of its input", width * tokens * hidden, ALWAYS),
        Part("loss: gradient of its weight", 4 * vocab * hidden, ALWAYS),
    ]
    # Of one chunk: logits, the same in float32, their log-probabilities. Until these are there, the
    # gradients of the chunk before stay, in float32 and narrow.
    is_narrow = width == 2
    logits = min(CHUNK, tokens) * vocab * (width + 4 + (4 if is_narrow else 0))
    if tokens > CHUNK:
        logits += CHUNK * vocab * (4 + (width if is_narrow else 0))
    weights = width * vocab * hidden if is_narrow else 0
    backward = 4 * vocab * hidden + 2 * width * tokens * hidden
    return Activations(tuple(parts), Peaks(logits + weights, backward))


# --- megatron -----------------------------------------------------------------------------------


def _norm(
    hidden: int, held: Held, kept: frozenset[str], *, again: Iterable[str] = ()
) -> list[Part]:
    """A norm and the residual before it; `again` are modules that take the norm with them."""
    rows = held.rows
    parts = [Part("residual", 2 * rows * hidden, kept)]
    if held.means.megatron.dropout:
        parts.append(Part("dropout's mask", rows * hidden, kept))
    normed = [
        Part("norm: inverse root", 4 * rows, kept),
        Part("normed", 2 * rows * hidden, kept),
    ]
    _unless(held, ("norm", *again), normed, parts)
    return parts


def _gathered(hidden: int, held: Held) -> float:
    """A tensor of all positions, where ranks share them."""
    return 2 * held.tokens * hidden if held.job.tp > 1 and held.job.sequence_parallel else 0.0


def _attention(hidden: int, shape: AttentionShape, held: Held) -> Activations:
    tokens, rows = held.tokens, held.rows
    heads, kv_heads = held.heads(shape)
    queries, values = heads * shape.score_dim, heads * shape.value_dim
    kept = NOT_ATTENTION
    # A norm that Transformer Engine fuses with the product after it is no module of its own.
    alone = () if shape.kv_rank is None else ("layernorm",)
    parts = _norm(hidden, held, kept, again=alone)
    if shape.kv_rank is None:
        keys_values = kv_heads * (shape.head_dim + shape.value_dim)
    else:
        keys_values = heads * (shape.score_dim + shape.value_dim)
        # Each latent and the same normed; those that no rank shares are cut by positions.
        latents = 2 * (shape.q_rank or 0) + 2 * shape.kv_rank + shape.rope_dim
        parts.append(Part("latents", 2 * rows * latents, kept))
    if shape.norms:
        normed = heads * shape.head_dim + kv_heads * shape.head_dim
        parts.append(Part("queries and keys before their norms", 2 * tokens * normed, kept))
    taken = [
        Part("queries", 2 * tokens * queries, kept),
        Part("keys and values", 2 * tokens * keys_values, kept),
    ]
    again = _unless(held, () if shape.kv_rank is None else ("mla_up_proj",), taken, parts)
    parts.append(Part("attended values", 2 * tokens * values, kept))
    if held.job.cp > 1 and held.means.megatron.context_all_to_all:
        parts.append(Part("attended values, other heads", 2 * tokens * values, kept))
    if held.job.attention_core == "unfused":
        # The softmax; with dropout its mask and what that left.
        each = 5 if held.means.megatron.dropout else 2
        scores = [Part("scores", each * tokens * heads * float(held.job.sequence), kept)]
        again += _unless(held, ("core_attn",), scores, parts)
    else:
        parts.append(Part("log of the softmax's sums", 4 * tokens * heads, kept))
    parts.append(Part(INPUT, 2 * rows * hidden, WHEN_ATTENTION))
    # Gradients of what attention took and gave, its float32 sum for the queries, the residual's.
    backward = 2 * tokens * (2 * queries + keys_values + values) + 4 * tokens * queries
    backward += 2 * rows * hidden + _gathered(hidden, held) + again
    return Activations(tuple(parts), Peaks(2 * rows * hidden, backward))


def _unless(held: Held, modules: Iterable[str], some: list[Part], parts: list[Part]) -> float:
    """Add to `parts` what is kept unless one of these modules is computed again.

    Returns:
        Bytes that the backward pass then computes again.
    """
    if held.means.megatron.again.isdisjoint(modules):
        parts += some
        return 0.0
    return sum(part.bytes for part in some)


def _inside(
    name: str, rows: float, columns: float, matrices: int, held: Held, parts: list[Part]
) -> float:
    """Add what a network keeps between its two products; the rest is as `_unless` returns."""
    modules = {"": ("mlp",), "experts: ": ("moe",), "shared expert: ": ("moe", "shared_experts")}
    again = _unless(
        held,
        modules[name],
        [Part(f"{name}gate and up", 2 * (matrices - 1) * rows * columns)],
        parts,
    )
    activation = [Part(f"{name}product", 2 * rows * columns, NOT_INSIDE)]
    if matrices == 3 and not held.means.megatron.fused_activation:
        activation.append(Part(f"{name}SiLU of the gate", 2 * rows * columns, NOT_INSIDE))
    act = ("activation", "moe_act") if name == "experts: " else ("activation",)
    return again + _unless(held, (*modules[name], *act), activation, parts)


def _dense(hidden: int, shape: DenseShape, held: Held) -> Activations:
    tokens, rows = held.tokens, held.rows
    columns = held.columns(shape.ffn_dim)
    parts = _norm(hidden, held, UNLESS_FULL, again=("mlp",))
    again = _inside("", tokens, columns, shape.matrices_count, held, parts)
    parts.append(Part(INPUT, 2 * rows * hidden, WHEN_FULL))
    # The gradient of gate and up, while all that is kept still is but for the product, in whose
    # place its gradient stands; the gradients of the result and of the residual.
    backward = 2 * (shape.matrices_count - 1) * tokens * columns + 2 * 2 * rows * hidden
    backward += _gathered(hidden, held) + again
    return Activations(tuple(parts), Peaks(2 * rows * hidden, backward))


def _experts(hidden: int, shape: MoEShape, held: Held, routed: Routed) -> Activations:
    tokens, rows = held.tokens, held.rows
    _, columns = held.experts(shape)
    copies = routed.computed
    parts = _norm(hidden, held, UNLESS_FULL, again=("layernorm",))
    # Logits, scores and probabilities in float32; the map of who goes where.
    taken = [
        Part("router", (3 * 4 + 1) * rows * shape.experts),
        Part("rows of the experts", 2 * copies * hidden),
        Part("gates of the rows", 4 * copies),
    ]
    again = _unless(held, ("moe",), taken, parts)
    again += _inside("experts: ", copies, columns, shape.matrices_count, held, parts)
    if shape.shared_dim:
        shared = held.columns(shape.shared_dim, shared=True)
        again += _inside("shared expert: ", tokens, shared, shape.matrices_count, held, parts)
    parts.append(Part(INPUT, 2 * rows * hidden, WHEN_FULL))
    # Rows leave one order or rank for the next: two tensors of them at a time.
    moving = 2 * 2 * copies * hidden
    gradient = 2 * (shape.matrices_count - 1) * copies * columns
    forward = moving + 2 * rows * hidden
    return Activations(
        tuple(parts), Peaks(forward, max(moving, gradient) + 2 * 2 * rows * hidden + again)
    )


def _embedding(shape: ModelShape, held: Held) -> Activations:
    # Its gradient is a whole table, before it is added to the buffer.
    table = 2 * held.vocab(shape.vocab) * shape.hidden
    backward = table + 2 * held.rows * shape.hidden + _gathered(shape.hidden, held)
    return Activations(
        (Part("token ids", 8 * held.tokens, ALWAYS),),
        Peaks(2 * held.tokens * shape.hidden, backward),
    )


def _head(shape: ModelShape, held: Held) -> Activations:
    hidden, tokens, loss = shape.hidden, held.tokens, held.means.megatron.loss
    vocab = held.vocab(shape.vocab)
    logits = 2 * tokens * vocab
    gathered = _gathered(hidden, held)
    product = 2 * tokens * hidden + gathered
    if held.means.megatron.spare_gradients:
        product += 2 * vocab * hidden
    norm = _norm(hidden, held, ALWAYS)
    if loss == "fused":
        parts = (*norm, Part("loss: logits", logits, ALWAYS))
        return Activations(parts, Peaks(gathered, product))
    parts = (*norm, Part("loss: softmax", 2 * logits, ALWAYS))
    forward = logits * (3 if loss == "old" else 1) + gathered
    # First the logits' gradient in bfloat16 beside that in float32, then what the product gives.
    return Activations(parts, Peaks(forward, max(logits, product - logits)))


def spare_gradients(shape: ModelShape, held: Held, units: Iterable[int]) -> float:
    """Bytes of the unused gradients that Transformer Engine keeps, one for each shape of weight."""
    if held.job.framework != "megatron" or not held.means.megatron.spare_gradients:
        return 0.0
    found: set[tuple[float, float]] = set()
    for unit in units:
        if not 0 < unit < 2 * len(shape.layers) + 1:
            continue
        layer = shape.layers[(unit - 1) // 2]
        tp = held.job.tp
        if unit % 2:
            matrices, parts = layer.attention.matrices(shape.hidden), tp
        elif isinstance(layer.feed_forward, DenseShape):
            matrices, parts = layer.feed_forward.matrices(shape.hidden), tp
        else:
            matrices, parts = layer.feed_forward.shared(shape.hidden), tp
            for matrix in layer.feed_forward.expert(shape.hidden):
                found.add(
                    _cut(matrix.inputs, matrix.outputs, matrix.shared, held.job.expert_tensor_ranks)
                )
        for matrix in matrices:
            found.add(_cut(matrix.inputs, matrix.outputs, matrix.shared, parts))
    return 2 * sum(inputs * outputs for inputs, outputs in found)


def _cut(inputs: int, outputs: int, shared: str, parts: int) -> tuple[float, float]:
    if shared == "columns":
        return inputs, outputs / parts
    return (inputs / parts, outputs) if shared == "rows" else (inputs, outputs)
