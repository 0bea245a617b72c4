"""8-bit weights and an 8-bit cache beside bfloat16: held-out loss, memory, and tokens a second.

    .venv/bin/python benchmarks/serving_formats.py demo/trained/model demo/tokens

The loss is that of the executor itself, so it has in it all that serving rounds: weights as they
are stored, keys and values as they are cached, and activations in bfloat16. Documents do not see
each other. Differences are taken sequence by sequence against bfloat16 weights and cache. Speeds
are measured in turns, a few tokens each time, so that whatever else the machine does hits all
alike; the best of the turns counts.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from measuring_machine import machine, save

from moesaic.data.tokenfolder import IGNORED, TokenFolder
from moesaic.evaluation.heldout import HeldoutLoss, SequenceLoss
from moesaic.planning.serving.layout import fit
from moesaic.planning.serving.plan import ServePlan
from moesaic.serving.execution.batch import Batch, Chunk
from moesaic.serving.execution.layers import allocate_cache
from moesaic.serving.execution.runner import ModelExecutor, load_executor

FORMATS = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "float8": ("float8", "bfloat16"),
    "int8": ("int8", "bfloat16"),
    "bfloat16, float8 cache": ("bfloat16", "float8"),
    "int8, float8 cache": ("int8", "float8"),
}
"""Weights and cache of each."""

PROMPT, NEW, BATCHES = 128, 12, (1, 8)
BLOCKS = 128


def load(model: Path, implementation: Any) -> dict[str, ModelExecutor]:
    """Every format; those that differ in their cache alone share their weights."""
    loaded: dict[str, ModelExecutor] = {}
    for name, (weights, kv_cache) in FORMATS.items():
        plan = ServePlan(weights=weights, kv_cache=kv_cache, kv_blocks=BLOCKS)
        if weights not in loaded:
            loaded[name] = load_executor(
                model, plan, max_step_tokens=1024, implementation=implementation
            )
            continue
        layout = fit(plan, loaded[weights].spec)
        loaded[name] = ModelExecutor(
            layout,
            loaded[weights].layers,
            allocate_cache(layout, 0, BLOCKS),
            max_step_tokens=1024,
        )
    return loaded


def heldout(executor: ModelExecutor, folder: TokenFolder, sequences: int) -> HeldoutLoss:
    """Loss over rows spread evenly over the held-out split, each document a sequence of its own."""
    (source,) = folder.sources
    rows = folder.num_sequences("heldout", source)
    losses = []
    for row in (number * rows // sequences for number in range(sequences)):
        inputs, targets, documents = (
            torch.as_tensor(part) for part in folder.row("heldout", source, row)
        )
        nats = 0.0
        for document in documents.unique().tolist():
            where = documents == document
            tokens = tuple(inputs[where].tolist())
            blocks = tuple(range(-(-len(tokens) // executor.block_tokens)))
            step = executor.step(Batch((Chunk(tokens, 0, blocks, logits=len(tokens)),)))
            log_probs = step.logits_NV.log_softmax(dim=-1)
            wanted = targets[where]
            counts = wanted != IGNORED
            chosen = log_probs[counts].gather(1, wanted[counts, None].long())
            nats -= float(chosen.sum(dtype=torch.float64))
        losses.append(
            SequenceLoss(
                source=source,
                document=folder.document_of("heldout", source, row),
                nats=nats,
                tokens=int((targets != IGNORED).sum()),
            )
        )
    return HeldoutLoss(tuple(losses))


def prompts_of(folder: TokenFolder, count: int) -> list[tuple[int, ...]]:
    (source,) = folder.sources
    return [
        tuple(folder.row("heldout", source, 7 * number)[0][:PROMPT].tolist())
        for number in range(count)
    ]


def seconds_of(executor: ModelExecutor, prompts: list[tuple[int, ...]]) -> tuple[float, float]:
    """Of reading the prompts in one step, and of one decoding step after them."""
    per_sequence = -(-(PROMPT + NEW) // executor.block_tokens)
    tables = [
        tuple(range(number * per_sequence, (number + 1) * per_sequence))
        for number in range(len(prompts))
    ]
    start = time.perf_counter()
    chunks = tuple(Chunk(tokens, 0, blocks) for tokens, blocks in zip(prompts, tables, strict=True))
    tokens = executor.step(Batch(chunks)).logits_NV.argmax(dim=-1).tolist()
    middle = time.perf_counter()
    times = []
    for place in range(PROMPT, PROMPT + NEW):
        began = time.perf_counter()
        chunks = tuple(
            Chunk((token,), place, blocks) for token, blocks in zip(tokens, tables, strict=True)
        )
        tokens = executor.step(Batch(chunks)).logits_NV.argmax(dim=-1).tolist()
        times.append(time.perf_counter() - began)
    return middle - start, sorted(times)[len(times) // 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--implementation", choices=("auto", "torch", "native"), default="auto")
    given = parser.parse_args()
    folder = TokenFolder(given.tokens)
    loaded = load(given.model, given.implementation)
    prompts = prompts_of(folder, max(BATCHES))
    best: dict[tuple[str, int], tuple[float, float]] = {}
    for _ in range(given.rounds):
        for batch in BATCHES:
            for name, one in loaded.items():
                found = seconds_of(one, prompts[:batch])
                before = best.get((name, batch), found)
                best[name, batch] = (min(before[0], found[0]), min(before[1], found[1]))
    losses = {name: heldout(one, folder, given.sequences) for name, one in loaded.items()}
    exact = losses["bfloat16"]
    rows: list[dict[str, Any]] = []
    for name, one in loaded.items():
        difference, error = losses[name].minus(exact)
        [memory] = one.memory
        rows.append(
            {
                "format": name,
                "loss": losses[name].loss,
                "difference": difference,
                "standard_error": error,
                "weight_bytes": memory.weights,
                "kv_bytes_a_token": memory.kv_cache // (BLOCKS * one.block_tokens),
                "speed": {
                    str(batch): {
                        "prefill_tokens_per_second": batch * PROMPT / best[name, batch][0],
                        "decode_tokens_per_second": batch / best[name, batch][1],
                    }
                    for batch in BATCHES
                },
            }
        )
    save(
        "serving_formats",
        {
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "tokens": exact.tokens,
            "prompt_tokens": PROMPT,
            "formats": rows,
        },
    )
    print("| format | loss | difference | weights | KV a token | prefill 8 | decode 1 | decode 8 |")
    print("|---" * 8 + "|")
    for row in rows:
        one, eight = (row["speed"][str(batch)] for batch in BATCHES)
        print(
            f"| {row['format']} | {row['loss']:.4f} | {row['difference']:+.4f} "
            f"| {row['weight_bytes'] / 1e6:.0f} MB | {row['kv_bytes_a_token'] / 1e3:.1f} kB "
            f"| {eight['prefill_tokens_per_second']:.0f}/s "
            f"| {one['decode_tokens_per_second']:.1f}/s "
            f"| {eight['decode_tokens_per_second']:.1f}/s |"
        )


if __name__ == "__main__":
    main()
