"""Layouts that must all compute what one rank computes, and the check that they do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.pieces import Held, parameter_names
from moesaic.data.batches import Batch
from moesaic.moe.balance import AdaptiveCoefficient
from moesaic.moe.config import RoutingConfig
from moesaic.parallel.gradients import gradient_norm, update
from moesaic.parallel.world import World
from moesaic.planning.layout import fit
from moesaic.planning.plan import Splits, Stage, TrainPlan
from moesaic.planning.split import Split
from moesaic.spec import ModelSpec, MoESpec
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizer import build_optimizer, set_learning_rate
from moesaic.training.sharded import ShardedModel
from moesaic.training.step import accumulate, balance
from tests.tiny import randomize

VOCAB = 51
LENGTH = 14

NINE_HEADS = ModelSpec(
    family="mixtral",
    vocab_size=VOCAB,
    hidden_dim=24,
    ffn_dim=20,
    num_layers=4,
    num_heads=9,
    num_kv_heads=3,
    head_dim=4,
    max_positions=32,
    moe=MoESpec(num_experts=6, top_k=2, expert_dim=20),
    moe_layers=(0, 1, 2, 3),
)
"""Nine query heads in three groups, six experts: little divides."""

SKYWORK = NINE_HEADS.replace(
    family="skywork",
    num_kv_heads=9,
    tied_embeddings=True,
    moe=dataclasses.replace(NINE_HEADS.moe, gate_norm_scale=1.0),
)
"""Gating logit normalisation, tied embeddings, as many key-value heads as query heads."""

QWEN = NINE_HEADS.replace(
    family="qwen2_moe",
    qkv_bias=True,
    moe=MoESpec(num_experts=6, top_k=3, expert_dim=12, shared_expert_dim=10, renormalize=False),
    moe_layers=(1, 3),
)
"""Biases, shared experts, dense layers between, gates that do not sum to one."""

WIDE = SKYWORK.replace(num_heads=36, num_kv_heads=36, head_dim=2, num_layers=2, moe_layers=(0, 1))
"""Thirty-six heads, for eight ranks."""

DENSE = NINE_HEADS.replace(family="llama", moe=None, moe_layers=())

BALANCED = RoutingConfig(z_loss_weight=0.1)
DROPPING = RoutingConfig(capacity_factor=0.8, balance_loss="switch", z_loss_weight=0.1)
BY_SEQUENCE = RoutingConfig(
    capacity_factor=0.9, capacity_group="sequence", balance_group="sequence", drop_policy="position"
)


@dataclass(frozen=True)
class Case:
    """One layout and what is trained under it."""

    plan: TrainPlan
    spec: ModelSpec = NINE_HEADS
    routing: RoutingConfig = field(default_factory=lambda: BALANCED)
    micros: int = 4
    """Micro-batches of a step, over all data-parallel ranks."""


def random_batches(micros: int, *, rows: int = 2, seed: int = 5) -> list[Batch]:
    """Micro-batches with two documents a row and some targets that do not count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(micros):
        tokens = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
        cut = int(torch.randint(3, LENGTH - 3, (), generator=generator))
        documents = (torch.arange(LENGTH) >= cut).long().expand(rows, -1).contiguous()
        found.append(Batch(tokens[:, :-1].contiguous(), targets, documents))
    return found


def sharded(case: Case, plan: TrainPlan, *, dtype: torch.dtype) -> ShardedModel:
    """This rank's part of a model with random weights, the same for every plan."""
    world = World.join(fit(plan, case.spec), torch.device("cpu"))
    model = ShardedModel.build(world, dtype=dtype, recompute=plan.recompute)
    alone = World.join(fit(TrainPlan(), case.spec), torch.device("cpu"))
    whole = ShardedModel.build(alone, dtype=dtype)
    randomize(whole.stages[0].model, seed=3)
    with torch.no_grad():
        for name, held in model.weights.items():
            held.tensor.copy_(whole.weights[name].tensor[held.piece.slices])
        model.spread()
    return model


def one_step(
    model: ShardedModel, case: Case, *, coefficient: AdaptiveCoefficient, seed: int
) -> Any:
    """Gradients of one step, and the coefficient moved."""
    plan, place = model.world.layout.plan, model.world.place
    batches = random_batches(case.micros, seed=seed)
    count = case.micros // plan.dp
    found = accumulate(
        model,
        batches[place.dp * count : (place.dp + 1) * count],
        routing=case.routing,
        coefficients_L=coefficient.values_L,
    )
    balance(model, found.statistics, routing=case.routing, coefficient=coefficient)
    return found


def controller(case: Case) -> AdaptiveCoefficient:
    return AdaptiveCoefficient(len(case.spec.moe_layers), maximum=0.7, slope=2.0, decay=0.5)


def check_gradients(case: Case) -> dict[str, float]:
    """The largest differences to one rank in float64, found on rank 0."""
    model = sharded(case, case.plan, dtype=torch.float64)
    coefficient = controller(case)
    found = one_step(model, case, coefficient=coefficient, seed=5)
    copies = {name: model.copies(name) for name in model.parameters}
    norm = gradient_norm(model.parameters, copies=copies, everyone=model.world.everyone)
    gradients = {
        name: Held(p.grad, model.weights[name].piece) for name, p in model.parameters.items()
    }
    whole = {name: model.whole(name, gradients) for name in parameter_names(case.spec)}
    if not model.world.is_first:
        return {}
    expected = sharded(case, TrainPlan(), dtype=torch.float64)
    one_coefficient = controller(case)
    one = one_step(expected, case, coefficient=one_coefficient, seed=5)
    one_norm = gradient_norm(expected.parameters)
    for ours, theirs in zip(found.statistics, one.statistics, strict=True):
        assert torch.equal(ours.counts_E, theirs.counts_E)
        assert int(ours.dropped) == int(theirs.dropped)
        assert int(ours.would_drop) == int(theirs.would_drop)
        assert (ours.tokens, ours.copies, ours.batches) == (
            theirs.tokens,
            theirs.copies,
            theirs.batches,
        )
    return {
        "loss": abs(float(found.loss) - float(one.loss)),
        "norm": abs(norm - one_norm),
        "coefficient": difference(coefficient.values_L, one_coefficient.values_L),
        "gates": max(
            [
                difference(ours.gates_E, theirs.gates_E)
                for ours, theirs in zip(found.statistics, one.statistics, strict=True)
            ],
            default=0.0,
        ),
        **{
            name: difference(gradient, expected.parameters[name].grad)
            for name, gradient in whole.items()
        },
    }


def check_steps(case: Case, optimizer: str) -> dict[str, float]:
    """Three float32 steps: largest difference of a weight, and of a loss, found on rank 0."""
    is_first, ours, our_weights = three_steps(case, case.plan, optimizer)
    if not is_first:
        return {}
    _, theirs, their_weights = three_steps(case, TrainPlan(), optimizer)
    return {
        "loss": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
        "weight": max(difference(our_weights[n], w) for n, w in their_weights.items()),
    }


def three_steps(
    case: Case, plan: TrainPlan, optimizer: str
) -> tuple[bool, list[float], dict[str, Tensor]]:
    """Whether this is rank 0, the losses, and the weights at the end."""
    model = sharded(case, plan, dtype=torch.float32)
    copies = {name: model.copies(name) for name in model.parameters}
    coefficient = controller(case)
    adamw = build_optimizer(model.parameters, OptimizerConfig(lr=1e-3))
    set_learning_rate(adamw, 1e-3)
    losses = []
    for step in range(3):
        found = one_step(model, case, coefficient=coefficient, seed=step)
        norm = gradient_norm(model.parameters, copies=copies, everyone=model.world.everyone)
        if optimizer == "adamw":
            update(adamw, norm=norm, clip=1.0)
        else:
            sgd(model, lr=0.05)
        model.spread()
        losses.append(float(found.loss))
    weights = {name: model.whole(name).clone() for name in parameter_names(case.spec)}
    return model.world.is_first, losses, weights


@torch.no_grad()
def sgd(model: ShardedModel, *, lr: float) -> None:
    for parameter in model.parameters.values():
        assert parameter.grad is not None
        parameter -= lr * parameter.grad
        parameter.grad = None


def difference(a: Tensor, b: Tensor | None) -> float:
    """Largest difference; NaN and a missing value are as far away as can be."""
    assert b is not None
    assert a.shape == b.shape, f"{a.shape=}, {b.shape=}"
    if a.numel() == 0:
        return 0.0
    return float((a - b).abs().max().nan_to_num(nan=torch.inf))


def halves(*last: str) -> tuple[Stage, ...]:
    """Stages that end with these units, the last one with the head."""
    units = ["embedding"]
    units += [f"{n}.{p}" for n in range(4) for p in ("attention", "feed_forward")] + ["head"]
    firsts = ["embedding", *(units[units.index(unit) + 1] for unit in last)]
    return tuple(Stage(a, b) for a, b in zip(firsts, (*last, "head"), strict=True))


def plan(**fields: Any) -> TrainPlan:
    return TrainPlan(**fields)


CASES: dict[str, Case] = {
    # Tensor parallelism, experts over the same ranks
    "tp2 edp": Case(plan(tp=2)),
    "tp2 edp, gathered": Case(plan(tp=2, dispatch="all_gather")),
    "tp2 edp, every copy": Case(plan(tp=2, dispatch="all_to_all", deduplicate=False)),
    "tp2 edp, dropping": Case(plan(tp=2), routing=DROPPING),
    "tp2 edp, by sequence": Case(plan(tp=2), routing=BY_SEQUENCE),
    "tp2 skywork": Case(plan(tp=2), spec=SKYWORK),
    "tp2 skywork dropping": Case(plan(tp=2), spec=SKYWORK, routing=DROPPING),
    "tp2 qwen": Case(plan(tp=2), spec=QWEN),
    "tp2 qwen by sequence": Case(plan(tp=2), spec=QWEN, routing=BY_SEQUENCE),
    "tp2 dense": Case(plan(tp=2), spec=DENSE),
    "tp3": Case(plan(tp=3)),
    "tp4, an idle rank in attention": Case(
        plan(tp=4, splits=Splits(kv_heads=Split.from_counts([1, 1, 0, 1])))
    ),
    "tp4, nine heads over four": Case(plan(tp=4), spec=SKYWORK),
    "tp4, six experts over four, dropping": Case(plan(tp=4), spec=SKYWORK, routing=DROPPING),
    "tp4, chosen splits": Case(
        plan(
            tp=4,
            splits=Splits(
                kv_heads=Split.from_counts([0, 5, 1, 3]),
                vocab=Split.from_counts([20, 0, 30, 1]),
                experts=Split.from_counts([1, 4, 0, 1]),
            ),
        ),
        spec=SKYWORK,
    ),
    "tp2, one rank with no expert": Case(
        plan(tp=2, splits=Splits(experts=Split.from_counts([0, 6])))
    ),
    "tp8, thirty-six heads": Case(plan(tp=8), spec=WIDE, micros=2),
    "tp2, all recomputed": Case(plan(tp=2, recompute=dict.fromkeys(range(4), "full"))),
    "tp2, a bit of each recomputed": Case(
        plan(tp=2, recompute={0: "full", 1: "attention", 2: "moe_activations"}), routing=DROPPING
    ),
    "tp2 qwen, a bit of each recomputed": Case(
        plan(tp=2, recompute={0: "moe_activations", 1: "moe_activations", 2: "attention"}),
        spec=QWEN,
    ),
    # Data parallelism
    "dp2 zero1": Case(plan(dp=2)),
    "dp2 zero2": Case(plan(dp=2, zero=2)),
    "dp2 zero3": Case(plan(dp=2, zero=3)),
    "dp4 zero3": Case(plan(dp=4, zero=3)),
    "dp4 in two copies": Case(plan(dp=4, zero=2, shard=2)),
    "dp4 in four copies": Case(plan(dp=4, shard=1)),
    "dp3, six micro-batches": Case(plan(dp=3, zero=3), micros=6),
    "dp2 dense zero3": Case(plan(dp=2, zero=3), spec=DENSE),
    "dp2 skywork, tied": Case(plan(dp=2, zero=3), spec=SKYWORK, routing=DROPPING),
    "dp2, recomputed": Case(plan(dp=2, zero=3, recompute=dict.fromkeys(range(4), "full"))),
    # Experts over data ranks
    "dp2 ep2": Case(plan(dp=2, experts_over="ep")),
    "dp2 ep2 zero3": Case(plan(dp=2, experts_over="ep", zero=3)),
    "dp4 ep2": Case(plan(dp=4, experts_over="ep", ep=2, zero=2)),
    "dp4 ep4, six experts": Case(plan(dp=4, experts_over="ep", zero=3), routing=DROPPING),
    "dp4 ep2 in two copies": Case(plan(dp=4, experts_over="ep", ep=2, shard=2)),
    # Both
    "dp2 tp2 edp": Case(plan(dp=2, tp=2)),
    "dp2 tp2 edp zero3": Case(plan(dp=2, tp=2, zero=3), routing=DROPPING),
    "dp2 tp2 ep4": Case(plan(dp=2, tp=2, experts_over="ep")),
    "dp2 tp2 ep2": Case(plan(dp=2, tp=2, experts_over="ep", ep=2)),
    "dp2 tp2 etp": Case(plan(dp=2, tp=2, experts_over="etp")),
    "dp2 tp2 etp, every copy": Case(
        plan(dp=2, tp=2, experts_over="etp", dispatch="all_to_all", deduplicate=False)
    ),
    "dp2 tp2 etp, ep1": Case(plan(dp=2, tp=2, experts_over="etp", ep=1, zero=3)),
    "tp2 etp, uneven columns": Case(
        plan(
            tp=2,
            experts_over="etp",
            splits=Splits(expert_columns=Split.from_counts([13, 7])),
        ),
        routing=DROPPING,
    ),
    "tp4 ep2, experts twice": Case(plan(tp=4, experts_over="ep", ep=2), spec=SKYWORK),
    "dp2 tp2 qwen zero3": Case(plan(dp=2, tp=2, zero=3), spec=QWEN),
    "dp2 tp4": Case(plan(dp=2, tp=4, zero=2), spec=SKYWORK),
    "dp4 tp2 in two copies": Case(plan(dp=4, tp=2, shard=2, zero=3)),
    "dp4 tp2 ep4": Case(plan(dp=4, tp=2, experts_over="ep", ep=4, zero=2), spec=SKYWORK),
    "dp2 tp3 etp": Case(plan(dp=2, tp=3, experts_over="etp"), routing=BY_SEQUENCE),
    # Pipelines
    "pp2": Case(plan(pp=2)),
    "pp2 uneven": Case(plan(pp=2, stages=halves("2.feed_forward"))),
    "pp2 half a layer": Case(plan(pp=2, stages=halves("1.attention")), routing=DROPPING),
    "pp2 gpipe": Case(plan(pp=2, schedule="gpipe", stages=halves("0.attention"))),
    "pp3, embedding and head alone": Case(plan(pp=3, stages=halves("embedding", "3.feed_forward"))),
    "pp2 tied": Case(plan(pp=2, stages=halves("1.attention")), spec=SKYWORK),
    "pp2 half a layer, each half recomputed its way": Case(
        plan(
            pp=2,
            stages=halves("1.attention"),
            recompute={"1.attention": "full", "1.feed_forward": "moe_activations", 3: "attention"},
        )
    ),
    "pp4 half layers": Case(
        plan(pp=4, stages=halves("0.attention", "1.attention", "2.feed_forward")), spec=SKYWORK
    ),
    "pp2 interleaved": Case(
        plan(
            pp=2,
            schedule="interleaved",
            stages=halves("0.attention", "1.feed_forward", "2.feed_forward"),
        )
    ),
    "pp2 zb1p": Case(
        plan(pp=2, schedule="zb1p", stages=halves("0.feed_forward", "1.attention", "3.attention"))
    ),
    "pp2 zb1p, one stage a rank": Case(plan(pp=2, schedule="zb1p")),
    "pp2 zbv": Case(
        plan(pp=2, schedule="zbv", stages=halves("0.feed_forward", "1.attention", "2.attention")),
        spec=SKYWORK,
    ),
    "pp2 dualpipev": Case(
        plan(
            pp=2,
            schedule="dualpipev",
            stages=halves("0.feed_forward", "1.attention", "2.attention"),
        ),
        spec=SKYWORK,
        routing=DROPPING,
    ),
    "pp2 recompute map": Case(
        plan(
            pp=2,
            stages=halves("1.attention"),
            recompute={0: "full", 1: "full", 2: "moe_activations", 3: "attention"},
        )
    ),
    "pp2 zbv recompute": Case(
        plan(pp=2, schedule="zbv", recompute={0: "full", 2: "attention", 3: "moe_activations"})
    ),
    "pp2 tp2": Case(plan(pp=2, tp=2, stages=halves("2.attention"))),
    "pp2 tp2 zbv": Case(plan(pp=2, tp=2, schedule="zbv"), spec=SKYWORK, routing=DROPPING),
    "pp2 tp2 zb1p": Case(plan(pp=2, tp=2, schedule="zb1p"), spec=QWEN),
    "pp2 dp2": Case(plan(pp=2, dp=2, zero=1)),
    "pp2 dp2 zero3": Case(plan(pp=2, dp=2, zero=3, stages=halves("1.attention"))),
    "pp2 dp2 ep2 interleaved": Case(
        plan(pp=2, dp=2, experts_over="ep", zero=2, schedule="interleaved"), micros=8
    ),
    "pp2 dp2 zbv": Case(plan(pp=2, dp=2, zero=1, schedule="zbv"), spec=SKYWORK, micros=8),
    "pp2 dp2 dualpipev": Case(plan(pp=2, dp=2, schedule="dualpipev"), micros=8),
    "pp2 dp2 tp2": Case(
        plan(pp=2, dp=2, tp=2, zero=3, stages=halves("1.attention"), recompute={0: "full"}),
        spec=SKYWORK,
        routing=DROPPING,
    ),
    "pp2 dp2 tp2 ep4": Case(
        plan(pp=2, dp=2, tp=2, experts_over="ep", schedule="1f1b", stages=halves("2.attention"))
    ),
    "pp2 dp2 tp2 etp zbv": Case(
        plan(pp=2, dp=2, tp=2, experts_over="etp", schedule="zbv"), spec=SKYWORK, micros=8
    ),
    "pp2 dp2 tp2 interleaved": Case(
        plan(pp=2, dp=2, tp=2, schedule="interleaved", zero=2), routing=DROPPING, micros=8
    ),
    "pp2 dp2 tp2 zb1p": Case(plan(pp=2, dp=2, tp=2, schedule="zb1p"), micros=8),
    "pp2 dp2 tp2 dualpipev": Case(
        plan(pp=2, dp=2, tp=2, schedule="dualpipev", zero=3), spec=SKYWORK, micros=8
    ),
    "pp4 tp2 half layers": Case(
        plan(pp=4, tp=2, stages=halves("0.attention", "1.feed_forward", "2.feed_forward")),
        spec=SKYWORK,
    ),
}
"""By what they are."""
