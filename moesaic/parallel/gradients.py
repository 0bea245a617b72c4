"""The norm of the whole model's gradient, and the update that is clipped to it.

The clip costs no pass over memory of its own: the fused update divides each gradient by a number
as it reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moesaic.parallel.group import ALONE, Group

NORM_PIECE = 2**18
"""Values of a gradient whose squares are summed at once."""


def gradient_norm(
    parameters: Mapping[str, nn.Parameter],
    *,
    copies: Mapping[str, int] | None = None,
    everyone: Group = ALONE,
) -> float:
    """Euclidean norm of the whole model's gradient as one vector, the same on every rank.

    Args:
        parameters: This rank's, by name; those that are trained have a gradient.
        copies: Ranks that hold the same piece of each; None: one.
        everyone: All ranks.
    """
    total = torch.zeros((), dtype=torch.float64)
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"no gradient on {name}"
        # In pieces: a float32 sum over millions loses digits, and a float64 one is slow.
        norms = [
            torch.linalg.vector_norm(piece)
            for piece in parameter.grad.reshape(-1).split(NORM_PIECE)
        ]
        squares = torch.stack(norms).double().square().sum()
        # A piece that several ranks hold counts once: each of them adds its share of it.
        total = total.to(squares.device) + squares / (1 if copies is None else copies[name])
    return float(everyone.sum_(total).sqrt())


def update(optimizer: torch.optim.AdamW, *, norm: float, clip: float) -> None:
    """Clip to the norm `clip` (0: never), update the weights, and free the gradients.

    Args:
        optimizer: With a gradient on each of its parameters.
        norm: Their norm, finite.
        clip: Largest norm that goes into the update.
    """
    if not optimizer.param_groups:
        return  # everything that this rank holds is frozen
    device = optimizer.param_groups[0]["params"][0].device
    too_long = norm / clip if clip > 0 else 1.0
    # The way torch's GradScaler hands its divisor to a fused optimizer.
    optimizer.grad_scale = torch.tensor(max(too_long, 1.0), device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
