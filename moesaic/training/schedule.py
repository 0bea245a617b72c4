"""The learning rate of every step, as a plain function of the step. Nothing here loads torch.

    warmup          main part                             final decay
    0 -> peak       peak -> minimum, by `shape`           minimum -> 0, linear

`cosine` and `linear` fall over the whole main part, `wsd` (warmup-stable-decay) over its last
`decay_steps`, `constant` not at all. The two-phase decay of Skywork-MoE C.1, to a tenth of the
peak and then to zero, is `linear` with `final_decay_steps`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves. Steps are optimizer steps."""

    shape: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the main part falls from the peak to the minimum."""

    warmup_steps: int = 0
    """First steps, over which the learning rate rises to its peak in a straight line. Ours."""

    minimum_lr: float | None = None
    """Where the main part ends; None for a tenth of the peak, which Skywork-13B and
    Skywork-MoE C.1 use. Without meaning for `constant`."""

    decay_steps: int = 0
    """`wsd`: last steps of the main part, over which it falls in a straight line."""

    final_decay_steps: int = 0
    """Last steps of the run, over which the learning rate goes on in a straight line towards
    zero (Skywork-MoE C.1), which it would reach one step after the end."""

    def check(self, *, peak: float, steps: int) -> None:
        """Refuse a schedule that a run of this length and peak cannot follow."""
        for name in ("warmup_steps", "decay_steps", "final_decay_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"schedule.{name} is {getattr(self, name)}. It must be at least 0."
                )
        if (self.decay_steps > 0) != (self.shape == "wsd"):
            raise ConfigError(
                f"schedule.decay_steps is {self.decay_steps} and schedule.shape is {self.shape}. "
                f"The shape wsd needs decay_steps above 0, and no other shape reads them."
            )
        parts = self.warmup_steps + self.decay_steps + self.final_decay_steps
        if parts > steps:
            raise ConfigError(
                f"The schedule's warmup, decay and final decay take {parts} steps, but the run "
                f"has {steps}. Lower them, or raise steps."
            )
        if self.minimum_lr is not None and not 0 <= self.minimum_lr <= peak:
            raise ConfigError(
                f"schedule.minimum_lr is {self.minimum_lr:g}. "
                f"It must lie between 0 and the peak, optimizer.lr = {peak:g}."
            )


def learning_rate(step: int, config: ScheduleConfig, *, peak: float, steps: int) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: Optimizer steps done before this one, from 0.
        config: The schedule.
        peak: Highest learning rate.
        steps: Optimizer steps of the whole run.

    Returns:
        The learning rate. The last warmup step has exactly the peak, the last step of the
        main part exactly the minimum.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    main_end = steps - config.final_decay_steps
    if step < main_end:
        return _main(step, config, peak=peak, end=main_end)
    floor = _main(main_end - 1, config, peak=peak, end=main_end)
    return floor * (steps - step) / (config.final_decay_steps + 1)


def _main(step: int, config: ScheduleConfig, *, peak: float, end: int) -> float:
    if config.shape == "constant":
        return peak
    start = end - config.decay_steps if config.shape == "wsd" else config.warmup_steps
    if step < start or end == start:
        return peak
    progress = (step + 1 - start) / (end - start)
    fall = 0.5 * (1 - math.cos(math.pi * progress)) if config.shape == "cosine" else progress
    minimum = 0.1 * peak if config.minimum_lr is None else config.minimum_lr
    return peak + (minimum - peak) * fall
