"""Ranks that are killed, stopped, or run out of disk: the job ends as if nothing had happened.

`moesaic train` on a tiny model, with real processes, under torchrun and on its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from moesaic.checkpoint.training_state import newest
from moesaic.config import to_toml
from moesaic.parallel.config import LaunchConfig
from moesaic.planning.plan import TrainPlan
from moesaic.training.config import CheckpointConfig, TrainConfig
from moesaic.training.run_folder import RunFolder
from moesaic.training.train import train
from tests.faults import failure_of
from tests.ranks import run_ranks
from tests.save_faults import VARIABLE, spoil
from tests.test_bad_input import snapshot
from tests.test_training import weights_hash
from tests.test_training_state import flip_a_byte
from tests.tiny import TINY, tiny_folder
from tests.tiny_run import lines, tiny_config, tiny_tokens

ROOT = Path(__file__).parent.parent
STEPS = 12
OF_TIME = {"seconds", "tokens_per_second", "mfu", "peak_memory_bytes"}
"""What no two runs have in common."""

PLANS = {
    "dp2": TrainPlan(dp=2),
    "tp2 x dp2": TrainPlan(dp=2, tp=2),
    "pp2 x tp2": TrainPlan(pp=2, tp=2),
}
LAUNCHERS = ("torchrun", "moesaic")
SLOW = [pytest.mark.slow]


@dataclass
class Recipe:
    """A run that saves every second step beside the training, and what it is made of."""

    folder: Path
    plan: str
    size: int
    """Ranks."""
    whole: Path
    """The same run, undisturbed."""

    def config(self, run: Path, **changes: Any) -> TrainConfig:
        config = tiny_config(
            self.folder / "moe",
            self.folder / "tokens",
            run,
            steps=STEPS,
            plan=self.folder / f"{self.plan}.json",
            checkpoint=CheckpointConfig(every=2, keep=2, in_background=True),
        )
        return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny_folder(folder / "moe", TINY["skywork moe"])
    tiny_tokens(folder / "tokens")
    for name, plan in PLANS.items():
        plan.save(folder / f"{name}.json")
    return folder


@pytest.fixture(scope="module")
def recipe_of(folder) -> Callable[[str], Recipe]:
    @functools.cache
    def make(plan: str) -> Recipe:
        recipe = Recipe(folder, plan, PLANS[plan].world_size, folder / f"whole {plan}")
        run_ranks(recipe.size, train, recipe.config(recipe.whole))
        return recipe

    return make


class Job:
    """`moesaic train` as a user types it, and what came of it."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        run: Path,
        *,
        launcher: str,
        restarts: int = 0,
        spoiled: dict[str, Any] | None = None,
        torchrun: tuple[str, ...] = (),
        **changes: Any,
    ) -> None:
        self.size = recipe.size
        self._folder = folder
        path = folder / "recipe.toml"
        path.write_text(to_toml(recipe.config(run, **changes)))
        words = ["moesaic", "train", str(path), "--launch.max-restarts", str(restarts)]
        if launcher == "torchrun":
            options = ["--nproc-per-node", str(recipe.size), "--max-restarts", str(restarts)]
            options += torchrun or ["--master-port", str(free_port())]
            words = ["torch.distributed.run", *options, "-m", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if spoiled is not None:
            environment["PYTHONPATH"] = f"{ROOT / 'tests' / 'spoiled'}{os.pathsep}{ROOT}"
            environment[VARIABLE] = json.dumps(spoiled)
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            self.process = psutil.Popen(
                [sys.executable, "-m", *words], env=environment, stdout=out, stderr=err
            )

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text()

    @property
    def said(self) -> list[str]:
        """What Moesaic said on stderr."""
        found = [line for line in self.err.splitlines() if line.startswith("moesaic: ")]
        return [line.removeprefix("moesaic: ") for line in found]

    def end(self, seconds: float = 120.0) -> int:
        """Exit status."""
        status: int = self.process.wait(timeout=seconds)
        return status

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that live."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for process in self.process.children():
                with contextlib.suppress(psutil.Error):
                    if process.status() != psutil.STATUS_ZOMBIE and "RANK" in process.environ():
                        found[int(process.environ()["RANK"])] = process
        return found

    def wait_for(self, holds: Callable[[], object], seconds: float = 90.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, f"it has ended: {self.err}"
            assert time.monotonic() < end, f"waited in vain: {self.err}"
            time.sleep(0.005)

    def clean_up(self) -> None:
        """Leave no process behind, whatever became of the test."""
        if self.process.is_running():
            left = [*self.ranks().values(), self.process]
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=30)


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Job]]:
    """Starts jobs; none outlives the test."""
    jobs: list[Job] = []

    def start_job(*args: Any, **named: Any) -> Job:
        jobs.append(Job(tmp_path, *args, **named))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.clean_up()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def num_lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def told(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, without what depends on the time."""
    found = lines(run / "metrics.jsonl")
    return [{key: line[key] for key in line if key not in OF_TIME} for line in found]


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def assert_same(run: Path, whole: Path) -> None:
    assert summary_of(run)["step"] == STEPS
    assert told(run) == told(whole)
    assert [line["step"] for line in told(run)] == list(range(1, STEPS + 1))
    assert weights_hash(run / "model") == weights_hash(whole / "model")
    for name in ("routing.jsonl", "similarity.jsonl"):
        assert (run / "routing" / name).read_bytes() == (whole / "routing" / name).read_bytes()
    assert not left_over(run)


def left_over(run: Path) -> list[Path]:
    """What is half written."""
    return [path for path in run.rglob(".*") if path.name not in (".lock", ".metadata")]


# Killed


@dataclass(frozen=True)
class Moment:
    """When a rank is killed."""

    lines: float
    """Lines of metrics.jsonl that must be there first; below 0 while the ranks start."""
    seconds: float
    """How long after that."""
    rank: int


def random_moments(count: int, *, size: int, seed: int) -> list[Moment]:
    """Over the whole life of a run: its starts, its steps, and its end."""
    moment = random.Random(seed)
    places = sorted(moment.uniform(-2, STEPS) for _ in range(count))
    return [
        Moment(lines, moment.uniform(0, 4 if lines < 0 else 0.3), moment.randrange(size))
        for lines in places
    ]


def kill_at(job: Job, run: Path, moments: list[Moment]) -> list[str]:
    """Kill a rank at each of the moments; how the run stood then, in words."""
    found = []
    before: set[int] = set()
    for moment in moments:
        ranks = new_ranks(job, before)
        if moment.lines >= 0:
            begin = ranks[0].create_time()
            wait_for_lines(job, run, moment.lines, since=begin)
        time.sleep(moment.seconds)
        is_saving = any((run / "checkpoints").glob(".step-*.partial"))
        found.append(f"{num_lines(run)} lines" + (", saving" if is_saving else ""))
        ranks[moment.rank].kill()
        before |= {process.pid for process in ranks.values()}
    return found


def new_ranks(job: Job, before: set[int]) -> dict[int, psutil.Process]:
    """All ranks, once they are started and none of them is one of those before."""

    def found() -> dict[int, psutil.Process]:
        return {rank: process for rank, process in job.ranks().items() if process.pid not in before}

    job.wait_for(lambda: len(found()) == job.size)
    return found()


def wait_for_lines(job: Job, run: Path, count: float, *, since: float = 0.0) -> None:
    """Wait for more lines than `count`, some of them told since then: a start cuts some off."""

    def is_told() -> bool:
        metrics = run / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_mtime > since and num_lines(run) > count

    job.wait_for(is_told)


@pytest.mark.slow
def test_ten_kills_at_random_moments_under_torchrun(recipe_of, start, tmp_path):
    recipe, run = recipe_of("tp2 x dp2"), tmp_path / "run"
    job = start(recipe, run, launcher="torchrun", restarts=10)
    print(kill_at(job, run, random_moments(10, size=4, seed=1)))
    assert job.end(seconds=300) == 0
    assert_same(run, recipe.whole)
    assert all(re.match(GONE, line) for line in job.said), job.said


GONE = r"Rank \d( \(stage \d\))? is gone; (its last step was \d+|it had finished no step)"
"""How the ranks that are left name the one that is lost."""

KILLS = {
    "stages under torchrun": ("pp2 x tp2", "torchrun", ("--standalone",), 3),
    "stages": ("pp2 x tp2", "moesaic", (), 9),
    "tensors and data": ("tp2 x dp2", "moesaic", (), 2),
}
"""Under which seed: the first kills early, another while the ranks start, another at the end."""


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "launcher", "torchrun", "seed"), KILLS.values(), ids=KILLS.keys())
def test_three_kills_at_random_moments(recipe_of, start, tmp_path, plan, launcher, torchrun, seed):
    recipe, run = recipe_of(plan), tmp_path / "run"
    job = start(recipe, run, launcher=launcher, restarts=3, torchrun=torchrun)
    print(kill_at(job, run, random_moments(3, size=4, seed=seed)))
    assert job.end(seconds=200) == 0
    assert_same(run, recipe.whole)


IN_A_SAVE = {
    "data": ("dp2", 1, "moesaic"),
    "who renames it": ("tp2 x dp2", 0, "torchrun"),
    "a later stage": ("pp2 x tp2", 3, "torchrun"),
}


@pytest.mark.parametrize(
    ("plan", "rank", "launcher"),
    [
        pytest.param(*values, id=name, marks=[pytest.mark.slow] if values[0] != "dp2" else [])
        for name, values in IN_A_SAVE.items()
    ],
)
def test_a_kill_inside_a_save_beside_the_training(recipe_of, start, tmp_path, plan, rank, launcher):
    recipe, run = recipe_of(plan), tmp_path / "run"
    slowed = {"step": 6, "seconds": 60.0}
    job = start(recipe, run, launcher=launcher, restarts=1, spoiled=slowed)
    ranks = new_ranks(job, set())
    saving = run / "checkpoints" / ".step-00000006.partial"
    # The training has gone on meanwhile.
    job.wait_for(lambda: num_lines(run) > 6 and len(list(saving.glob("*.distcp"))) == job.size)
    ranks[rank].kill()
    assert job.end() == 0
    assert summary_of(run)["resumed_from"] == 4
    assert_same(run, recipe.whole)
    assert len(job.said) == 1
    assert re.match(GONE if launcher == "torchrun" else rf"Rank {rank} was ended", job.said[0])


# Stopped


STOPPED = {
    "data": ("dp2", 0, "moesaic"),
    "tensors and data under torchrun": ("tp2 x dp2", 0, "torchrun"),
    "stages": ("pp2 x tp2", 3, "moesaic"),
    "stages under torchrun": ("pp2 x tp2", 3, "torchrun"),
}
HANG_SECONDS = 5.0
BUSY_SECONDS = 6.0
"""For the beats in which a silent rank is noticed and said, and for a busy machine."""
TORCHRUN_SECONDS = 30.0
"""So long torchrun waits for a stopped process to react to SIGTERM."""


def stop(job: Job, run: Path, rank: int) -> float:
    """Stop a rank between its steps; the time of it."""
    ranks = new_ranks(job, set())
    wait_for_lines(job, run, 4)
    ranks[rank].suspend()
    return time.monotonic()


def assert_named(job: Job, plan: str, rank: int) -> None:
    stage = f" \\(stage {rank // 2}\\)" if plan.startswith("pp2") else ""
    last = r"(its last step was \d+|it had finished no step)( \(writing a checkpoint\))?"
    assert re.fullmatch(
        rf"Rank {rank}{stage} has not answered for \d+ s; {last}\. Stopping\.", job.said[0]
    ), job.said


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "rank", "launcher"), STOPPED.values(), ids=STOPPED.keys())
def test_a_stopped_rank_is_named_and_the_run_goes_on(
    recipe_of, start, tmp_path, plan, rank, launcher
):
    recipe, run = recipe_of(plan), tmp_path / "run"
    hang = {"launch": LaunchConfig(hang_seconds=HANG_SECONDS)}
    job = start(recipe, run, launcher=launcher, restarts=1, **hang)
    begin = stop(job, run, rank)
    job.wait_for(lambda: job.said)
    assert time.monotonic() - begin < HANG_SECONDS + BUSY_SECONDS
    assert job.end(seconds=120) == 0
    assert_named(job, plan, rank)
    assert_same(run, recipe.whole)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_stopped_rank_ends_the_job_within_the_stated_time(recipe_of, start, tmp_path, launcher):
    recipe, run = recipe_of("tp2 x dp2"), tmp_path / "run"
    hang = {"launch": LaunchConfig(hang_seconds=HANG_SECONDS)}
    # While it saves, which other ranks wait for in a thread of their own.
    slowed = {"step": 4, "seconds": 60.0}
    job = start(recipe, run, launcher=launcher, spoiled=slowed, **hang)
    begin = stop(job, run, 2)
    status = job.end()
    seconds = time.monotonic() - begin
    assert seconds < HANG_SECONDS + BUSY_SECONDS + TORCHRUN_SECONDS * (launcher == "torchrun")
    assert status == (1 if launcher == "torchrun" else 3)
    assert_named(job, "tp2 x dp2", 2)
    assert not job.ranks()
    run_ranks(recipe.size, train, recipe.config(run))
    assert summary_of(run)["resumed_from"] == 2
    assert_same(run, recipe.whole)


# Damaged


def unfinished(recipe: Recipe, run: Path) -> Path:
    """A run whose last checkpoint is there, and its model is not."""
    shutil.copytree(recipe.whole, run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    return run


def train_and_listen(config: TrainConfig) -> str:
    """What a rank says on stderr while it trains."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        train(config)
    return err.getvalue()


@pytest.mark.parametrize("rank", range(2))
def test_a_flipped_byte_is_named_and_the_state_before_is_used(recipe_of, tmp_path, rank):
    recipe = recipe_of("dp2")
    run = unfinished(recipe, tmp_path / "run")
    damaged = run / "checkpoints" / f"step-{STEPS:08d}" / f"__{rank}_0.distcp"
    flip_a_byte(damaged)
    said, *others = run_ranks(2, train_and_listen, recipe.config(run))
    assert (
        f"{damaged.parent} is damaged ({damaged.name} does not match its checksum); "
        f"trying the one before.\n"
    ) in said
    assert others == [""]
    assert summary_of(run)["resumed_from"] == STEPS - 2
    assert_same(run, recipe.whole)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_names_a_flipped_byte_once(recipe_of, start, tmp_path, launcher):
    recipe = recipe_of("pp2 x tp2")
    run = unfinished(recipe, tmp_path / "run")
    damaged = run / "checkpoints" / f"step-{STEPS:08d}" / "__3_0.distcp"
    flip_a_byte(damaged)
    job = start(recipe, run, launcher=launcher)
    assert job.end() == 0
    assert job.err.count("is damaged (__3_0.distcp does not match its checksum)") == 1
    assert_same(run, recipe.whole)


# A full disk


def assert_refused(job: Job, launcher: str, message: str) -> None:
    """It ends with one line and status 2, which torchrun reports with a status of its own."""
    status = job.end()
    assert len(job.said) == 1, job.err
    assert message in job.said[0]
    if launcher == "torchrun":
        assert status == 1
        # SIGTERM: the first that ended had torchrun end the others.
        statuses = re.findall(r"exitcode +: (-?\d+) ", job.err)
        assert "2" in statuses, job.err
        assert set(statuses) <= {"2", str(-signal.SIGTERM)}, job.err
        assert "moesaic/" not in job.err.partition("Traceback")[2]
    else:
        assert status == 2
        assert "Traceback" not in job.err


FULL = {
    "of the first rank": (0, "moesaic", False),
    "of another, beside the training": (1, "moesaic", True),
    "under torchrun": (1, "torchrun", True),
}


@pytest.mark.parametrize(
    ("rank", "launcher", "in_background"),
    [
        pytest.param(*values, id=name, marks=[] if values[1:] == ("moesaic", True) else SLOW)
        for name, values in FULL.items()
    ],
)
def test_a_full_disk_ends_the_job_with_one_line(
    recipe_of, start, tmp_path, rank, launcher, in_background
):
    recipe, run = recipe_of("dp2"), tmp_path / "run"
    full = {"step": 4, "rank": rank, "number": 5}
    checkpoint = CheckpointConfig(every=2, keep=2, in_background=in_background)
    job = start(recipe, run, launcher=launcher, restarts=1, spoiled=full, checkpoint=checkpoint)
    assert_refused(job, launcher, "step-00000004 was not written: No space left on device.")
    assert not left_over(run)
    run_ranks(2, train, recipe.config(run))
    assert summary_of(run)["resumed_from"] == 2
    assert_same(run, recipe.whole)


def fail_once(config: TrainConfig, rank: int, number: int) -> tuple[bool, str, int]:
    """Train with a disk that is full at one change of one rank's second save, then go on.

    Returns whether there was such a change on this rank, what all said of it, and the step of the
    checkpoint that was left.
    """
    spoiled = spoil(step=4, rank=rank, number=number)
    error = failure_of(lambda: train(config))
    assert not left_over(config.run)
    left = newest(config.run / "checkpoints")
    assert left is not None
    if error is not None:
        train(config)
    return spoiled.has_struck, str(error), left.step


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(2))
def test_a_disk_that_is_full_at_any_write_of_a_save(recipe_of, tmp_path, rank):
    recipe = recipe_of("dp2")
    checkpoint = CheckpointConfig(every=2, keep=2)
    left = []
    for number in itertools.count(1):
        run = tmp_path / str(number)
        found = run_ranks(2, fail_once, recipe.config(run, checkpoint=checkpoint), rank, number)
        assert_same(run, recipe.whole)
        if not found[rank][0]:
            break
        (said,) = {said for _, said, _ in found}
        assert "step-00000004 was not written: No space left on device" in said
        left.append(found[0][2])
        assert summary_of(run)["resumed_from"] == left[-1]
    # After the last write of the first rank, the flush that follows the rename, the new one stands.
    assert left == [2] * (len(left) - 1) + [2 if rank else 4]
    assert len(left) > 10


# Refused


@dataclass(frozen=True)
class Refused:
    """One mistake in a run of two data-parallel ranks."""

    message: str
    """Part of the line it must give."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the config."""
    plan: str | None = None
    """Another plan, as its file has it."""
    size: int = 2
    """Ranks that torchrun starts."""


def plan_text(**values: Any) -> str:
    return json.dumps({"format": "moesaic-train-plan", "version": 1, **values})


REFUSED = {
    "no such model": Refused("nowhere does not exist", {"model": Path("nowhere")}),
    "a freeze that fits nothing": Refused("no.such.*", {"freeze": ("no.such.*",)}),
    "a plan that does not fit": Refused(
        "splits.kv_heads", plan=plan_text(tp=2, splits={"kv_heads": [[0, 3], [3, 5]]})
    ),
    "micro-batches that cannot be shared": Refused(
        "2 micro-batches, which 4 data-parallel", plan=plan_text(dp=4), size=4
    ),
    "a plan that is no JSON": Refused("plan.json is not readable", plan="{", size=2),
}
OF_TORCHRUN = {
    "too many ranks": Refused("The plan is for 2 ranks, but 3 were started", size=3),
    "too few ranks": Refused("The plan is for 2 ranks, but this process is alone", size=1),
}
CASES = [
    pytest.param(refused, launcher, id=f"{name}, {launcher}", marks=marks)
    for launcher, found in {"moesaic": REFUSED, "torchrun": REFUSED | OF_TORCHRUN}.items()
    for name, refused in found.items()
    for marks in [[] if (name, launcher) == ("a freeze that fits nothing", "moesaic") else SLOW]
]


@pytest.mark.parametrize(("refused", "launcher"), CASES)
def test_a_mistake_is_said_once_and_leaves_nothing(recipe_of, start, tmp_path, refused, launcher):
    recipe = dataclasses.replace(recipe_of("dp2"), size=refused.size)
    changes = dict(refused.changes)
    if refused.plan is not None:
        changes["plan"] = tmp_path / "plan.json"
        changes["plan"].write_text(refused.plan)
    # Of one rank alone torchrun cannot know that starting again is in vain.
    restarts = 0 if refused.size == 1 else 1
    job = start(recipe, tmp_path / "run", launcher=launcher, restarts=restarts, **changes)
    assert_refused(job, launcher, refused.message)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_folder_that_is_taken_is_left_alone(recipe_of, start, tmp_path, launcher):
    recipe, run = recipe_of("dp2"), tmp_path / "run"
    unfinished(recipe, run)
    before = snapshot(run)
    with RunFolder(run, resume="auto"):
        job = start(recipe, run, launcher=launcher, restarts=1)
        assert_refused(job, launcher, f"Another process is training in {run}")
    assert snapshot(run) == before
