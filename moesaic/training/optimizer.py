"""AdamW over named weights: who decays, who learns faster, who is frozen, and the clip.

Weights, gradients and the two moments are each one float32 copy, and nothing here makes a
second of any. The clip costs no pass over memory of its own: the fused update divides each
gradient by a number as it reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from moesaic.checkpoint.pieces import SCALAR, Held
from moesaic.errors import ConfigError
from moesaic.parallel.group import ALONE, Group
from moesaic.training.config import OptimizerConfig

NORM_PIECE = 2**18
"""Values of a gradient whose squares are summed at once."""


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those of the whole model's parameters that match one of the patterns.

    Args:
        names: Of every parameter, over all ranks.
        patterns: Shell-style, as in `*.self_attn.*`, over whole parameter names.

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left to train.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"freeze has {pattern!r}, which matches no parameter. "
                f"Names look like {names[-1]!r}; write * for any part."
            )
    frozen = [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
    if len(frozen) == len(names):
        raise ConfigError("freeze matches every parameter, so nothing is left to train.")
    return frozen


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients, moments at zero.

    Matrices decay; norms, biases and other one-dimensional weights do not. Routed experts form
    groups of their own, whose learning rate `set_learning_rate` multiplies.

    Args:
        parameters: This rank's, by name.
        config: Of the optimizer.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            key = (parameter.ndim >= 2, ".experts." in name)
            groups.setdefault(key, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": of_group,
                "weight_decay": config.weight_decay if decays else 0.0,
                "lr_multiplier": config.expert_lr_multiplier if is_expert else 1.0,
            }
            for (decays, is_expert), of_group in groups.items()
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


def moments(
    weights: Mapping[str, Held],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
) -> dict[str, Held]:
    """The optimizer's own state by name: `moment1.NAME`, `moment2.NAME` and `updates.NAME`."""
    found: dict[str, Held] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            state, piece = optimizer.state[parameter], weights[name].piece
            found[f"moment1.{name}"] = Held(state["exp_avg"], piece)
            found[f"moment2.{name}"] = Held(state["exp_avg_sq"], piece)
            found[f"updates.{name}"] = Held(state["step"], SCALAR)
    return found
