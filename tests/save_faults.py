"""Spoil the writing of one state of a run: slow it down, or fill the disk under it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "MOESAIC_TEST_SAVE_FAULT"
"""Environment variable with the arguments of `spoil`, for the ranks of a job."""


class Spoiled:
    """What came of it on this rank."""

    has_struck = False
    """Whether a change to the disk failed."""


def spoil(
    *, step: int, rank: int | None = None, number: int = sys.maxsize, seconds: float = 0.0
) -> Spoiled:
    """Spoil the state after `step` steps, the first time that it is written from here on.

    Args:
        step: Optimizer steps done.
        rank: The rank that it happens to; None for all.
        number: The change to the disk within that save that meets a full one, from 1.
        seconds: How long a rank takes to write its tensors, at least.
    """
    from moesaic.checkpoint import state_writer
    from moesaic.checkpoint.blocks import Share
    from tests.faults import fault

    spoiled, write_share, write = Spoiled(), state_writer.write_share, Share.write
    if rank is not None and os.environ["RANK"] != str(rank):
        return spoiled

    def spoiled_write_share(checkpoints: Path, of_step: int, *rest: Any, **named: Any) -> Path:
        if of_step != step:
            return write_share(checkpoints, of_step, *rest, **named)
        state_writer.write_share = write_share
        Share.write = slow_write  # type: ignore[method-assign]
        with fault(number) as faults:
            try:
                return write_share(checkpoints, of_step, *rest, **named)
            finally:
                spoiled.has_struck = faults.has_struck
                Share.write = write  # type: ignore[method-assign]

    def slow_write(share: Share, folder: Path) -> Any:
        results = write(share, folder)
        time.sleep(seconds)
        return results

    state_writer.write_share = spoiled_write_share
    return spoiled


def spoil_as_told() -> None:
    """Do what the environment of a rank says, if it says anything, at the job's first start."""
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if VARIABLE in os.environ and "RANK" in os.environ and is_first:
        spoil(**json.loads(os.environ[VARIABLE]))
