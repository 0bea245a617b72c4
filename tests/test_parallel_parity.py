"""Training over any number of ranks computes what one rank computes."""

from __future__ import annotations

from unittest import mock

import pytest

from moesaic.parallel.mailbox import Mailbox
from tests.layouts import CASES, Case, check_gradients, check_steps
from tests.ranks import run_ranks

EVERY_THIRD = list(CASES)[::3]


def slow_unless(is_quick: bool) -> list[pytest.MarkDecorator]:
    return [] if is_quick else [pytest.mark.slow]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow_unless(name in EVERY_THIRD)) for name in CASES]
)
def test_a_step_has_the_loss_and_every_gradient_of_one_rank(name):
    case = CASES[name]
    differences = run_ranks(case.plan.world_size, check_gradients, case)[0]
    worst = max(differences, key=lambda key: differences[key])
    assert differences[worst] < 1e-9, f"{worst}: {differences[worst]:.2g}"


def check_over_network(case: Case) -> dict[str, float]:
    """As ranks of different machines exchange."""
    with mock.patch.object(Mailbox, "open", return_value=None):
        return check_gradients(case)


@pytest.mark.parametrize(
    "name", ["tp2 edp", "tp2 skywork dropping", "dp4 in two copies", "dp4 tp2 ep4"]
)
def test_ranks_of_different_machines_compute_the_same(name):
    case = CASES[name]
    differences = run_ranks(case.plan.world_size, check_over_network, case)[0]
    assert max(differences.values()) < 1e-9


STEPS = ("tp2 skywork dropping", "dp2 tp2 edp zero3", "pp2 tied", "dp2 tp2 ep4", "pp2 dp2 tp2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow_unless(name in STEPS[:3])) for name in STEPS]
)
@pytest.mark.parametrize(("optimizer", "of_loss"), [("sgd", 1e-6), ("adamw", 1e-5)])
def test_three_float32_steps_end_where_one_rank_ends(name, optimizer, of_loss):
    case = CASES[name]
    differences = run_ranks(case.plan.world_size, check_steps, case, optimizer)[0]
    assert differences["loss"] < of_loss
    # AdamW divides gradients that are zero but for rounding by their own size.
    assert optimizer == "adamw" or differences["weight"] < 1e-6
