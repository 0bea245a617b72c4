"""What it costs to train the demo's MoE on two ranks instead of one, on the same cores.

    one     1 rank of 2 threads
    edp     2 ranks of 1 thread: heads 6 + 3, and 4 + 4 experts over the same ranks
    ep      2 ranks of 1 thread: each its own micro-batches, 4 + 4 experts
    dp      2 ranks of 1 thread: each its own micro-batches, weights shared by FSDP (ZeRO-3)
    pp      2 ranks of 1 thread: 15 layers each, 1F1B

Each takes the same steps of the same recipe through `moesaic train`'s own function, in processes of
its own, one layout after the other, round by round. The first step of a run is not counted. A
thread of each rank looks every few milliseconds at what the training does: that is where the time
goes. Losses are printed beside each other, because they must agree.

    make demo
    python benchmarks/ranks.py [--demo demo] [--rounds 2] [--steps 3] [--layouts one edp ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from measuring_machine import machine, save

RESULT = "ranks"
THREADS = 2
LIMIT = 0.8

PLANS: dict[str, dict[str, object]] = {
    "one": {},
    "edp": {"tp": 2, "splits": {"kv_heads": [[0, 2], [2, 3]]}},
    "ep": {"dp": 2, "experts_over": "ep"},
    "dp": {"dp": 2, "zero": 3},
    "pp": {"pp": 2},
}

KINDS = {
    "fsdp": "FSDP",
    "exchange.py": "tokens to experts and back",
    "pipelining": "between stages",
    "schedule.py": "between stages",
    "collectives.py": "between positions and heads",
}
"""What a collective is for, by a word in the path of a function that leads to it."""

EXCHANGES = ("torch/distributed/distributed_c10d", "parallel/mailbox")
"""Where ranks exchange something, or wait for each other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what `make demo` left")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of 4 x 512")
    parser.add_argument("--layouts", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train_and_watch(arguments.child)
        return
    scratch = Path(tempfile.mkdtemp(prefix="ranks-"))
    try:
        result = measure(scratch, arguments)
    finally:
        shutil.rmtree(scratch)
    report(result)
    save(RESULT, result)


def measure(scratch: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Every layout, round by round."""
    runs: dict[str, list[dict[str, object]]] = {name: [] for name in arguments.layouts}
    for number in range(arguments.rounds):
        order = list(runs) if number % 2 == 0 else list(reversed(runs))
        for name in order:
            runs[name].append(run(scratch, name, arguments))
            print(name, json.dumps(runs[name][-1]), flush=True)
    speeds = {
        name: statistics.median(speed for one in found for speed in one["tokens_per_second"])
        for name, found in runs.items()
    }
    return {
        "machine": machine(),
        "threads": THREADS,
        "tokens_a_step": arguments.accumulation * 4 * 512,
        "tokens_per_second": speeds,
        "ratio": {name: speed / speeds["one"] for name, speed in speeds.items()},
        "largest_loss_difference": {
            name: _furthest(found[0]["losses"], runs["one"][0]["losses"])
            for name, found in runs.items()
        },
        "runs": runs,
    }


def _furthest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def run(scratch: Path, name: str, arguments: argparse.Namespace) -> dict[str, object]:
    """One run of one layout."""
    from moesaic.config import to_toml
    from moesaic.parallel.launch import start_ranks
    from moesaic.planning.plan import TrainPlan
    from moesaic.training.config import (
        CheckpointConfig,
        MetricsConfig,
        OptimizerConfig,
        TrainConfig,
        TrainDataConfig,
    )

    folder = scratch / name
    plan_file = scratch / f"{name}.json"
    head = {"format": "moesaic-train-plan", "version": 1}
    plan_file.write_text(json.dumps({**head, **PLANS[name]}))
    config = TrainConfig(
        model=(arguments.demo / "upcycled").resolve(),
        run=folder,
        data=TrainDataConfig(
            tokens=(arguments.demo / "tokens").resolve(),
            micro_batch=4,
            accumulation=arguments.accumulation,
        ),
        steps=arguments.steps + 1,
        optimizer=OptimizerConfig(lr=2e-4),
        checkpoint=CheckpointConfig(every=0, at_end=False),
        metrics=MetricsConfig(similarity_every=0, log_every=1, peak_flops=1e12, tensorboard=False),
        plan=plan_file,
    )
    recipe = scratch / f"{name}.toml"
    recipe.write_text(to_toml(config))
    size = TrainPlan.load(plan_file).world_size
    os.environ["OMP_NUM_THREADS"] = str(THREADS // size)
    command = [sys.executable, __file__, "--child", str(recipe)]
    status = start_ranks(command, size=size, config=dataclasses.replace(config.launch))
    if status:
        raise SystemExit(f"{name} ended with status {status}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(lines) < config.steps:
        raise SystemExit(f"{name} was stopped after {len(lines)} of {config.steps} steps")
    ranks_file = folder / "ranks.jsonl"
    ranks = (
        json.loads(ranks_file.read_text().splitlines()[-1])["ranks"] if ranks_file.exists() else []
    )
    where: Counter[str] = Counter()
    for file in sorted(folder.parent.glob(f"{name}.where.*.json")):
        where.update(json.loads(file.read_text()))
        file.unlink()
    result = {
        "tokens_per_second": [line["tokens_per_second"] for line in lines[1:]],
        "losses": [line["loss"] for line in lines],
        "peak_memory_bytes": [rank["peak_memory_bytes"] for rank in ranks]
        or [lines[-1]["peak_memory_bytes"]],
        "share_of_time": {kind: count / sum(where.values()) for kind, count in where.most_common()},
    }
    shutil.rmtree(folder)
    return result


def train_and_watch(recipe: Path) -> None:
    """One rank: train, and write down where the time went."""
    import moesaic
    from moesaic.config import build, load_toml
    from moesaic.training.config import TrainConfig

    found: Counter[str] = Counter()
    stop = threading.Event()
    watched = threading.get_ident()

    def look() -> None:
        while not stop.wait(0.005):
            kind = what_runs(watched)
            if kind is not None:
                found[kind] += 1

    config = build(TrainConfig, load_toml(recipe), where=recipe)
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    moesaic.train(config)
    stop.set()
    watcher.join()
    rank = os.environ.get("RANK", "0")
    out = config.run.parent / f"{config.run.name}.where.{rank}.json"
    out.write_text(json.dumps(found))


def what_runs(thread: int) -> str | None:
    """What the training thread does now; None outside of a step."""
    frame = sys._current_frames().get(thread)
    paths = []
    while frame is not None:
        paths.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back
    names = [name for _, name in paths]
    if "take_step" not in names:
        return None
    if not any(word in path for path, _ in paths[:4] for word in EXCHANGES):
        return "update" if "update" in names and "accumulate" not in names else "computing"
    for path, _ in paths:
        for word, kind in KINDS.items():
            if word in path:
                return kind
    return "other sums"


def report(result: dict[str, object]) -> None:
    """The table, and whether the limit holds."""
    print(f"\n{result['tokens_a_step']:,} tokens a step; {THREADS} threads in all")
    print(f"{'layout':8}{'tokens/s':>10}{'ratio':>8}{'loss':>10}  where the time goes")
    for name, speed in result["tokens_per_second"].items():
        shares = result["runs"][name][-1]["share_of_time"]
        where = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.01)
        print(
            f"{name:8}{speed:10.0f}{result['ratio'][name]:8.2f}"
            f"{result['largest_loss_difference'][name]:10.1e}  {where}"
        )
    print(f"edp and dp are to be at least {LIMIT} times as fast as one rank")


if __name__ == "__main__":
    started = time.monotonic()
    main()
    if "--child" not in sys.argv:
        print(f"{time.monotonic() - started:.0f} s")
