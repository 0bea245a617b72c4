"""`moesaic plan train MODEL --cluster C`, `plan serve MODEL --cluster C`, `plan check`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.show import size, table
from moesaic.cli.verb import Summary, verb
from moesaic.planning.config import PlanCheckConfig, PlanServeConfig, PlanTrainConfig


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
    if best["measured"] is not None:
        yield from _sources(best["measured"])
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


def _sources(measured: Mapping[str, Any]) -> Iterator[str]:
    when = f", {measured['when']}" if measured["when"] else ""
    yield (
        f"measured on {measured['device']}{when}: {', '.join(measured['parts']) or 'nothing of it'}"
    )
    if measured["by_formulas"]:
        yield f"by formulas: {', '.join(measured['by_formulas'])}"


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


def show_serve(done: Mapping[str, Any]) -> Iterator[str]:
    """The choice, the memory of each rank, and what else was compared."""
    yield (
        f"{done['model']}, {_count(done['parameters'])} parameters, "
        f"{_count(done['active_parameters'])} active, weights {done['weights']}, cache "
        f"{done['kv_cache']}, on {done['cluster']}"
    )
    yield done["reason"]
    if done["bound"] is not None:
        best = next(one for one in done["arrangements"] if one["is_chosen"])
        gap = done["bound"] / best["tokens_per_second"] - 1
        yield f"no shares of heads and columns are more than {max(0.0, gap):.1%} faster"
    if done["crosses_nodes"]:
        yield "ranks exchange over the network between nodes; --one-box if they share a machine"
    if done["fewer_ranks"]:
        fewer = done["fewer_ranks"]
        yield (
            f"{fewer['ranks']} of these ranks alone would do {fewer['tokens_per_second']:,.0f} "
            f"tokens/s at that batch"
        )
    yield ""
    yield from _shares(done["shapes"])
    yield ""
    yield from _ledger(done)
    yield ""
    yield from _arrangements(done["arrangements"])
    yield ""
    yield from _by_batch(done)
    yield ""
    yield from _by_context(done["by_context"])
    if done["by_target"]:
        yield ""
        yield from _by_target(done)
    yield ""
    yield from _assumptions(done["assumptions"])


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _unit(num_bytes: int) -> tuple[str, int]:
    """What a table of ledgers counts in."""
    return ("GiB", 2**30) if num_bytes > 2**32 else ("MiB", 2**20)


def _shares(shapes: Mapping[str, Any]) -> Iterator[str]:
    def row(name: str, sizes: list[int]) -> list[str]:
        return [name, *map(str, sizes)]

    rows = [row(f"heads of layer {n}", sizes) for n, sizes in enumerate(shapes["heads"])]
    rows.append(row("heads over all layers", shapes["heads_over_all_layers"]))
    rows.append(row("key-value heads over all layers", shapes["kv_heads_over_all_layers"]))
    if any(shapes["experts"]):
        rows.append(row("experts of the last layer", shapes["experts"]))
    rows.append(row("columns of the last layer", shapes["columns"]))
    rows.append(row("vocabulary", shapes["vocabulary"]))
    return table(["rank", *map(str, range(len(shapes["vocabulary"])))], rows)


def _ledger(done: Mapping[str, Any]) -> Iterator[str]:
    parts = [
        name
        for name in done["ledger"][0]["weights"]
        if any(one["weights"][name] for one in done["ledger"])
    ]
    keys = ("weight_bytes", "kv_bytes", "workspace_bytes", "total_bytes", "budget_bytes")
    name_of_unit, unit = _unit(done["ledger"][0]["total_bytes"])
    rows = [
        [
            str(one["rank"]),
            *(f"{one['weights'][name] / unit:.2f}" for name in parts),
            *(f"{one[key] / unit:.2f}" for key in keys),
        ]
        for one in done["ledger"]
    ]
    heads = [*(name.replace("_", " ") for name in parts), "weights", "cache", "to work in"]
    yield from table([f"{name_of_unit} of rank", *heads, "total", "to fill"], rows)
    blocks = done["ledger"][0]["kv_blocks"]
    yield (
        f"cache of {done['kv_tokens']:,} positions in {blocks:,} blocks on every rank; rank "
        f"{done['binding_rank']} has the least room"
    )


def _arrangements(found: list[Mapping[str, Any]]) -> Iterator[str]:
    name_of_unit, unit = _unit(4 * max(one["fullest_weight_bytes"] for one in found))

    def row(one: Mapping[str, Any]) -> list[str]:
        mark = "*" if one["is_chosen"] else "" if one["can_run"] else " (compared only)"
        cells = [f"{one['name']}{mark}", f"{one['fullest_weight_bytes'] / unit:.2f}"]
        step = one["step"]
        if step is None:
            return [*cells, f"{one['kv_tokens']:,}", "does not fit", *[""] * 8]
        times = (step["attention"], step["feed_forward"] + step["head"], step["sums"])
        return [
            *cells,
            f"{one['kv_tokens']:,}",
            str(one["batch"]),
            f"{one['tokens_per_second']:,.0f}",
            "" if one["is_chosen"] else f"{one['to_choice']:+.1%}",
            f"{1e3 * one['token_seconds']:.1f}",
            *(f"{1e3 * seconds:.1f}" for seconds in times),
            f"{1e3 * step['host']:.1f}",
            f"{one['prefill_tokens_per_second']:,.0f}",
        ]

    heads = ["layout (*: the plan)", name_of_unit, "cache", "batch", "tokens/s", "", "ms/token"]
    heads += ["attention", "network", "sums", "host", "prompt/s"]
    return table(heads, map(row, found))


def _by_batch(done: Mapping[str, Any]) -> Iterator[str]:
    names, batches = _axes(done["by_batch"], "batch")
    cells = {(one["name"], one["batch"]): one for one in done["by_batch"]}
    rows = [
        [
            name,
            *(
                f"{cells[name, batch]['tokens_per_second']:,.0f}"
                + ("" if cells[name, batch]["fits"] else "*")
                for batch in batches
            ),
        ]
        for name in names
    ]
    heads = [f"tokens/s, context {done['context']:,}, batch", *map(str, batches)]
    yield from table(heads, rows)
    if any("*" in cell for row in rows for cell in row):
        yield "*: the cache has no room for it"


def _by_context(found: list[Mapping[str, Any]]) -> Iterator[str]:
    names, contexts = _axes(found, "context")
    cells = {(one["name"], one["context"]): one for one in found}
    rows = [
        [
            name,
            *(
                f"{cells[name, context]['tokens_per_second']:,.0f} "
                f"({cells[name, context]['batch']})"
                for context in contexts
            ),
        ]
        for name in names
    ]
    heads = ["tokens/s (batch that fits), context", *(f"{context:,}" for context in contexts)]
    return table(heads, rows)


def _axes(found: list[Mapping[str, Any]], axis: str) -> tuple[list[str], list[int]]:
    """Names and places of a table, each once and in order."""
    return list(dict.fromkeys(one["name"] for one in found)), list(
        dict.fromkeys(one[axis] for one in found)
    )


def _by_target(done: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [one["name"], f"{one['context']:,}" if one["context"] else "never", str(one["batch"])]
        for one in done["by_target"]
    ]
    return table([f"{done['target']:,.0f} tokens/s up to a context of", "", "batch"], rows)


def _assumptions(given: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"predicted, not measured: {given['memory_efficiency']:.0%} of the memory's bandwidth, "
        f"{given['matmul_efficiency']:.0%} of peak, bus {given['bus_bytes_per_second'] / 1e9:g} "
        f"GB/s, {1e6 * given['hop_seconds']:g} us a hop, no overlap (docs/serving-plan.md)"
    )


@verb(PlanTrainConfig, positional=("model",), show=show_plan)
def train(config: PlanTrainConfig) -> Summary:
    """Find the fastest legal layout for training a model on a cluster, before any GPU is rented."""
    summary: Summary = moesaic.plan_train(config)
    return summary


@verb(PlanServeConfig, positional=("model",), show=show_serve)
def serve(config: PlanServeConfig) -> Summary:
    """Say before anything loads what each rank holds, how fast it is, and which layout is best."""
    summary: Summary = moesaic.plan_serve(config)
    return summary


@verb(PlanCheckConfig, show=show_check)
def check(config: PlanCheckConfig) -> Summary:
    """Hold predictions of step time and memory against published runs."""
    summary: Summary = moesaic.plan_check(config)
    return summary
