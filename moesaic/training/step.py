"""One optimizer step: micro-batches in, gradients, statistics, one update out.

The loss of a step is the sum of its tokens' losses over the number of its target tokens, so a
token weighs the same whichever micro-batch it lies in. The losses of the router are means over
micro-batches.

Shapes.  B sequences    S positions    N = B * S    D model width
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.data.batches import Batch
from moesaic.errors import TrainingError
from moesaic.model.loss import linear_cross_entropy
from moesaic.model.transformer import Transformer
from moesaic.moe.balance import AdaptiveCoefficient, update_selection_bias
from moesaic.moe.config import RoutingConfig
from moesaic.moe.layer import MoELayer, RoutingStep
from moesaic.moe.statistics import RoutingStatistics


@dataclass(frozen=True)
class Gradients:
    """What the backward passes of one step found; the gradients themselves lie on the weights."""

    loss: Tensor
    """Mean over the step's target tokens of -log p, in nats, ()."""

    statistics: list[RoutingStatistics]
    """One a MoE layer, summed over micro-batches."""


def accumulate(
    model: Transformer,
    batches: Sequence[Batch],
    *,
    routing: RoutingConfig,
    coefficients_L: Tensor,
    recompute: Collection[int] = (),
    attend_across_documents: bool = False,
) -> Gradients:
    """Leave on each weight the gradient of the whole step's loss.

    Args:
        model: Without gradients.
        batches: The step's micro-batches.
        routing: Capacity and balance of MoE layers.
        coefficients_L: Balance-loss coefficient of each MoE layer.
        recompute: Layers whose activations are not kept.
        attend_across_documents: Let tokens see earlier documents of their row.

    Raises:
        TrainingError: No token of the step is a target.
    """
    device = model.head_weight.device
    num_targets = sum(int((batch.targets_BS != -100).sum()) for batch in batches)
    if num_targets == 0:
        raise TrainingError(
            "No token of this step is to be predicted. Raise data.accumulation or "
            "data.micro_batch, so that each step holds some."
        )
    steps = [
        RoutingStep(config=routing, coefficient=coefficient, scale=1 / len(batches))
        for coefficient in coefficients_L.to(device).unbind()
    ]
    loss = torch.zeros((), dtype=torch.float64, device=device)
    of_batches: list[list[RoutingStatistics]] = []
    for batch in batches:
        hidden_BSD, of_layers = model.hidden(
            batch.input_ids_BS.to(device),
            documents_BS=None if attend_across_documents else batch.documents_BS.to(device),
            routing=steps,
            recompute=recompute,
        )
        nats = linear_cross_entropy(
            hidden_BSD.flatten(0, 1), model.head_weight, batch.targets_BS.to(device).flatten()
        )
        share = nats / num_targets
        share.backward()
        loss += share.detach()
        of_batches.append(of_layers)
    of_layer = zip(*of_batches, strict=True)
    return Gradients(loss, [functools.reduce(operator.add, layer) for layer in of_layer])


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
    model: Transformer,
    statistics: Sequence[RoutingStatistics],
    *,
    routing: RoutingConfig,
    coefficient: AdaptiveCoefficient,
) -> None:
    """Move what balances the experts outside of autograd, once for each optimizer step."""
    if routing.coefficient == "adaptive" and statistics:
        coefficient.update([layer.would_drop_rate for layer in statistics])
    if routing.bias_rate > 0:
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        for layer, counted in zip(layers, statistics, strict=True):
            bias_E = layer.gate.e_score_correction_bias
            assert isinstance(bias_E, Tensor), "checked when the run was set up"
            update_selection_bias(
                bias_E, counted.counts_E, rate=routing.bias_rate, form=routing.bias_form
            )
