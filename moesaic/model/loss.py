"""Cross entropy over a large vocabulary without ever holding all logits.

Logits are made, used and dropped in chunks of tokens, and the gradients are worked out in
the same pass, since the chunk's probabilities are at hand only then.

Each rank may hold its own rows of the vocabulary: their sums of exponentials are then brought
together, chunk by chunk.

Shapes.  N tokens    M tokens in a chunk    D model width    V vocabulary, v of it this rank's
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moesaic.parallel.group import ALONE, Group

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once: 1024 x 49,152 in float32 are 192 MiB."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_vD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    first: int = 0,
    group: Group = ALONE,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[target].

    Args:
        hidden_ND: Activations after the final norm, (N, D).
        weight_vD: This rank's rows of the output projection, (v, D); may be wider than `hidden_ND`.
        targets_N: Next tokens, (N,); `ignore_index` where there is none.
        ignore_index: The target that counts nothing.
        first: Number of the first row that this rank holds.
        group: Ranks that hold the others; each has the same tokens.

    Returns:
        Scalar in nats, at least float32, the same on every rank; 0 when every target is ignored.
        The gradient of `hidden_ND` is this rank's part of a sum over the ranks.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_vD, targets_N, ignore_index, first, group
    )
    return loss


def _log_probs(logits_Mv: Tensor, dtype: torch.dtype, group: Group) -> Tensor:
    """log softmax over the rows of all ranks, (M, v)."""
    # One fused pass from the logits' dtype, which is what makes this affordable on a CPU.
    log_probs_Mv = torch.log_softmax(logits_Mv, dim=-1, dtype=dtype)
    if group.size == 1:
        return log_probs_Mv
    # What that took off each row is the log of this rank's sum of exponentials.
    sums = logits_Mv[:, :1].to(dtype) - log_probs_Mv[:, :1]
    sum_M1 = sums if sums.shape[1] else sums.new_full((sums.shape[0], 1), -math.inf)
    sums_Mn = group.gather(sum_M1, [1] * group.size, dim=1)
    return log_probs_Mv.add_(sum_M1 - sums_Mn.logsumexp(dim=-1, keepdim=True))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_vD: Tensor,
        targets_N: Tensor,
        ignore_index: int,
        first: int,
        group: Group,
    ) -> Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_vD.to(hidden_ND.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_vD, dtype=dtype) if wants_weight else None
        total = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        counted_N = targets_N != ignore_index
        # Only the rank that holds a target's row adds its part of the loss.
        chosen_N = targets_N - first
        ours_N = counted_N & (chosen_N >= 0) & (chosen_N < weight.shape[0])
        for start in range(0, hidden_ND.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            hidden_MD, counted_M1 = hidden_ND[rows], counted_N[rows, None]
            log_probs_Mv = _log_probs(hidden_MD @ weight.t(), dtype, group)
            if weight.shape[0] == 0:
                continue
            ours_M1, chosen_M1 = (
                ours_N[rows, None],
                chosen_N[rows, None].where(ours_N[rows, None], 0),
            )
            nats_M1 = -log_probs_Mv.gather(1, chosen_M1)
            total += nats_M1.masked_fill(~ours_M1, 0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot, and nothing where no target counts.
            grad_Mv = log_probs_Mv.exp_()
            grad_Mv.scatter_add_(1, chosen_M1, -ours_M1.to(dtype))
            grad_Mv.masked_fill_(~counted_M1, 0)
            grad_logits_Mv = grad_Mv.to(hidden_ND.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits_Mv @ weight
            if grad_weight is not None:
                grad_weight += grad_logits_Mv.t() @ hidden_MD
        group.sum_(total)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_vD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None
