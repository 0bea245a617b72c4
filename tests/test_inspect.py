"""What `moesaic inspect` says about folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moesaic.errors import ConfigError, FolderError, SpecError
from moesaic.model.build import load_model
from moesaic.quantizing.config import QuantizeConfig
from moesaic.quantizing.quantize import quantize
from moesaic.reporting.config import InspectConfig
from moesaic.reporting.inspect import inspect, render
from tests.tiny import LLAMA, TINY, tiny_folder


@pytest.mark.parametrize("family", TINY)
def test_counts_are_those_of_the_tensors_in_the_folder(family: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", TINY[family], tokenizer=False, dtype=torch.bfloat16)
    found = inspect(InspectConfig(model=folder))
    stored = sum(parameter.numel() for parameter in load_model(folder).parameters())
    assert found["parameters"] == stored
    assert found["weight_bytes"] == found["bytes_by_dtype"]["bfloat16"] == 2 * stored
    assert found["quantization"] is None
    assert json.loads(json.dumps(found))["spec"]["hidden_dim"] == 32


def test_active_parameters_leave_out_the_experts_a_token_does_not_visit(tmp_path: Path) -> None:
    spec = TINY["mixtral"]
    assert spec.moe is not None
    found = inspect(InspectConfig(model=tiny_folder(tmp_path / "m", spec, tokenizer=False)))
    expert = 3 * spec.hidden_dim * spec.moe.expert_dim
    idle = spec.moe.num_experts - spec.moe.top_k
    assert found["active_parameters"] == found["parameters"] - 3 * idle * expert
    assert list(found["similarity"]) == ["0", "1", "2"]


def test_a_dense_model_has_no_similarity_and_the_flag_turns_it_off(tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense", LLAMA, tokenizer=False)
    moe = tiny_folder(tmp_path / "moe", TINY["mixtral"], tokenizer=False)
    assert inspect(InspectConfig(model=dense))["similarity"] is None
    assert inspect(InspectConfig(model=moe, similarity=False))["similarity"] is None


def test_operations_grow_with_the_position_of_the_token(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", LLAMA, tokenizer=False)
    near, far = (
        inspect(InspectConfig(model=folder, context=context))["flops_per_token"]
        for context in (1, 33)
    )
    # Scores and their weighted sum: two products of head_dim for each head, layer and position.
    assert far - near == 2 * 2 * 32 * LLAMA.num_layers * LLAMA.num_heads * LLAMA.head_dim


@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_an_fp8_folder_says_so_and_counts_the_same_model(scheme: str, tmp_path: Path) -> None:
    wide = tiny_folder(tmp_path / "m", TINY["skywork moe"], tokenizer=False, dtype=torch.bfloat16)
    quantize(QuantizeConfig(model=wide, out=tmp_path / "fp8", scheme=scheme))
    before, after = (inspect(InspectConfig(model=folder)) for folder in (wide, tmp_path / "fp8"))
    assert after["quantization"] == scheme
    assert after["parameters"] == before["parameters"]
    assert after["weight_bytes"] < before["weight_bytes"]
    assert after["bytes_by_dtype"]["float8_e4m3fn"] > 0
    for layer, value in after["similarity"].items():
        # e4m3 rounds by a few per cent, which moves a cosine of independent experts little.
        assert value == pytest.approx(before["similarity"][layer], abs=0.02)
    assert f"FP8 e4m3, one scale a {scheme}" in render(after)


@pytest.mark.parametrize("family", TINY)
def test_the_table_for_people_has_the_numbers(family: str, tmp_path: Path) -> None:
    spec = TINY[family]
    found = inspect(InspectConfig(model=tiny_folder(tmp_path / "m", spec, tokenizer=False)))
    table = render(found)
    assert f"{found['parameters']:,}" in table
    assert ("4 experts of inner width 24, top-2" in table) == (spec.moe is not None)
    assert ("inner width of 48" in table) == (spec.moe is None)


def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="does not exist"):
        inspect(InspectConfig(model=tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(SpecError, match="abacus"):
        inspect(InspectConfig(model=tmp_path))


def test_a_folder_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", TINY["mixtral"], tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(FolderError) as error:
        inspect(InspectConfig(model=folder))
    assert "model.layers.3" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_position_before_the_first_is_refused() -> None:
    with pytest.raises(ConfigError, match="context is 0"):
        InspectConfig(model=Path("m"), context=0)
