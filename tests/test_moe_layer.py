"""The whole layer, against plain loops over tokens and chosen experts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moesaic.errors import ConfigError
from moesaic.moe.config import RoutingConfig
from moesaic.moe.layer import MoELayer, RoutingStep
from moesaic.moe.losses import router_z_loss, skywork_balance_loss
from moesaic.spec import MoESpec

DIM = 8
SPECS = {
    "top-2": MoESpec(num_experts=4, top_k=2, expert_dim=6),
    "normalised": MoESpec(num_experts=4, top_k=2, expert_dim=6, gate_norm_scale=1.0),
    "not renormalised": MoESpec(num_experts=4, top_k=2, expert_dim=6, renormalize=False),
    "top-1": MoESpec(num_experts=4, top_k=1, expert_dim=6),
    "all experts": MoESpec(num_experts=3, top_k=3, expert_dim=6),
    "one expert": MoESpec(num_experts=1, top_k=1, expert_dim=6),
    "biased choice": MoESpec(num_experts=4, top_k=2, expert_dim=6, selection_bias=True),
    "shared": MoESpec(num_experts=4, top_k=2, expert_dim=6, shared_expert_dim=5),
}


def make_layer(spec: MoESpec) -> MoELayer:
    layer = MoELayer(spec, DIM).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    if spec.selection_bias:
        layer.gate.e_score_correction_bias.copy_(torch.tensor([0.4, -0.2, 0.0, 0.1]))
    return layer


def make_input(sequences: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randn(sequences, length, DIM, dtype=torch.float64, requires_grad=True)


def step(coefficient: float = 0.01, scale: float = 1.0, **config: object) -> RoutingStep:
    return RoutingStep(RoutingConfig(**config), torch.tensor(coefficient), scale)  # type: ignore[arg-type]


def swiglu(x, w1, w3, w2):
    h1 = w1 @ x
    return w2 @ (h1 * torch.sigmoid(h1) * (w3 @ x))


def layer_by_hand(layer: MoELayer, x_BSD, keep=None):
    routed = layer.gate(x_BSD.reshape(-1, DIM))
    experts = layer.experts
    rows = []
    for t, x in enumerate(x_BSD.reshape(-1, DIM)):
        y = torch.zeros(DIM, dtype=x.dtype)
        for k, e in enumerate(routed.experts_TK[t].tolist()):
            if keep is None or keep[t][k]:
                expert = swiglu(x, experts.w1[e], experts.w3[e], experts.w2[e])
                y = y + routed.gates_TK[t, k] * expert
        if layer.shared_expert is not None:
            shared = layer.shared_expert
            gate = torch.sigmoid((layer.shared_expert_gate.weight[0] * x).sum())
            y = y + gate * swiglu(
                x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight
            )
        rows.append(y)
    return torch.stack(rows).view(x_BSD.shape)


def gradients(y, layer, x_BSD):
    inputs = [x_BSD, *layer.parameters()]
    found = torch.autograd.grad(y.sin().sum(), inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("training", [False, True])
def test_dropless_layer_is_the_gated_sum_over_the_chosen_experts(spec, training):
    layer, x_BSD = make_layer(spec), make_input()
    routing = step(coefficient=0.0) if training else None
    y_BSD, statistics = layer(x_BSD, routing)
    expected = layer_by_hand(layer, x_BSD)
    assert (statistics is not None) == training
    torch.testing.assert_close(y_BSD, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradients(y_BSD, layer, x_BSD), gradients(expected, layer, x_BSD), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize("group", ["sequence", "micro_batch", "global_batch"])
def test_dropped_copies_contribute_nothing_and_other_gates_stay(policy, group):
    layer, x_BSD = make_layer(SPECS["top-2"]), make_input()
    config = {"capacity_factor": 0.6, "drop_policy": policy, "capacity_group": group}
    y_BSD, statistics = layer(x_BSD, step(**config))
    routed = layer.gate(x_BSD.reshape(-1, DIM))
    # ceil(0.6 * 2 * T / 4) copies of an expert in a group of T tokens.
    size, capacity = (10, 3) if group == "sequence" else (30, 9)
    keep = [[False, False] for _ in range(30)]
    for start in range(0, 30, size):
        for e in range(4):
            copies = [
                (t, k)
                for t in range(start, start + size)
                for k in range(2)
                if routed.experts_TK[t, k] == e
            ]
            if policy == "probability":
                copies.sort(key=lambda c: -routed.probs_TE[c[0], e].item())
            for t, k in copies[:capacity]:
                keep[t][k] = True
    expected = layer_by_hand(layer, x_BSD, keep)
    torch.testing.assert_close(y_BSD, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradients(layer(x_BSD, step(coefficient=0.0, **config))[0], layer, x_BSD),
        gradients(expected, layer, x_BSD),
        rtol=1e-8,
        atol=1e-9,
    )
    dropped = sum(not kept for row in keep for kept in row)
    assert 0 < dropped < 60
    assert int(statistics.dropped) == int(statistics.would_drop) == dropped


@pytest.mark.parametrize("group", ["sequence", "micro_batch"])
def test_dropless_statistics_say_what_the_stated_capacity_would_have_dropped(group):
    layer, x_BSD = make_layer(SPECS["top-2"]), make_input()
    dropping = step(capacity_factor=0.8, capacity_group=group)
    dropless = step(stated_capacity_factor=0.8, capacity_group=group)
    would, did = layer(x_BSD, dropless)[1], layer(x_BSD, dropping)[1]
    assert int(would.dropped) == 0
    assert int(would.would_drop) == int(did.dropped) > 0


def test_more_capacity_than_copies_changes_nothing():
    layer, x_BSD = make_layer(SPECS["top-2"]), make_input()
    roomy = layer(x_BSD, step(capacity_factor=4.0))[0]
    torch.testing.assert_close(roomy, layer(x_BSD)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_losses_enter_the_gradient_as_if_added_to_the_total(recompute, groups):
    layer, x_BSD = make_layer(SPECS["normalised"]), make_input()
    routing = step(
        coefficient=0.7,
        scale=0.25,
        z_loss_weight=0.3,
        balance_group="sequence" if groups == 3 else "micro_batch",
    )
    if recompute:
        y_BSD, _ = checkpoint(layer, x_BSD, routing, use_reentrant=False)
    else:
        y_BSD, _ = layer(x_BSD, routing)
    y_BSD.sin().sum().backward()
    ours = [x_BSD.grad, *(p.grad for p in layer.parameters())]

    inputs = [x_BSD, *layer.parameters()]
    routed = layer.gate(x_BSD.reshape(-1, DIM))
    balance = skywork_balance_loss(routed.probs_TE, groups=groups)
    total = layer(x_BSD)[0].sin().sum()
    plain = torch.autograd.grad(total, inputs, retain_graph=True)
    total = total + 0.25 * (0.7 * balance + 0.3 * router_z_loss(routed.logits_TE))
    expected = torch.autograd.grad(total, inputs)
    # The coefficient is float32 and 0.7 is not exact in it.
    torch.testing.assert_close(ours, list(expected), rtol=1e-6, atol=1e-9)
    assert (plain[1] - expected[1]).abs().max() > 1e-3


def test_switch_loss_is_reported_and_enters_the_gradient():
    layer, x_BSD = make_layer(SPECS["top-2"]), make_input()
    _, statistics = layer(x_BSD, step(balance_loss="switch"))
    routed = layer.gate(x_BSD.reshape(-1, DIM))
    share = [(routed.experts_TK == e).sum().item() / 60 for e in range(4)]
    by_hand = 4 * sum(f * p for f, p in zip(share, routed.probs_TE.mean(0).tolist(), strict=True))
    assert statistics.summary()["balance_loss"] == pytest.approx(by_hand)
    pulled = layer(x_BSD, step(coefficient=1.0, balance_loss="switch"))[0]
    free = layer(x_BSD, step(coefficient=1.0, balance_loss="none"))[0]
    assert torch.equal(pulled, free)
    difference = gradients(pulled, layer, x_BSD)[1] - gradients(free, layer, x_BSD)[1]
    assert difference.abs().max() > 1e-3


def test_bfloat16_activations_with_float32_weights_stay_bfloat16():
    layer = MoELayer(SPECS["shared"], DIM)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x_BSD = torch.randn(2, 40, DIM).bfloat16().requires_grad_()
    y_BSD, _ = layer(x_BSD, step())
    y_BSD.sum().backward()
    exact = layer(x_BSD.float())[0]
    assert y_BSD.dtype == x_BSD.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    # 3 % of the norm: three matrix products and a gate, each rounded to 8 bits.
    assert (y_BSD.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("implementation", ["loop", "padded", "grouped_mm"])
def test_every_implementation_gives_the_same_layer(implementation):
    # torch's grouped product has no double precision and wants rows of 16 bytes.
    layer = make_layer(MoESpec(num_experts=4, top_k=2, expert_dim=8)).float()
    x_BSD = make_input().detach().float()
    by_hand = layer_by_hand(layer, x_BSD)
    layer.experts.implementation = implementation
    torch.testing.assert_close(layer(x_BSD)[0], by_hand, rtol=1e-4, atol=1e-4)


def test_the_layer_can_be_built_without_memory():
    with torch.device("meta"):
        layer = MoELayer(SPECS["shared"], DIM)
    assert all(p.is_meta for p in layer.parameters())


def test_parameter_names_are_those_of_the_checkpoint():
    names = set(MoELayer(SPECS["shared"], DIM).state_dict())
    assert names == {
        "gate.weight",
        "experts.w1",
        "experts.w3",
        "experts.w2",
        "shared_expert.gate_proj.weight",
        "shared_expert.up_proj.weight",
        "shared_expert.down_proj.weight",
        "shared_expert_gate.weight",
    }
    assert "gate.e_score_correction_bias" in MoELayer(SPECS["biased choice"], DIM).state_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"stated_capacity_factor": -1.0}, "stated_capacity_factor is -1.0"),
        ({"coefficient_decay": 1.5}, "coefficient_decay is 1.5"),
        ({"z_loss_weight": float("nan")}, "z_loss_weight is nan"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RoutingConfig(**values)
