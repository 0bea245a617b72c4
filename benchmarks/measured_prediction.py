"""What the planner predicts from measured layers, beside the steps that training then takes.

    one     1 rank of 1 thread
    pp      2 ranks of 1 thread: 15 layers each, 1F1B

For each layout `moesaic measure` times the layers of the demo's MoE on as many ranks, the planner
predicts the step from that table and nothing else, and `moesaic train` takes the step: the same
session, one after the other, and measured once more afterwards to see what drifted.

A machine that does other work meanwhile makes all of that longer, the layers by another factor
than the steps. So two things are compared: the step's time on the wall; and for each rank the time
that its thread has the processor, which is what the layers' sum predicts, without any waiting.
With `--clock processor` layers too are timed by that, and only the latter means much.

    make demo
    python benchmarks/measured_prediction.py [--demo demo] [--clock wall] [--layouts one pp]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring_machine import machine, save

RESULT = "measured_prediction"

PLANS: dict[str, dict[str, object]] = {"one": {}, "pp": {"pp": 2}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what `make demo` left")
    parser.add_argument("--layouts", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.child:
        train_and_watch(arguments.child)
        return
    before = machine()
    found = {}
    scratch = Path(tempfile.mkdtemp(prefix="measured-prediction-"))
    try:
        for name in arguments.layouts:
            found[name] = compare(name, arguments, scratch)
            report(name, found[name])
    finally:
        shutil.rmtree(scratch)
    save(
        RESULT,
        {
            "machine": before,
            "load_average_after": machine()["load_average"],
            "clock": arguments.clock,
            "micro_batch": arguments.micro_batch,
            "accumulation": arguments.accumulation,
            "layouts": found,
        },
    )


def compare(name: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Measure, predict, train, measure again."""
    from moesaic.planning.plan import TrainPlan

    plan_file = scratch / f"{name}.json"
    head = {"format": "moesaic-train-plan", "version": 1}
    plan_file.write_text(json.dumps({**head, **PLANS[name]}))
    plan = TrainPlan.load(plan_file)
    first = measured(arguments, scratch / f"{name}-1.json", plan.world_size)
    steps = train(arguments, scratch / f"{name}-run", plan_file, plan.world_size)
    second = measured(arguments, scratch / f"{name}-2.json", plan.world_size)
    predictions = [predicted(arguments, plan, table) for table in (first, second)]
    wall = statistics.median(step["wall"] for step in steps[0])
    processor = [statistics.median(step["processor"] for step in rank) for rank in steps]
    return {
        "predicted": predictions,
        "measured": {"wall": wall, "processor": processor},
        "error": {
            "wall": [one["wall"] / wall - 1 for one in predictions],
            "processor": [
                [ours / theirs - 1 for ours, theirs in zip(one["busy"], processor, strict=True)]
                for one in predictions
            ],
        },
        "steps": steps,
        "units": [json.loads(table.read_text())["units"] for table in (first, second)],
        "about": [json.loads(table.read_text())["about"] for table in (first, second)],
    }


def measured(arguments: argparse.Namespace, table: Path, ranks: int) -> Path:
    """A table, by the command that anybody would use."""
    command = [sys.executable, "-m", "moesaic", "measure"]
    command += ["--model", str(arguments.demo / "upcycled"), "--out", str(table)]
    command += ["--tokens", str(arguments.demo / "tokens"), "--ranks", str(ranks)]
    command += ["--micro-batch", str(arguments.micro_batch), "--clock", arguments.clock]
    subprocess.run([*command, "--rounds", str(arguments.rounds)], check=True)
    return table


def predicted(arguments: argparse.Namespace, plan: object, table_file: Path) -> dict[str, object]:
    """Seconds of a step on the wall, and of each rank without waiting."""
    from moesaic.checkpoint.folder import read_spec
    from moesaic.planning.cluster import read_cluster
    from moesaic.planning.cost import predict, rank_of, step_costs
    from moesaic.planning.job import job_of
    from moesaic.planning.layout import fit
    from moesaic.planning.measured import MeasuredTable
    from moesaic.planning.shape import shape_of

    spec, table = read_spec(arguments.demo / "upcycled"), MeasuredTable.load(table_file)
    header = json.loads((arguments.demo / "tokens" / "header.json").read_text())
    job = job_of(
        plan,
        sequence=header["sequence_length"],
        global_batch=arguments.micro_batch * arguments.accumulation,
        micro_batch=arguments.micro_batch,
    )
    shape, cluster = shape_of(spec), read_cluster(f"cpu{job.world_size}")
    sizes = {"sequence": job.sequence, "dtype": job.dtype, "micro_batch": job.micro_batch}
    table.check(shape, **sizes, ranks=job.world_size)
    stages = fit(plan, spec).stages
    found = predict(shape, job, cluster, stages=stages, table=table)
    busy = [0.0] * job.pp
    for stage, (span, of) in enumerate(zip(stages, found.stage_seconds, strict=True)):
        passes = of.forward + of.input_gradient + of.weight_gradient
        optimizer = step_costs(shape, job, cluster, span, table=table).optimizer
        busy[rank_of(stage, job)] += job.micro_batches * passes + optimizer
    return {
        "wall": found.seconds,
        "busy": busy,
        "pipeline": found.pipeline,
        "communication": found.communication,
        "optimizer": found.optimizer,
        "measured": found.measured,
        "by_formulas": found.by_formulas,
    }


def train(
    arguments: argparse.Namespace, folder: Path, plan_file: Path, ranks: int
) -> list[list[dict[str, float]]]:
    """Of each rank, the steps that count."""
    from moesaic.config import to_toml
    from moesaic.parallel.launch import start_ranks
    from moesaic.training.config import (
        CheckpointConfig,
        MetricsConfig,
        OptimizerConfig,
        TrainConfig,
        TrainDataConfig,
    )

    config = TrainConfig(
        model=(arguments.demo / "upcycled").resolve(),
        run=folder,
        data=TrainDataConfig(
            tokens=(arguments.demo / "tokens").resolve(),
            micro_batch=arguments.micro_batch,
            accumulation=arguments.accumulation,
        ),
        steps=arguments.steps + 2,
        optimizer=OptimizerConfig(lr=2e-4),
        checkpoint=CheckpointConfig(every=0, at_end=False),
        metrics=MetricsConfig(similarity_every=0, log_every=1, peak_flops=1e12, tensorboard=False),
        plan=plan_file,
    )
    recipe = folder.with_suffix(".toml")
    recipe.write_text(to_toml(config))
    command = [sys.executable, __file__, "--child", str(recipe)]
    status = start_ranks(command, size=ranks, config=dataclasses.replace(config.launch))
    if status:
        raise SystemExit(f"training ended with status {status}")
    files = [folder.with_suffix(f".steps.{rank}.json") for rank in range(ranks)]
    steps = [json.loads(file.read_text()) for file in files]
    shutil.rmtree(folder)
    return [of_rank[1:] for of_rank in steps]


def train_and_watch(recipe: Path) -> None:
    """One rank: train all but the last step of the recipe, and write down what each took."""
    import moesaic
    from moesaic.config import build, load_toml
    from moesaic.training import train as job
    from moesaic.training.config import TrainConfig

    config = build(TrainConfig, load_toml(recipe), where=recipe)
    out = config.run.with_suffix(f".steps.{os.environ.get('RANK', '0')}.json")
    steps: list[dict[str, float]] = []
    take_step = job._Job.take_step

    def timed(self: job._Job, *args: object, **named: object) -> object:
        if len(steps) == config.steps - 1:
            # No model folder is wanted, and the last step is what would write one.
            os._exit(0)
        wall, processor = time.perf_counter(), time.thread_time()
        done = take_step(self, *args, **named)
        steps.append(
            {"wall": time.perf_counter() - wall, "processor": time.thread_time() - processor}
        )
        out.write_text(json.dumps(steps))
        return done

    job._Job.take_step = timed
    moesaic.train(config)


def report(name: str, result: dict) -> None:
    """One layout's errors."""
    wall, busy = result["measured"]["wall"], result["measured"]["processor"]
    for when, one in zip(("before", "after"), result["predicted"], strict=True):
        parts = ", ".join(
            f"rank {rank} {ours:.2f} s of {theirs:.2f} ({ours / theirs - 1:+.1%})"
            for rank, (ours, theirs) in enumerate(zip(one["busy"], busy, strict=True))
        )
        print(
            f"{name}, from layers measured {when}: step {one['wall']:.2f} s of {wall:.2f} "
            f"({one['wall'] / wall - 1:+.1%}); processor: {parts}",
            flush=True,
        )


if __name__ == "__main__":
    main()
