"""A plan fitted to a model: every split worked out, and what each rank holds of each tensor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.plan import V_SHAPED, Recompute, Splits, TrainPlan
from moesaic.planning.schedules import check_stages, stages_of
from moesaic.planning.split import Span, Split
from moesaic.spec import ModelSpec


class Place(NamedTuple):
    """Where a rank stands: in the dense mesh (pp, dp, tp), and in the experts' view of a stage."""

    pp: int
    dp: int
    tp: int
    edp: int
    """Among the ranks that hold the same part of the same experts."""
    ep: int
    """Among the ranks that hold different experts."""
    etp: int
    """Among the ranks that hold different columns of the same experts."""


@dataclass(frozen=True)
class Shard:
    """What one rank holds of every layer of its stages, as spans of the whole dimensions."""

    kv_heads: Span
    heads: Span
    ffn: Span
    shared_ffn: Span
    vocab: Span
    experts: Span
    expert_columns: Span
    vocab_split: Split
    """Who holds which rows of the vocabulary."""
    expert_split: Split
    """Who holds which experts."""
    dispatch: Literal["all_to_all", "all_gather"]
    """How tokens reach experts."""
    deduplicate: bool
    """Whether a token goes once to a rank that holds several of its experts."""


@dataclass(frozen=True)
class Layout:
    """A plan that was held against a model; `fit` makes it."""

    spec: ModelSpec
    plan: TrainPlan
    kv_heads: Split
    ffn: Split
    shared_ffn: Split
    vocab: Split
    experts: Split
    expert_columns: Split
    stages: tuple[Span, ...]
    """Units of each stage, in the order that tokens pass."""

    def place(self, rank: int) -> Place:
        """Coordinates of a rank."""
        plan = self.plan
        assert 0 <= rank < plan.world_size, f"{rank=}, {plan.world_size=}"
        stage_rank, dense = divmod(rank, plan.dp * plan.tp)
        dp, tp = divmod(dense, plan.tp)
        experts, etp = divmod(dense, plan.expert_tensor_ranks)
        edp, ep = divmod(experts, plan.expert_ranks)
        return Place(stage_rank, dp, tp, edp, ep, etp)

    def shard(self, rank: int) -> Shard:
        """Spans that a rank holds."""
        place = self.place(rank)
        kv_heads = self.kv_heads.spans[place.tp]
        group = self.spec.num_heads // self.spec.num_kv_heads
        return Shard(
            kv_heads=kv_heads,
            heads=(kv_heads[0] * group, kv_heads[1] * group),
            ffn=self.ffn.spans[place.tp],
            shared_ffn=self.shared_ffn.spans[place.tp],
            vocab=self.vocab.spans[place.tp],
            experts=self.experts.spans[place.ep],
            expert_columns=self.expert_columns.spans[place.etp],
            vocab_split=self.vocab,
            expert_split=self.experts,
            dispatch=self.dispatch,
            deduplicate=self.plan.deduplicate,
        )

    @property
    def dispatch(self) -> Literal["all_to_all", "all_gather"]:
        """How tokens reach experts.

        An all-to-all brings each rank 2 (T/t) k h (e-1)/e elements of T tokens over t ranks, a
        gather and a sum 2 (e-1)/e T' h of the T' tokens that the e ranks have between them;
        the former is less where k < e.
        """
        if self.plan.dispatch != "auto":
            return self.plan.dispatch
        top_k = 1 if self.spec.moe is None else self.spec.moe.top_k
        return "all_to_all" if top_k < self.plan.expert_ranks else "all_gather"

    def stages_of(self, pp: int) -> tuple[int, ...]:
        """Stages that pipeline rank `pp` runs, in the order that tokens pass."""
        return stages_of(pp, self.plan.schedule, ranks=self.plan.pp, stages=len(self.stages))

    def recompute(
        self, stage: int, chosen: Mapping[int | str, Recompute] | None = None
    ) -> dict[int, Recompute]:
        """What a stage computes again of each layer of which it holds a part; none is left out.

        Args:
            stage: Its number.
            chosen: By layer or unit, as a plan says it; None: as this plan does.
        """
        chosen = self.plan.recompute if chosen is None else chosen
        units = self.stages[stage]
        found: dict[int, Recompute] = {}
        for layer in layers_of(units, self.spec):
            kind = chosen.get(layer, "none")
            has_attention = holds(units, attention_unit(layer))
            if has_attention != holds(units, feed_forward_unit(layer)):
                half = "attention" if has_attention else "feed_forward"
                kind = chosen.get(f"{layer}.{half}", kind)
                if kind == ("moe_activations" if has_attention else "attention"):
                    kind = "none"
            if kind != "none":
                found[layer] = kind
        return found

    def summary(self) -> str:
        """The layout in one line."""
        plan = self.plan
        parts = [f"pp {plan.pp} x dp {plan.dp} x tp {plan.tp}"]
        if self.spec.moe is not None:
            parts.append(f"experts over {plan.experts_over} {plan.expert_ranks}")
        if plan.pp > 1:
            layers = "+".join(f"{(end - start) / 2:g}" for start, end in self.stages)
            parts.append(f"{plan.schedule}, layers and ends {layers}")
        if plan.tp > 1:
            group = self.spec.num_heads // self.spec.num_kv_heads
            heads = "+".join(str(size * group) for size in self.kv_heads.sizes)
            parts.append(f"heads {heads}")
        return ", ".join(parts)


def fit(plan: TrainPlan, spec: ModelSpec) -> Layout:
    """Work out every split that the plan leaves open, and hold the plan against the model.

    Raises:
        PlanError: A split, a stage or a layer does not belong to this model.
    """
    moe = spec.moe
    if moe is None and plan.experts_over != "edp":
        raise PlanError(
            f"The plan puts experts over {plan.experts_over}, but the model is dense. "
            f"Leave experts_over out."
        )
    splits = plan.splits
    if plan.stages is not None:
        check_stages(plan.schedule, ranks=plan.pp, stages=len(plan.stages))
    if splits.kv_heads is None and plan.tp > spec.num_kv_heads:
        raise PlanError(
            f"The plan's tp is {plan.tp}, but the model has {spec.num_kv_heads} key-value heads: "
            f"a rank would hold none. Lower tp, or say so with splits.kv_heads."
        )
    stages = _fit_stages(plan, spec)
    _check_recompute(plan, spec, stages)
    return Layout(
        spec=spec,
        plan=plan,
        kv_heads=_fit_split(splits, "kv_heads", spec.num_kv_heads, plan.tp),
        ffn=_fit_split(splits, "ffn", spec.ffn_dim, plan.tp),
        shared_ffn=_fit_split(
            splits, "shared_ffn", 0 if moe is None else moe.shared_expert_dim, plan.tp
        ),
        vocab=_fit_split(splits, "vocab", spec.vocab_size, plan.tp),
        experts=_fit_split(
            splits, "experts", 0 if moe is None else moe.num_experts, plan.expert_ranks
        ),
        expert_columns=_fit_split(
            splits,
            "expert_columns",
            0 if moe is None else moe.expert_dim,
            plan.expert_tensor_ranks,
        ),
        stages=stages,
    )


def _check_recompute(plan: TrainPlan, spec: ModelSpec, stages: tuple[Span, ...]) -> None:
    begins = {begin for begin, _ in stages}
    for name in plan.recompute:
        layer = int(str(name).partition(".")[0])
        if layer >= spec.num_layers:
            raise PlanError(
                f"The plan recomputes layer {layer}, but the model has {spec.num_layers} layers, "
                f"0 to {spec.num_layers - 1}."
            )
        if isinstance(name, str) and feed_forward_unit(layer) not in begins:
            raise PlanError(
                f"The plan recomputes {name}, but no stage begins at {layer}.feed_forward: one "
                f"stage has both halves of the layer. Name layer {layer}."
            )


def _fit_split(splits: Splits, name: str, total: int, ranks: int) -> Split:
    given: Split | None = getattr(splits, name)
    if given is None:
        return Split.balanced(total, ranks)
    if len(given.spans) != ranks:
        raise PlanError(
            f"The plan's splits.{name} has {len(given.spans)} spans, but {ranks} ranks share "
            f"this dimension. Give one span a rank."
        )
    if not given.is_partition or given.total != total:
        raise PlanError(
            f"The plan's splits.{name} is {[list(span) for span in given.spans]}, which does not "
            f"hold each of the model's {total} exactly once, in order."
        )
    return given


def _fit_stages(plan: TrainPlan, spec: ModelSpec) -> tuple[Span, ...]:
    end = num_units(spec)
    if plan.stages is None:
        per_rank = 2 if plan.pp > 1 and plan.schedule in (*V_SHAPED, "interleaved") else 1
        return default_stages(spec, plan.pp * per_rank)
    numbers = {name: unit for unit, name in enumerate(unit_names(spec))}
    stages, begin = [], 0
    for number, stage in enumerate(plan.stages):
        for name in stage:
            if name not in numbers:
                raise PlanError(
                    f"Stage {number} of the plan names {name!r}. The model's units are embedding, "
                    f"0.attention, 0.feed_forward and so on to layer {spec.num_layers - 1}, head."
                )
        first, last = numbers[stage.first], numbers[stage.last]
        if last < first:
            raise PlanError(
                f"Stage {number} of the plan ends with {stage.last!r}, which comes before "
                f"{stage.first!r}. Name its first unit first."
            )
        if first != begin:
            expected = "nothing more" if begin == end else f"{unit_names(spec)[begin]!r}"
            raise PlanError(
                f"Stage {number} of the plan goes from {stage.first!r} to {stage.last!r}. Stages "
                f"follow each other without a gap: this one must begin with {expected}."
            )
        begin = last + 1
        stages.append((first, begin))
    if begin != end:
        raise PlanError("The plan's last stage must end with 'head'.")
    return tuple(stages)


def whole(spec: ModelSpec) -> Shard:
    """What the only rank of a world holds: everything."""
    return fit(TrainPlan(), spec).shard(0)


def default_stages(spec: ModelSpec, count: int) -> tuple[Span, ...]:
    """Whole layers over `count` stages, as equal as can be; embedding and head at the ends.

    Raises:
        PlanError: There are fewer layers than stages.
    """
    if count > spec.num_layers:
        raise PlanError(
            f"The plan has {count} stages, but the model only {spec.num_layers} layers. "
            f"Give `stages` that cut layers in two, or use fewer."
        )
    layers = Split.balanced(spec.num_layers, count).spans
    edges = [0, *(attention_unit(start) for start, _ in layers[1:]), num_units(spec)]
    return tuple(itertools.pairwise(edges))


def num_units(spec: ModelSpec) -> int:
    """Embedding, two for each layer, head."""
    return 2 * spec.num_layers + 2


def unit_names(spec: ModelSpec) -> list[str]:
    """Every unit as a plan's file names it, in order; its place here is its number."""
    layers = (
        f"{layer}.{part}"
        for layer in range(spec.num_layers)
        for part in ("attention", "feed_forward")
    )
    return ["embedding", *layers, "head"]


def attention_unit(layer: int) -> int:
    """Number of the unit in which `layer` mixes positions."""
    return 1 + 2 * layer


def feed_forward_unit(layer: int) -> int:
    """Number of the unit in which `layer` has its feed-forward network or its experts."""
    return 2 + 2 * layer


def layers_of(units: Span, spec: ModelSpec) -> list[int]:
    """Layers of which a stage holds a part, in order."""
    return [
        layer
        for layer in range(spec.num_layers)
        if holds(units, attention_unit(layer)) or holds(units, feed_forward_unit(layer))
    ]


def holds(units: Span, unit: int) -> bool:
    """Whether a stage holds a unit."""
    return units[0] <= unit < units[1]
