"""Ranks start, join, are watched, die and start again: with real processes, on gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.cli.app import run
from moesaic.config import build
from moesaic.errors import ConfigError, PlanError
from moesaic.parallel.config import LaunchConfig
from moesaic.parallel.join import Needs, joined
from moesaic.parallel.launch import Member, environment_world, start_ranks
from moesaic.parallel.watch import Beat, slowest
from moesaic.planning.plan import TrainPlan
from moesaic.training.config import TrainConfig

ROOT = Path(__file__).parent.parent

START = """
import json, sys
from moesaic.cli.app import fail
from moesaic.errors import MoesaicError
from moesaic.parallel.config import LaunchConfig
from moesaic.parallel.launch import start_ranks
asked = json.loads(sys.argv[1])
command = [sys.executable, "-m", "tests.launch_worker", sys.argv[1]]
try:
    config = LaunchConfig(**asked.get("config", {}))
    status = start_ranks(command, size=asked["size"], config=config)
except MoesaicError as error:
    status = fail(str(error), error.exit_status)
assert "torch" not in sys.modules
sys.exit(status)
"""


class Job:
    """Ranks of tests/launch_worker.py, and what came of them."""

    def __init__(self, folder: Path, *, torchrun: tuple[str, ...] | None = None, **asked) -> None:
        self.folder = folder
        asked = json.dumps({"folder": str(folder), **asked})
        command = [sys.executable, "-c", START, asked]
        if torchrun is not None:
            # Its own default is one port for all jobs of a machine.
            run_it = ["torch.distributed.run", "--master-port", str(free_port()), *torchrun]
            command = [sys.executable, "-m", *run_it, "-m", "tests.launch_worker", asked]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, seconds: float = 120.0) -> tuple[int, str, list[str]]:
        """Exit status, stdout, and what Moesaic said on stderr, line by line."""
        out, self.stderr = self.process.communicate(timeout=seconds)
        lines = self.stderr.splitlines()
        return self.process.returncode, out, [x for x in lines if x.startswith("moesaic: ")]

    def wait_for(self, name: str) -> Path:
        """A file that a rank writes."""
        path = self.folder / name
        wait_until(lambda: path.exists() and path.read_text())
        return path

    def process_of(self, rank: int, *, attempt: int = 0) -> int:
        return int(self.wait_for(f"process-{rank}-{attempt}").read_text())

    def clean_up(self) -> None:
        """Leave no process behind, whatever became of the test."""
        if self.process.poll() is None:
            self.process.kill()
            for path in self.folder.glob("process-*"):
                if is_alive(int(path.read_text())):
                    os.kill(int(path.read_text()), signal.SIGKILL)
            self.process.communicate()

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank-{rank}.log").read_text()


@pytest.fixture
def start(tmp_path):
    """Starts a job; none outlives the test."""
    jobs = []

    def start_job(**asked) -> Job:
        jobs.append(Job(tmp_path, **asked))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.clean_up()


def wait_until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    """Whether it is still a rank of ours: a zombie has no arguments, and numbers come again."""
    try:
        return b"launch_worker" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def test_ranks_start_finish_and_only_the_first_prints(start):
    job = start(size=3)
    assert job.end() == (0, "rank 0: 42\n", [])
    assert job.stderr == "hello from 0\n"
    for rank in range(3):
        assert f"rank {rank} of 3" in job.log(rank)
        assert f"hello from {rank}\n" in job.log(rank)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_refusal_is_said_once_with_its_status_and_not_tried_again(start, tmp_path, rank):
    job = start(size=2, faults={rank: "refuse"}, always=True)
    assert job.end() == (2, "", ["moesaic: steps are 3, which is too many."])
    assert "Traceback" not in job.stderr
    assert len(list(tmp_path.glob("process-*"))) == 2


@pytest.mark.slow
def test_ranks_that_refuse_together_say_so_once(start):
    job = start(size=2, faults={0: "refuse", 1: "refuse"})
    assert job.end() == (2, "", ["moesaic: steps are 3, which is too many."])


def test_a_killed_rank_is_named_and_all_start_again(start):
    job = start(size=2, faults={1: "kill"})
    status, out, said = job.end()
    assert (status, out) == (0, "rank 0: 24\n")
    assert said == [
        "moesaic: Rank 1 (stage 1) was ended by SIGKILL, as the system does when memory runs out; "
        "its last step was 2. Starting again (1 of 3)."
    ]
    assert "Traceback" not in job.stderr
    assert job.log(1).count("hello from 1\n") == 2


def test_asked_to_stop_ranks_end_in_good_order(start, tmp_path):
    job = start(size=2, steps=10_000, pause=0.02)
    job.wait_for("step-1")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == (130, "", [])
    assert (tmp_path / "good-order-0").exists()
    assert (tmp_path / "good-order-1").exists()


@pytest.mark.slow
def test_ranks_outside_of_their_grace_are_killed(start):
    job = start(size=2, faults={1: "sleep"}, config={"grace_seconds": 1})
    processes = [job.process_of(rank) for rank in range(2)]
    job.wait_for("step-1")
    job.process.send_signal(signal.SIGTERM)
    status, _, said = job.end()
    assert status == 130
    assert said == [
        "moesaic: 2 of 2 ranks had not ended 1 s after SIGTERM (launch.grace_seconds), "
        "and were killed."
    ]
    assert not any(map(is_alive, processes))


@pytest.mark.slow
def test_a_second_signal_kills_at_once(start):
    job = start(size=2, faults={1: "sleep"})
    processes = [job.process_of(rank) for rank in range(2)]
    job.wait_for("step-1")
    job.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    job.process.send_signal(signal.SIGINT)
    assert job.end(seconds=20)[0] == 130
    assert not any(map(is_alive, processes))


@pytest.mark.slow
def test_ranks_that_do_not_come_are_named(tmp_path, monkeypatch):
    world = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    set_world(monkeypatch, {**world, "RANK": "0", "LOCAL_RANK": "0"})
    asked = {"folder": str(tmp_path), "size": 3, "config": {"wait_seconds": 2}}
    command = [sys.executable, "-m", "tests.launch_worker", json.dumps(asked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        3,
        "moesaic: 2 of 3 ranks did not come within 2 s: 1, 2. Look why they did not start.\n",
    )


@pytest.mark.slow
def test_a_fault_of_one_rank_is_said_once_and_not_tried_again(start, tmp_path):
    job = start(size=2, faults={1: "bug"}, always=True)
    status, _, said = job.end()
    assert status == 1
    assert said == [
        "moesaic: Rank 1 (stage 1) failed: IndexError: list index out of range. "
        f"{tmp_path}/logs/rank-1.log has more."
    ]
    assert "Traceback" in job.log(1)
    assert "Traceback" not in job.stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_stopped_rank_is_named_and_all_start_again(start, rank):
    job = start(size=3, faults={rank: "stop"}, config={"hang_seconds": 5})
    stopped = job.process_of(rank)
    status, out, said = job.end()
    assert (status, out) == (0, "rank 0: 42\n")
    assert len(said) == 2
    assert said[0].startswith(f"moesaic: Rank {rank} (stage {rank}) has not answered for ")
    assert said[0].endswith(" s; its last step was 2. Stopping.")
    assert said[1] == "moesaic: A rank was lost (see above). Starting again (1 of 3)."
    assert not is_alive(stopped)


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_within_the_stated_time(start):
    config = {"hang_seconds": 5, "max_restarts": 0}
    job = start(size=2, faults={1: "stop"}, config=config)
    process = job.process_of(1)
    wait_until(lambda: Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] == "T")
    begin = time.monotonic()
    status, _, said = job.end()
    # The last beat, a beat to notice, one to say so, and as much again for a busy machine.
    assert time.monotonic() - begin < 5 + 6
    assert status == 3
    assert said[1:] == [
        "moesaic: A rank was lost (see above). launch.max_restarts is 0; "
        "the same command goes on from the last checkpoint."
    ]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_line_of_code(start):
    config = {"wait_seconds": 5, "max_restarts": 0}
    job = start(size=3, faults={1: "sleep"}, config=config)
    status, _, said = job.end()
    assert status == 3
    assert said[0].startswith(
        "moesaic: No rank has gone on for 5 s, because of rank 1 (stage 1) at "
        "tests/launch_worker.py:"
    )
    assert said[0].endswith(" in fault; its last step was 2. Stopping.")


@pytest.mark.slow
def test_ranks_that_were_all_stopped_for_long_accuse_nobody(start):
    job = start(size=2, steps=100, pause=0.02, config={"hang_seconds": 5})
    processes = [job.process_of(rank) for rank in range(2)]
    job.wait_for("step-1")
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    time.sleep(9)
    for process in processes:
        os.kill(process, signal.SIGCONT)
        time.sleep(0.5)
    status, _, said = job.end()
    assert (status, said) == (0, [])


@pytest.mark.slow
def test_ranks_end_in_good_order_when_who_started_them_is_killed(start, tmp_path):
    job = start(size=2, steps=10_000, pause=0.02)
    processes = [job.process_of(rank) for rank in range(2)]
    job.wait_for("step-1")
    job.process.kill()
    wait_until(lambda: not any(map(is_alive, processes)))
    assert (tmp_path / "good-order-0").exists()
    job.end()


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_is_named_and_all_start_again(start):
    job = start(
        torchrun=("--nproc-per-node", "2", "--max-restarts", "1"),
        size=2,
        faults={1: "kill"},
    )
    status, out, said = job.end()
    assert (status, out) == (0, "rank 0: 24\n")
    assert said == ["moesaic: Rank 1 (stage 1) is gone; its last step was 2. Stopping."]


@pytest.mark.slow
def test_under_torchrun_a_refusal_is_said_once_whatever_the_restarts(start, tmp_path):
    job = start(
        torchrun=("--nproc-per-node", "2", "--max-restarts", "2"),
        size=2,
        faults={1: "refuse"},
        always=True,
    )
    status, _, said = job.end()
    assert (status, said) == (1, ["moesaic: steps are 3, which is too many."])
    assert len(list(tmp_path.glob("process-*"))) == 2


@pytest.mark.slow
def test_two_machines_start_again_though_their_agents_count_restarts_differently(start):
    with_port = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    torchrun = ("--nnodes", "2", "--nproc-per-node", "1", *with_port, "--max-restarts", "2")
    jobs = [start(torchrun=torchrun, size=2, faults={1: "kill"}) for _ in range(2)]
    ends = [job.end(seconds=180) for job in jobs]
    assert [status for status, _, _ in ends] == [0, 0]
    assert sorted(out for _, out, _ in ends) == ["", "rank 0: 24\n"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_another_number_of_ranks_than_the_plan_has_is_refused_once(start):
    job = start(torchrun=("--nproc-per-node", "2"), size=4)
    status, _, said = job.end()
    assert status == 1
    assert said == [
        "moesaic: The plan is for 4 ranks, but 2 were started. Start 4, or take another plan."
    ]


def beat(**values) -> Beat:
    fields = {"number": 0, "label": "", "step": 1, "doing": "", "place": "a.py:1 in f"}
    return Beat(**{**fields, "is_waiting": False, "still": 0.0, **values})


SLOWEST = {
    "all go on": ([beat(), beat(is_waiting=True, still=5)], []),
    "one works, another waits": ([beat(is_waiting=True, still=9), beat()], [1]),
    "one stands, another waits": ([beat(still=9), beat(is_waiting=True, still=9)], [0]),
    "two keep a third waiting": ([beat(), beat(is_waiting=True, still=9), beat()], [0, 2]),
    "on a GPU one stands elsewhere": (
        [beat(still=9), beat(still=9, place="b.py:2 in g"), beat(still=9)],
        [1],
    ),
    "all wait in one place": ([beat(is_waiting=True, still=9)] * 2, [0, 1]),
}


@pytest.mark.parametrize(("beats", "who"), SLOWEST.values(), ids=SLOWEST.keys())
def test_who_keeps_the_others_waiting(beats, who):
    assert slowest(dict(enumerate(beats)), seconds=8) == who


def test_a_rank_alone_joins_nothing(monkeypatch):
    monkeypatch.setattr("torch.distributed.init_process_group", None)
    with joined(lambda: Needs(1)) as watch:
        watch.describe("stage 0")
        watch.progress(1)
    assert (watch.rank, watch.size) == (0, 1)


def test_a_plan_of_several_ranks_is_refused_by_a_process_alone():
    alone = pytest.raises(PlanError, match="for 4 ranks, but this process is alone")
    with alone, joined(lambda: Needs(4)):
        pass


WORLDS = {
    "nothing": ({}, None),
    "a rank": ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Member(3, 8, 1)),
    "a stray word": ({"WORLD_SIZE": "8"}, None),
}


@pytest.mark.parametrize(("given", "member"), WORLDS.values(), ids=WORLDS.keys())
def test_the_environment_says_who_a_process_is(monkeypatch, given, member):
    set_world(monkeypatch, given)
    assert environment_world() == member


@pytest.mark.parametrize(
    "given",
    [{"RANK": "3", "WORLD_SIZE": "8"}, {"RANK": "3", "WORLD_SIZE": "x", "LOCAL_RANK": "0"}],
)
def test_an_environment_that_says_half_is_refused(monkeypatch, given):
    set_world(monkeypatch, given)
    with pytest.raises(ConfigError, match="RANK=3"):
        environment_world()


def set_world(monkeypatch, given: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, text in given.items():
        monkeypatch.setenv(name, text)


@pytest.mark.parametrize(
    "values", [{"max_restarts": -1}, {"hang_seconds": 1}, {"wait_seconds": float("nan")}]
)
def test_a_launch_that_cannot_be_is_refused(values):
    with pytest.raises(ConfigError, match=f"launch.{next(iter(values))} is "):
        LaunchConfig(**values)


def test_ranks_have_a_fair_share_of_the_cores_unless_told_otherwise(tmp_path, monkeypatch):
    script = "import os, sys; print(os.environ['OMP_NUM_THREADS'], file=open(sys.argv[1], 'a'))"
    command = [sys.executable, "-c", script]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert start_ranks([*command, str(tmp_path / "share")], size=2) == 0
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (tmp_path / "share").read_text() == f"{share}\n" * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert start_ranks([*command, str(tmp_path / "told")], size=2) == 0
    assert (tmp_path / "told").read_text() == "3\n3\n"


RECIPE = {"model": "m", "run": "r", "data": {"tokens": "t"}, "steps": 1}


def test_train_starts_the_ranks_of_its_plan(tmp_path, monkeypatch):
    started = []

    def start(command, *, size, config):
        recipe = Path(command[4])
        started.append((command[:4], command[5:], size, config, recipe.read_text()))
        return 3

    monkeypatch.setattr("moesaic.cli.train.start_ranks", start)
    set_world(monkeypatch, {})
    plan = tmp_path / "plan.json"
    TrainPlan(pp=2, dp=2).save(plan)
    flags = ["--model", "m", "--run", "r", "--data.tokens", "t", "--steps", "1"]
    flags += ["--plan", str(plan), "--launch.max-restarts", "7"]
    assert run(["train", *flags, "--json"]) == 3
    ((command, rest, size, config, recipe),) = started
    assert command == [sys.executable, "-m", "moesaic", "train"]
    assert (rest, size, config) == (["--json"], 4, LaunchConfig(max_restarts=7))
    wanted = {**RECIPE, "plan": str(plan), "launch": {"max_restarts": 7}}
    assert build(TrainConfig, tomllib.loads(recipe), where="") == build(
        TrainConfig, wanted, where=""
    )
    assert run(["train", *flags, "--dry-run"]) == 0
    assert len(started) == 1
