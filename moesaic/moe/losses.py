"""What pulls the router towards balance, and how that pull enters the backward pass.

The balance losses look at one layer. Their gradient is added inside the layer by `inject`, so
a loss needs no way out of the model and no wire between pipeline stages.

A *group* is the set of tokens over which means are taken: each sequence by itself, or the whole
micro-batch. A loss over several groups is their mean.

Shapes.
    T tokens, those of a group side by side     E experts     K experts per token     G groups
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def skywork_balance_loss(probs_TE: Tensor, *, groups: int = 1) -> Tensor:
    """Sum over experts of (1/E - mean probability)^2, Skywork-MoE Eq. 4; from 0 to below 1.

    Quadratic in the mean probability over *all* experts, with no count and no factor E. For
    the same coefficient it pulls E/2 times less hard than `switch_balance_loss`.

    Args:
        probs_TE: Softmax over all experts, (T, E).
        groups: Groups in the batch; must divide T.

    Returns:
        The mean over groups, ().
    """
    num_experts = probs_TE.shape[-1]
    mean_GE = probs_TE.view(groups, -1, num_experts).mean(dim=1)
    return (1.0 / num_experts - mean_GE).square().sum(dim=-1).mean()


def switch_balance_loss(probs_TE: Tensor, counts_GE: Tensor) -> Tensor:
    """E times the sum over experts of (share of copies) x (mean probability); 1 when balanced.

    Switch Transformer Eq. 4-6 (arXiv 2101.03961), with shares of copies where a token has
    several. Only the mean probability carries a gradient.

    Args:
        probs_TE: Softmax over all experts, (T, E).
        counts_GE: Copies each expert was sent from each group, before any drop, (G, E).

    Returns:
        The mean over groups, ().
    """
    groups, num_experts = counts_GE.shape
    mean_GE = probs_TE.view(groups, -1, num_experts).mean(dim=1)
    counts_GE = counts_GE.to(probs_TE.dtype)
    share_GE = counts_GE / counts_GE.sum(dim=-1, keepdim=True)
    return num_experts * (share_GE * mean_GE).sum(dim=-1).mean()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, (), of *raw* logits (ST-MoE, arXiv 2202.08906).

    Normalised logits have a fixed scale, on which this loss would be nearly constant.
    """
    return logits_TE.logsumexp(dim=-1).square().mean()


def inject(carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
    """Return `carrier` as it is; in the backward pass, also send `scale` into `loss`.

    The gradient of `scale * loss` is thereby added to that of whatever the carrier flows into,
    once for each backward pass through the carrier.
    """
    carried: Tensor = _Inject.apply(carrier, loss, scale)  # type: ignore[no-untyped-call]
    return carried


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss_like = scale, (loss.dtype, loss.device)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.loss_like
        return grad, torch.full((), ctx.scale, dtype=dtype, device=device), None
