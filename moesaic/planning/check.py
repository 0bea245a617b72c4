"""Answer `moesaic plan check`: predictions beside published runs."""

from __future__ import annotations

from typing import Any

from moesaic.planning.config import PlanCheckConfig
from moesaic.planning.published_memory import compare_memory
from moesaic.planning.published_time import compare_time


def plan_check(config: PlanCheckConfig) -> dict[str, Any]:
    """Predict step time and memory of every run in a file that says enough.

    Raises:
        PlanError: The file cannot be read.
    """
    return {
        "runs": str(config.runs),
        "time": compare_time(config.runs).table(),
        "memory": compare_memory(config.runs).table(),
    }
