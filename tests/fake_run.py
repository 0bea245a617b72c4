"""Write a run folder as training would, with curves shaped like those of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moesaic.planning.layout import fit
from moesaic.planning.plan import TrainPlan
from moesaic.spec import PRESETS
from moesaic.training.ranks import RankRecord, rank_line

CONFIG = """\
model = "no such folder/moe"
run = "runs/first"
steps = {steps}
seed = 0
compute_dtype = "bfloat16"

[data]
tokens = "tokens"
micro_batch = 4
accumulation = 1

[optimizer]
lr = 0.0001
betas = [0.9, 0.95]

[routing]
capacity_factor = {capacity}
stated_capacity_factor = 1.25
coefficient = "adaptive"
"""


def write_run(
    run: Path,
    *,
    steps: int = 200,
    planned: int | None = None,
    layers: int = 30,
    experts: int = 8,
    extras: bool = True,
    dropless: bool = False,
    first_step: int = 1,
    plan: TrainPlan | None = None,
) -> Path:
    """Write a run of `steps` steps; `layers` 0 makes it dense, `extras` False leaves out
    whatever training does not need to write, a plan adds what its ranks did."""
    random = np.random.default_rng(0)
    (run / "routing").mkdir(parents=True)
    capacity = '"none"' if dropless else "1.25"
    config = CONFIG.format(steps=planned or steps, capacity=capacity)
    coefficient_L = np.full(layers, 0.01)
    logits_LE = random.normal(size=(layers, experts))
    metrics, routing, similarity = [], [], []
    for step in range(first_step, first_step + steps):
        done = step / max(steps, 1)
        settled = np.exp(-4 * done)
        depth_L = np.linspace(0.3, 1.0, layers)
        drop_L = 0.008 * depth_L + 0.06 * settled + 0.002 * random.random(layers)
        if layers:
            drop_L[0] = 0.05 - 0.03 * done + 0.004 * random.random()
            coefficient_L = 0.9 * coefficient_L + 0.1 * np.minimum(0.2 * drop_L, 0.01)
            noisy_LE = logits_LE * (0.15 + 0.7 * settled) + 0.08 * random.normal(
                size=(layers, experts)
            )
            load_LE = np.exp(noisy_LE) / np.exp(noisy_LE).sum(axis=1, keepdims=True)
            max1_L = 1.2 + 1.9 * done * depth_L + 0.05 * random.random(layers)
            routing.append(
                {
                    "step": step,
                    "layers": list(range(layers)),
                    "load": load_LE.tolist(),
                    "drop_rate": drop_L.tolist(),
                    "coefficient": coefficient_L.tolist(),
                    "entropy": (np.log(experts) * (1 - 0.3 * done * depth_L)).tolist(),
                    "max1_over_max2": max1_L.tolist(),
                    "max2_over_max3": [1 + ratio / 8 if experts > 2 else None for ratio in max1_L],
                }
            )
            if step % 20 == 0 or step in (first_step, first_step + steps - 1):
                values = 1 - 0.02 * done * depth_L
                similarity.append(
                    {"step": step, "layers": list(range(layers)), "similarity": values.tolist()}
                )
        metrics.append(
            {
                "step": step,
                "tokens": 2048 * step,
                "loss": float(1.5 + 0.7 * settled + 0.08 * random.normal()),
                "gradient_norm": float(0.8 + 2 * settled + 0.1 * random.random()),
                "learning_rate": 1e-4 * min(1.0, step / 10) * (0.55 + 0.45 * np.cos(np.pi * done)),
                "tokens_per_second": float(1700 + 60 * random.normal()),
                "mfu": 0.41,
                "drop_rate": float(drop_L.mean()) if layers else None,
                "coefficient": float(coefficient_L.mean()) if layers else None,
                "seconds": 1.2,
                "peak_memory_bytes": 12_345_678_901,
            }
        )
    (run / "config.toml").write_text(config)
    write_lines(run / "metrics.jsonl", metrics)
    if layers:
        write_lines(run / "routing" / "routing.jsonl", routing)
        write_lines(run / "routing" / "similarity.jsonl", similarity)
    if plan is not None:
        told = [s for s in range(first_step, first_step + steps) if s == 1 or s % 10 == 0]
        write_lines(run / "ranks.jsonl", [ranks_of_step(plan, step, layers) for step in told])
    if extras:
        _write_extras(run)
    return run


def ranks_of_step(plan: TrainPlan, step: int, layers: int = 1) -> dict[str, object]:
    """A line of ranks.jsonl: the last stage computes longest, the first keeps most activations,
    and experts on higher ranks are the more popular."""
    layout = fit(plan, PRESETS["smollm2-135m"])
    random = np.random.default_rng(step)
    records = []
    for rank in range(plan.world_size):
        place = layout.place(rank)
        records.append(
            RankRecord(
                rank=rank,
                pp=place.pp,
                dp=place.dp,
                tp=place.tp,
                stages=layout.stages_of(place.pp),
                peak_memory_bytes=int(2e9 + 6e8 * (plan.pp - place.pp) + 7e6 * rank),
                compute_seconds=float(0.7 + 0.2 * place.pp + 0.03 * rank + 0.01 * random.random()),
                tokens_received=int(30_000 + 2_500 * rank + 900 * random.random()) if layers else 0,
            )
        )
    seconds = 1.1 * max(record.compute_seconds for record in records) + 2.0 * (step == 1)
    return rank_line(step, seconds, records)


def write_lines(path: Path, items: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def _write_extras(run: Path) -> None:
    machine = {"processor": "a fast one", "threads": 2, "python": "3.11.7", "torch": "2.13.0"}
    (run / "machine.json").write_text(json.dumps(machine))
    (run / "hardware.json").write_text(json.dumps({"peak_flops": {"a fast one": 5e11}}))
    question = "Write a Python function that reverses a list."
    texts = {
        "dense": "Use `reversed`:\n\ndef reverse(items):\n    return list(reversed(items))",
        "upcycled": "Use `reversed`:\n\ndef reverse(items):\n    return list(reversed(items))",
        "trained": "def reverse(items):\n    return items[::-1]",
        "trained, FP8": "def reverse(items):\n    return items[::-1]  # <b>not bold</b>",
    }
    samples = [{"prompt": question, "model": model, "text": text} for model, text in texts.items()]
    (run / "samples.json").write_text(json.dumps(samples))
    losses = {"dense": 1.7012, "upcycled": 1.7013, "dense, trained": 1.6012, "trained": 1.5808}
    models = [
        {
            "label": label,
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "standard_error": 0.021,
            "difference": loss - losses["dense"] if label != "dense" else None,
            "difference_standard_error": 0.0042 if label != "dense" else None,
        }
        for label, loss in losses.items()
    ]
    evaluation = {"sequences": 64, "tokens": 32_768, "models": models}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
