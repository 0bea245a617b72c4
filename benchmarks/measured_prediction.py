"""What the planner predicts from measured layers, beside the steps that training then takes.

    one     1 rank of 1 thread
    pp      2 ranks of 1 thread: 15 layers each, 1F1B

For each layout `moesaic measure` times the layers of the demo's MoE on as many ranks, and then
training takes its steps. Before each step the same ranks time their layers once more, in the same
process, so that each step stands beside a table of the same minute:

    ahead       predicted from what the command measured before training
    beside      predicted for each step from what was measured just before it; links as ahead

A machine that does other work makes all of that longer, layers by another factor than steps. So two
things are compared: a step's time on the wall; and for each rank the time that its thread has the
processor, which is what its layers' sum predicts, without any waiting. With `--clock processor`
layers too are timed by that; then only the latter means much.

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
        train_and_watch(arguments.child, arguments.clock)
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
    """Measure, and train with measurements between the steps; predict from both."""
    from moesaic.planning.measured import MeasuredTable
    from moesaic.planning.plan import TrainPlan

    plan_file = scratch / f"{name}.json"
    head = {"format": "moesaic-train-plan", "version": 1}
    plan_file.write_text(json.dumps({**head, **PLANS[name]}))
    plan = TrainPlan.load(plan_file)
    table_file = measured(arguments, scratch / f"{name}-table.json", plan.world_size)
    ranks = train(arguments, scratch / f"{name}-run", plan_file, plan.world_size)
    table = MeasuredTable.load(table_file)
    rows = []
    for of_ranks in zip(*ranks, strict=True):
        # Each rank by its own layers.
        beside = [
            predicted(arguments, plan, dataclasses.replace(table, units=units_of(of)))
            for of in of_ranks
        ]
        rows.append(
            {
                "wall": max(of["wall"] for of in of_ranks),
                "processor": [of["processor"] for of in of_ranks],
                "predicted_wall": max(one["wall"] for one in beside),
                "predicted_processor": [one["busy"][rank] for rank, one in enumerate(beside)],
            }
        )
    ahead = predicted(arguments, plan, table)
    return {
        "ahead": ahead,
        "steps": rows,
        "error": {
            "ahead": {
                "wall": ahead["wall"] / statistics.median(row["wall"] for row in rows) - 1,
                "processor": [
                    busy / statistics.median(row["processor"][rank] for row in rows) - 1
                    for rank, busy in enumerate(ahead["busy"])
                ],
            },
            "beside": {
                "wall": [row["predicted_wall"] / row["wall"] - 1 for row in rows],
                "processor": [
                    [row["predicted_processor"][rank] / row["processor"][rank] - 1 for row in rows]
                    for rank in range(plan.world_size)
                ],
            },
        },
        "table": json.loads(table_file.read_text()),
    }


def units_of(step: dict) -> tuple:
    """The units that a rank measured before a step."""
    from moesaic.planning.measured import read_unit

    return tuple(map(read_unit, step["units"]))


def measured(arguments: argparse.Namespace, table: Path, ranks: int) -> Path:
    """A table, by the command that anybody would use."""
    command = [sys.executable, "-m", "moesaic", "measure"]
    command += ["--model", str(arguments.demo / "upcycled"), "--out", str(table)]
    command += ["--tokens", str(arguments.demo / "tokens"), "--ranks", str(ranks)]
    command += ["--micro-batch", str(arguments.micro_batch), "--clock", arguments.clock]
    subprocess.run([*command, "--rounds", str(arguments.rounds)], check=True)
    return table


def predicted(arguments: argparse.Namespace, plan: object, table: object) -> dict[str, object]:
    """Seconds of a step on the wall, and of each rank without waiting."""
    from moesaic.checkpoint.folder import read_spec
    from moesaic.planning.cluster import read_cluster
    from moesaic.planning.cost import predict, rank_of, step_costs
    from moesaic.planning.job import job_of
    from moesaic.planning.layout import fit
    from moesaic.planning.shape import shape_of

    spec = read_spec(arguments.demo / "upcycled")
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
    command = [sys.executable, __file__, "--child", str(recipe), "--clock", arguments.clock]
    status = start_ranks(command, size=ranks, config=dataclasses.replace(config.launch))
    if status:
        raise SystemExit(f"training ended with status {status}")
    files = [folder.with_suffix(f".steps.{rank}.json") for rank in range(ranks)]
    steps = [json.loads(file.read_text()) for file in files]
    shutil.rmtree(folder)
    return [of_rank[1:] for of_rank in steps]


def train_and_watch(recipe: Path, clock: str) -> None:
    """One rank: train all but the last step of the recipe, and write down what each took."""
    import torch

    import moesaic
    from moesaic.config import build, load_toml
    from moesaic.measuring.config import MeasureConfig
    from moesaic.measuring.measure import timed_units
    from moesaic.measuring.rounds import ProcessorTime, time_rounds
    from moesaic.parallel.stopwatch import Stopwatch
    from moesaic.planning.measured import unit_json
    from moesaic.training import train as job
    from moesaic.training.config import TrainConfig

    config = build(TrainConfig, load_toml(recipe), where=recipe)
    data = config.data
    asked = MeasureConfig(model=str(config.model), tokens=data.tokens, micro_batch=data.micro_batch)
    out = config.run.with_suffix(f".steps.{os.environ.get('RANK', '0')}.json")
    steps: list[dict[str, object]] = []
    units: list[object] = []
    take_step = job._Job.take_step

    def timed(self: job._Job, *args: object, **named: object) -> object:
        if len(steps) == config.steps - 1:
            # No model folder is wanted, and the last step is what would write one.
            os._exit(0)
        world = self.model.world
        units[:] = units or timed_units(asked, world)
        samples = time_rounds(
            [case for one in units for case in one.cases],
            rounds=2,
            warmup_rounds=0 if steps else 2,
            clock=lambda case: (
                ProcessorTime() if clock == "processor" else Stopwatch(torch.device("cpu"))
            ),
            meet=world.everyone.wait_for_all,
            seed=len(steps),
        )
        world.everyone.wait_for_all()
        wall, processor = time.perf_counter(), time.thread_time()
        done = take_step(self, *args, **named)
        steps.append(
            {
                "wall": time.perf_counter() - wall,
                "processor": time.thread_time() - processor,
                "units": [unit_json(one.measured(samples)) for one in units],
            }
        )
        out.write_text(json.dumps(steps))
        return done

    job._Job.take_step = timed
    moesaic.train(config)


def report(name: str, result: dict) -> None:
    """One layout's errors."""
    ahead, beside = result["error"]["ahead"], result["error"]["beside"]
    print(f"{name}: step {statistics.median(row['wall'] for row in result['steps']):.2f} s")
    print(f"  on the wall: ahead {ahead['wall']:+.1%}; beside {_list(beside['wall'])}")
    for rank, (before, then) in enumerate(
        zip(ahead["processor"], beside["processor"], strict=True)
    ):
        seconds = statistics.median(row["processor"][rank] for row in result["steps"])
        print(
            f"  rank {rank} has the processor for {seconds:.2f} s: ahead {before:+.1%}; "
            f"beside {_list(then)}",
            flush=True,
        )


def _list(errors: list[float]) -> str:
    return ", ".join(f"{error:+.1%}" for error in errors)


if __name__ == "__main__":
    main()
