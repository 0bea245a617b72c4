"""A job of a few steps that sums over its ranks, for the tests of starting and watching ranks.

    python -m tests.launch_worker '{"folder": "...", "size": 2, "faults": {"1": "raise"}}'

A rank with a fault has it in the step `at` of the first attempt only, unless `always`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from moesaic.cli.app import fail
from moesaic.errors import ConfigError, MoesaicError
from moesaic.parallel.config import LaunchConfig
from moesaic.parallel.join import Needs, joined


def main() -> int:
    """As the command line treats a job."""
    try:
        return work(json.loads(sys.argv[1]))
    except MoesaicError as error:
        return fail(str(error), error.exit_status)
    except Exception:
        traceback.print_exc()
        return fail("this is a fault of Moesaic.", 1)


def work(asked: dict) -> int:
    """Take the steps; the first rank prints their sum."""
    folder = Path(asked["folder"])
    stops: list[int] = []
    config = LaunchConfig(**asked.get("config", {}))
    with joined(lambda: Needs(asked["size"]), config=config) as watch:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: stops.append(number))
        watch.keep_log(folder / "logs")
        watch.describe(f"stage {watch.rank}")
        print(f"hello from {watch.rank}", file=sys.stderr)
        attempt = len(list(folder.glob(f"process-{watch.rank}-*")))
        (folder / f"process-{watch.rank}-{attempt}").write_text(str(os.getpid()))
        total = 0.0
        for step in range(1, asked.get("steps", 4) + 1):
            if step == asked.get("at", 3) and (attempt == 0 or asked.get("always")):
                fault(asked.get("faults", {}).get(str(watch.rank)))
            sums = torch.tensor([watch.rank + step, float(bool(stops))])
            dist.all_reduce(sums)
            total += sums[0].item()
            watch.progress(step)
            (folder / f"step-{watch.rank}").write_text(str(step))
            if sums[1] > 0:
                (folder / f"good-order-{watch.rank}").touch()
                return 130
            time.sleep(asked.get("pause", 0.0))
    print(f"rank {watch.rank}: {total:g}")
    return 0


def fault(kind: str | None) -> None:
    """Meet it."""
    if kind in ("kill", "stop"):
        time.sleep(3)  # a beat says the last step within a second, and is read within another
    if kind == "refuse":
        raise ConfigError("steps are 3, which is\ntoo many.")
    if kind == "bug":
        raise IndexError("list index out of range")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "sleep":
        time.sleep(1000)


if __name__ == "__main__":
    sys.exit(main())
