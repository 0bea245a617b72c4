"""Any number of ranks computes what one does, and each allocates what the ledger says."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.errors import MoesaicError, PlanError
from moesaic.parallel.config import LaunchConfig
from moesaic.parallel.group import Group
from moesaic.parallel.launch import start_ranks
from moesaic.planning.serving.ledger import ledger
from moesaic.planning.serving.plan import ServePlan
from moesaic.serving.execution import ranks
from moesaic.serving.execution.batch import Batch, Chunk
from moesaic.serving.execution.runner import load_executor
from moesaic.serving.native import build
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


def compare_packed(folders: dict[str, str], answers: str) -> None:
    wanted = torch.load(answers, weights_only=True)
    group = Group.of_all()
    for name, folder in folders.items():
        for weights in ("bfloat16", "int8"):
            plan = replace(PLAN, ranks=group.size, weights=weights, kv_cache="bfloat16")
            executor = load_executor(
                Path(folder), plan, group=group, max_step_tokens=64, implementation="native"
            )
            planned = ledger(executor.layout, dtype="bfloat16", packed=True, max_step_tokens=64)
            for found, expected in zip(executor.memory, planned, strict=True):
                assert found.weights == expected.weight_bytes, f"{name}, {plan}"
                assert found.kv_cache == expected.kv_bytes, f"{name}, {plan}"
            if group.rank:
                executor.follow()
                continue
            logits, _, _ = ask(executor)
            executor.close()
            # The median: a router may decide a near tie otherwise, and that token differs by more.
            exact = wanted[name]["logits"]
            error = (logits - exact).abs().mean(dim=1).median() / exact.std()
            assert float(error) < 0.03, f"{name}, {weights}, {error=}"


@pytest.mark.skipif(not build.available(), reason="the C++ kernels cannot be used here")
@pytest.mark.parametrize("size", [3, 7])
def test_packed_layers_on_several_ranks_are_near_and_allocate_what_the_ledger_says(models, size):
    run_ranks(size, compare_packed, *models)


def test_a_batch_survives_being_told():
    chunks = (Chunk((5, 9, 2), 16, (4, 0), 2), Chunk((1,), 0, (), 0), Chunk((7,), 3, (9, 9), 1))
    for batch in (Batch(chunks), Batch(chunks[:1], experts=True), Batch(chunks, hidden=True)):
        assert ranks.decode(ranks.encode(batch)) == batch


class CountingWatch:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def progress(self, step: int, doing: str = "") -> None:
        self.steps.append(step)


def idle(folder: str) -> list[int]:
    ranks.ALIVE_SECONDS = 0.2
    group, watch = Group.of_all(), CountingWatch()
    plan = replace(PLAN, ranks=group.size)
    executor = load_executor(Path(folder), plan, group=group, watch=watch, **options(plan))
    if group.rank:
        executor.follow()
    else:
        step = Batch((Chunk((5, 6), 0, (0,)),))
        before = executor.step(step).logits_NV
        time.sleep(2)
        assert torch.equal(executor.step(step).logits_NV, before)
        executor.close()
        executor.close()
    return watch.steps


def test_idle_ranks_are_told_that_rank_0_lives(models):
    for steps in run_ranks(3, idle, models[0]["9 heads on 3"]):
        assert steps.count(1) > 3, "no sign of life between two steps"
        assert steps[-1] == 2


def refuse(folder: str) -> str:
    group = Group.of_all()
    with pytest.raises(PlanError) as found:
        load_executor(Path(folder), replace(PLAN, ranks=3), group=group, **options(PLAN))
    return str(found.value)


def test_a_plan_for_another_number_of_ranks_is_refused_on_all_of_them(models):
    said = run_ranks(2, refuse, models[0]["9 heads on 3"])
    assert (
        said == ["The plan is for 3 ranks, but 2 were started. Start 3, or take another plan."] * 2
    )


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_is_named_and_no_wrong_token_is_answered(models, tmp_path, dies):
    folder = models[0]["9 heads on 3"]
    asked = {"folder": str(tmp_path), "model": folder, "size": 2, "dies": dies, "at": 27}
    command = [sys.executable, "-m", "tests.serving_worker", json.dumps(asked)]
    began = time.monotonic()
    with pytest.raises(MoesaicError, match=f"Rank {dies} was ended by SIGKILL"):
        start_ranks(command, size=2, config=LaunchConfig(max_restarts=0))
    assert time.monotonic() - began < 90
    alone = load_executor(Path(folder), PLAN, **options(PLAN))
    [right] = greedy(alone, [[5]], new=20)
    answered = [int(line) for line in (tmp_path / "tokens").read_text().split()]
    assert len(answered) == 26
    assert answered == (right + right)[:26]
