"""Token drop, against a plain loop over tokens."""

from __future__ import annotations

import pytest
import torch

from moesaic.moe.capacity import (
    count_copies,
    count_overflow,
    expert_capacity,
    keep_within_capacity,
)


def random_choices(tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    # A steep preference, so that some experts overflow and some stay empty.
    probs = (torch.randn(tokens, experts) + torch.linspace(3, -3, experts)).softmax(dim=-1)
    probs_TK, experts_TK = probs.topk(top_k, dim=-1)
    return experts_TK, probs_TK


def keep_by_hand(experts_TK, probs_TK, *, num_experts, capacity, groups, policy):
    tokens, top_k = experts_TK.shape
    keep = torch.zeros(tokens, top_k, dtype=torch.bool)
    per_group = tokens // groups
    for group in range(groups):
        for expert in range(num_experts):
            copies = [
                (t, k)
                for t in range(group * per_group, (group + 1) * per_group)
                for k in range(top_k)
                if experts_TK[t, k] == expert
            ]
            if policy == "probability":
                copies.sort(key=lambda copy: -float(probs_TK[copy]))
            for copy in copies[:capacity]:
                keep[copy] = True
    return keep


@pytest.mark.parametrize("policy", ["probability", "position"])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("capacity", [0, 1, 4, 7, 1000])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (5, 1), (4, 4), (1, 1)])
def test_kept_copies_are_those_of_a_plain_loop(policy, groups, capacity, experts, top_k):
    experts_TK, probs_TK = random_choices(48, experts, top_k)
    case = {"num_experts": experts, "capacity": capacity, "groups": groups, "policy": policy}
    keep_TK = keep_within_capacity(experts_TK, probs_TK, **case)
    assert torch.equal(keep_TK, keep_by_hand(experts_TK, probs_TK, **case))


def test_equal_probabilities_keep_the_earlier_token():
    experts_TK = torch.zeros(6, 1, dtype=torch.int64)
    keep_TK = keep_within_capacity(
        experts_TK, torch.ones(6, 1), num_experts=2, capacity=4, groups=1, policy="probability"
    )
    assert keep_TK.flatten().tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("groups", [1, 4])
def test_counted_overflow_is_the_number_of_copies_not_kept(groups):
    experts_TK, probs_TK = random_choices(48, 6, 2)
    counts_GE = count_copies(experts_TK, num_experts=6, groups=groups)
    for capacity in (0, 2, 5, 100):
        keep_TK = keep_within_capacity(
            experts_TK, probs_TK, num_experts=6, capacity=capacity, groups=groups, policy="position"
        )
        assert int(count_overflow(counts_GE, capacity)) == int((~keep_TK).sum())


def test_counts_are_those_of_a_plain_loop():
    experts_TK, _ = random_choices(12, 5, 2)
    counts_GE = count_copies(experts_TK, num_experts=5, groups=3)
    for group in range(3):
        chosen = experts_TK[group * 4 : group * 4 + 4].flatten().tolist()
        assert counts_GE[group].tolist() == [chosen.count(e) for e in range(5)]


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "capacity"),
    [
        (1.0, 2048, 2, 8, 512),
        (1.25, 512, 2, 8, 160),
        (1.0, 10, 1, 4, 3),
        (1.1, 100, 2, 4, 55),
        (0.001, 8, 2, 8, 1),
        (1e-9, 8, 2, 8, 1),
        (2.0, 0, 2, 8, 0),
    ],
)
def test_capacity_is_the_ceiling_of_the_fair_share_times_the_factor(
    factor, tokens, top_k, experts, capacity
):
    found = expert_capacity(factor, tokens=tokens, top_k=top_k, num_experts=experts)
    assert found == capacity
