"""One optimizer step: micro-batches in, gradients, statistics, one update out.

The loss of a step is the sum of its tokens' losses over the number of its target tokens, so a
token weighs the same whichever micro-batch, and whichever rank, it lies in. The losses of the
router are means over micro-batches.

Shapes.  B sequences    S positions    L MoE layers    E experts
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.data.batches import Batch
from moesaic.errors import TrainingError
from moesaic.moe.balance import AdaptiveCoefficient, update_selection_bias
from moesaic.moe.config import RoutingConfig
from moesaic.moe.layer import RoutingStep
from moesaic.moe.statistics import RoutingStatistics
from moesaic.training.sharded import ShardedModel


@dataclass(frozen=True)
class Gradients:
    """What the backward passes of one step found; the gradients themselves lie on the weights.

    The same on every rank.
    """

    loss: Tensor
    """Mean over the step's target tokens of -log p, in nats, ()."""

    statistics: list[RoutingStatistics]
    """One a MoE layer of the whole model, summed over micro-batches and data-parallel ranks."""


def accumulate(
    model: ShardedModel,
    batches: Sequence[Batch],
    *,
    routing: RoutingConfig,
    coefficients_L: Tensor,
    attend_across_documents: bool = False,
) -> Gradients:
    """Leave on each local parameter its part of the gradient of the whole step's loss.

    Args:
        model: Without gradients.
        batches: This rank's micro-batches of the step.
        routing: Capacity and balance of MoE layers.
        coefficients_L: Balance-loss coefficient of each MoE layer of the whole model.
        attend_across_documents: Let tokens see earlier documents of their row.

    Raises:
        TrainingError: No token of the step is a target.
    """
    world, spec = model.world, model.spec
    counted = sum(int((batch.targets_BS != -100).sum()) for batch in batches)
    targets = int(world.data.sum_(torch.tensor(counted, device=world.device)))
    if targets == 0:
        raise TrainingError(
            "No token of this step is to be predicted. Raise data.accumulation or "
            "data.micro_batch, so that each step holds some."
        )
    scale = 1 / (len(batches) * world.layout.plan.dp)
    steps = {
        layer: RoutingStep(config=routing, coefficient=coefficient, scale=scale)
        for layer, coefficient in zip(
            spec.moe_layers, coefficients_L.to(world.device).unbind(), strict=True
        )
    }
    for stage in model.stages:
        stage.begin(steps, targets=targets)
    tokens_BS, targets_BS, documents_BS = (
        torch.cat(column).to(world.device) for column in zip(*batches, strict=True)
    )
    others = {"targets_BS": targets_BS}
    if not attend_across_documents:
        others["documents_BS"] = documents_BS
    loss = model.run(tokens_BS, micro_batches=len(batches), **others)
    model.collect_gradients()
    return _over_ranks(model, loss)


def _over_ranks(model: ShardedModel, loss: Tensor) -> Gradients:
    """Sum what this rank found with what the others did, in one collective."""
    world, spec = model.world, model.spec
    num_experts = 0 if spec.moe is None else spec.moe.num_experts
    of_layer = {
        layer: functools.reduce(operator.add, (found[layer] for found in stage.found))
        for stage in model.stages
        for layer in stage.found[0]
    }
    width = RoutingStatistics.width(num_experts)
    sums = torch.zeros(1 + len(spec.moe_layers) * width, dtype=torch.float64, device=loss.device)
    # Tensor-parallel ranks found the same, so one of them speaks for all.
    if world.place.tp == 0:
        sums[0] = loss
        for row, layer in enumerate(spec.moe_layers):
            if layer in of_layer:
                start = 1 + row * width
                sums[start : start + width] = of_layer[layer].to_tensor()
    world.everyone.sum_(sums)
    rows = sums[1:].split(width) if spec.moe_layers else ()
    return Gradients(
        sums[0], [RoutingStatistics.from_tensor(row, num_experts=num_experts) for row in rows]
    )


def check_finite(step: int, *, loss: float, norm: float, last_state: str) -> None:
    """Refuse to go on from numbers that would spoil the weights.

    Args:
        step: Number of the step, from 1.
        loss: Its loss.
        norm: Its gradient's norm.
        last_state: What the run can be resumed from, in words.

    Raises:
        TrainingError: One of them is not finite. No weight has been touched.
    """
    if not all(map(torch.isfinite, torch.tensor([loss, norm]))):
        raise TrainingError(
            f"Step {step} has loss {loss:g} and gradient norm {norm:g}, so it was not applied. "
            f"{last_state} Lower optimizer.lr or optimizer.clip, or lengthen "
            f"schedule.warmup_steps, and run again."
        )


def balance(
    model: ShardedModel,
    statistics: Sequence[RoutingStatistics],
    *,
    routing: RoutingConfig,
    coefficient: AdaptiveCoefficient,
) -> None:
    """Move what balances the experts outside of autograd, once for each optimizer step."""
    if routing.coefficient == "adaptive" and statistics:
        coefficient.update([layer.would_drop_rate for layer in statistics])
    if routing.bias_rate > 0:
        of_layer = dict(zip(model.spec.moe_layers, statistics, strict=True))
        for number, layer in model.moe_layers().items():
            bias_E = layer.gate.e_score_correction_bias
            assert isinstance(bias_E, Tensor), "checked when the run was set up"
            update_selection_bias(
                bias_E, of_layer[number].counts_E, rate=routing.bias_rate, form=routing.bias_form
            )
