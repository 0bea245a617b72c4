"""The router, against plain loops in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.moe.router import Router, normalise_logits
from moesaic.spec import MoESpec


def normalised_by_hand(logits: list[float], scale: float, eps: float) -> list[float]:
    mean = math.fsum(logits) / len(logits)
    std = math.sqrt(math.fsum((z - mean) ** 2 for z in logits) / (len(logits) - 1))
    return [scale * (z - mean) / (std + eps) for z in logits]


def softmax_by_hand(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    return [p / math.fsum(powers) for p in powers]


def make_router(hidden_dim: int = 12, **changes: object) -> Router:
    values: dict[str, object] = {"num_experts": 6, "top_k": 2, "expert_dim": 4, **changes}
    router = Router(MoESpec(**values), hidden_dim)  # type: ignore[arg-type]
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(3))
    return router


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_normalisation_is_equation_6_with_the_unbiased_deviation(scale):
    logits_TE = torch.randn(20, 16, dtype=torch.float64) * 3 + 1
    ours = normalise_logits(logits_TE, scale, 1e-6)
    by_hand = [normalised_by_hand(row, scale, 1e-6) for row in logits_TE.tolist()]
    # Double precision: what remains is the order of 16 additions.
    torch.testing.assert_close(ours, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("factor", "shift"), [(7.0, 0.0), (1.0, -40.0), (0.01, 3.0)])
def test_normalised_logits_do_not_feel_scale_or_shift(factor, shift):
    logits_TE = torch.randn(20, 16, dtype=torch.float64)
    before = normalise_logits(logits_TE, 1.0, 0.0)
    after = normalise_logits(logits_TE * factor + shift, 1.0, 0.0)
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)


def test_gradient_is_orthogonal_to_shift_and_to_scale():
    logits_TE = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    normalised_TE = normalise_logits(logits_TE, 1.0, 0.0)
    (normalised_TE * torch.randn(5, 16, dtype=torch.float64)).sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.abs().max() > 1e-2
    along_shift = logits_TE.grad.sum(dim=-1)
    along_scale = (logits_TE.grad * normalised_TE.detach()).sum(dim=-1)
    torch.testing.assert_close(along_shift, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(along_scale, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_normalisation_has_the_gradient_of_finite_differences():
    logits_TE = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: normalise_logits(z, 1.5, 1e-6), (logits_TE,))


@pytest.mark.parametrize(("hot", "bound"), [(1, 0.784), (2, 0.364)])
def test_largest_gates_of_16_experts_are_the_known_bounds(hot, bound):
    logits = torch.zeros(1, 16, dtype=torch.float64)
    logits[0, :hot] = 1.0
    probs = normalise_logits(logits, 1.0, 1e-12).softmax(dim=-1)
    assert probs.max().item() == pytest.approx(bound, abs=5e-4)


def test_no_gate_of_16_experts_exceeds_the_one_hot_bound():
    logits_TE = torch.randn(2000, 16, dtype=torch.float64).exp().square()
    probs_TE = normalise_logits(logits_TE, 1.0, 0.0).softmax(dim=-1)
    # One-hot logits: one of 3.75, fifteen of -0.25.
    bound = math.exp(4) / (math.exp(4) + 15)
    assert 0.99 * bound < probs_TE.max().item() <= bound


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_logits_give_equal_gates_and_finite_gradients(value, eps):
    logits_TE = torch.full((4, 7), value, requires_grad=True)
    probs_TE = normalise_logits(logits_TE, 1.0, eps).softmax(dim=-1)
    (probs_TE * torch.randn(4, 7)).sum().backward()
    torch.testing.assert_close(probs_TE, torch.full((4, 7), 1 / 7))
    assert logits_TE.grad is not None
    assert logits_TE.grad.isfinite().all()


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("renormalize", [True, False])
def test_router_is_softmax_over_all_experts_then_top_k(scale, renormalize):
    router = make_router(gate_norm_scale=scale, renormalize=renormalize).double()
    x_TD = torch.randn(15, 12, dtype=torch.float64)
    out = router(x_TD)
    for t in range(15):
        logits = [math.fsum((w * x_TD[t]).tolist()) for w in router.weight.detach()]
        scores = logits if scale is None else normalised_by_hand(logits, scale, 1e-6)
        probs = softmax_by_hand(scores)
        chosen = sorted(range(6), key=lambda e: -probs[e])[:2]
        total = sum(probs[e] for e in chosen) if renormalize else 1.0
        assert out.experts_TK[t].tolist() == chosen
        assert out.gates_TK[t].tolist() == pytest.approx([probs[e] / total for e in chosen])
        assert out.probs_TE[t].tolist() == pytest.approx(probs)
        assert out.logits_TE[t].tolist() == pytest.approx(logits)


def test_normalisation_changes_gates_but_not_the_choice():
    plain, normalised = make_router(), make_router(gate_norm_scale=1.0)
    x_TD = torch.randn(50, 12)
    assert torch.equal(plain(x_TD).experts_TK, normalised(x_TD).experts_TK)
    assert (plain(x_TD).gates_TK - normalised(x_TD).gates_TK).abs().max() > 0.05


def test_normalisation_is_the_same_in_training_and_inference():
    router = make_router(gate_norm_scale=1.0)
    x_TD = torch.randn(9, 12)
    assert torch.equal(router.train()(x_TD).gates_TK, router.eval()(x_TD).gates_TK)


def test_router_computes_in_float32_for_bfloat16_activations():
    router = make_router()
    x_TD = torch.randn(9, 12).bfloat16()
    out = router(x_TD)
    assert out.gates_TK.dtype == out.logits_TE.dtype == torch.float32
    assert torch.equal(out.gates_TK, router(x_TD.float()).gates_TK)


def test_selection_bias_changes_the_choice_but_not_the_gates():
    router = make_router(selection_bias=True, renormalize=False)
    x_TD = torch.randn(30, 12)
    router.e_score_correction_bias[4] = 2.0
    out = router(x_TD)
    assert (out.experts_TK[:, 0] == 4).all()
    assert torch.equal(out.gates_TK, out.probs_TE.gather(-1, out.experts_TK))


def test_experts_chosen_by_bias_alone_still_give_finite_gates():
    router = make_router(hidden_dim=1, num_experts=4, selection_bias=True)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[500.0], [0.0], [0.0], [0.0]]))
    router.e_score_correction_bias[2:] = 5.0
    out = router(torch.ones(1, 1))
    out.gates_TK.sum().backward()
    assert out.gates_TK.isfinite().all()
    assert router.weight.grad.isfinite().all()


def test_gates_rise_with_the_scale_as_the_report_says():
    # Mean ratios of i.i.d. Gaussian logits, n = 16: skywork-moe reference values.
    logits_TE = torch.randn(40_000, 16, dtype=torch.float64, generator=torch.manual_seed(0))
    for scale, first, second in [(0.5, 1.31, 1.17), (1.0, 1.81, 1.40), (2.0, 4.27, 2.19)]:
        best = normalise_logits(logits_TE, scale, 0.0).softmax(dim=-1).topk(3).values
        # 2 %: sampling error of a heavy-tailed ratio over 40,000 tokens.
        assert (best[:, 0] / best[:, 1]).mean().item() == pytest.approx(first, rel=0.02)
        assert (best[:, 1] / best[:, 2]).mean().item() == pytest.approx(second, rel=0.02)
