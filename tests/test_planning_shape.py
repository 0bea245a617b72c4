"""Shapes count what is published, agree with ModelSpec, and refuse what they cannot say."""

import json

import pytest

from moesaic.errors import PlanError
from moesaic.planning.shape import (
    MoEShape,
    preset_shapes,
    read_shape,
    shape_from_config,
    shape_of,
)
from moesaic.spec import PRESETS, MoESpec, spec_from_hf, spec_to_hf

# Billions of parameters, all and active, as the models' reports and cards print them; tolerance
# is half of the last digit printed. Active counts differ in whether the embedding counts.
PUBLISHED = {
    "skywork-moe-146b": (146, 0.5),
    "skywork-13b": (13.85, 0.05),
    "mixtral-8x7b": (46.7, 0.05),
    "mixtral-8x22b": (140.6, 0.05),
    "qwen3-30b-a3b": (30.5, 0.05),
    "qwen3-235b-a22b": (235, 0.5),
    "qwen2-57b-a14b": (57.4, 0.05),
    "deepseek-v2-lite": (15.7, 0.05),
    "deepseek-v2": (236, 0.5),
    "deepseek-v3": (671, 0.5),
    "kimi-k2": (1026.4, 0.5),
    "llama2-7b": (6.74, 0.005),
    "llama2-13b": (13.02, 0.005),
    "llama2-70b": (68.98, 0.005),
    "llama3-8b": (8.03, 0.005),
    "llama3-70b": (70.55, 0.005),
    "llama3-405b": (405.85, 0.005),
    "llama-65b": (65.3, 0.05),
    "gpt3-175b": (174.6, 0.05),
    "nemotron4-15b": (15.6, 0.05),
    "nemotron4-340b": (341, 0.5),
    "grok-1": (314, 2),
    "gpt-oss-120b": (116.8, 0.05),
    "smollm2-135m": (0.1345, 0.0005),
}

ACTIVE = {
    "skywork-moe-146b": 22,
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22,
    "deepseek-v2": 21,
    "deepseek-v3": 37,
    "kimi-k2": 32,
}


def test_every_preset_has_a_published_count():
    assert set(PUBLISHED) == set(preset_shapes())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_as_many_parameters_as_published(name):
    billions, tolerance = PUBLISHED[name]
    assert read_shape(name).parameters() / 1e9 == pytest.approx(billions, abs=tolerance)


@pytest.mark.parametrize("name", ACTIVE)
def test_a_preset_has_as_many_active_parameters_as_published(name):
    assert read_shape(name).active_parameters() / 1e9 == pytest.approx(ACTIVE[name], rel=0.04)


CONFIGS = {
    "llama": {"model_type": "llama", "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 64},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "skywork": {
        "model_type": "skywork",
        "num_experts": [4],
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "attention_out_bias": True,
        "qk_norm": True,
        "shared_expert_intermediate_size": 40,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}

COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_and_its_spec_have_the_same_shape(config):
    spec = spec_from_hf(COMMON | config)
    shape = shape_from_config(COMMON | config, name=spec.family)
    assert shape == shape_of(spec)
    assert shape_from_config(spec_to_hf(spec), name=spec.family) == shape
    assert shape.parameters() == spec.num_params()
    assert shape.active_parameters() == spec.active_params()


@pytest.mark.parametrize("name", PRESETS)
def test_operations_are_three_times_the_forward_pass_that_a_spec_counts(name):
    spec, sequence = PRESETS[name], 2048
    expected = 3 * spec.flops_per_token((sequence + 1) / 2)
    assert read_shape(name).flops_per_token(sequence) == pytest.approx(expected)


def test_skywork_moe_does_146_gigaflop_a_token():
    assert read_shape("skywork-moe-146b").flops_per_token(8192) / 1e9 == pytest.approx(146, abs=0.3)


def test_latent_attention_has_the_matrices_of_deepseek_v3():
    attention = read_shape("deepseek-v3").layers[0].attention
    sizes = {m.name: (m.inputs, m.outputs, m.shared) for m in attention.matrices(7168)}
    assert sizes == {
        "queries_down": (7168, 1536, "whole"),
        "queries_up": (1536, 128 * 192, "columns"),
        "latent_down": (7168, 576, "whole"),
        "latent_up": (512, 128 * 256, "columns"),
        "output": (128 * 128, 7168, "rows"),
    }


def test_dense_layers_come_first_in_deepseek_v3():
    kinds = [isinstance(x.feed_forward, MoEShape) for x in read_shape("deepseek-v3").layers]
    assert kinds == [False] * 3 + [True] * 58


def test_a_window_is_attended_to_on_average():
    attention = read_shape("gpt-oss-120b").layers[0].attention
    assert attention.window == 128
    plain = [min(position + 1, 128) for position in range(1000)]
    assert attention.attended(1000) == pytest.approx(sum(plain) / 1000)


def test_a_model_spec_is_read_as_it_is():
    spec = PRESETS["skywork-13b"].replace(
        moe=MoESpec(num_experts=2, top_k=1, expert_dim=128), moe_layers=(3,)
    )
    assert isinstance(read_shape(spec).layers[3].feed_forward, MoEShape)


def test_a_folder_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(COMMON | CONFIGS["llama"]))
    assert read_shape(tmp_path).parameters() == read_shape(tmp_path / "config.json").parameters()


BAD = {
    "keys": ({"model_type": "llama", "vocab_size": 5}, "lacks num_hidden_layers, hidden_size"),
    "ffn": ({k: v for k, v in COMMON.items() if k != "intermediate_size"}, "intermediate_size"),
    "top_k": (COMMON | {"num_experts": 8}, "lacks num_experts_per_tok"),
    "many": (COMMON | {"num_experts": 8, "num_experts_per_tok": 9}, "there are 8 experts"),
    "heads": (COMMON | {"num_key_value_heads": 3}, "must divide 4"),
    "width": (COMMON | {"num_attention_heads": 3, "num_key_value_heads": 3}, "Give head_dim"),
    "latent": (COMMON | {"kv_lora_rank": 8}, "qk_nope_head_dim, qk_rope_head_dim, v_head_dim"),
    "text": (COMMON | {"hidden_size": "64"}, "a whole number is needed"),
    "zero": (COMMON | {"num_hidden_layers": 0}, "at least 1"),
    "mamba": (COMMON | {"model_type": "mamba2"}, "'mamba'"),
    "hybrid": (COMMON | {"layer_types": ["linear_attention"] * 4}, "'linear_attention'"),
    "encoder": (COMMON | {"is_encoder_decoder": True}, "an encoder"),
}


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD)
def test_a_config_that_cannot_be_planned_is_refused_in_one_line(config, message):
    with pytest.raises(PlanError, match=message) as caught:
        shape_from_config(config)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_refused_with_the_presets():
    with pytest.raises(PlanError, match=r"no preset\. Presets are deepseek-v2"):
        read_shape("gpt-5")
