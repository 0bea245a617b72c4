"""AdamW over named weights: who decays, who learns faster, and who is frozen.

Weights, gradients and the two moments are each one float32 copy, and nothing here makes a
second of any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from moesaic.checkpoint.pieces import SCALAR, Held
from moesaic.errors import ConfigError
from moesaic.training.config import OptimizerConfig


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
