"""Stages as the schedules of `torch.distributed.pipelining` run them.

The only module that knows these, private names included. What torch's own stage does otherwise,
and why it is not left so:

    before the first step it runs every stage once to see shapes, and routers would count that:
        here shapes are told
    it sends results and gradients as they lie in memory, which fails unless they are
        contiguous, and frees graphs in a way that fails for a view: here they are copied if need be
    it takes buffers for all micro-batches at once and keeps them between steps, which undoes
        what 1F1B saves: here a buffer lives from its receive to its last use
    it holds FSDP's reductions and resharding back until the step is over, so that ZeRO-2 and 3
        save nothing and nothing overlaps: here FSDP does as in one stage (`expect_backward`)
    in zero-bubble schedules it finds the gradients of inputs and of weights in two passes. What
        is recomputed is then recomputed again for every weight, and compiled code refuses its
        second pass: here a stage with either does its whole backward pass at once

What is left: gloo keeps what was sent until the step is over, except under gpipe and 1f1b.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from moesaic.errors import MoesaicError
from moesaic.parallel.backward import only
from moesaic.parallel.sharding import expect_backward
from moesaic.parallel.stopwatch import Stopwatch
from moesaic.parallel.world import World

_ONE_STAGE: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
_SEVERAL: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zb1p": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Schedule:
    """A schedule and this rank's stages in it.

    Args:
        world: This rank's, of at least two pipeline ranks.
        stages: As in `Pipeline`.
        micro_batches: As in `Pipeline`.
        activation: As in `Pipeline`.
        recomputed: Which of the stages compute something again in their backward pass.
    """

    def __init__(
        self,
        world: World,
        stages: Sequence[nn.Module],
        *,
        micro_batches: int,
        activation: tuple[tuple[int, ...], torch.dtype],
        recomputed: Sequence[bool],
    ) -> None:
        self.micro_batches = micro_batches
        self._stages = [
            _Stage(world, number, stage, activation=activation, splits=not again)
            for number, stage, again in zip(world.stages, stages, recomputed, strict=True)
        ]
        name = world.layout.plan.schedule
        # Losses are divided by the targets of all ranks already, so gradients are not scaled.
        chosen = {"loss_fn": _as_it_is, "scale_grads": False}
        if name in _ONE_STAGE:
            (stage,) = self._stages
            self._schedule: Any = _ONE_STAGE[name](stage, micro_batches, **chosen)
        else:
            self._schedule = _SEVERAL[name](self._stages, micro_batches, **chosen)
        places = [self._stages[0].stage_index_to_group_rank[n] for n in world.stages]
        assert set(places) == {world.pipeline.rank}, f"{places=}, {world.stages=}"

    def step(
        self, tokens: Tensor, others: dict[str, Tensor]
    ) -> tuple[list[Tensor], tuple[Stopwatch, ...]]:
        """Forward and backward passes of all micro-batches.

        Args:
            tokens: As in `Pipeline.run`.
            others: As in `Pipeline.run`.

        Returns:
            losses: Of each micro-batch, () each; none without the last stage.
            stopwatches: What ran while each stage computed.
        """
        for stage in self._stages:
            stage.stopwatch = Stopwatch(stage.device)
        losses: list[Tensor] = []
        try:
            self._schedule.step(
                *((tokens,) if self._stages[0].is_first else ()),
                target=torch.zeros(self.micro_batches),  # torch computes no loss without one
                losses=losses,
                return_outputs=False,
                **others,
            )
        except RuntimeError as error:
            if isinstance(error.__cause__, MoesaicError):
                raise error.__cause__ from None
            raise
        return losses, tuple(stage.stopwatch for stage in self._stages)


def _as_it_is(loss: Tensor, _: Tensor) -> Tensor:
    return loss


class _HandsOn(nn.Module):
    """A stage whose result can be sent."""

    def __init__(self, stage: nn.Module, expected: Tensor) -> None:
        super().__init__()
        self.stage = stage
        self.expected = expected.shape, expected.dtype

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        y: Tensor = self.stage(x, **others)
        # The receiver has laid out its buffer already; what does not fit it ends the process.
        assert y.dim() == 0 or (y.shape, y.dtype) == self.expected, f"{y.shape=}, {y.dtype=}"
        # torch frees graphs with `detach_`, which a view refuses.
        if y._is_view() or not y.is_contiguous():
            return y.clone(memory_format=torch.contiguous_format)
        return y


class _Stage(PipelineStage):
    """One stage of this rank, which FSDP may share.

    Args:
        world: This rank's.
        number: Of the stage, among all.
        stage: Its module.
        activation: As in `Pipeline`.
        splits: Whether a zero-bubble schedule may run its backward pass in two parts, if nothing
            in it is compiled.
    """

    def __init__(
        self,
        world: World,
        number: int,
        stage: nn.Module,
        *,
        activation: tuple[tuple[int, ...], torch.dtype],
        splits: bool,
    ) -> None:
        shape, dtype = activation
        count = len(world.layout.stages)
        hidden = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        ids = torch.empty(shape[:1], dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=dtype, device="meta", requires_grad=True)
        # Wrapped, so that torch does not see FSDP, and leaves it alone.
        super().__init__(
            _HandsOn(stage, hidden),
            number,
            count,
            world.device,
            input_args=ids if number == 0 else hidden,
            output_args=loss if number == count - 1 else hidden,
            group=world.pipeline.process_group,
        )
        self._runtime_validate = False  # it would miss the length of the ids
        self.stage = stage
        self.splits = splits and all(m._compiled_call_impl is None for m in stage.modules())
        self.zero = world.layout.plan.zero
        self.stopwatch = Stopwatch(world.device)
        self._backwards = 0

    # --- Work -----------------------------------------------------------------------------------

    def clear_runtime_states(self) -> None:
        super().clear_runtime_states()
        self._backwards = 0

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.stopwatch:
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._let_go(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        with self.stopwatch:
            super().backward_one_chunk(
                bwd_chunk_id,
                loss=loss,
                full_backward=full_backward or not self.splits,
                last_backward=last_backward,
            )
        self._let_go(self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if self.splits:
            with self.stopwatch:
                super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        is_last = self._backwards + 1 == self.chunks
        if backward_type == "full":
            expect_backward(self.stage, is_last=is_last, zero=self.zero)
            result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs)
            self._backwards += 1
            return result
        # FSDP knows no parts: its hooks run in the first, before there are gradients of weights.
        # What it would do is done here, and weights must be gathered before torch looks for them.
        expect_backward(self.stage, is_last=False, zero=1)
        _gather_weights(self.stage)
        for_input = backward_type == "input"
        with only(activations=for_input, weights=not for_input):
            result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs)
        if not for_input:
            self._backwards += 1
            if is_last or self.zero > 1:
                expect_backward(self.stage, is_last=is_last, zero=self.zero)
                _reduce_gradients(self.stage)
        return result

    # --- What is sent and received --------------------------------------------------------------

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        self._make_room(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
        if not self.is_first:
            self.bwd_cache[bwd_chunk_id] = tuple(
                None if gradient is None else gradient.contiguous()
                for gradient in self.bwd_cache[bwd_chunk_id]
            )
        return super().get_bwd_send_ops(bwd_chunk_id)

    def _post_metadata_inference_cleanup(self) -> None:
        pass  # nothing was inferred, and gradients of earlier steps are not to be dropped

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        with self._no_memory():
            super()._setup_forward_recv_info(num_microbatches, has_backward)

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        with self._no_memory():
            super()._setup_backward_recv_info(num_microbatches)

    @contextmanager
    def _no_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _make_room(self, infos: Sequence[Any]) -> None:
        for info in infos:
            if not info.is_root_arg:
                meta = info.tensor_meta
                info.buffer = torch.empty(meta.shape, dtype=meta.dtype, device=self.device)

    @staticmethod
    def _let_go(infos: Sequence[Any]) -> None:
        for info in infos:
            info.buffer = None


def input_gradient(y: Tensor, gradient: Tensor | None, x: Tensor, module: nn.Module) -> Any:
    """The first part of a backward pass, as zero-bubble schedules run it; adds to `x.grad`.

    Args:
        y: What `module` made of `x`; a scalar needs no gradient.
        gradient: Its gradient.
        x: What that is for.
        module: Whose weights' gradients are left for later.

    Returns:
        What `weight_gradient` goes on from.
    """
    with only(activations=True):
        _, rest = stage_backward_input(
            [y], None if gradient is None else [gradient], [x], module.parameters()
        )
    return rest


def weight_gradient(module: nn.Module, rest: Any) -> None:
    """The second part: adds to the gradient of every weight."""
    with only(weights=True):
        stage_backward_weight(module.parameters(), rest)


def _gather_weights(stage: nn.Module) -> None:
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


def _reduce_gradients(stage: nn.Module) -> None:
    """Do what FSDP's hooks would have done after a backward pass that they saw."""
    if not isinstance(stage, FSDPModule):
        return
    root = stage._get_fsdp_state()
    for state in root._state_ctx.all_states:
        for group in state._fsdp_param_groups:
            group.post_backward()
    root._root_post_backward_final_callback()
