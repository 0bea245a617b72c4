"""AdamW over named weights: who decays, who learns faster, who is frozen, and the clip.

Weights, gradients and the two moments are each one float32 copy, and nothing here makes a
second of any. The clip costs no pass over memory of its own: the fused update divides each
gradient by a number as it reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.training.config import OptimizerConfig

NORM_PIECE = 2**18
"""Values of a gradient whose squares are summed at once."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop gradients of every parameter whose name matches one of the patterns.

    Args:
        model: Its other parameters are made to take part.
        patterns: Shell-style, as in `*.self_attn.*`, over whole parameter names.

    Returns:
        Names of the frozen parameters.

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"freeze has {pattern!r}, which matches no parameter. "
                f"Names look like {names[-1]!r}; write * for any part."
            )
    frozen = [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
    if len(frozen) == len(names):
        raise ConfigError("freeze matches every parameter, so nothing is left to train.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients, moments at zero.

    Matrices decay; norms, biases and other one-dimensional weights do not. Routed experts form
    groups of their own, whose learning rate `set_learning_rate` multiplies.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (parameter.ndim >= 2, ".experts." in name)
            groups.setdefault(key, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_multiplier": config.expert_lr_multiplier if is_expert else 1.0,
            }
            for (decays, is_expert), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Made now and not by the first step, so that a state to resume has a place to go.
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Use `lr`, times each group's multiplier, from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def gradient_norm(optimizer: torch.optim.AdamW) -> float:
    """Euclidean norm of all gradients as one vector."""
    norms = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter.grad is not None, f"no gradient on {tuple(parameter.shape)=}"
            # In pieces: a float32 sum over millions loses digits, and a float64 one is slow.
            for piece in parameter.grad.reshape(-1).split(NORM_PIECE):
                norms.append(torch.linalg.vector_norm(piece))
    return float(torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64))


def update(optimizer: torch.optim.AdamW, *, norm: float, clip: float) -> None:
    """Clip to the norm `clip` (0: never), update the weights, and free the gradients.

    Args:
        optimizer: With a gradient on each of its parameters.
        norm: Their norm, finite.
        clip: Largest norm that goes into the update.
    """
    device = optimizer.param_groups[0]["params"][0].device
    too_long = norm / clip if clip > 0 else 1.0
    # The way torch's GradScaler hands its divisor to a fused optimizer.
    optimizer.grad_scale = torch.tensor(max(too_long, 1.0), device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def moments(model: nn.Module, optimizer: torch.optim.AdamW) -> Mapping[str, Tensor]:
    """The optimizer's own state by name: `moment1.NAME`, `moment2.NAME` and `updates.NAME`."""
    return {
        f"{label}.{name}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for label, key in (("moment1", "exp_avg"), ("moment2", "exp_avg_sq"), ("updates", "step"))
    }
