"""What `moesaic plan serve` prints is what ranks allocate that are given its plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.cli.app import run
from moesaic.parallel.group import Group
from moesaic.planning.serving.plan import ServePlan
from moesaic.serving.execution.runner import load_executor
from moesaic.serving.native import build
from moesaic.spec import ModelSpec, MoESpec
from tests.ranks import run_ranks
from tests.tiny import VOCAB_SIZE, tiny_folder

SPEC = ModelSpec(
    family="mixtral",
    vocab_size=VOCAB_SIZE,
    hidden_dim=72,
    ffn_dim=160,
    num_layers=5,
    num_heads=9,
    num_kv_heads=3,
    head_dim=8,
    max_positions=64,
    tied_embeddings=True,
    moe=MoESpec(num_experts=8, top_k=2, expert_dim=160),
    moe_layers=tuple(range(5)),
)
"""Heads as the demo's model has them: 6 + 3 over two ranks."""


def allocated(folder: str, plan: str, options: dict) -> list[tuple[int, int]]:
    group = Group.of_all()
    executor = load_executor(Path(folder), ServePlan.load(plan), group=group, **options)
    found = [(one.weights, one.kv_cache) for one in executor.memory]
    if group.rank:
        executor.follow()
    else:
        executor.close()
    return found


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("kernels", ["plain", "packed"])
def test_ranks_allocate_what_was_printed(ranks, kernels, tmp_path, capsys):
    if kernels == "packed" and not build.available():
        pytest.skip("the C++ kernels cannot be used here")
    folder, path = tiny_folder(tmp_path / "moe", SPEC, tokenizer=False), tmp_path / "plan.json"
    words = ["plan", "serve", str(folder), "--cluster", f"cpu{ranks}", "--context", "32"]
    words += ["--kernels", kernels, "--weights", "int8" if kernels == "packed" else "bfloat16"]
    assert run([*words, "--kv-tokens", "480", "--out", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["shapes"]["heads"][0] == {2: [6, 3], 5: [2, 2, 3, 1, 1]}[ranks]
    printed = [(one["weight_bytes"], one["kv_bytes"]) for one in shown["ledger"]]
    options = {"implementation": "native" if kernels == "packed" else "torch"}
    for found in run_ranks(ranks, allocated, str(folder), str(path), options):
        assert found == printed
