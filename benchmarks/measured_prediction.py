"""What the planner predicts from measured layers, beside the steps that training then takes.

    one     1 rank of 1 thread
    pp      2 ranks of 1 thread: 15 layers each, 1F1B

`moesaic measure` times the layers of the demo's MoE on as many ranks, training takes its steps, and
layers are measured once more: how far the two tables are apart is what the machine's speed changed
meanwhile. With `--between` the ranks also time their layers before every step, in the same process,
so that each step stands beside a table of the same minute; a rank then needs 1.5 GB more.

A machine that does other work makes all of that longer, layers by another factor than steps. So two
things are compared: a step's time on the wall; and for each rank the time that its thread has the
processor, which is what its layers' sum predicts, without any waiting. With `--clock processor`
layers too are timed by that; then only the latter means anything.

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
from typing import TYPE_CHECKING

from measuring_machine import RESULTS, machine, save

if TYPE_CHECKING:
    from moesaic.measuring.units import Timed
    from moesaic.parallel.world import World
    from moesaic.training.config import TrainConfig

RESULT = "measured_prediction"

PLANS: dict[str, dict[str, object]] = {"one": {}, "pp": {"pp": 2}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what `make demo` left")
    parser.add_argument("--layouts", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--between", action="store_true", help="measure before each step too")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.child:
        train_and_watch(arguments.child, arguments.clock if arguments.between else None)
        return
    scratch = Path(tempfile.mkdtemp(prefix="measured-prediction-"))
    try:
        for name in arguments.layouts:
            keep(
                f"{name}, between" if arguments.between else name, compare(name, arguments, scratch)
            )
    finally:
        shutil.rmtree(scratch)


def keep(name: str, run: dict[str, object]) -> None:
    """Print a run, and save it beside what is known of the others."""
    report(name, run)
    path = RESULTS / f"{RESULT}.json"
    before = json.loads(path.read_text())["runs"] if path.exists() else {}
    save(RESULT, {"runs": {**before, name: run}})


def compare(name: str, arguments: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """Measure, train, measure again; predict from every table."""
    from moesaic.planning.measured import MeasuredTable
    from moesaic.planning.plan import TrainPlan

    begin = machine()
    plan_file = scratch / f"{name}.json"
    head = {"format": "moesaic-train-plan", "version": 1}
    plan_file.write_text(json.dumps({**head, **PLANS[name]}))
    plan = TrainPlan.load(plan_file)
    before = measured(arguments, scratch / f"{name}-before.json", plan.world_size)
    ranks = train(arguments, scratch / f"{name}-run", plan_file, plan.world_size)
    after = measured(arguments, scratch / f"{name}-after.json", plan.world_size)
    tables = {"before": MeasuredTable.load(before), "after": MeasuredTable.load(after)}
    run = judged(arguments, plan, tables, ranks)
    return {
        "machine": begin,
        "load_average_after": machine()["load_average"],
        "clock": arguments.clock,
        "micro_batch": arguments.micro_batch,
        "accumulation": arguments.accumulation,
        **run,
        "tables": {
            "before": json.loads(before.read_text()),
            "after": json.loads(after.read_text()),
        },
    }


def judged(
    arguments: argparse.Namespace, plan: object, tables: dict[str, object], ranks: list[list[dict]]
) -> dict[str, object]:
    """What each table predicts, and how far that is from the steps."""
    steps = [
        {"wall": max(of["wall"] for of in row), "processor": [of["processor"] for of in row]}
        for row in zip(*ranks, strict=True)
    ]
    wall = statistics.median(step["wall"] for step in steps)
    busy = [statistics.median(step["processor"][n] for step in steps) for n in range(len(ranks))]
    found = {when: predicted(arguments, plan, table) for when, table in tables.items()}
    errors: dict[str, object] = {
        when: {
            "wall": one["wall"] / wall - 1,
            "processor": [a / b - 1 for a, b in zip(one["busy"], busy, strict=True)],
        }
        for when, one in found.items()
    }
    if "units" in ranks[0][0]:
        # Each rank by its own layers, each step by those of just before.
        table = next(iter(tables.values()))
        of_steps = [
            [
                predicted(arguments, plan, dataclasses.replace(table, units=units_of(step)))
                for step in steps_of_rank
            ]
            for steps_of_rank in ranks
        ]
        errors["between"] = {
            "processor": [
                [one["busy"][n] / step["processor"] - 1 for one, step in zip(a, b, strict=True)]
                for n, (a, b) in enumerate(zip(of_steps, ranks, strict=True))
            ]
        }
    return {"steps": steps, "predicted": found, "error": errors}


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
    command += ["--between"] if arguments.between else []
    status = start_ranks(command, size=ranks, config=dataclasses.replace(config.launch))
    if status:
        raise SystemExit(f"training ended with status {status}")
    files = [folder.with_suffix(f".steps.{rank}.json") for rank in range(ranks)]
    steps = [json.loads(file.read_text()) for file in files]
    shutil.rmtree(folder)
    return [of_rank[1:] for of_rank in steps]


def train_and_watch(recipe: Path, clock: str | None) -> None:
    """One rank: train all but the last step of the recipe, and write down what each took.

    Args:
        recipe: Of the training.
        clock: By which layers are timed before each step; None: they are not.
    """
    import moesaic
    from moesaic.config import build, load_toml
    from moesaic.training import train as job
    from moesaic.training.config import TrainConfig

    config = build(TrainConfig, load_toml(recipe), where=recipe)
    out = config.run.with_suffix(f".steps.{os.environ.get('RANK', '0')}.json")
    steps: list[dict[str, object]] = []
    layers = Layers(config, clock) if clock else None
    take_step = job._Job.take_step

    def timed(self: job._Job, *args: object, **named: object) -> object:
        if len(steps) == config.steps - 1:
            # No model folder is wanted, and the last step is what would write one.
            os._exit(0)
        found = layers.measure(self.model.world) if layers else {}
        self.model.world.everyone.wait_for_all()
        wall, processor = time.perf_counter(), time.thread_time()
        done = take_step(self, *args, **named)
        took = {"wall": time.perf_counter() - wall, "processor": time.thread_time() - processor}
        steps.append({**took, **found})
        out.write_text(json.dumps(steps))
        return done

    job._Job.take_step = timed
    moesaic.train(config)


class Layers:
    """The layers of a rank that trains, timed between its steps."""

    def __init__(self, config: TrainConfig, clock: str) -> None:
        self.config, self.clock = config, clock
        self.units: list[Timed] = []
        self.calls = 0

    def measure(self, world: World) -> dict[str, object]:
        """Two rounds; before the first ones two more that do not count."""
        import torch

        from moesaic.measuring.config import MeasureConfig
        from moesaic.measuring.measure import timed_units
        from moesaic.measuring.rounds import ProcessorTime, time_rounds
        from moesaic.parallel.stopwatch import Stopwatch
        from moesaic.planning.measured import unit_json

        data = self.config.data
        asked = MeasureConfig(
            model=str(self.config.model), tokens=data.tokens, micro_batch=data.micro_batch
        )
        self.units = self.units or timed_units(asked, world)
        samples = time_rounds(
            [case for one in self.units for case in one.cases],
            rounds=2,
            warmup_rounds=0 if self.calls else 2,
            clock=lambda case: (
                ProcessorTime() if self.clock == "processor" else Stopwatch(torch.device("cpu"))
            ),
            meet=world.everyone.wait_for_all,
            seed=self.calls,
        )
        self.calls += 1
        return {"units": [unit_json(one.measured(samples)) for one in self.units]}


def report(name: str, run: dict) -> None:
    """One run's errors."""
    steps = run["steps"]
    print(f"{name}: step {statistics.median(step['wall'] for step in steps):.2f} s on the wall")
    for when, errors in run["error"].items():
        if "wall" in errors:
            print(f"  from layers measured {when}: {errors['wall']:+.1%}")
    for rank in range(len(steps[0]["processor"])):
        seconds = statistics.median(step["processor"][rank] for step in steps)
        print(f"  rank {rank} has the processor for {seconds:.2f} s")
        for when, errors in run["error"].items():
            of_rank = errors["processor"][rank]
            words = ", ".join(f"{e:+.1%}" for e in (of_rank if when == "between" else [of_rank]))
            print(f"    from layers measured {when}: {words}", flush=True)


if __name__ == "__main__":
    main()
