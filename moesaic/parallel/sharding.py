"""Sharing weights, gradients and optimizer state over data-parallel ranks, with FSDP2.

Each block of a stage is gathered and reduced on its own; routed experts have a view of the ranks
of their own. Losses are divided by the number of target tokens of all ranks, so every reduction
here is a plain sum: `set_gradient_divide_factor(1)` with a forced sum is right for every size
and exact for uneven token counts, where any other factor is applied twice on a mesh of one rank.

Outside of this module everything works on local tensors: the part of a weight that is left on
this rank, which shares its memory with what FSDP holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, Comm, ReduceScatter
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
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Let FSDP share a stage's parameters over the data-parallel ranks, if there are any.

    Args:
        stage: The module whose `forward` runs the stage.
        world: This rank's.
        blocks: Modules in it that are gathered and reduced as a whole.
        experts: Modules in those that hold routed experts.
        zero: 3 lets go of gathered weights after each forward pass of a block.
        compute_dtype: Experts are gathered in it, since they are rounded to it anyway; their
            gradients are added up in the weights' own. None: that too.
    """
    if world.dense_mesh is None:
        return
    reshard = zero == 3
    ignored: set[nn.Parameter] = set()
    experts = list(experts)
    for module in experts:
        if world.expert_mesh is None:
            ignored |= set(module.parameters())
        else:
            fully_shard(
                module,
                mesh=world.expert_mesh,
                reshard_after_forward=reshard,
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=compute_dtype,
                    reduce_dtype=next(module.parameters()).dtype,
                    cast_forward_inputs=False,
                ),
            )
    for module in blocks:
        fully_shard(
            module, mesh=world.dense_mesh, reshard_after_forward=reshard, ignored_params=ignored
        )
    fully_shard(stage, mesh=world.dense_mesh, reshard_after_forward=reshard, ignored_params=ignored)
    shared_experts = set() if world.expert_mesh is None else set(experts)
    for module in stage.modules():
        if not isinstance(module, FSDPModule):
            continue
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        group = world.expert_shards if module in shared_experts else world.dense_shards
        if world.device.type == "cpu" and group.size > 1:
            module.set_custom_all_gather(_Gather(group))
            module.set_custom_reduce_scatter(_ScatterSum(group))


class _Buffers(Comm):
    """Memory that FSDP asks for before it communicates, and the ranks it does that with."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Buffers, AllGather):
    """How FSDP gathers weights on CPUs: as all else here; gloo's way takes twice as long."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        self._group.gather_into(output_tensor, input_tensor)


class _ScatterSum(_Buffers, ReduceScatter):
    """How FSDP adds gradients up on CPUs: gloo's way is an all-reduce."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM, f"{op=}"
        sizes = [output_tensor.shape[0]] * self._group.size
        output_tensor.copy_(self._group.scatter_sum(input_tensor, sizes))


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
