"""A training step of the demo's MoE, against Hugging Face transformers on the same weights.

SmolLM2-135M becomes 8 experts, top-2 (Mixtral's form, which transformers can run), and both
sides train it on the same tokens, 4 x 512 a step: forward, loss, backward, clip, fused AdamW.
    float32     float32 weights and moments, bfloat16 compute (transformers: autocast)
    bfloat16    everything bfloat16, one pair
Each measurement is a process of its own; the two sides alternate, pair by pair. First every
experts implementation of transformers is tried once, and its fastest is the one that we meet.
Ours is the step that `moesaic train` takes, balance loss and statistics included.

    python benchmarks/train_step.py [--pairs 5] [--steps 4] [--folder SCRATCH]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measuring_machine import machine, save

EXPERTS, TOP_K = 8, 2
BATCH, LENGTH = 4, 512
WARMUP = 2
THREADS = 2
THEIRS = ("grouped_mm", "eager")
"""Not batched_mm: it copies an expert's weights for every token, minutes a step here."""
RESULT = "train_step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help=f"timed, after {WARMUP} that are not")
    parser.add_argument("--folder", type=Path, help="where 2 GB of weights go; a temporary folder")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(*arguments.child)
        return
    scratch = Path(tempfile.mkdtemp(prefix="train-step-", dir=arguments.folder))
    try:
        result = measure(scratch, arguments.pairs, arguments.steps)
    finally:
        shutil.rmtree(scratch)
    report(result)
    save(RESULT, result)


def measure(scratch: Path, pairs: int, steps: int) -> dict[str, object]:
    """Everything, as one JSON object."""
    facts = child("build", scratch, steps)
    first = {name: child("transformers", scratch, 1, "float32", name) for name in THEIRS}
    best = min(first, key=lambda name: first[name]["seconds"])
    print(f"transformers' fastest experts here: {best}", flush=True)
    rate = child("matmul", scratch, steps)["flops_per_second"]
    precisions: dict[str, object] = {}
    for precision, times in (("float32", pairs), ("bfloat16", 1)):
        runs = []
        for index in range(times):
            ours = ("moesaic", scratch, steps, precision)
            theirs = ("transformers", scratch, steps, precision, best)
            order = (ours, theirs) if index % 2 == 0 else (theirs, ours)
            pair = {what[0]: child(*what) for what in order}
            pair["ratio"] = pair["transformers"]["seconds"] / pair["moesaic"]["seconds"]
            runs.append(pair)
            print(precision, json.dumps(pair), flush=True)
        seconds = {
            side: statistics.median(run[side]["seconds"] for run in runs)
            for side in ("moesaic", "transformers")
        }
        precisions[precision] = {
            "tokens_per_second": {side: BATCH * LENGTH / s for side, s in seconds.items()},
            "median_ratio": statistics.median(run["ratio"] for run in runs),
            "matrix_rate_share": facts["flops"] / seconds["moesaic"] / rate,
            "runs": runs,
        }
    return {
        "machine": machine(),
        "threads": THREADS,
        "tokens_a_step": BATCH * LENGTH,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "transformers_version": facts["transformers"],
        "transformers_experts": best,
        "transformers_experts_seconds": {name: run["seconds"] for name, run in first.items()},
        "bfloat16_matrix_flops_per_second": rate,
        "step_flops": facts["flops"],
        "precisions": precisions,
    }


def report(result: dict[str, object]) -> None:
    """One table for people."""
    print(
        f"\nbfloat16 matrix products: {result['bfloat16_matrix_flops_per_second'] / 1e9:.0f} GF/s"
    )
    for precision, figures in result["precisions"].items():
        speeds = figures["tokens_per_second"]
        print(
            f"{precision} weights: moesaic {speeds['moesaic']:.0f} tokens/s, transformers "
            f"({result['transformers_experts']}) {speeds['transformers']:.0f}, "
            f"median ratio {figures['median_ratio']:.2f}; "
            f"{figures['matrix_rate_share']:.0%} of the matrix rate"
        )


def child(what: str, *rest: object) -> dict[str, object]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", what, *map(str, rest)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(what: str, folder: str, steps: str, precision: str = "", experts: str = "") -> None:
    """One measurement; its last line on stdout is a JSON object."""
    import torch

    from moesaic.memory import reused_memory

    torch.set_num_threads(THREADS)
    scratch = Path(folder)
    if what == "build":
        result = build(scratch, int(steps))
    elif what == "matmul":
        result = {"flops_per_second": matrix_rate()}
    else:
        dtype = getattr(torch, precision)
        start = moesaic_step if what == "moesaic" else transformers_step
        tokens = torch.load(scratch / "tokens.pt")
        with reused_memory() if what == "moesaic" else contextlib.nullcontext():
            result = time_steps(start(scratch / "moe", dtype, experts), tokens, int(steps))
    print(json.dumps(result))


def build(scratch: Path, steps: int) -> dict[str, object]:
    """The MoE folder, and as many real tokens as any side will read."""
    import sysconfig

    import torch
    import transformers

    from moesaic.checkpoint.folder import read_spec
    from moesaic.studies.smollm2 import smollm2_folder
    from moesaic.upcycling.config import UpcycleConfig
    from moesaic.upcycling.upcycle import upcycle

    dense = smollm2_folder(scratch / "dense")
    moe = scratch / "moe"
    upcycle(UpcycleConfig(dense=dense, out=moe, experts=EXPERTS, top_k=TOP_K, prove=False))
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    needed = (steps + WARMUP) * BATCH * (LENGTH + 1)
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(ids) >= needed:
            break
        ids += tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    torch.save(torch.tensor(ids[:needed]).view(-1, BATCH, LENGTH + 1), scratch / "tokens.pt")
    flops = 3 * read_spec(moe).flops_per_token((LENGTH + 1) / 2) * BATCH * LENGTH
    return {"flops": flops, "transformers": transformers.__version__}


def matrix_rate(size: int = 4096, times: int = 7) -> float:
    """Operations a second of a square bfloat16 matrix product, median."""
    import torch

    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def moesaic_step(folder: Path, dtype, _experts: str) -> Callable:  # noqa: ANN001
    """What `moesaic train` does in a step."""
    import torch

    from moesaic.data.batches import Batch
    from moesaic.model.build import load_model
    from moesaic.moe.config import RoutingConfig
    from moesaic.parallel.gradients import gradient_norm, update
    from moesaic.training.config import OptimizerConfig
    from moesaic.training.optimizer import build_optimizer
    from moesaic.training.sharded import ShardedModel
    from moesaic.training.step import accumulate

    whole = load_model(folder, dtype=dtype)
    whole.compute_dtype = torch.bfloat16
    model = ShardedModel.alone(whole)
    optimizer = build_optimizer(model.parameters, OptimizerConfig())
    coefficients = torch.full((len(model.spec.moe_layers),), 0.01)

    def step(inputs, targets) -> float:  # noqa: ANN001
        batch = Batch(inputs, targets, torch.zeros_like(inputs))
        done = accumulate(model, [batch], routing=RoutingConfig(), coefficients_L=coefficients)
        update(optimizer, norm=gradient_norm(model.parameters), clip=1.0)
        return float(done.loss)

    return step


def transformers_step(folder: Path, dtype, experts: str) -> Callable:  # noqa: ANN001
    """A plain loop over the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation=experts, attn_implementation="sdpa"
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32)

    def step(inputs, targets) -> float:  # noqa: ANN001
        with autocast:
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def time_steps(step: Callable, rows, steps: int) -> dict[str, object]:  # noqa: ANN001
    """Median seconds of the steps after the warm-up, and every loss."""
    seconds, losses = [], []
    for row in rows[: WARMUP + steps]:
        start = time.perf_counter()
        losses.append(step(row[:, :-1].contiguous(), row[:, 1:].contiguous()))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[WARMUP:]),
        "step_seconds": seconds,
        "losses": losses,
    }


if __name__ == "__main__":
    main()
