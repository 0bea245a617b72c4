"""How many copies an expert takes, and which ones overflow.

An expert takes at most C = ceil(CF k T / n) copies from each group of T tokens. A group is a
piece of *data* (one sequence, or one micro-batch), never a rank, so that every layout drops the
same copies. An overflowing copy contributes nothing: the token keeps its other gates as
they are (they are not divided by their sum again; the report does not say, this is ours) and
otherwise passes by the residual.

Shapes.
    T tokens, those of a group side by side     K experts per token     E experts     G groups
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.moe.config import DropPolicy

PROBABILITY_STEPS = 2**16
"""Probabilities that agree to this part of 1 rank as equal. Equal tokens in equal places, such as
the first of two documents, have equal probabilities but for rounding, which depends on the
layout; which of them is dropped must not."""


def expert_capacity(factor: float, *, tokens: int, top_k: int, num_experts: int) -> int:
    """Copies one expert takes from a group of `tokens`: ceil(factor k T / n).

    At least 1, unless the group is empty.
    """
    # Rounded first, so that floating point does not make 1.1 * 10 need a twelfth place.
    return max(min(tokens, 1), math.ceil(round(factor * top_k * tokens / num_experts, 6)))


def count_copies(experts_TK: Tensor, *, num_experts: int, groups: int) -> Tensor:
    """Copies each expert is sent from each group, (G, E), int64."""
    keys_N = _group_and_expert(experts_TK, num_experts=num_experts, groups=groups)
    counts = torch.zeros(groups * num_experts, dtype=torch.int64, device=keys_N.device)
    return counts.scatter_add_(0, keys_N, torch.ones_like(keys_N)).view(groups, num_experts)


def count_overflow(counts_GE: Tensor, capacity: int) -> Tensor:
    """Copies beyond `capacity`, summed over groups and experts, (), int64."""
    return (counts_GE - capacity).clamp_min(0).sum()


def keep_within_capacity(
    experts_TK: Tensor,
    probs_TK: Tensor,
    *,
    num_experts: int,
    capacity: int,
    groups: int,
    policy: DropPolicy,
) -> Tensor:
    """Mark the copies that fit.

    Args:
        experts_TK: Chosen experts, (T, K); a token names an expert at most once.
        probs_TK: Probability of each choice, (T, K); where two agree to `PROBABILITY_STEPS`, the
            earlier token goes first.
        num_experts: Experts in the layer.
        capacity: Copies an expert takes from one group.
        groups: Groups in the batch; must divide T.
        policy: What an overfull expert keeps.

    Returns:
        keep_TK: True where the copy is computed, (T, K), bool.
    """
    keys_N = _group_and_expert(experts_TK, num_experts=num_experts, groups=groups)
    # Both sorts are stable: copies of one group and expert stay in order of preference.
    if policy == "probability":
        steps_N = (probs_TK.detach().reshape(-1) * PROBABILITY_STEPS).round()
        best_first_N = steps_N.argsort(descending=True, stable=True)
        order_N = best_first_N[keys_N[best_first_N].argsort(stable=True)]
    else:
        order_N = keys_N.argsort(stable=True)
    counts = count_copies(experts_TK, num_experts=num_experts, groups=groups).view(-1)
    starts = counts.cumsum(0) - counts
    place_N = torch.arange(keys_N.numel(), device=keys_N.device) - starts[keys_N[order_N]]
    keep_N = torch.empty_like(keys_N, dtype=torch.bool)
    keep_N[order_N] = place_N < capacity
    return keep_N.view_as(experts_TK)


def _group_and_expert(experts_TK: Tensor, *, num_experts: int, groups: int) -> Tensor:
    tokens = experts_TK.shape[0]
    assert tokens % groups == 0, f"{tokens=}, {groups=}"
    if groups == 1:
        return experts_TK.reshape(-1)
    group_G1 = torch.arange(groups, device=experts_TK.device)[:, None] * num_experts
    return (experts_TK.reshape(groups, -1) + group_G1).reshape(-1)
