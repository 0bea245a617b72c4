"""Routing statistics, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.moe.capacity import count_copies
from moesaic.moe.statistics import RoutingStatistics, measure_routing


def measure(probs_TE: torch.Tensor, top_k: int = 1, overflow: int = 3) -> RoutingStatistics:
    experts_TK = probs_TE.topk(top_k, dim=-1).indices
    counts_GE = count_copies(experts_TK, num_experts=probs_TE.shape[1], groups=1)
    return measure_routing(
        probs_TE,
        copies=experts_TK.numel(),
        counts_E=counts_GE[0],
        dropped=torch.tensor(0),
        would_drop=torch.tensor(overflow),
        balance_loss=probs_TE.new_tensor(0.5),
        z_loss=probs_TE.new_tensor(2.0),
    )


def test_summary_is_that_of_a_plain_loop():
    probs_TE = torch.randn(40, 5, dtype=torch.float64).mul(2).softmax(dim=-1)
    summary = measure(probs_TE, top_k=2).summary()
    rows = probs_TE.tolist()
    ranked = [sorted(row, reverse=True) for row in rows]
    chosen = [e for row in rows for e in sorted(range(5), key=lambda e: -row[e])[:2]]
    expected = {
        "load": [chosen.count(e) / 80 for e in range(5)],
        "mean_gates": [math.fsum(row[e] for row in rows) / 40 for e in range(5)],
        "entropy": math.fsum(-p * math.log(p) for row in rows for p in row) / 40,
        "max1_over_max2": math.fsum(r[0] / r[1] for r in ranked) / 40,
        "max2_over_max3": math.fsum(r[1] / r[2] for r in ranked) / 40,
        "drop_rate": 0.0,
        "would_drop_rate": 3 / 80,
        "balance_loss": 0.5,
        "z_loss": 2.0,
        "tokens": 40,
    }
    assert summary.keys() == expected.keys()
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, rel=1e-12), name


def test_two_micro_batches_add_up_to_one():
    probs_TE = torch.randn(30, 6, dtype=torch.float64).softmax(dim=-1)
    parts = (measure(probs_TE[:10]) + measure(probs_TE[10:])).summary()
    whole = measure(probs_TE, overflow=6).summary()
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("experts", [1, 2])
def test_ratios_that_need_more_experts_are_none(experts):
    probs_TE = torch.randn(8, experts).softmax(dim=-1)
    summary = measure(probs_TE).summary()
    assert (summary["max1_over_max2"] is None) == (experts == 1)
    assert summary["max2_over_max3"] is None


def test_tokens_with_a_zero_denominator_are_left_out_of_the_ratio():
    probs_TE = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]])
    summary = measure(probs_TE).summary()
    assert summary["max1_over_max2"] == 2.0
    assert summary["max2_over_max3"] == 1.0
    assert summary["entropy"] == pytest.approx(0.75 * math.log(2), rel=1e-6)


def test_statistics_hold_no_graph():
    probs_TE = torch.randn(8, 4, requires_grad=True).softmax(dim=-1)
    statistics = measure(probs_TE)
    tensors = [v for v in vars(statistics).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 9
    assert not any(tensor.requires_grad for tensor in tensors)
