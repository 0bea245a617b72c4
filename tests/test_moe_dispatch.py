"""Copies sorted by expert, and brought back."""

from __future__ import annotations

import pytest
import torch

from moesaic.moe.dispatch import combine, gather, plan_dispatch


def random_case(tokens: int = 9, experts: int = 5, top_k: int = 2):
    experts_TK = torch.rand(tokens, experts).argsort(dim=-1)[:, :top_k]
    return experts_TK, torch.rand(tokens, top_k) > 0.4


@pytest.mark.parametrize("with_drop", [False, True])
def test_rows_stand_expert_by_expert_and_token_by_token(with_drop):
    experts_TK, keep_TK = random_case()
    plan = plan_dispatch(experts_TK, num_experts=5, keep_TK=keep_TK if with_drop else None)
    expected = [
        (e, t)
        for e in range(5)
        for t in range(9)
        for k in range(2)
        if experts_TK[t, k] == e and (not with_drop or keep_TK[t, k])
    ]
    owners = torch.arange(5).repeat_interleave(plan.counts_E)
    assert list(zip(owners.tolist(), plan.tokens_N.tolist(), strict=True)) == expected


@pytest.mark.parametrize("with_drop", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_combine_sums_the_gated_copies_of_a_plain_loop(with_drop, top_k):
    experts_TK, keep_TK = random_case(top_k=top_k)
    plan = plan_dispatch(experts_TK, num_experts=5, keep_TK=keep_TK if with_drop else None)
    x_TD = torch.randn(9, 4, dtype=torch.float64)
    gates_TK = torch.rand(9, top_k, dtype=torch.float64)
    factor_E = torch.randn(5, dtype=torch.float64)
    rows = gather(x_TD, plan) * factor_E.repeat_interleave(plan.counts_E)[:, None]
    expected = torch.zeros_like(x_TD)
    for t in range(9):
        for k in range(top_k):
            if not with_drop or keep_TK[t, k]:
                expected[t] += gates_TK[t, k] * factor_E[experts_TK[t, k]] * x_TD[t]
    torch.testing.assert_close(combine(rows, gates_TK, plan), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("drop", ["none", "some", "all"])
def test_both_ways_have_the_gradients_of_finite_differences(drop):
    experts_TK, keep_TK = random_case()
    keep = {"none": None, "some": keep_TK, "all": torch.zeros_like(keep_TK)}[drop]
    plan = plan_dispatch(experts_TK, num_experts=5, keep_TK=keep)
    x_TD = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    gates_TK = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    mixed = lambda x, gates: combine(gather(x, plan).square(), gates, plan)  # noqa: E731
    assert torch.autograd.gradcheck(mixed, (x_TD, gates_TK))


def test_sums_of_bfloat16_copies_are_rounded_once():
    experts_TK, _ = random_case()
    plan = plan_dispatch(experts_TK, num_experts=5)
    y_ND = torch.randn(18, 4).bfloat16()
    gates_TK = torch.rand(9, 2)
    exact = combine(y_ND.double(), gates_TK.double(), plan)
    assert torch.equal(combine(y_ND, gates_TK, plan), exact.float().bfloat16())
