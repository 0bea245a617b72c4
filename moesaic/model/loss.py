"""Cross entropy over a large vocabulary without ever holding all logits.

Logits are made, used and dropped in chunks of tokens, and the gradients are worked out in
the same pass, since the chunk's probabilities are at hand only then.

Shapes.  N tokens    M tokens in a chunk    D model width    V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once: 1024 x 49,152 in float32 are 192 MiB."""


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[target].

    Args:
        hidden_ND: Activations after the final norm, (N, D).
        weight_VD: Output projection, (V, D); may be wider than `hidden_ND`.
        targets_N: Next tokens, (N,); `ignore_index` where there is none.
        ignore_index: The target that counts nothing.

    Returns:
        Scalar in nats, at least float32; 0 when every target is ignored.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, ignore_index
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int
    ) -> Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_VD.to(hidden_ND.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if wants_weight else None
        total = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            hidden_MD, targets_M = hidden_ND[rows], targets_N[rows]
            counted_M1 = (targets_M != ignore_index)[:, None]
            chosen_M1 = targets_M.clamp_min(0)[:, None]
            # One fused pass from the logits' dtype, which is what makes this affordable on a CPU.
            log_probs_MV = torch.log_softmax(hidden_MD @ weight.t(), dim=-1, dtype=dtype)
            nats_M1 = -log_probs_MV.gather(1, chosen_M1)
            total += nats_M1.masked_fill(~counted_M1, 0).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot, and nothing where no target counts.
            grad_MV = log_probs_MV.exp_()
            grad_MV.scatter_add_(1, chosen_M1, -torch.ones_like(nats_M1))
            grad_MV.masked_fill_(~counted_M1, 0)
            grad_logits_MV = grad_MV.to(hidden_ND.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits_MV @ weight
            if grad_weight is not None:
                grad_weight += grad_logits_MV.t() @ hidden_MD
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
