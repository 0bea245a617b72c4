"""Upcycle, or train from scratch? The rule of the Skywork-MoE report, section 3.

The report compares what was spent on the dense model with what will be spent on the MoE:
    1. C_MoE much less than C_dense: upcycle.
    2. C_MoE at least 2 C_dense: train from scratch.
    3. No dense model yet (C_dense = 0): train from scratch.
Between the first two it gives no rule. Nothing here loads torch.
"""

from __future__ import annotations

from typing import Any

from moesaic.spec import ModelSpec

MUCH_LESS = 0.4
"""How far below C_dense is "much less". The report gives no number; this one is ours:
Skywork-MoE itself was upcycled at some 0.3 to 0.4 of its dense model's cost."""

SCRATCH_FROM = 2.0
"""C_MoE / C_dense from which the report trains from scratch."""


def verdict(
    dense: ModelSpec,
    moe: ModelSpec,
    *,
    dense_tokens: float,
    moe_tokens: float,
    relative_cost: float,
) -> dict[str, Any]:
    """Apply the rule to two budgets.

    Args:
        dense: The dense model.
        moe: The MoE it would become.
        dense_tokens: Tokens the dense model was trained on.
        moe_tokens: Tokens the MoE would be trained on.
        relative_cost: GPU hours of an MoE token in those of a dense one. The report's figure
            is 2, for top-2: some 1.7 times the active parameters, and communication.

    Returns:
        `advice` ("upcycle", "from scratch" or "no rule"), `reason`, one sentence with the
        numbers, and the numbers. Costs are FLOPs of a dense model's training, forward and
        backward (3 times forward), so that C_MoE / C_dense is the ratio of GPU hours.
    """
    context = (dense.max_positions + 1) / 2  # what a token of a full sequence sees on average
    dense_cost = 3 * dense.flops_per_token(context) * dense_tokens
    moe_cost = 3 * dense.flops_per_token(context) * relative_cost * moe_tokens
    flops_ratio = moe.flops_per_token(context) / dense.flops_per_token(context)
    ratio = moe_cost / dense_cost if dense_cost else None
    advice, rule = _advise(ratio)
    costs = (
        f"C_MoE {moe_cost:.3g} and C_dense {dense_cost:.3g} dense training FLOPs"
        + ("" if ratio is None else f" (ratio {ratio:.2f})")
        + f", an MoE token counted as {relative_cost:g} dense tokens"
        f" ({flops_ratio:.2f} by FLOPs alone)"
    )
    return {
        "advice": advice,
        "reason": f"{rule} {costs}.",
        "dense_tokens": dense_tokens,
        "moe_tokens": moe_tokens,
        "dense_cost_flops": dense_cost,
        "moe_cost_flops": moe_cost,
        "cost_ratio": ratio,
        "relative_cost": relative_cost,
        "flops_ratio": flops_ratio,
    }


def _advise(ratio: float | None) -> tuple[str, str]:
    if ratio is None:
        return "from scratch", (
            "No dense model has been paid for, and paying for one only to upcycle it is "
            "generally not worth it (rule 3):"
        )
    if ratio >= SCRATCH_FROM:
        return "from scratch", "The MoE costs at least twice what the dense model did (rule 2):"
    if ratio <= MUCH_LESS:
        return "upcycle", (
            f"The MoE costs much less than the dense model did "
            f"(rule 1; at most {MUCH_LESS:g}, a bound of ours):"
        )
    return "no rule", "Between the bounds the report gives no rule:"
