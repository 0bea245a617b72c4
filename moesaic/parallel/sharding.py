"""Sharing weights, gradients and optimizer state over data-parallel ranks, with FSDP2.

Each block of a stage is gathered and reduced on its own; routed experts have a view of the ranks
of their own. Losses are divided by the number of target tokens of all ranks, so every reduction
here is a plain sum: `set_gradient_divide_factor(1)` with a forced sum is right for every size
and exact for uneven token counts, where any other factor is applied twice on a mesh of one rank.

Outside of this module everything works on local tensors: the part of a weight that is left on
this rank, which shares its memory with what FSDP holds.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from moesaic.parallel.group import Group
from moesaic.parallel.world import World


def share(
    stage: nn.Module,
    world: World,
    *,
    blocks: Iterable[nn.Module],
    experts: Iterable[nn.Module],
    zero: int,
) -> None:
    """Let FSDP share a stage's parameters over the data-parallel ranks, if there are any.

    Args:
        stage: The module whose `forward` runs the stage.
        world: This rank's.
        blocks: Modules in it that are gathered and reduced as a whole.
        experts: Modules in those that hold routed experts.
        zero: 3 lets go of gathered weights after each forward pass of a block.
    """
    if world.dense_mesh is None:
        return
    reshard = zero == 3
    ignored: set[nn.Parameter] = set()
    for module in experts:
        if world.expert_mesh is None:
            ignored |= set(module.parameters())
        else:
            fully_shard(module, mesh=world.expert_mesh, reshard_after_forward=reshard)
    for module in blocks:
        fully_shard(
            module, mesh=world.dense_mesh, reshard_after_forward=reshard, ignored_params=ignored
        )
    fully_shard(stage, mesh=world.dense_mesh, reshard_after_forward=reshard, ignored_params=ignored)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def expect_backward(stage: nn.Module, *, is_last: bool, zero: int) -> None:
    """Say whether the backward pass that comes is a step's last one.

    Gradients are reduced after the last one only, and after every one from ZeRO-2 on.
    """
    if isinstance(stage, FSDPModule):
        stage.set_is_last_backward(is_last)
        stage.set_requires_gradient_sync(is_last or zero > 1)
        stage.set_reshard_after_backward(is_last or zero > 2)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or its gradient; memory is shared."""
    if isinstance(tensor, DTensor):
        local: Tensor = tensor._local_tensor
        return local
    return tensor


def sum_gradients(gradients: Iterable[Tensor], group: Group) -> None:
    """Add gradients up over a group, in place, with one collective for each dtype."""
    if group.size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for same in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in same])
        group.sum_(flat)
        parts = flat.split([gradient.numel() for gradient in same])
        for gradient, part in zip(same, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
