"""Any number of ranks computes what one does, and each allocates what the ledger says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.parallel.group import Group
from moesaic.planning.serving.ledger import ledger
from moesaic.planning.serving.plan import ServePlan
from moesaic.serving.execution.batch import Batch, Chunk
from moesaic.serving.execution.runner import load_executor
from moesaic.spec import MoESpec
from tests.greedy import greedy
from tests.ranks import run_ranks
from tests.tiny import LLAMA, tiny_folder, token_ids

WORLDS = (2, 3, 5, 7, 8)

SPECS = {
    "9 heads on 3": LLAMA.replace(
        family="skywork",
        num_heads=9,
        num_kv_heads=3,
        num_layers=4,
        qkv_bias=True,
        out_bias=True,
        qk_norm=True,
        tied_embeddings=True,
    ),
    "36 heads, 16 experts": LLAMA.replace(
        family="skywork",
        num_heads=36,
        num_kv_heads=36,
        head_dim=4,
        num_layers=4,
        moe=MoESpec(
            num_experts=16, top_k=2, expert_dim=40, gate_norm_scale=1.0, shared_expert_dim=24
        ),
        moe_layers=(1, 2, 3),
    ),
}

PROMPTS = [token_ids(1, length, seed=length)[0].tolist() for length in (2, 19, 7)]

PLAN = ServePlan(weights="float32", kv_cache="float32", block_tokens=4, kv_blocks=32)


def plans(spec, size):
    """Every way to share this model among so many ranks."""
    for heads in ("rotated", "fixed"):
        for experts in ("columns", "whole") if spec.moe else ("columns",):
            yield replace(PLAN, ranks=size, heads=heads, experts=experts)
    shares = tuple(float(1 + rank % 3) for rank in range(size))
    yield replace(PLAN, ranks=size, shares=shares)


def ask(executor):
    """Scores at every position of a batch, in two pieces, and greedy answers."""
    tokens = [tuple(ids) for ids in token_ids(2, 16, seed=9).tolist()]
    parts = []
    for start, end in ((0, 11), (11, 16)):
        chunks = tuple(
            Chunk(ids[start:end], start, (n, 8 + n, 4 + n, 12 + n), end - start)
            for n, ids in enumerate(tokens)
        )
        result = executor.step(Batch(chunks, experts=True))
        parts.append(result.logits_NV)
    return torch.cat(parts), result.experts_LTK, greedy(executor, PROMPTS, new=6, chunk=8)


def options(plan):
    dtype = "bfloat16" if plan.weights == "bfloat16" else "float32"
    return {"dtype": dtype, "max_step_tokens": 64, "implementation": "torch"}


def compare(folders: dict[str, str], answers: str) -> None:
    wanted = torch.load(answers, weights_only=True)
    group = Group.of_all()
    for name, folder in folders.items():
        for plan in plans(SPECS[name], group.size):
            executor = load_executor(Path(folder), plan, group=group, **options(plan))
            planned = ledger(executor.layout, dtype="float32", packed=False, max_step_tokens=64)
            for found, expected in zip(executor.memory, planned, strict=True):
                assert found.weights == expected.weight_bytes, f"{name}, {plan}"
                assert found.kv_cache == expected.kv_bytes, f"{name}, {plan}"
            if group.rank:
                executor.follow()
                continue
            logits, experts, tokens = ask(executor)
            executor.close()
            torch.testing.assert_close(logits, wanted[name]["logits"], atol=1e-4, rtol=0)
            assert tokens == wanted[name]["tokens"], f"{name}, {plan}"
            if experts is not None:
                assert torch.equal(experts, wanted[name]["experts"]), f"{name}, {plan}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    top = tmp_path_factory.mktemp("ranks")
    folders, wanted = {}, {}
    for name, spec in SPECS.items():
        folder = tiny_folder(top / name, spec, tokenizer=False)
        logits, experts, tokens = ask(load_executor(folder, PLAN, **options(PLAN)))
        folders[name] = str(folder)
        wanted[name] = {"logits": logits, "experts": experts, "tokens": tokens}
    torch.save(wanted, top / "answers.pt")
    return folders, str(top / "answers.pt")


@pytest.mark.parametrize("size", WORLDS)
def test_any_number_of_ranks_answers_as_one_does_and_allocates_what_the_ledger_says(models, size):
    run_ranks(size, compare, *models)
