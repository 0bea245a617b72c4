"""config.json to ModelSpec and back, what a spec counts, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesaic.checkpoint.names import disk_entries
from moesaic.errors import SpecError
from moesaic.spec import PRESETS, ModelSpec, MoESpec, RopeSpec, spec_from_hf, spec_to_hf
from tests.test_parity import SPECS
from tests.tiny import LLAMA, MIXTRAL, MOE, QWEN2, TINY, tiny_model, token_ids

ALL = SPECS | TINY
every_spec = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())

# As the hubs have them, in the spelling of transformers 4.
LLAMA_31_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": [128001, 128008, 128009],
    "bos_token_id": 128000,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "torch_dtype": "bfloat16",
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
QWEN15_MOE = {
    "model_type": "qwen2_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "rope_theta": 1000000.0,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 21,
    "tie_word_embeddings": False,
}


def test_skywork_presets_count_what_the_reports_count():
    dense, moe = PRESETS["skywork-13b"], PRESETS["skywork-moe-146b"]
    attention, expert, router, embedding = 4 * 4608**2, 3 * 4608 * 12288, 4608 * 16, 65536 * 4608
    norms = (2 * 52 + 1) * 4608
    rest = 52 * attention + 2 * embedding + norms
    assert dense.num_params() == dense.active_params() == rest + 52 * expert
    assert moe.num_params() == rest + 52 * (16 * expert + router)
    assert moe.active_params() == rest + 52 * (2 * expert + router)
    assert round(dense.num_params() / 1e9, 2) == 13.85
    assert round(moe.num_params() / 1e9, 2) == 146.36
    assert round(moe.active_params() / 1e9, 2) == 22.69


@pytest.mark.parametrize(
    ("config", "params", "active_billions"),
    [
        (LLAMA_31_8B, 8_030_261_248, 8.03),
        (MIXTRAL_8X7B, 46_702_792_704, 12.9),
        (QWEN3_30B_A3B, 30_532_122_624, 3.3),
        (QWEN15_MOE, 14_315_784_192, 2.7),
    ],
    ids=["Llama-3.1-8B", "Mixtral-8x7B", "Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B"],
)
def test_published_models_count_what_their_makers_say(config, params, active_billions):
    spec = spec_from_hf(config)
    assert spec.num_params() == params
    # Active counts are published rounded, or cut, to one digit.
    assert spec.active_params() / 1e9 == pytest.approx(active_billions, abs=0.06)


def test_smollm2_preset_counts_134_5_million():
    assert PRESETS["smollm2-135m"].num_params() == 134_515_008


@every_spec
def test_parameters_counted_are_the_elements_on_disk(spec):
    assert spec.num_params() == sum(math.prod(entry.shape) for entry in disk_entries(spec))


def test_a_selection_bias_is_not_a_parameter():
    spec = TINY["skywork moe"]
    biased = spec.replace(moe=MoESpec(num_experts=4, top_k=2, expert_dim=24, selection_bias=True))
    assert biased.num_params() == spec.num_params()
    assert len(disk_entries(biased)) == len(disk_entries(spec)) + spec.num_layers


@pytest.mark.parametrize("name", ["llama", "qwen3", "skywork dense"])
def test_flops_are_those_that_torch_counts(name):
    spec, length = TINY[name], 16
    # The plain kernel, because torch does not count its fused one on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tiny_model(spec)(token_ids(1, length))
    # torch counts attention as if no position were masked: every token attends to all.
    assert counter.get_total_flops() == length * spec.flops_per_token(length)


def test_flops_of_an_moe_are_those_of_a_dense_model_as_wide_as_its_active_experts():
    moe = LLAMA.replace(family="qwen3_moe", qk_norm=True, moe=MOE, moe_layers=(0, 1, 2))
    dense = LLAMA.replace(family="qwen3", qk_norm=True, ffn_dim=MOE.top_k * MOE.expert_dim)
    router = 2 * moe.num_layers * moe.hidden_dim * MOE.num_experts
    assert moe.flops_per_token(9) == dense.flops_per_token(9) + router


def test_a_sliding_window_bounds_the_flops_of_its_layers():
    spec = QWEN2.replace(sliding_window=5, sliding_layers=(1,))
    assert spec.flops_per_token(5) == QWEN2.flops_per_token(5)
    more = spec.flops_per_token(50) - spec.flops_per_token(5)
    assert more == 4 * spec.q_dim * 45 * (spec.num_layers - 1)


@every_spec
def test_a_spec_written_and_read_is_the_same_spec(spec):
    assert spec_from_hf(spec_to_hf(spec)) == spec


@every_spec
def test_both_spellings_are_written(spec):
    config = spec_to_hf(spec, dtype="float32")
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == spec.rope.theta
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    assert config["rope_parameters"] == {"rope_theta": spec.rope.theta, **scaling}
    if spec.moe is not None:
        assert config["num_local_experts"] == spec.moe.num_experts
        assert config["num_experts"] in (spec.moe.num_experts, [spec.moe.num_experts])


@every_spec
@pytest.mark.parametrize("version", ["4.57", "5"])
def test_either_spelling_alone_says_the_same(spec, version):
    config = spec_to_hf(spec)
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        if version == "5":
            del config[key]
    for key in ("rope_parameters", "dtype"):
        if version == "4.57":
            del config[key]
    if spec.moe is not None and spec.family != "skywork":
        del config["num_experts" if version == "5" else "num_local_experts"]
    assert spec_from_hf(config) == spec


def test_a_type_of_rope_may_be_spelt_the_oldest_way():
    scaling = {"type": "linear", "factor": 2}
    spec = spec_from_hf(LLAMA_31_8B | {"rope_scaling": scaling})
    assert spec.rope == RopeSpec(theta=500_000.0, scaling="linear", factor=2.0)


def test_windows_follow_max_window_layers_where_layer_types_are_silent():
    config = spec_to_hf(QWEN2) | {
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
        "layer_types": None,
    }
    assert spec_from_hf(config).sliding_layers == (2,)
    assert spec_from_hf(config | {"max_window_layers": 9}).sliding_window is None
    assert spec_from_hf(config | {"use_sliding_window": False}).sliding_window is None


def test_normalisation_is_written_only_when_it_is_on():
    on = spec_to_hf(TINY["skywork moe"])
    assert (on["moe_use_logits_norm"], on["moe_gate_norm_std"]) == (True, 1.0)
    assert on["num_experts"] == [4]
    assert on["model_type"] == "skywork"
    off = spec_to_hf(TINY["skywork moe"].replace(moe=MOE))
    # Loaders of the release ask whether the key is there.
    assert "moe_use_logits_norm" not in off


def test_the_keys_of_the_release_alone_are_enough():
    config = {
        "model_type": "skywork",
        "vocab_size": 65536,
        "hidden_size": 4608,
        "intermediate_size": 12288,
        "num_hidden_layers": 52,
        "num_attention_heads": 36,
        "max_position_embeddings": 8192,
        "num_experts": [16],
        "num_experts_per_tok": 2,
        "moe_expert_interval": 1,
        "moe_use_logits_norm": True,
        "moe_gate_norm_std": 1.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    assert spec_from_hf(config) == PRESETS["skywork-moe-146b"]
    assert spec_from_hf(config | {"moe_expert_interval": 26}).moe_layers == (25, 51)


def test_a_null_token_is_none_and_a_silent_one_is_the_familys():
    assert spec_from_hf(MIXTRAL_8X7B).eos_token_ids == (2,)
    silenced = spec_from_hf(MIXTRAL_8X7B | {"eos_token_id": None, "bos_token_id": None})
    assert (silenced.bos_token_id, silenced.eos_token_ids) == (None, ())
    assert spec_from_hf(LLAMA_31_8B).eos_token_ids == (128001, 128008, 128009)


CONFIGS = {name: spec_to_hf(spec) for name, spec in TINY.items()}
BAD: dict[str, tuple[str, dict[str, object], tuple[str, ...]]] = {
    "unknown family": ("llama", {"model_type": "gemma3"}, ("model_type", "'gemma3'", "mixtral")),
    "no family": ("llama", {"model_type": None}, ("model_type", "None")),
    "no size": ("llama", {"hidden_size": None}, ("hidden_size", "missing")),
    "text for a number": ("llama", {"vocab_size": "300"}, ("vocab_size", "'300'")),
    "true for a number": ("llama", {"num_hidden_layers": True}, ("num_hidden_layers", "True")),
    "no layers": ("llama", {"num_hidden_layers": 0}, ("num_hidden_layers", "0")),
    "no heads": ("llama", {"num_attention_heads": 0}, ("num_attention_heads", "0")),
    "negative width": ("llama", {"intermediate_size": -4}, ("ffn_dim", "-4")),
    "infinite epsilon": ("llama", {"rms_norm_eps": math.inf}, ("rms_norm_eps", "inf")),
    "kv heads": ("llama", {"num_key_value_heads": 3}, ("4 attention heads", "3")),
    "odd head": ("llama", {"head_dim": 7}, ("head_dim", "7")),
    "heads do not divide": (
        "llama",
        {"head_dim": None, "hidden_size": 33},
        ("hidden_size", "33", "head_dim"),
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "silu")),
    "mlp bias": ("llama", {"mlp_bias": True}, ("mlp_bias", "True")),
    "flag as text": ("llama", {"tie_word_embeddings": "no"}, ("tie_word_embeddings", "'no'")),
    "token": ("llama", {"eos_token_id": 300}, ("300", "vocabulary")),
    "token as text": ("llama", {"eos_token_id": "</s>"}, ("eos_token_id", "</s>")),
    "two dtypes": ("llama", {"torch_dtype": "float16"}, ("dtype", "float16", "bfloat16")),
    "two thetas": ("llama", {"rope_theta": 5.0}, ("rope_theta", "5.0", "10000.0")),
    "yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None},
        ("rope_type", "'yarn'", "llama3"),
    ),
    "two ropes": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ("rope_scaling.rope_type", "'linear'", "'default'"),
    ),
    "rope without factor": (
        "llama",
        {"rope_scaling": {"rope_type": "linear"}, "rope_parameters": None},
        ("rope_scaling.factor", "missing"),
    ),
    "shrinking rope": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}, "rope_parameters": None},
        ("factor", "0.5"),
    ),
    "rope is a list": ("llama", {"rope_scaling": [1]}, ("rope_scaling", "[1]", "object")),
    "half-turned heads": ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary", "0.5")),
    "dynamic from elsewhere": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "dynamic",
                "factor": 2.0,
                "original_max_position_embeddings": 32,
            },
            "rope_parameters": None,
        },
        ("original_max_position_embeddings", "32", "64"),
    ),
    "window of zero": ("mistral", {"sliding_window": 0}, ("sliding_window", "0")),
    "layer types too few": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
        ("layer_types", "3 layers"),
    ),
    "layer type unknown": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["linear"] * 3},
        ("layer_types", "linear"),
    ),
    "layer types against the flag": (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 3},
        ("layer_types", "use_sliding_window"),
    ),
    "more chosen than experts": ("mixtral", {"num_experts_per_tok": 5}, ("top_k", "5", "4")),
    "no experts": (
        "mixtral",
        {"num_experts": None, "num_local_experts": None},
        ("num_experts", "missing"),
    ),
    "two counts": ("mixtral", {"num_local_experts": 8}, ("num_experts", "4", "8")),
    "no top-k": ("qwen3_moe", {"num_experts_per_tok": None}, ("num_experts_per_tok", "missing")),
    "experts differ": ("skywork moe", {"num_experts": [4, 8]}, ("num_experts", "[4, 8]")),
    "dense layer outside": ("qwen3_moe", {"mlp_only_layers": [3]}, ("mlp_only_layers", "[3]")),
    "step outside": ("qwen2_moe", {"decoder_sparse_step": 4}, ("decoder_sparse_step", "4")),
    "step zero": ("qwen2_moe", {"decoder_sparse_step": 0}, ("decoder_sparse_step", "0")),
    "two-layer gate": ("skywork moe", {"moe_2layer_gate": True}, ("moe_2layer_gate", "True")),
    "inputs times k": (
        "skywork moe",
        {"moe_feature_no_mul_topk": False},
        ("moe_feature_no_mul_topk", "False"),
    ),
    "lambda zero": ("skywork moe", {"moe_gate_norm_std": 0.0}, ("gate_norm_scale", "0.0")),
    "moe layer outside": ("skywork moe", {"moe_layers": [0, 9]}, ("moe_layers", "[0, 9]")),
}


@pytest.mark.parametrize(("base", "change", "words"), BAD.values(), ids=BAD.keys())
def test_a_config_that_cannot_be_is_refused_in_one_line(base, change, words):
    with pytest.raises(SpecError) as caught:
        spec_from_hf(CONFIGS[base] | change)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


UNSAYABLE: dict[str, tuple[ModelSpec, dict[str, object], str]] = {
    "moe in a dense family": (LLAMA, {"moe": MOE, "moe_layers": (0,)}, "dense"),
    "dense in an moe family": (MIXTRAL, {"moe": None, "moe_layers": ()}, "has MoE layers"),
    "mixtral, every 2nd layer": (MIXTRAL, {"moe_layers": (1,)}, "all 3 layers, not 1"),
    "mixtral, two widths": (MIXTRAL, {"ffn_dim": 25}, "expert_dim is 24 and ffn_dim is 25"),
    "mixtral, bias": (MIXTRAL, {"qkv_bias": True}, "qkv_bias False, not True"),
    "mixtral, normalisation": (
        MIXTRAL,
        {"moe": MoESpec(num_experts=4, top_k=2, expert_dim=24, gate_norm_scale=1.0)},
        "gating logit normalisation",
    ),
    "mixtral, selection bias": (
        MIXTRAL,
        {"moe": MoESpec(num_experts=4, top_k=2, expert_dim=24, selection_bias=True)},
        "selection bias",
    ),
    "mixtral, gates as they are": (
        MIXTRAL,
        {"moe": MoESpec(num_experts=4, top_k=2, expert_dim=24, renormalize=False)},
        "renormalises",
    ),
    "llama, window": (LLAMA, {"sliding_window": 4, "sliding_layers": (0,)}, "sliding window"),
    "llama, half a bias": (LLAMA, {"qkv_bias": True}, "or on none of them"),
    "mistral, some slide": (TINY["mistral"], {"sliding_layers": (0,)}, "not 1 of 3"),
    "qwen2 without bias": (QWEN2, {"qkv_bias": False}, "qkv_bias True, not False"),
    "qwen3 without norms": (TINY["qwen3"], {"qk_norm": False}, "qk_norm True, not False"),
    "qwen3_moe, shared": (
        TINY["qwen3_moe"],
        {"moe": MoESpec(num_experts=4, top_k=2, expert_dim=24, shared_expert_dim=8)},
        "shared expert",
    ),
}


@pytest.mark.parametrize(("spec", "change", "words"), UNSAYABLE.values(), ids=UNSAYABLE.keys())
def test_what_a_family_cannot_say_is_refused_and_skywork_can_say_it(spec, change, words):
    with pytest.raises(SpecError, match=words):
        spec.replace(**change)
    skywork = spec.replace(family="skywork").replace(**change)
    assert spec_from_hf(spec_to_hf(skywork)) == skywork


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LLAMA.replace(hidden_dim=30), "multiple"),
        (TINY["qwen2_moe"].replace(head_dim=16), "4.57 refuses"),
        (TINY["qwen2_moe"].replace(sliding_window=4, sliding_layers=(0,)), "4.57 decodes"),
    ],
)
def test_what_transformers_would_refuse_or_read_in_two_ways_is_not_written(spec, words):
    with pytest.raises(SpecError, match=words):
        spec_to_hf(spec)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 0}, "num_heads is 0"),
        ({"moe": MOE}, "0 layers are MoE"),
        ({"moe_layers": (0,)}, "moe is absent"),
        ({"sliding_window": 4}, "0 layers slide"),
        ({"sliding_layers": (2, 1), "sliding_window": 4}, "must rise"),
        ({"family": "falcon"}, "'falcon' is unknown"),
        (
            {"rope": RopeSpec(scaling="dynamic", factor=2.0, original_max_positions=8)},
            "max_positions is 64",
        ),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(change, words):
    with pytest.raises(SpecError, match=words):
        LLAMA.replace(**change)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts": 0, "top_k": 1}, "not 0"),
        ({"num_experts": 2, "top_k": 3}, "top_k is 3"),
        ({"num_experts": 2, "top_k": 0}, "top_k is 0"),
        ({"num_experts": 1, "top_k": 1, "gate_norm_scale": 1.0}, "one expert"),
        ({"num_experts": 2, "top_k": 1, "gate_norm_scale": -1.0}, "positive"),
        ({"num_experts": 2, "top_k": 1, "shared_expert_dim": -1}, "shared_expert_dim is -1"),
    ],
)
def test_experts_that_cannot_be_are_refused(fields, words):
    with pytest.raises(SpecError, match=words):
        MoESpec(expert_dim=8, **fields)


def test_a_window_belongs_to_its_layers_only():
    spec = QWEN2.replace(sliding_window=5, sliding_layers=(1,))
    assert [spec.window_of(layer) for layer in range(3)] == [None, 5, None]


def test_every_family_builds_what_its_table_lists():
    for name, spec in TINY.items():
        state = tiny_model(spec, dtype=torch.bfloat16).state_dict()
        assert set(state) == {entry.param for entry in disk_entries(spec)}, name


ODD = (None, -1, 0, 3.5, math.nan, "x", True, [], [None], [{}], {}, {"rope_type": 3}, 10**30)


@pytest.mark.parametrize("name", TINY)
def test_whatever_stands_in_a_config_is_read_or_refused_in_one_line(name):
    config = CONFIGS[name]
    rope = config["rope_parameters"] | {"factor": 2.0, "rope_type": "llama3"}
    changes = [{key: value} for key in config for value in ODD]
    changes += [
        {"rope_parameters": rope | {key: value}} for key in rope | {"type": None} for value in ODD
    ]
    changes += [{key: 5} for key in ("partial_rotary_factor", "max_window_layers", "moe_layers")]
    refusals = []
    for change in changes:
        try:
            spec_from_hf(config | change)
        except SpecError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert not any("\n" in refusal for refusal in refusals)
