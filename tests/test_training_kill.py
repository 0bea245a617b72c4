"""kill -9 of a real process, at any moment: the resumed run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesaic.checkpoint.training_state import newest
from moesaic.config import to_toml
from moesaic.training.config import CheckpointConfig
from tests.test_training import losses, weights_hash
from tests.tiny import TINY, tiny_folder
from tests.tiny_run import lines, tiny_config, tiny_tokens

STEPS = 12
TRAIN = """
import sys
from moesaic.config import build, load_toml
from moesaic.training.config import TrainConfig
from moesaic.training.train import train
train(build(TrainConfig, load_toml(sys.argv[1]), where=sys.argv[1]))
"""


class Run:
    """A short run of a tiny MoE that checkpoints every second step, in a process of its own."""

    def __init__(self, root: Path, folders: Path) -> None:
        self.run = root / "run"
        self.recipe = root / "recipe.toml"
        root.mkdir()
        config = tiny_config(
            folders / "moe",
            folders / "tokens",
            self.run,
            steps=STEPS,
            compute_dtype="bfloat16",
            checkpoint=CheckpointConfig(every=2, keep=2),
        )
        self.recipe.write_text(to_toml(config))

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOESAIC_QUIET": "1"}
        return subprocess.Popen([sys.executable, "-c", TRAIN, self.recipe], env=environment)

    def finish(self) -> None:
        assert self.start().wait(timeout=300) == 0

    def num_lines(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def is_saving(self) -> bool:
        return any((self.run / "checkpoints").glob(".step-*.partial/*"))

    def kill(self, *, moment: random.Random, in_checkpoint: bool) -> bool:
        """Start, kill at a random moment; returns whether a checkpoint was being written."""
        process = self.start()
        lines_before = moment.randrange(STEPS)
        while process.poll() is None and self.num_lines() <= lines_before:
            time.sleep(0.001)
        if in_checkpoint:
            while process.poll() is None and not self.is_saving():
                pass
        else:
            time.sleep(moment.uniform(0, 0.1))
        process.kill()
        assert process.wait(timeout=60) in (-signal.SIGKILL, 0)
        return self.is_saving()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    tiny_folder(root / "moe", TINY["skywork moe"])
    tiny_tokens(root / "tokens")
    return root


@pytest.fixture(scope="module")
def whole(folders):
    """The same run, never stopped."""
    run = Run(folders / "whole", folders)
    run.finish()
    return run.run


def assert_same(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole)
    assert weights_hash(run / "model") == weights_hash(whole / "model")
    assert (run / "routing" / "routing.jsonl").read_bytes() == (
        whole / "routing" / "routing.jsonl"
    ).read_bytes()
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert not list((run / "checkpoints").glob(".*"))


def test_a_run_killed_three_times_ends_as_one_that_never_was(tmp_path, folders, whole):
    run = Run(tmp_path / "run", folders)
    moment = random.Random(0)
    for number in range(3):
        run.kill(moment=moment, in_checkpoint=number == 1)
        newest(run.run / "checkpoints")  # raises if a state is there that is not whole
    run.finish()
    assert_same(run.run, whole)


@pytest.mark.slow
def test_twenty_kills_all_end_as_the_run_that_never_was(tmp_path, folders, whole):
    moment = random.Random(1)
    in_checkpoint = 0
    for number in range(20):
        run = Run(tmp_path / str(number), folders)
        in_checkpoint += run.kill(moment=moment, in_checkpoint=number % 3 == 0)
        run.finish()
        assert_same(run.run, whole)
    assert in_checkpoint >= 3, f"only {in_checkpoint} of 20 kills came inside a checkpoint"
