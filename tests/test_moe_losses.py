"""Balance losses against plain loops, and their way into the backward pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moesaic.moe.capacity import count_copies
from moesaic.moe.losses import (
    inject,
    router_z_loss,
    skywork_balance_loss,
    switch_balance_loss,
)


def probs_and_choices(tokens: int = 24, experts: int = 5, top_k: int = 2):
    logits_TE = torch.randn(tokens, experts, dtype=torch.float64)
    probs_TE = logits_TE.softmax(dim=-1).requires_grad_()
    return probs_TE, probs_TE.topk(top_k, dim=-1).indices


def groups_of(rows, groups: int):
    size = len(rows) // groups
    return [rows[g * size : (g + 1) * size] for g in range(groups)]


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_skywork_loss_and_gradient_are_equation_4(groups):
    probs_TE, _ = probs_and_choices()
    loss = skywork_balance_loss(probs_TE, groups=groups)
    loss.backward()
    expected, gradient, n = 0.0, [], 5
    for group in groups_of(probs_TE.tolist(), groups):
        means = [math.fsum(row[j] for row in group) / len(group) for j in range(n)]
        expected += sum((1 / n - mean) ** 2 for mean in means) / groups
        # d/dg_ij (1/n - mean_j)^2 = -2 (1/n - mean_j) / T
        row = [-2 * (1 / n - mean) / len(group) / groups for mean in means]
        gradient += [row] * len(group)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    expected_grad = torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(probs_TE.grad, expected_grad, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_switch_loss_and_gradient_are_those_of_a_plain_loop(groups):
    probs_TE, experts_TK = probs_and_choices()
    counts_GE = count_copies(experts_TK, num_experts=5, groups=groups)
    loss = switch_balance_loss(probs_TE, counts_GE)
    loss.backward()
    expected, gradient, n = 0.0, [], 5
    both = zip(
        groups_of(probs_TE.tolist(), groups), groups_of(experts_TK.tolist(), groups), strict=True
    )
    for rows, choices in both:
        flat = [e for row in choices for e in row]
        shares = [flat.count(j) / len(flat) for j in range(n)]
        means = [math.fsum(row[j] for row in rows) / len(rows) for j in range(n)]
        expected += n * sum(f * p for f, p in zip(shares, means, strict=True)) / groups
        gradient += [[n * f / len(rows) / groups for f in shares]] * len(rows)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    expected_grad = torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(probs_TE.grad, expected_grad, rtol=1e-10, atol=1e-15)


def test_balanced_probabilities_cost_nothing_by_skywork_and_one_by_switch():
    probs_TE = torch.full((8, 4), 0.25, dtype=torch.float64)
    experts_TK = torch.arange(8)[:, None] % 4
    assert skywork_balance_loss(probs_TE).item() == 0.0
    counts_GE = count_copies(experts_TK, num_experts=4, groups=1)
    assert switch_balance_loss(probs_TE, counts_GE).item() == 1.0


def test_skywork_pulls_half_the_number_of_experts_less_than_switch():
    # One expert takes all: for top-1, shares equal the mean probabilities as they become hard.
    experts, probs_TE = 16, torch.full((4, 16), 1e-9, dtype=torch.float64)
    probs_TE[:, 0] = 1 - 15e-9
    probs_TE.requires_grad_()
    skywork = torch.autograd.grad(skywork_balance_loss(probs_TE), probs_TE)[0]
    counts_GE = count_copies(torch.zeros(4, 1, dtype=torch.int64), num_experts=16, groups=1)
    switch = torch.autograd.grad(switch_balance_loss(probs_TE, counts_GE), probs_TE)[0]
    spread = lambda grad: (grad[0, 0] - grad[0, 1]).item()  # noqa: E731
    assert spread(switch) / spread(skywork) == pytest.approx(experts / 2, rel=1e-6)


def test_z_loss_and_gradient_are_those_of_a_plain_loop():
    logits_TE = (torch.randn(7, 5, dtype=torch.float64) * 4).requires_grad_()
    loss = router_z_loss(logits_TE)
    loss.backward()
    expected, gradient = 0.0, []
    for row in logits_TE.tolist():
        total = math.fsum(math.exp(z) for z in row)
        expected += math.log(total) ** 2 / 7
        gradient.append([2 * math.log(total) * math.exp(z) / total / 7 for z in row])
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logits_TE.grad, torch.tensor(gradient, dtype=torch.float64))


def run_injected(x, w, *, recompute: bool):
    def block(x):
        hidden = x @ w
        return inject(hidden.tanh(), hidden.square().mean(), 0.3).sin()

    y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    y.sum().backward()
    return y


@pytest.mark.parametrize("recompute", [False, True])
def test_injected_loss_adds_exactly_its_gradient(recompute):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    hidden = x @ w
    expected = (hidden.tanh().sin().sum() + 0.3 * hidden.square().mean()).backward
    expected()
    reference = [x.grad.clone(), w.grad.clone()]
    x.grad = w.grad = None
    y = run_injected(x, w, recompute=recompute)
    assert torch.equal(y, (x @ w).tanh().sin())
    torch.testing.assert_close([x.grad, w.grad], reference, rtol=1e-12, atol=1e-14)


def test_injected_loss_counts_once_for_each_backward_pass():
    weight = torch.tensor(2.0, requires_grad=True)
    for _ in range(3):
        inject(torch.ones(4, requires_grad=True), weight * 5, 0.1).sum().backward()
    assert weight.grad.item() == pytest.approx(3 * 0.1 * 5)
