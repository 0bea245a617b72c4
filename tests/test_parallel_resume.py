"""A run goes on under another layout, and another number of ranks, as if nothing had happened."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.pieces import Held, whole_piece
from moesaic.checkpoint.training_state import newest, save_state
from moesaic.moe.balance import AdaptiveCoefficient
from moesaic.parallel.gradients import gradient_norm, update
from moesaic.planning.plan import TrainPlan
from moesaic.training.config import OptimizerConfig
from moesaic.training.optimizer import (
    build_optimizer,
    moments,
    set_learning_rate,
)
from moesaic.training.sharded import ShardedModel
from tests.layouts import DROPPING, SKYWORK, Case, controller, halves, one_step, plan, sgd, sharded
from tests.ranks import run_ranks

LAYOUTS: dict[str, TrainPlan] = {
    "one rank": plan(),
    "2: half layers": plan(pp=2, stages=halves("1.attention")),
    "2: experts over data": plan(dp=2, experts_over="ep", zero=3),
    "3: tensors": plan(tp=3),
    "3: data": plan(dp=3, zero=2),
    "8: everything": plan(pp=2, dp=2, tp=2, schedule="zbv", zero=3),
    "8: columns of experts": plan(dp=4, tp=2, experts_over="etp", ep=2),
}

CASE = Case(plan(dp=2, tp=2), spec=SKYWORK, routing=DROPPING, micros=12)
OF_LOSS = {"sgd": 1e-6, "adamw": 1e-5}


def tensors(
    model: ShardedModel, adamw: torch.optim.AdamW, coefficient: AdaptiveCoefficient
) -> dict[str, Held]:
    values = coefficient.values_L
    return {
        **{f"weights.{name}": held for name, held in model.weights.items()},
        **moments(model.weights, model.parameters, adamw),
        "routing.coefficient": Held(values, whole_piece(tuple(values.shape))),
    }


def losses(
    layout: TrainPlan, optimizer: str, folder: Path, *, first: int, save_after: int | None
) -> list[float]:
    """Losses of the steps from `first` to the eighth, in float32."""
    case = dataclasses.replace(CASE, plan=layout)
    model = sharded(case, layout, dtype=torch.float32)
    writers = model.world.writers
    coefficient = controller(case)
    adamw = build_optimizer(model.parameters, OptimizerConfig(lr=1e-3))
    set_learning_rate(adamw, 1e-3)
    if first:
        with torch.no_grad():
            for held in model.weights.values():
                held.tensor.fill_(torch.nan)
        state = newest(folder, writers)
        assert state is not None
        assert state.step == first
        state.load(tensors(model, adamw, coefficient))
        model.spread()
    copies = {name: model.copies(name) for name in model.parameters}
    found = []
    for step in range(first, 8):
        found.append(float(one_step(model, case, coefficient=coefficient, seed=step).loss))
        norm = gradient_norm(model.parameters, copies=copies, everyone=model.world.everyone)
        if optimizer == "adamw":
            update(adamw, norm=norm, clip=1.0)
        else:
            sgd(model, lr=0.05)
        model.spread()
        if step + 1 == save_after:
            state = tensors(model, adamw, coefficient)
            save_state(folder, step + 1, state, facts={}, config_toml="", writers=writers)
    return found


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def uninterrupted(request: Any, tmp_path_factory: Any) -> tuple[str, Path, list[float]]:
    """Eight steps on four ranks, tensors over two and data over two, saved after the third."""
    folder = tmp_path_factory.mktemp("states")
    found = run_ranks(4, on_four, request.param, folder)[0]
    return request.param, folder, found


def on_four(optimizer: str, folder: Path) -> list[float]:
    return losses(CASE.plan, optimizer, folder, first=0, save_after=3)


def on_others(layout: TrainPlan, optimizer: str, folder: Path) -> list[float]:
    return losses(layout, optimizer, folder, first=3, save_after=None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_five_steps_after_a_resume_are_those_of_the_run_that_was_not_interrupted(
    uninterrupted, name
):
    optimizer, folder, expected = uninterrupted
    layout = LAYOUTS[name]
    for found in run_ranks(layout.world_size, on_others, layout, optimizer, folder):
        assert len(found) == 5
        assert found == pytest.approx(expected[3:], rel=0, abs=OF_LOSS[optimizer])
