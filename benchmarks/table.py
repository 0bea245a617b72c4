"""Print the README's table of measurements from the results that are kept beside this script.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from measuring_machine import RESULTS


def rows() -> Iterator[tuple[str, str, str]]:
    """What was measured, the figure, and the script behind it."""
    path = _result("whole_path")
    dense, trained = path["losses"]["dense"], path["losses"]["trained"]
    control = path["losses"]["dense, trained on the same tokens"]
    yield (
        "the demo, from a dense model to an answer in FP8",
        f"{path['seconds']:.0f} s, {path['peak_memory_bytes'] / 1e9:.1f} GB",
        "whole_path",
    )
    yield (
        "held-out loss, nats a token: dense, trained MoE, dense trained on the same tokens, FP8",
        f"{dense:.3f}, {trained:.3f}, {control:.3f}, {trained + path['fp8_cost']:.3f}",
        "whole_path",
    )
    step = _result("train_step")
    whole, pure = step["precisions"]["float32"], step["precisions"]["bfloat16"]
    yield (
        f"training step against transformers {step['transformers_version']}, float32 weights "
        f"(pure bfloat16)",
        f"{whole['median_ratio']:.2f} times as fast ({pure['median_ratio']:.2f}), "
        f"{whole['tokens_per_second']['moesaic']:.0f} tokens/s",
        "train_step",
    )
    copy = _result("upcycle_speed")
    ratios = ", ".join(f"{m['ratio']:.2f} ({cache} cache)" for cache, m in copy["median"].items())
    yield (
        f"upcycling {copy['layers']} layers of Skywork-13B's width to {copy['experts']} experts, "
        f"time against `cp` of the same {copy['written_bytes'] / 1e9:.1f} GB",
        f"{ratios}; {copy['upcycle_anonymous_bytes'] / 1e9:.2f} GB of memory",
        "upcycle_speed",
    )
    ranks = _result("ranks")
    yield (
        f"2 ranks of 1 thread against 1 rank of 2 on the demo's MoE, {ranks['tokens_a_step']:,} "
        f"tokens a step: EDP, FSDP, data ranks with experts over them",
        ", ".join(f"{ranks['ratio'][name]:.2f}" for name in ("edp", "dp", "ep")),
        "ranks",
    )
    cases = _result("pipeline_simulation")
    yield (
        # One of them is what the cost of an action is taken from.
        f"simulated step of {len(cases['cases']) - 1} pipelines against real ones, of sleeping "
        f"stages",
        f"at most {cases['largest_error']:.1%} off",
        "pipeline_simulation",
    )
    load = _result("serving_load")
    yield (
        f"{load['streams']} open streams for {load['seconds'] / 60:.0f} minutes on the demo's MoE, "
        f"beside clients that go away, send what is wrong or never read: whole answers, errors, "
        f"memory against that after 30 s",
        f"{load['counts']['good']}, {len(load['errors'])}, {load['memory_grown'] / 1e6:+.0f} MB",
        "serving_load",
    )


def table() -> str:
    """The table in Markdown."""
    lines = ["| measured | result | script |", "|---|---|---|"]
    lines += [f"| {what} | {figure} | `benchmarks/{by}.py` |" for what, figure, by in rows()]
    return "\n".join(lines)


def _result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    print(table())
