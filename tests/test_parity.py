"""The decoder computes what Hugging Face transformers computes, from the same folders.

Gating logit normalisation has no class in transformers. Its reference is a plain loop in
float64, and, with the normalisation off, Mixtral.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.checkpoint.folder import WeightReader, read_spec, write_config
from moesaic.model.build import load_model, save_model
from moesaic.model.cache import KVCache
from moesaic.model.transformer import Transformer
from moesaic.spec import ModelSpec, MoESpec, RopeSpec, spec_to_hf
from tests.tiny import (
    EVERY_LAYER,
    LLAMA,
    MIXTRAL,
    MOE,
    QWEN2,
    QWEN3,
    TINY,
    randomize,
    tiny_folder,
    tiny_model,
    token_ids,
)

LENGTH = 24
"""Positions compared. More than any window or original context below."""

TOLERANCE = 1e-5
"""Of float32 logits of order 1 to 10: some ten roundings of their last bit."""

LLAMA3_ROPE = RopeSpec(
    theta=5_000.0,
    scaling="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=16,
)
DYNAMIC = {
    "max_positions": 12,
    "rope": RopeSpec(scaling="dynamic", factor=3.0, original_max_positions=12),
}
SHARED = TINY["qwen2_moe"]

SPECS: dict[str, ModelSpec] = {
    "llama": LLAMA,
    "llama, llama3 rope, tied": LLAMA.replace(rope=LLAMA3_ROPE, tied_embeddings=True),
    "llama, linear rope": LLAMA.replace(rope=RopeSpec(scaling="linear", factor=4.0)),
    "llama, dynamic rope": LLAMA.replace(**DYNAMIC),
    "llama, biases": LLAMA.replace(qkv_bias=True, out_bias=True),
    "llama, head_dim, one kv head": LLAMA.replace(head_dim=20, num_kv_heads=1),
    "mistral, window": TINY["mistral"],
    "mistral, no window, head_dim": LLAMA.replace(family="mistral", head_dim=16),
    "qwen2": QWEN2,
    "qwen2, two layers slide, tied": QWEN2.replace(
        sliding_window=5, sliding_layers=(1, 2), tied_embeddings=True
    ),
    "qwen2, first layer slides": QWEN2.replace(sliding_window=5, sliding_layers=(0,)),
    "qwen3": QWEN3,
    "qwen3, biases, tied, a layer slides": QWEN3.replace(
        qkv_bias=True,
        out_bias=True,
        tied_embeddings=True,
        sliding_window=5,
        sliding_layers=(2,),
    ),
    "skywork dense": TINY["skywork dense"],
    "mixtral": MIXTRAL,
    "mixtral, top-1": MIXTRAL.replace(moe=MoESpec(num_experts=4, top_k=1, expert_dim=24)),
    "mixtral, window, llama3 rope, tied": MIXTRAL.replace(
        sliding_window=6, sliding_layers=EVERY_LAYER, rope=LLAMA3_ROPE, tied_embeddings=True
    ),
    "mixtral, dynamic rope, head_dim": MIXTRAL.replace(head_dim=16, **DYNAMIC),
    "qwen2_moe": SHARED,
    "qwen2_moe, every 2nd layer, renormalised": SHARED.replace(
        num_layers=4,
        moe_layers=(1, 3),
        moe=MoESpec(num_experts=4, top_k=3, expert_dim=24, shared_expert_dim=16),
    ),
    "qwen2_moe, not renormalised, first layer dense, no bias": SHARED.replace(
        qkv_bias=False,
        moe_layers=(1, 2),
        moe=MoESpec(num_experts=4, top_k=2, expert_dim=24, shared_expert_dim=16, renormalize=False),
    ),
    "qwen3_moe": TINY["qwen3_moe"],
    "qwen3_moe, every 2nd layer, tied, window": TINY["qwen3_moe"].replace(
        num_layers=4,
        moe_layers=(1, 3),
        tied_embeddings=True,
        sliding_window=6,
        sliding_layers=(0, 1, 2, 3),
    ),
    "qwen3_moe, not renormalised, all experts, linear rope": TINY["qwen3_moe"].replace(
        moe=MoESpec(num_experts=4, top_k=4, expert_dim=24, renormalize=False),
        rope=RopeSpec(scaling="linear", factor=2.0),
    ),
    "skywork moe without normalisation": LLAMA.replace(
        family="skywork", ffn_dim=24, moe=MOE, moe_layers=EVERY_LAYER
    ),
}

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def set_in_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stock_family(spec: ModelSpec) -> str:
    if spec.family != "skywork":
        return spec.family
    return "llama" if spec.moe is None else "mixtral"


def hf_load(folder: Path, spec: ModelSpec) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    if spec.family == "skywork":
        stock = spec.replace(family=stock_family(spec))
        write_config(folder, stock, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__.lower().startswith(stock_family(spec).replace("_", ""))
    return model.eval()


def hf_folder(path: Path, spec: ModelSpec) -> torch.nn.Module:
    """A random model made and saved by transformers; its config is in transformers' own words."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = path.with_name("config only")
    source.mkdir()
    write_config(source, spec.replace(family=stock_family(spec)), dtype="float32")
    config = AutoConfig.from_pretrained(source)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed=1)
    model.save_pretrained(path)
    set_in_config(path, model_type=spec.family)
    return model


@torch.no_grad()
def compare(ours: Transformer, theirs: torch.nn.Module) -> float:
    """Largest difference of logits, over a prefill, and over cached decoding after a short one."""
    ids = token_ids(2, LENGTH)
    worst = (ours(ids) - theirs(ids, use_cache=False).logits).abs().max().item()
    cache = KVCache(ours.spec, 2, LENGTH, dtype=torch.float32)
    past = None
    for start, stop in [(0, 7)] + [(i, i + 1) for i in range(7, LENGTH)]:
        piece = ids[:, start:stop]
        out = theirs(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        worst = max(worst, (ours(piece, cache=cache) - out.logits).abs().max().item())
    return worst


@every_spec
def test_a_folder_saved_by_us_gives_transformers_the_same_logits(tmp_path, spec):
    folder = tiny_folder(tmp_path / "model", spec, tokenizer=False)
    ours = load_model(folder)
    assert compare(ours, hf_load(folder, spec)) <= TOLERANCE


@every_spec
def test_a_folder_saved_by_transformers_gives_us_the_same_logits(tmp_path, spec):
    theirs = hf_folder(tmp_path / "model", spec)
    assert read_spec(tmp_path / "model") == spec
    assert compare(load_model(tmp_path / "model"), theirs) <= TOLERANCE


def test_windows_of_a_qwen2_moe_are_read_as_transformers_5_reads_them(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    windows = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    config = spec_to_hf(SHARED) | windows | {"layer_types": None}
    theirs = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**config)).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    # Between them, these say what the config's defaults make of max_window_layers.
    for types in (theirs.config.layer_types, None):
        set_in_config(tmp_path, layer_types=types)
        assert read_spec(tmp_path).sliding_layers == (0,)
        assert compare(load_model(tmp_path), theirs) <= TOLERANCE


@every_spec
def test_transformers_finds_every_tensor_and_no_other(tmp_path, spec):
    from transformers import AutoModelForCausalLM

    tiny_folder(tmp_path / "model", spec, tokenizer=False)
    write_config(tmp_path / "model", spec.replace(family=stock_family(spec)), dtype="float32")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("spec", TINY.values(), ids=TINY.keys())
def test_saving_and_loading_changes_no_bit(tmp_path, spec):
    model = tiny_model(spec)
    save_model(model, tmp_path / "model", dtype=torch.float32)
    again = load_model(tmp_path / "model").state_dict()
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


SKYWORK = {
    "lambda 1": MoESpec(num_experts=4, top_k=2, expert_dim=24, gate_norm_scale=1.0),
    "lambda 2, 8 experts, top-3": MoESpec(
        num_experts=8, top_k=3, expert_dim=24, gate_norm_scale=2.0
    ),
    "selection bias": MoESpec(
        num_experts=4, top_k=2, expert_dim=24, gate_norm_scale=0.5, selection_bias=True
    ),
    "not renormalised, shared expert": MoESpec(
        num_experts=4,
        top_k=2,
        expert_dim=24,
        gate_norm_scale=1.0,
        renormalize=False,
        shared_expert_dim=16,
    ),
}


@pytest.mark.parametrize("moe", SKYWORK.values(), ids=SKYWORK.keys())
@torch.no_grad()
def test_skywork_moe_computes_what_plain_loops_in_float64_compute(tmp_path, moe):
    spec = TINY["skywork moe"].replace(
        moe=moe, num_layers=4, moe_layers=(1, 3), qkv_bias=True, qk_norm=True
    )
    folder = tiny_folder(tmp_path / "model", spec, tokenizer=False)
    ids = token_ids(1, 11)
    expected = plain_loops(folder, spec, ids[0].tolist())
    in_float64 = load_model(folder, dtype=torch.float64)(ids)[0]
    # Rope's angles are float32 in the model, as in transformers: hence not 1e-14.
    torch.testing.assert_close(in_float64, expected, rtol=0, atol=2e-6)
    in_float32 = load_model(folder)(ids)[0]
    torch.testing.assert_close(in_float32.double(), expected, rtol=0, atol=TOLERANCE)


def plain_loops(folder: Path, spec: ModelSpec, ids: list[int]) -> Tensor:
    """Logits of every position, token by token and expert by expert, in float64."""
    with WeightReader(folder) as reader:
        w = {name: reader.read(name).double() for name in reader.entries}
    stream = [w["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(spec.num_layers):
        name = f"model.layers.{layer}"
        normed = [rms_norm(x, w[f"{name}.input_layernorm.weight"], spec) for x in stream]
        mixed = plain_attention(normed, w, f"{name}.self_attn", spec)
        stream = [x + y for x, y in zip(stream, mixed, strict=True)]
        normed = [rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], spec) for x in stream]
        feed = plain_moe if layer in spec.moe_layers else plain_mlp
        stream = [x + feed(y, w, name, spec) for x, y in zip(stream, normed, strict=True)]
    final = [rms_norm(x, w["model.norm.weight"], spec) for x in stream]
    return torch.stack([w["lm_head.weight"] @ x for x in final])


def rms_norm(x: Tensor, weight: Tensor, spec: ModelSpec) -> Tensor:
    return weight * x / math.sqrt(float((x * x).mean()) + spec.norm_eps)


def plain_attention(xs: list[Tensor], w: dict[str, Tensor], name: str, spec: ModelSpec):
    width, half = spec.head_dim, spec.head_dim // 2

    def project(x: Tensor, part: str, position: int) -> list[Tensor]:
        y = w[f"{name}.{part}_proj.weight"] @ x + w[f"{name}.{part}_proj.bias"]
        heads = list(y.split(width))
        if part == "v":
            return heads
        turned = []
        for head in heads:
            normed = rms_norm(head, w[f"{name}.{part}_norm.weight"], spec)
            out = normed.clone()
            for pair in range(half):
                angle = position * spec.rope.theta ** (-2 * pair / width)
                a, b = float(normed[pair]), float(normed[pair + half])
                out[pair] = a * math.cos(angle) - b * math.sin(angle)
                out[pair + half] = b * math.cos(angle) + a * math.sin(angle)
            turned.append(out)
        return turned

    queries = [project(x, "q", i) for i, x in enumerate(xs)]
    keys = [project(x, "k", i) for i, x in enumerate(xs)]
    values = [project(x, "v", i) for i, x in enumerate(xs)]
    outputs = []
    for i in range(len(xs)):
        heads = []
        for head in range(spec.num_heads):
            kv_head = head // (spec.num_heads // spec.num_kv_heads)
            scores = [float(queries[i][head] @ keys[j][kv_head]) for j in range(i + 1)]
            powers = [math.exp(score / math.sqrt(width)) for score in scores]
            heads.append(sum(p / sum(powers) * values[j][kv_head] for j, p in enumerate(powers)))
        outputs.append(w[f"{name}.o_proj.weight"] @ torch.cat(heads))
    return outputs


def plain_mlp(x: Tensor, w: dict[str, Tensor], layer: str, spec: ModelSpec) -> Tensor:
    return swiglu(x, w, f"{layer}.mlp", ("gate_proj", "up_proj", "down_proj"))


def swiglu(x: Tensor, w: dict[str, Tensor], name: str, parts: tuple[str, str, str]) -> Tensor:
    gate, up, down = (w[f"{name}.{part}.weight"] for part in parts)
    return down @ (F.silu(gate @ x) * (up @ x))


def plain_moe(x: Tensor, w: dict[str, Tensor], layer: str, spec: ModelSpec) -> Tensor:
    name, moe = f"{layer}.block_sparse_moe", spec.moe
    logits = [float(row @ x) for row in w[f"{name}.gate.weight"]]
    n = len(logits)
    mean = sum(logits) / n
    deviation = math.sqrt(sum((z - mean) ** 2 for z in logits) / (n - 1))
    normed = [moe.gate_norm_scale * (z - mean) / (deviation + moe.gate_norm_eps) for z in logits]
    powers = [math.exp(z) for z in normed]
    gates = [p / sum(powers) for p in powers]
    bias = [0.0] * n
    if moe.selection_bias:
        bias = w[f"{name}.gate.e_score_correction_bias"].tolist()
    chosen = sorted(range(n), key=lambda e: gates[e] + bias[e])[-moe.top_k :]
    total = sum(gates[e] for e in chosen) if moe.renormalize else 1.0
    y = torch.zeros_like(x)
    for e in chosen:
        y += gates[e] / total * swiglu(x, w, f"{name}.experts.{e}", ("w1", "w3", "w2"))
    if moe.shared_expert_dim:
        shared = swiglu(x, w, f"{name}.shared_expert", ("gate_proj", "up_proj", "down_proj"))
        y += torch.sigmoid(w[f"{name}.shared_expert_gate.weight"] @ x) * shared
    return y
