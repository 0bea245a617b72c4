"""MoE layers whose experts lie on several ranks, against the layer that has them all."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.moe.capacity import expert_capacity, keep_within_capacity
from moesaic.moe.config import RoutingConfig
from moesaic.moe.exchange import Exchange
from moesaic.moe.layer import MoELayer, RoutingStep
from moesaic.parallel.collectives import Traffic
from moesaic.parallel.world import World
from moesaic.planning.layout import fit
from moesaic.planning.plan import Splits, TrainPlan
from moesaic.planning.split import Split
from moesaic.spec import MoESpec
from tests.ranks import run_ranks
from tests.tiny import MIXTRAL
from tests.wire import received_bytes

DIM = 8
BATCH, LENGTH = 2, 7
"""Of each data-parallel rank; 7 positions over 2 ranks are 4 + 3, over 4 they are 2 + 2 + 2 + 1."""

PLANS = {
    "edp 2": TrainPlan(tp=2),
    "edp 4": TrainPlan(tp=4),
    "edp 2 in each of 2": TrainPlan(dp=2, tp=2),
    "ep 2": TrainPlan(dp=2, experts_over="ep"),
    "ep 3": TrainPlan(dp=3, experts_over="ep"),
    "ep 4 over 2 x 2": TrainPlan(dp=2, tp=2, experts_over="ep"),
    "ep 2 over 2 x 2": TrainPlan(dp=2, tp=2, experts_over="ep", ep=2),
    "etp 2 x 2": TrainPlan(dp=2, tp=2, experts_over="etp"),
    "etp, columns only": TrainPlan(dp=2, tp=2, experts_over="etp", ep=1),
}

MOE = MoESpec(num_experts=6, top_k=2, expert_dim=5)
"""6 experts over 4 ranks are 2 + 2 + 1 + 1; 5 columns over 2 are 3 + 2."""

DROPLESS = RoutingConfig()


@dataclass(frozen=True)
class Case:
    """A layer, what training asks of it, and how rows travel."""

    spec: MoESpec = MOE
    config: RoutingConfig | None = DROPLESS
    dispatch: str = "all_to_all"
    deduplicate: bool = True
    recompute: bool = False
    length: int = LENGTH
    crowded: bool = False
    """Every token chooses the first `top_k` experts, and ranks without them get no row."""

    def with_(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def moe(**changes: Any) -> MoESpec:
    return dataclasses.replace(MOE, **changes)


WAYS = {
    "once to a rank": {"dispatch": "all_to_all", "deduplicate": True},
    "every copy": {"dispatch": "all_to_all", "deduplicate": False},
    "all to all ranks": {"dispatch": "all_gather"},
}

CASES = {
    f"top-{top_k}, {name}": Case(spec=moe(top_k=top_k), **way)
    for top_k in (1, 2, 4)
    for name, way in WAYS.items()
}
for name, way in WAYS.items():
    CASES |= {
        f"{what}, {name}": case.with_(**way)
        for what, case in {
            "an idle rank": Case(spec=moe(num_experts=3)),
            "ranks without a row": Case(crowded=True),
            "ranks without a position": Case(length=1),
            "dropping": Case(config=RoutingConfig(capacity_factor=0.6)),
            "dropping by position": Case(
                config=RoutingConfig(
                    capacity_factor=0.6, drop_policy="position", capacity_group="sequence"
                )
            ),
            "everything dropped but one copy of an expert": Case(
                config=RoutingConfig(capacity_factor=0.01), crowded=True
            ),
            "shared expert": Case(spec=moe(shared_expert_dim=3)),
            "normalised logits": Case(spec=moe(gate_norm_scale=1.5, renormalize=False)),
            "biased choice": Case(spec=moe(selection_bias=True)),
            "recomputed": Case(spec=moe(top_k=4), recompute=True),
            "recomputed without a row": Case(crowded=True, recompute=True),
            "inference": Case(config=None),
        }.items()
    }
CASES |= {
    "Switch loss and z-loss": Case(config=RoutingConfig(balance_loss="switch", z_loss_weight=0.3)),
    "losses of each sequence": Case(
        config=RoutingConfig(balance_group="sequence", z_loss_weight=0.3)
    ),
    "Switch loss of each sequence": Case(
        config=RoutingConfig(balance_loss="switch", balance_group="sequence")
    ),
    "everything": Case(
        spec=moe(top_k=4, shared_expert_dim=3, gate_norm_scale=2.0),
        config=RoutingConfig(capacity_factor=0.8, balance_loss="switch", z_loss_weight=0.1),
        recompute=True,
    ),
}


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same values wherever it is called."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def whole_layer(case: Case) -> MoELayer:
    layer = MoELayer(case.spec, DIM).double()
    for number, parameter in enumerate(layer.parameters()):
        parameter.data = 0.5 * drawn(*parameter.shape, seed=number)
    if case.crowded:
        layer.gate.weight.data[: case.spec.top_k, 0] += 100.0
    if layer.gate.e_score_correction_bias is not None:
        layer.gate.e_score_correction_bias.copy_(0.3 * drawn(case.spec.num_experts, seed=99))
    return layer


def inputs(case: Case, world: World) -> list[Tensor]:
    """Tokens of each data-parallel rank, (B, S, D)."""
    found = [drawn(BATCH, case.length, DIM, seed=1000 + dp) for dp in range(world.layout.plan.dp)]
    for x_BSD in found:
        x_BSD[..., 0] = x_BSD[..., 0].abs() + 0.5  # crowded layers look at its sign
    return found


def routing_step(case: Case) -> RoutingStep | None:
    if case.config is None:
        return None
    return RoutingStep(case.config, torch.tensor(0.5, dtype=torch.float64), scale=0.25)


def own_parts(whole: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """What this rank holds of each tensor of a layer."""
    shard = world.layout.shard(world.rank)
    (e0, e1), (c0, c1), (s0, s1) = shard.experts, shard.expert_columns, shard.shared_ffn
    cuts: dict[str, tuple[slice, ...]] = {
        "experts.w1": (slice(e0, e1), slice(c0, c1)),
        "experts.w3": (slice(e0, e1), slice(c0, c1)),
        "experts.w2": (slice(e0, e1), slice(None), slice(c0, c1)),
        "shared_expert.gate_proj.weight": (slice(s0, s1),),
        "shared_expert.up_proj.weight": (slice(s0, s1),),
        "shared_expert.down_proj.weight": (slice(None), slice(s0, s1)),
    }
    return {name: tensor[cuts.get(name, ())] for name, tensor in whole.items()}


def own_layer(case: Case, reference: MoELayer, world: World) -> MoELayer:
    shard = dataclasses.replace(
        world.layout.shard(world.rank), dispatch=case.dispatch, deduplicate=case.deduplicate
    )
    layer = MoELayer(case.spec, DIM, shard=shard, groups=world.groups).double()
    layer.load_state_dict(own_parts(reference.state_dict(), world))
    return layer


def join(plan: TrainPlan, spec: MoESpec) -> World:
    model = MIXTRAL.replace(family="skywork", num_kv_heads=4, moe=spec)
    return World.join(fit(plan, model), torch.device("cpu"))


def refit(world: World, spec: MoESpec) -> World:
    """The same groups for another mixture."""
    layout = fit(world.layout.plan, world.layout.spec.replace(moe=spec))
    return dataclasses.replace(world, layout=layout)


def check_layers(plan: TrainPlan) -> None:
    world = join(plan, MOE)
    for name, case in CASES.items():
        try:
            check_layer(case, refit(world, case.spec))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check_layer(case: Case, world: World) -> None:
    plan, place = world.layout.plan, world.place
    reference, xs = whole_layer(case), [x.requires_grad_() for x in inputs(case, world)]
    step, weights = routing_step(case), drawn(BATCH, case.length, DIM, seed=5)
    expected = [reference(x, step) for x in xs]
    sum((y.sin() * weights).sum() for y, _ in expected).backward()

    layer = own_layer(case, reference, world)
    parts = Split.balanced(case.length, plan.tp)
    own = slice(*parts.spans[place.tp])
    x = xs[place.dp].detach()[:, own].clone().requires_grad_()
    y, statistics = layer(x, step, parts, recompute=case.recompute)
    (y.sin() * weights[:, own]).sum().backward()

    exact = {"rtol": 1e-12, "atol": 1e-12}
    expected_y, expected_statistics = expected[place.dp]
    torch.testing.assert_close(y, expected_y[:, own], **exact)
    torch.testing.assert_close(x.grad, xs[place.dp].grad[:, own], **exact)
    if statistics is not None:
        ours, theirs = (s.to_tensor() for s in (statistics, expected_statistics))
        torch.testing.assert_close(ours, theirs, **exact)
    assert reference.gate.weight.grad.any()
    gradients = own_parts({n: p.grad for n, p in reference.named_parameters()}, world)
    for name, parameter in layer.named_parameters():
        alike = world.everyone
        if name.startswith("experts."):
            alike = world.expert_data
        elif name.startswith("shared_expert."):
            alike = world.data
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            alike.sum_(gradient), gradients[name], **exact, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_ranks_together_compute_what_one_rank_computes(plan):
    run_ranks(plan.world_size, check_layers, plan)


def check_uneven(plan: TrainPlan) -> None:
    world = join(plan, MOE)
    for way in WAYS.values():
        check_layer(Case(**way), world)


@pytest.mark.parametrize(
    "plan",
    [
        TrainPlan(tp=2, splits=Splits(experts=Split.from_counts([0, 6]))),
        TrainPlan(dp=3, experts_over="ep", splits=Splits(experts=Split.from_counts([1, 0, 5]))),
        TrainPlan(
            dp=2,
            tp=2,
            experts_over="etp",
            splits=Splits(
                experts=Split.from_counts([5, 1]), expert_columns=Split.from_counts([0, 5])
            ),
        ),
    ],
    ids=["edp", "ep", "etp"],
)
def test_experts_and_their_columns_are_cut_as_the_plan_says(plan):
    run_ranks(plan.world_size, check_uneven, plan)


def check_full_recompute(plan: TrainPlan) -> list[int]:
    """Compare gradients; returns payloads: forward, backward, and both when recomputed."""
    world = join(plan, MOE)
    layer = own_layer(Case(crowded=True), whole_layer(Case(crowded=True)), world)
    parts = Split.balanced(LENGTH, plan.tp)
    own = slice(*parts.spans[world.place.tp])
    x = inputs(Case(), world)[world.place.dp][:, own].clone().requires_grad_()
    step = routing_step(Case())
    payloads = []
    y, _ = layer(x, step, parts)
    payloads.append(layer.exchange.traffic.payload)
    y.sin().sum().backward()
    payloads.append(layer.exchange.traffic.payload - payloads[0])
    plain = [x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    layer.exchange.traffic, x.grad = Traffic(), None
    layer.zero_grad()
    y, _ = checkpoint(layer, x, step, parts, use_reentrant=False)
    y.sin().sum().backward()
    payloads.append(layer.exchange.traffic.payload)
    torch.testing.assert_close([x.grad, *(p.grad for p in layer.parameters())], plain)
    return payloads


@pytest.mark.parametrize("name", ["edp 4", "ep 4 over 2 x 2", "etp 2 x 2"])
def test_recomputing_a_whole_layer_sends_its_tokens_once_more_but_no_results(name):
    payloads = run_ranks(4, check_full_recompute, PLANS[name])
    # Summed over ranks, because what one gets and what it sends back differ.
    forward, backward, both = (sum(column) for column in zip(*payloads, strict=True))
    assert forward == backward > 0
    assert both == forward + backward + forward // 2


def check_bfloat16(plan: TrainPlan) -> None:
    world = join(plan, MOE)
    reference = whole_layer(Case()).float()
    for way in WAYS.values():
        layer = own_layer(Case(**way), whole_layer(Case()), world).float()
        parts = Split.balanced(LENGTH, plan.tp)
        own = slice(*parts.spans[world.place.tp])
        x_BSD = inputs(Case(), world)[world.place.dp].bfloat16()
        x = x_BSD[:, own].clone().requires_grad_()
        y, _ = layer(x, routing_step(Case()), parts)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == torch.bfloat16
        assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
        exact = reference(x_BSD.float())[0][:, own]
        # As for the layer on one rank, and what each rank adds is rounded to 8 bits once more.
        assert (y.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("name", ["edp 2", "etp 2 x 2"])
def test_bfloat16_rows_travel_as_bfloat16(name):
    run_ranks(PLANS[name].world_size, check_bfloat16, PLANS[name])


def expected_payload(case: Case, world: World) -> int:
    """Bytes that this rank gets, forward and backward, counted token by token."""
    layout, plan = world.layout, world.layout.plan
    parts = Split.balanced(case.length, plan.tp)
    reference = whole_layer(case)
    chosen = [routed_experts(reference, x, case.config) for x in inputs(case, world)]
    """By data rank, sequence and position: the experts whose copies were kept."""
    places = [layout.place(rank) for rank in range(plan.world_size)]
    owners = {
        expert: ep
        for ep, (start, end) in enumerate(layout.experts.spans)
        for expert in range(start, end)
    }

    def tokens(rank: int) -> list[list[int]]:
        own = slice(*parts.spans[places[rank].tp])
        return [experts for sequence in chosen[places[rank].dp] for experts in sequence[own]]

    def rows(source: int, target: int) -> int:
        """Rows that go from one rank to another, or to itself."""
        if case.dispatch == "all_gather":
            return len(tokens(source))
        count = 0
        for experts in tokens(source):
            copies = sum(owners[expert] == places[target].ep for expert in experts)
            count += min(copies, 1) if case.deduplicate else copies
        return count

    def ep_group(rank: int) -> list[int]:
        mine = places[rank]
        return [r for r, p in enumerate(places) if (p.edp, p.etp) == (mine.edp, mine.etp)]

    def arrivals(rank: int) -> int:
        if len(ep_group(rank)) == 1:
            return len(tokens(rank))
        return sum(rows(other, rank) for other in ep_group(rank))

    me, mine = world.rank, world.place
    others = [rank for rank in ep_group(me) if rank != me]
    count = sum(rows(other, me) + rows(me, other) for other in others)
    sharers = [r for r, p in enumerate(places) if (p.edp, p.ep) == (mine.edp, mine.ep) and r != me]
    count += sum(arrivals(other) + arrivals(me) for other in sharers)
    return 2 * count * DIM * 8


def routed_experts(
    reference: MoELayer, x_BSD: Tensor, config: RoutingConfig
) -> list[list[list[int]]]:
    spec = reference.spec
    batch, length, _ = x_BSD.shape
    routed = reference.gate(x_BSD.flatten(0, 1))
    keep_TK = torch.ones_like(routed.experts_TK, dtype=torch.bool)
    if config.capacity_factor is not None:
        keep_TK = keep_within_capacity(
            routed.experts_TK,
            routed.probs_TE.gather(-1, routed.experts_TK),
            num_experts=spec.num_experts,
            capacity=expert_capacity(
                config.capacity_factor,
                tokens=batch * length,
                top_k=spec.top_k,
                num_experts=spec.num_experts,
            ),
            groups=1,
            policy=config.drop_policy,
        )
    kept = [
        [expert for expert, is_kept in zip(experts, keeps, strict=True) if is_kept]
        for experts, keeps in zip(routed.experts_TK.tolist(), keep_TK.tolist(), strict=True)
    ]
    return [kept[start : start + length] for start in range(0, len(kept), length)]


def check_payload(plan: TrainPlan) -> list[int]:
    world = join(plan, MOE)
    found = []
    for top_k in (1, 2, 4):
        for way in WAYS.values():
            for factor in (None, 0.6):
                config = RoutingConfig(capacity_factor=factor)
                case = Case(spec=moe(top_k=top_k), config=config, **way)
                at = refit(world, case.spec)
                layer = own_layer(case, whole_layer(case), at)
                parts = Split.balanced(LENGTH, plan.tp)
                own = slice(*parts.spans[world.place.tp])
                x = inputs(case, world)[world.place.dp][:, own].clone().requires_grad_()
                layer(x, routing_step(case), parts)[0].sum().backward()
                expected = expected_payload(case, at)
                assert layer.exchange.traffic.payload == expected, f"{case=}"
                found.append(expected)
    return found


@pytest.mark.parametrize(
    "name", ["edp 4", "ep 3", "ep 4 over 2 x 2", "ep 2 over 2 x 2", "etp 2 x 2"]
)
def test_payload_is_the_sum_over_the_routing_token_by_token(name):
    found = run_ranks(PLANS[name].world_size, check_payload, PLANS[name])
    assert all(payload > 0 for payloads in found for payload in payloads)


def check_wire(plan: TrainPlan) -> None:
    world = join(plan, MOE)
    for way in WAYS.values():
        exchange = Exchange(
            world.layout.experts,
            world.layout.shard(world.rank).experts,
            ep=world.groups.ep,
            etp=world.groups.etp,
            **way,
        )
        tokens = 3 + 2 * world.rank
        x = drawn(tokens, DIM, seed=world.rank, dtype=torch.bfloat16).requires_grad_()
        gates = drawn(tokens, 2, seed=world.rank, dtype=torch.float32).requires_grad_()
        experts = drawn(tokens, 6, seed=world.rank).topk(2).indices
        with received_bytes() as found:
            arrived = exchange.send(x, experts, gates)
            y = arrived.x_RD * arrived.gates_RJ.sum(dim=-1, keepdim=True)
            exchange.bring_back(y, arrived.way_back).sum().backward()
        assert exchange.traffic.payload > exchange.traffic.routing > 0
        assert sum(found) == exchange.traffic.payload + exchange.traffic.routing


@pytest.mark.parametrize("name", ["edp 2", "ep 3", "ep 4 over 2 x 2", "etp 2 x 2"])
def test_payload_and_routing_are_all_that_the_calls_bring(name):
    run_ranks(PLANS[name].world_size, check_wire, PLANS[name])


EXPERTS = 8
"""A multiple of every group's size, so that routing can be balanced to the copy."""


def balanced_layer(
    top_k: int, plan: TrainPlan, world: World, **way: Any
) -> tuple[MoELayer, Tensor]:
    """A layer that reads its choice off its tokens, and tokens that choose evenly, (1, s, D)."""
    spec = MoESpec(num_experts=EXPERTS, top_k=top_k, expert_dim=3)
    at = refit(world, spec)
    shard = dataclasses.replace(at.layout.shard(at.rank), **way)
    layer = MoELayer(spec, DIM, shard=shard, groups=at.groups).double()
    for parameter in layer.parameters():
        parameter.data = drawn(*parameter.shape, seed=1)
    layer.gate.weight.data = torch.eye(EXPERTS, DIM, dtype=torch.float64)
    x_1sD = torch.zeros(1, EXPERTS, DIM, dtype=torch.float64)
    for token in range(EXPERTS):
        for choice in range(top_k):
            x_1sD[0, token, (token * top_k + choice) % EXPERTS] = 2.0 - 0.1 * choice
    return layer, x_1sD.requires_grad_()


def check_formulas(tp: int) -> None:
    """What planning says of elements per rank: T tokens enter a group of t ranks."""
    t, h = tp, DIM
    T = EXPERTS * t
    worlds = {
        over: join(TrainPlan(dp=2, tp=tp, experts_over=over), moe(num_experts=EXPERTS))
        for over in ("edp", "ep", "etp")
    }
    for k in (1, 2, 4):
        all_to_all = {
            "edp": 2 * (T / t) * k * h * (t - 1) / t,
            "ep": 2 * (T / t) * k * h * (2 * t - 1) / (2 * t),
            "etp": 2 * (T / t) * k * h * (2 - 1) / 2 + 2 * (t - 1) / t * T * k * h,
        }
        for over, elements in all_to_all.items():
            way = {"dispatch": "all_to_all", "deduplicate": False}
            assert payload(k, worlds[over], way) == 2 * 8 * elements, f"{over=}, {k=}"
        elements = 2 * (t - 1) / t * T * h
        assert payload(k, worlds["edp"], {"dispatch": "all_gather"}) == 2 * 8 * elements, f"{k=}"
        # A token goes once to a rank: as often as its k experts, one after the other, lie on
        # different ones.
        held = EXPERTS // t
        copies = math.ceil(k / held)
        elements = 2 * (T / t) * copies * h * (t - 1) / t
        way = {"dispatch": "all_to_all", "deduplicate": True}
        if held % k == 0 or k % held == 0:
            assert payload(k, worlds["edp"], way) == 2 * 8 * elements, f"{k=}"


def payload(top_k: int, world: World, way: dict[str, Any]) -> int:
    plan = world.layout.plan
    layer, x = balanced_layer(top_k, plan, world, **way)
    y, statistics = layer(x, routing_step(Case()), Split.balanced(EXPERTS * plan.tp, plan.tp))
    assert statistics.counts_E.tolist() == [plan.tp * top_k] * EXPERTS
    y.sum().backward()
    return layer.exchange.traffic.payload


@pytest.mark.parametrize("tp", [2, 4])
def test_payload_of_balanced_routing_is_what_the_planner_reckons(tp):
    run_ranks(2 * tp, check_formulas, tp)


def test_a_layer_alone_exchanges_nothing():
    case = Case(config=RoutingConfig(capacity_factor=0.6))
    layer = whole_layer(case)
    experts_TK = torch.tensor([[0, 1], [2, 0]])
    x_TD, gates_TK = drawn(2, DIM, seed=0), drawn(2, 2, seed=1)
    arrived = layer.exchange.send(x_TD, experts_TK, gates_TK)
    assert arrived.x_RD is x_TD
    assert arrived.experts_RJ is experts_TK
    assert arrived.gates_RJ is gates_TK
    assert arrived.keep_RJ is None
    assert layer.exchange.bring_back(x_TD, arrived.way_back) is x_TD
    assert layer.exchange.traffic == Traffic()
