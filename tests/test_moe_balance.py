"""Controllers outside autograd, step by step against plain arithmetic."""

from __future__ import annotations

import random

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.moe.balance import AdaptiveCoefficient, update_selection_bias


def test_200_steps_follow_equations_7_to_9():
    rng = random.Random(0)
    ours = AdaptiveCoefficient(3)
    by_hand = [0.01, 0.01, 0.01]
    assert ours.values_L.tolist() == by_hand
    for step in range(200):
        # One layer mostly saturated, one around the knee at 5 %, one nearly balanced.
        drops = [rng.uniform(0.04, 0.5), rng.uniform(0.0, 0.1), rng.uniform(0.0, 0.01)]
        ours.update(drops if step % 2 else torch.tensor(drops, dtype=torch.float64))
        by_hand = [
            0.99 * value + 0.01 * (drop / 5 if drop <= 0.05 else 0.01)
            for value, drop in zip(by_hand, drops, strict=True)
        ]
        assert ours.values_L.tolist() == pytest.approx(by_hand, rel=1e-12)
    assert by_hand[0] > 0.0095
    assert by_hand[2] < 0.004


@pytest.mark.parametrize(("drop", "target"), [(0.0, 0.0), (0.02, 0.004), (0.05, 0.01), (1.0, 0.01)])
def test_a_steady_drop_rate_leads_to_its_target(drop, target):
    coefficient = AdaptiveCoefficient(1)
    for _ in range(3000):
        coefficient.update([drop])
    assert coefficient.values_L.item() == pytest.approx(target, abs=1e-12)


def test_a_value_handed_out_does_not_change_with_the_next_step():
    coefficient = AdaptiveCoefficient(2)
    used = coefficient.values_L[0]
    coefficient.update([0.0, 0.0])
    assert used.item() == 0.01


def test_a_saved_coefficient_goes_on_bit_for_bit():
    first, second = AdaptiveCoefficient(2), AdaptiveCoefficient(2)
    for step in range(5):
        first.update([0.01 * step, 0.003])
    state = first.state_dict()
    second.load_state_dict(state)
    for coefficient in (first, second):
        coefficient.update([0.017, 0.3])
    assert torch.equal(first.values_L, second.values_L)
    assert not torch.equal(state["values"], first.values_L)


def test_coefficients_of_another_model_are_refused():
    with pytest.raises(ConfigError, match="for 2 layers, but the model has 3"):
        AdaptiveCoefficient(3).load_state_dict(AdaptiveCoefficient(2).state_dict())


@pytest.mark.parametrize("form", ["error", "sign"])
def test_selection_bias_moves_against_the_load(form):
    counts, bias_E = [30, 10, 20, 20], torch.tensor([0.1, 0.0, 0.0, -0.1])
    update_selection_bias(bias_E, torch.tensor(counts), rate=0.5, form=form)
    expected = []
    for bias, count in zip([0.1, 0.0, 0.0, -0.1], counts, strict=True):
        error = 1 / 4 - count / 80
        step = error if form == "error" else (error > 0) - (error < 0)
        expected.append(bias + 0.5 * step)
    assert bias_E.tolist() == pytest.approx(expected, abs=1e-7)


def test_selection_bias_without_copies_stays_finite():
    bias_E = torch.zeros(4)
    update_selection_bias(bias_E, torch.zeros(4, dtype=torch.int64), rate=1.0)
    assert bias_E.isfinite().all()
