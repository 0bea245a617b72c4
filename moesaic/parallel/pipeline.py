"""Run a step's micro-batches through the stages, forwards and backwards, in a schedule's order.

A stage is a module whose `forward(x, **others)` takes token ids (the first stage) or what the
stage before returned, and returns activations or (the last stage) its share of the loss, a scalar.
With one stage this is a plain loop.

Shapes.  M micro-batches    B sequences in each    S positions, s of them this rank's
         D model width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moesaic.parallel.sharding import expect_backward
from moesaic.parallel.stopwatch import Stopwatch
from moesaic.parallel.world import World
from moesaic.planning.plan import Recompute
from moesaic.planning.schedules import check_micro_batches

if TYPE_CHECKING:
    from moesaic.parallel.schedule import Schedule


@dataclass(frozen=True)
class PipelineRun:
    """What a step of this rank's stages came to."""

    loss: Tensor
    """Sum of the losses, () float64; 0 on a rank without the last stage."""

    stopwatches: tuple[Stopwatch, ...]
    """What ran while each stage computed."""

    @property
    def seconds(self) -> tuple[float, ...]:
        """Time inside each of this rank's stages, forwards and backwards, as `World.stages` go.

        Collectives of layers and of FSDP count, waiting for other stages does not. On a GPU this
        waits for the step to end.
        """
        return tuple(stopwatch.seconds for stopwatch in self.stopwatches)


class Pipeline:
    """The stages of this rank, and how they work with those of others.

    Args:
        world: This rank's.
        stages: Modules of the stages of this rank, as `world.stages` numbers them.
        micro_batches: M.
        activation: Shape (B, s, D) and dtype of what stages hand on.
        recompute: What is computed again in the backward pass; None: as the plan says. The
            backward pass of a stage that computes anything again is never run in two parts.

    Raises:
        PlanError: The schedule cannot run so many micro-batches on so many stages.
    """

    def __init__(
        self,
        world: World,
        stages: Sequence[nn.Module],
        *,
        micro_batches: int,
        activation: tuple[tuple[int, ...], torch.dtype],
        recompute: Mapping[int | str, Recompute] | None = None,
    ) -> None:
        layout, plan = world.layout, world.layout.plan
        count = len(layout.stages)
        check_micro_batches(plan.schedule, micro_batches, ranks=plan.pp, stages=count)
        assert len(stages) == len(world.stages), f"{len(stages)=}, {world.stages=}"
        self.world, self.stages = world, list(stages)
        self.micro_batches = micro_batches
        self.rows = micro_batches * activation[0][0]
        self._schedule: Schedule | None = None
        if plan.pp > 1:
            # Loads torch's compiler, which one stage alone has no use for.
            from moesaic.parallel.schedule import Schedule

            self._schedule = Schedule(
                world,
                self.stages,
                micro_batches=micro_batches,
                activation=activation,
                recomputed=[bool(layout.recompute(stage, recompute)) for stage in world.stages],
            )

    def step(self, tokens: Tensor, **others: Tensor) -> PipelineRun:
        """Add to every parameter's gradient that of the sum of the micro-batches' losses.

        Ranks of one pipeline call this with the same tensors.

        Args:
            tokens: Ids of all micro-batches, (M * B, S).
            others: What each stage's `forward` is given beside its input, cut along dim 0 alike.
        """
        given = {"tokens": tokens, **others}
        lengths = {name: x.shape[0] for name, x in given.items()}
        assert set(lengths.values()) == {self.rows}, f"{lengths=}, {self.rows=}"
        if self._schedule is None:
            losses, stopwatches = self._loop(tokens, others)
        else:
            losses, stopwatches = self._schedule.step(tokens, others)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for loss in losses:
            total += loss.detach()
        return PipelineRun(total, stopwatches)

    def _loop(
        self, tokens: Tensor, others: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], tuple[Stopwatch, ...]]:
        zero = self.world.layout.plan.zero
        (stage,) = self.stages
        stopwatch = Stopwatch(self.world.device)
        losses = []
        for micro in range(self.micro_batches):
            expect_backward(stage, is_last=micro == self.micro_batches - 1, zero=zero)
            inputs = tokens.chunk(self.micro_batches)[micro]
            named = {k: v.chunk(self.micro_batches)[micro] for k, v in others.items()}
            with stopwatch:
                loss = stage(inputs, **named)
                loss.backward()
            losses.append(loss.detach())
        return losses, (stopwatch,)
