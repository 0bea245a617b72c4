"""A model folder becomes an FP8 one that others can read, and its cost is told truly."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moesaic.checkpoint.folder import read_config
from moesaic.errors import ConfigError, FolderError
from moesaic.model.build import load_model, save_model
from moesaic.quantizing.config import QuantizeConfig
from moesaic.quantizing.quantize import quantize
from tests.tiny import MIXTRAL, TINY, tiny_folder, tiny_model

SCHEMES = ("channel", "tensor")
FORMATS = (("float8", "channel"), ("float8", "tensor"), ("int8", "channel"))
DTYPES = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
IGNORED = ("embed_tokens", "lm_head", "norm", "gate.weight", "shared_expert_gate", ".bias")
"""Names of what stays in 16 bits, written out again on purpose."""


def stays(name: str) -> bool:
    return any(part in name for part in IGNORED)


@pytest.mark.parametrize(("format", "scheme"), FORMATS)
@pytest.mark.parametrize("spec", TINY.values(), ids=TINY.keys())
def test_matrices_get_8_bits_with_scales_and_the_rest_stays(tmp_path, spec, format, scheme):
    before = load_file(
        tiny_folder(tmp_path / "m", spec, dtype=torch.bfloat16) / "model.safetensors"
    )
    quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q", scheme=scheme, format=format))
    after = load_file(tmp_path / "q" / "model.safetensors")
    rounded = {name for name in before if not stays(name)}
    assert set(after) == set(before) | {f"{name}_scale" for name in rounded}
    for name, weight in before.items():
        if stays(name):
            assert torch.equal(after[name], weight)
            continue
        assert after[name].dtype == DTYPES[format]
        scale = after[f"{name}_scale"]
        assert scale.dtype == torch.float32
        assert scale.shape == ((weight.shape[0], 1) if scheme == "channel" else (1,))
        largest = weight.float().abs().amax(dim=1, keepdim=True)
        error = (after[name].float() * scale - weight.float()).abs()
        limit = largest if scheme == "channel" else before_largest(before, name)
        allowed = torch.maximum(weight.abs().float() / 15, limit / 448)
        allowed = limit / 127 * 0.5001 if format == "int8" else allowed
        assert bool((error <= allowed).all())


def before_largest(before: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    pair = [name, name.replace(".w1.", ".w3."), name.replace(".w3.", ".w1.")]
    pair += [name.replace("gate_proj", "up_proj"), name.replace("up_proj", "gate_proj")]
    return torch.stack([before[other].float().abs().amax() for other in pair]).amax()


@pytest.mark.parametrize("spec", [MIXTRAL, TINY["qwen3_moe"]], ids=["mixtral", "qwen3_moe"])
def test_per_tensor_w1_and_w3_of_an_expert_share_their_scale(tmp_path, spec):
    model = tiny_model(spec)
    with torch.no_grad():  # make their own scales differ by much
        model.model.layers["0"].block_sparse_moe.experts.w3 *= 5
    save_model(model, tmp_path / "m")
    quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q", scheme="tensor"))
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    names = ("w1", "w3", "w2") if spec is MIXTRAL else ("gate_proj", "up_proj", "down_proj")
    experts = "block_sparse_moe" if spec is MIXTRAL else "mlp"
    for expert in range(spec.moe.num_experts):
        w1, w3, w2 = (
            float(tensors[f"model.layers.0.{experts}.experts.{expert}.{name}.weight_scale"])
            for name in names
        )
        assert w1 == w3 != w2


@pytest.mark.parametrize(("format", "scheme"), FORMATS)
def test_a_quantised_folder_loads_as_its_weights_multiplied_out(tmp_path, format, scheme):
    tiny_folder(tmp_path / "m", MIXTRAL)
    quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q", scheme=scheme, format=format))
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    state = load_model(tmp_path / "q").state_dict()
    for expert in range(MIXTRAL.moe.num_experts):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"
        wide = tensors[name].float() * tensors[f"{name}_scale"]
        assert torch.equal(state["model.layers.1.block_sparse_moe.experts.w2"][expert], wide)


def test_the_weight_error_is_that_of_the_weights_on_disk(tmp_path):
    tiny_folder(tmp_path / "m", MIXTRAL)
    summary = quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "mq")
    errors = {}
    for layer in range(MIXTRAL.num_layers):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        wide = after[name].double() * after[f"{name}_scale"].double()
        errors[name] = (wide - before[name].double()).norm(), before[name].double().norm()
    told = summary["kinds"]["self_attn.q_proj"]
    total = [math.hypot(*(float(pair[part]) for pair in errors.values())) for part in (0, 1)]
    ratios = {name: float(error / norm) for name, (error, norm) in errors.items()}
    assert told["tensors"] == MIXTRAL.num_layers
    assert told["relative_rms"] == pytest.approx(total[0] / total[1], rel=1e-5)
    assert told["worst_tensor"] == max(ratios, key=ratios.get)
    assert told["worst_relative_rms"] == pytest.approx(max(ratios.values()), rel=1e-5)
    assert 0.01 < told["relative_rms"] < 0.04
    assert json.loads((tmp_path / "q" / "quantization.json").read_text()) == summary


def test_bytes_told_are_bytes_on_disk(tmp_path):
    tiny_folder(tmp_path / "m", MIXTRAL, dtype=torch.bfloat16)
    summary = quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q"))
    for key, name in (("bytes_before", "m"), ("bytes_after", "q")):
        tensors = load_file(tmp_path / name / "model.safetensors").values()
        assert summary[key] == sum(tensor.nbytes for tensor in tensors)


def test_the_tokenizer_comes_along(tmp_path):
    tiny_folder(tmp_path / "m", MIXTRAL)
    quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q"))
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_int8_with_one_scale_a_matrix_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="int8 weights are read with a scale a row"):
        QuantizeConfig(model=tmp_path, out=tmp_path / "q", format="int8", scheme="tensor")


@pytest.mark.parametrize(("format", "word"), [("float8", "FP8"), ("int8", "int8")])
def test_quantising_twice_is_refused(tmp_path, format, word):
    tiny_folder(tmp_path / "m", MIXTRAL)
    quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q", format=format))
    with pytest.raises(ConfigError, match=f"{word} already"):
        quantize(QuantizeConfig(model=tmp_path / "q", out=tmp_path / "q2"))
    assert not (tmp_path / "q2").exists()


def test_a_weight_that_is_not_finite_is_refused_and_leaves_nothing(tmp_path):
    model = tiny_model(MIXTRAL)
    with torch.no_grad():
        model.model.layers["2"].block_sparse_moe.experts.w2[3, 0, 0] = math.nan
    save_model(model, tmp_path / "m")
    with pytest.raises(FolderError, match=r"layers\.2\..*experts\.3\.w2.* NaN"):
        quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q"))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def layers_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        layers.setdefault(module, {})[part] = tensor
    return layers


@pytest.mark.slow
@pytest.mark.parametrize(("format", "scheme"), FORMATS)
def test_compressed_tensors_itself_reads_every_weight_the_same(tmp_path, format, scheme):
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors import compressors

    name = "IntQuantizationCompressor" if format == "int8" else "FloatQuantizationCompressor"
    tiny_folder(tmp_path / "m", MIXTRAL)
    quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q", scheme=scheme, format=format))
    stated = read_config(tmp_path / "q")["quantization_config"]
    config = compressed_tensors.QuantizationConfig.model_validate(stated)
    (group,) = config.config_groups.values()
    state = load_model(tmp_path / "q").state_dict()
    compared = 0
    for module, tensors in layers_of(tmp_path / "q").items():
        if "weight_scale" not in tensors or ".experts." in module:
            continue
        theirs = getattr(compressors, name).decompress(tensors, group)["weight"]
        assert torch.equal(theirs.float(), state[f"{module}.weight"])
        compared += 1
    assert compared == 4 * MIXTRAL.num_layers


@pytest.mark.slow
def test_transformers_reads_an_int8_folder_and_rounds_activations_too(tmp_path):
    pytest.importorskip("compressed_tensors")
    tiny_folder(tmp_path / "m", TINY["llama"])
    quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q", format="int8"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = load_model(tmp_path / "q")(ids)
        difference = float((their_logits(tmp_path / "q", ids) - ours).std() / ours.std())
    # Steps of 1/127 of a token's largest activation, through three layers.
    assert 1e-3 < difference < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_reads_a_quantised_folder(tmp_path, scheme):
    pytest.importorskip("compressed_tensors")
    tiny_folder(tmp_path / "m", TINY["llama"])
    quantize(QuantizeConfig(model=tmp_path / "m", out=tmp_path / "q", scheme=scheme))
    config = read_config(tmp_path / "q")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours = load_model(tmp_path / "q")(ids)
        rounding = float((their_logits(tmp_path / "q", ids) - ours).abs().mean())
        # Without its rounding of activations, transformers computes the same.
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
        (tmp_path / "q" / "config.json").write_text(json.dumps(config))
        assert torch.allclose(their_logits(tmp_path / "q", ids), ours, atol=1e-5, rtol=0)
    assert rounding > 1e-3


def their_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
