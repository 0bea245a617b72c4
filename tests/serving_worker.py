"""Ranks that answer greedily for ever, for the tests of what happens when one of them dies.

    python -m tests.serving_worker '{"model": "...", "folder": ".", "size": 2, "dies": 1, "at": 9}'

Rank 0 writes every token it chose, one a line. Rank `dies` kills itself before step `at`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from moesaic.cli.app import fail
from moesaic.errors import MoesaicError
from moesaic.parallel.config import LaunchConfig
from moesaic.parallel.group import Group
from moesaic.parallel.join import Needs, joined
from moesaic.planning.serving.plan import ServePlan
from moesaic.serving.execution.batch import Batch, Chunk
from moesaic.serving.execution.runner import ModelExecutor, load_executor


def main() -> int:
    """As the command line treats a job."""
    try:
        return work(json.loads(sys.argv[1]))
    except MoesaicError as error:
        return fail(str(error), error.exit_status)


def work(asked: dict) -> int:
    """Answer until something ends it."""
    folder, size = Path(asked["folder"]), asked["size"]
    plan = ServePlan(ranks=size, weights="float32", kv_cache="float32", kv_blocks=8, block_tokens=4)
    with joined(lambda: Needs(size), config=LaunchConfig(max_restarts=0)) as watch:
        executor = load_executor(
            Path(asked["model"]), plan, dtype="float32", group=Group.of_all(), watch=watch
        )
        compute, steps = executor._compute, 0

        def compute_or_die(batch: Batch):
            nonlocal steps
            steps += 1
            if watch.rank == asked["dies"] and steps == asked["at"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return compute(batch)

        executor._compute = compute_or_die
        if watch.rank > 0:
            executor.follow()
            return 0
        answer(executor, folder / "tokens")
    return 0


def answer(executor: ModelExecutor, path: Path) -> None:
    """One token a step, again from the start every 20 of them."""
    token = 5
    with path.open("w") as file:
        for step in range(400):
            token = token if step % 20 else 5
            chunk = Chunk((token,), step % 20, (0, 1, 2, 3, 4))
            token = int(executor.step(Batch((chunk,))).logits_NV.argmax())
            file.write(f"{token}\n")
            file.flush()
    executor.close()


if __name__ == "__main__":
    sys.exit(main())
