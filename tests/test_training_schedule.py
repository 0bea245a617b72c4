from __future__ import annotations

import math

import pytest

from moesaic.errors import ConfigError
from moesaic.training.schedule import ScheduleConfig, learning_rate


def rates(config: ScheduleConfig, *, steps: int, peak: float = 1.0) -> list[float]:
    config.check(peak=peak, steps=steps)
    return [learning_rate(step, config, peak=peak, steps=steps) for step in range(steps)]


GOLDEN = {
    "cosine to a tenth": (
        ScheduleConfig(warmup_steps=2),
        [0.5, 1.0, *(0.1 + 0.45 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3)), 0.1],
    ),
    "cosine to a fixed minimum": (
        ScheduleConfig(minimum_lr=0.5),
        [0.5 + 0.25 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)],
    ),
    "constant": (ScheduleConfig(shape="constant", warmup_steps=1), [1.0, 1.0, 1.0]),
    "linear": (ScheduleConfig(shape="linear", minimum_lr=0.0), [0.75, 0.5, 0.25, 0.0]),
    "warmup, stable, decay": (
        ScheduleConfig(shape="wsd", warmup_steps=4, decay_steps=2, minimum_lr=0.2),
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.6, 0.2],
    ),
    "two phases": (
        ScheduleConfig(shape="linear", final_decay_steps=4),
        [0.7, 0.4, 0.1, 0.08, 0.06, 0.04, 0.02],
    ),
    "constant, then to zero": (
        ScheduleConfig(shape="constant", final_decay_steps=1),
        [1.0, 1.0, 0.5],
    ),
    "warmup and final decay meet": (
        ScheduleConfig(warmup_steps=2, final_decay_steps=1),
        [0.5, 1.0, 0.5],
    ),
}


@pytest.mark.parametrize(("config", "expected"), GOLDEN.values(), ids=GOLDEN.keys())
def test_schedule_has_the_golden_values(config, expected):
    assert rates(config, steps=len(expected)) == pytest.approx(expected, rel=1e-12)


def test_schedule_scales_with_the_peak():
    config = ScheduleConfig(warmup_steps=3, final_decay_steps=2)
    small, large = (rates(config, steps=20, peak=peak) for peak in (6e-5, 6e-4))
    assert [10 * rate for rate in small] == pytest.approx(large)


def test_c1_of_the_report_falls_to_a_tenth_and_then_to_zero():
    # 300 B tokens of linear decay to 10 % of 6e-3, then 10 B to 0, in steps of 1 B.
    config = ScheduleConfig(shape="linear", final_decay_steps=10)
    values = rates(config, steps=310, peak=6e-3)
    assert values[299] == pytest.approx(6e-4)
    assert values[300] == pytest.approx(6e-4 * 10 / 11)
    assert values[309] == pytest.approx(6e-4 / 11)


BAD = {
    "too long": ScheduleConfig(warmup_steps=8, final_decay_steps=3),
    "negative": ScheduleConfig(warmup_steps=-1),
    "minimum above the peak": ScheduleConfig(minimum_lr=2.0),
    "negative minimum": ScheduleConfig(minimum_lr=-1e-5),
    "not a number": ScheduleConfig(minimum_lr=math.nan),
    "wsd without decay": ScheduleConfig(shape="wsd"),
    "decay without wsd": ScheduleConfig(decay_steps=2),
}


@pytest.mark.parametrize("config", BAD.values(), ids=BAD.keys())
def test_schedule_that_cannot_be_followed_is_refused(config):
    with pytest.raises(ConfigError):
        config.check(peak=1.0, steps=10)
