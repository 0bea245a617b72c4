"""`moesaic plan train MODEL --cluster C` and `moesaic plan check --runs FILE`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.show import size, table
from moesaic.cli.verb import Summary, verb
from moesaic.planning.config import PlanCheckConfig, PlanTrainConfig


def show_plan(done: Mapping[str, Any]) -> Iterator[str]:
    """The plan, what bounds it, and what was worse."""
    best = done["answer"]
    yield (
        f"{done['model']}, {done['parameters'] / 1e9:.1f}B parameters, "
        f"{done['active_parameters'] / 1e9:.1f}B active, on {done['cluster']}: {_mesh(best['job'])}"
    )
    yield (
        f"step {best['step_seconds']:.3f} s, {best['tokens_per_second_per_rank']:,.0f} tokens/s a "
        f"rank, MFU {best['mfu']:.1%}"
    )
    yield ""
    yield from _bounds(done["bounds"])
    yield ""
    yield from _stages(best)
    gap = best["bottleneck_gap"]
    if gap > 1e-9:
        yield f"no cut has a slowest rank more than {gap:.1%} faster; whether one has is not known"
    yield ""
    yield from _memory(best)
    yield ""
    yield from _others(done)
    searched = done["searched"]
    yield (
        f"{searched['combinations']:,} combinations are legal; {searched['tried']:,} were tried, "
        f"of which {searched['refused']:,} do not fit or could not be faster; the others are "
        f"slower by their bounds"
    )
    if done["curve"]:
        yield ""
        yield from _curve(done["curve"])


def _mesh(job: Mapping[str, Any]) -> str:
    words = f"pp {job['pp']} x dp {job['dp']} x tp {job['tp']}"
    if job["cp"] > 1:
        words += f" x cp {job['cp']}"
    if job["ep"] is not None:
        words += f", experts over {job['experts_over']} {job['ep']}"
    words += f", micro-batch {job['micro_batch']}, ZeRO-{job['zero']}"
    if job["pp"] > 1:
        words += f", {job['schedule']}"
        words += f" with {job['interleave']} stages a rank" if job["interleave"] > 1 else ""
    return words


def _bounds(bounds: list[Mapping[str, Any]]) -> Iterator[str]:
    last = bounds[-1]["seconds"]
    rows = [
        [
            f"{bound['name']}: {bound['words']}",
            f"{bound['seconds']:.3f}",
            f"{last / bound['seconds'] - 1:+.1%}",
        ]
        for bound in bounds
    ]
    return table(["what keeps the step from being shorter", "seconds", "step above it"], rows)


def _stages(answer: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [
            f"{row['first']} to {row['last']}",
            str(row["stage"]),
            str(row["rank"]),
            f"{row['layers']:g}",
            row["recompute"],
            f"{1e3 * row['seconds']:.1f}",
            f"{row['share']:.0%}",
        ]
        for row in answer["stages"]
    ]
    heads = ["units", "stage", "rank", "layers", "recomputed", "ms", "of slowest"]
    return table(heads, rows)


def _memory(answer: Mapping[str, Any]) -> Iterator[str]:
    names: list[str] = []
    for ledger in answer["memory"]:
        names += [_line(name) for name in ledger["lines"] if _line(name) not in names]
    rows = []
    for ledger in answer["memory"]:
        sums = dict.fromkeys(names, 0.0)
        for name, count in ledger["lines"].items():
            sums[_line(name)] += count
        rows.append(
            [
                str(ledger["pipeline_rank"]),
                *(f"{sums[name] / 2**30:.2f}" for name in names),
                f"{ledger['total_bytes'] / 2**30:.2f}",
                f"{ledger['budget_bytes'] / 2**30:.2f}",
            ]
        )
    return table(["GiB of pipeline rank", *names, "total", "to fill"], rows)


def _line(name: str) -> str:
    return "activations" if name.startswith("activations") else name


def _others(done: Mapping[str, Any]) -> Iterator[str]:
    best = done["answer"]["step_seconds"]
    named = [("this plan", done["answer"])]
    named += [(f"next best {n}", other) for n, other in enumerate(done["others"], 1)]
    if done["uniform"] is not None:
        named.append(("uniform on the same mesh", done["uniform"]))
    named += [(compared["file"], compared) for compared in done["compared"]]
    rows = [
        [
            f"{name}: {_mesh(answer['job'])}",
            f"{answer['step_seconds']:.3f}",
            f"{answer['step_seconds'] / best - 1:+.1%}",
            size(max(ledger["total_bytes"] for ledger in answer["memory"])),
        ]
        for name, answer in named
    ]
    yield from table(["plan", "seconds", "", "fullest rank"], rows)
    if done["uniform"] is None and done["answer"]["job"]["pp"] > 1:
        yield "uniform layers on the same mesh fit with no recompute"


def _curve(gains: list[Mapping[str, Any]]) -> Iterator[str]:
    def seconds(value: float) -> str:
        return "does not fit" if value == float("inf") else f"{value:.3f}"

    def gain(base: float, ours: float) -> str:
        return "" if float("inf") in (base, ours) else f"{base / ours - 1:+.1%}"

    rows = [
        [
            f"{one['budget_bytes'] / 1e9:g}",
            *(seconds(one[name]) for name in ("flags", "free", "whole", "halves")),
            gain(one["flags"], one["whole"]),
            gain(one["free"], one["whole"]),
            gain(one["free"], one["halves"]),
        ]
        for one in gains
    ]
    heads = ["GB a device", "flags", "free cut", "joint", "half layers"]
    return table([*heads, "joint/flags", "joint/free", "halves/free"], rows)


def show_check(done: Mapping[str, Any]) -> Iterator[str]:
    """Both tables."""
    yield "step time"
    yield from done["time"].splitlines()
    yield ""
    yield "memory"
    yield from done["memory"].splitlines()


@verb(PlanTrainConfig, positional=("model",), show=show_plan)
def train(config: PlanTrainConfig) -> Summary:
    """Find the fastest legal layout for training a model on a cluster, before any GPU is rented."""
    summary: Summary = moesaic.plan_train(config)
    return summary


@verb(PlanCheckConfig, show=show_check)
def check(config: PlanCheckConfig) -> Summary:
    """Hold predictions of step time and memory against published runs."""
    summary: Summary = moesaic.plan_check(config)
    return summary
