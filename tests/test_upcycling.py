"""What upcycling promises: the same function where it says so, the stated change elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from moesaic.checkpoint.folder import (
    WeightReader,
    WeightWriter,
    read_config,
    read_spec,
)
from moesaic.config import build, load_toml
from moesaic.errors import ConfigError, DataError, FolderError, MoesaicError
from moesaic.model.build import build_model, init_weights, load_model, save_model
from moesaic.moe.dispatch import combine, plan_dispatch
from moesaic.moe.router import sum_to_one
from moesaic.spec import ModelSpec, RopeSpec
from moesaic.upcycling import proof as proof_module
from moesaic.upcycling.config import UpcycleConfig, upcycled_spec
from moesaic.upcycling.initialise import (
    dropped_positions,
    normal,
    part_of_mlp,
    router_weight,
    with_noise,
    with_positions_redrawn,
)
from moesaic.upcycling.proof import prove
from moesaic.upcycling.upcycle import upcycle
from moesaic.upcycling.verdict import verdict

LLAMA = ModelSpec(
    family="llama",
    vocab_size=300,
    hidden_dim=24,
    ffn_dim=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_positions=128,
)
ALL = (0, 1, 2)
DENSE = {
    "llama": LLAMA,
    "llama with biases": LLAMA.replace(qkv_bias=True, out_bias=True),
    "llama tied, llama3 rope": LLAMA.replace(
        tied_embeddings=True,
        rope=RopeSpec(scaling="llama3", factor=4.0, original_max_positions=16),
    ),
    "mistral sliding": LLAMA.replace(family="mistral", sliding_window=5, sliding_layers=ALL),
    "qwen2": LLAMA.replace(family="qwen2", qkv_bias=True),
    "qwen3": LLAMA.replace(family="qwen3", qk_norm=True, head_dim=8),
    "skywork": LLAMA.replace(family="skywork", num_kv_heads=4),
}


def make_dense(folder: Path, spec: ModelSpec = LLAMA, *, seed: int = 1) -> Path:
    model = build_model(spec, dtype=torch.float32)
    init_weights(model, seed=seed, std=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that matter
                parameter.add_(normal(tuple(parameter.shape), std=0.1, seed=seed, name=name))
    return save_model(model, folder, dtype=torch.float32)


@pytest.fixture
def dense(tmp_path):
    return make_dense(tmp_path / "dense")


def config_for(dense: Path, **choices: object) -> UpcycleConfig:
    values = {"experts": 4, "out": dense.parent / "moe", "prove": False, **choices}
    return UpcycleConfig(dense=dense, **values)  # type: ignore[arg-type]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with WeightReader(folder) as reader:
        return {name: reader.read(name).clone() for name in reader.entries}


def ids(vocab: int = LLAMA.vocab_size) -> torch.Tensor:
    return torch.randint(0, vocab, (2, 40), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def largest_difference(dense: Path, moe: Path) -> float:
    """In float64, so that what is left of an exact construction is 1e-12 and not 1e-5."""
    logits = [load_model(folder, dtype=torch.float64)(ids()) for folder in (dense, moe)]
    assert logits[0].abs().max() > 0.1
    return float((logits[0] - logits[1]).abs().max())


# ---- the same function


@pytest.mark.parametrize("gate_norm_scale", [None, 1.0], ids=["raw gates", "normalised gates"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("spec", DENSE.values(), ids=DENSE.keys())
def test_copies_compute_what_the_dense_model_did(tmp_path, spec, top_k, gate_norm_scale):
    dense = make_dense(tmp_path / "dense", spec)
    config = config_for(
        dense, top_k=top_k, gate_norm_scale=gate_norm_scale, prove=True, proof_tokens=64
    )
    summary = upcycle(config)
    assert largest_difference(dense, config.out) < 1e-11
    assert summary["proof"]["verdict"] == "exact"
    assert summary["proof"]["logits"]["largest_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("granularity", "experts", "top_k"), [(2, 4, 2), (2, 8, 4), (4, 16, 8), (8, 8, 8)]
)
def test_parts_of_mlps_compute_what_the_dense_model_did(dense, granularity, experts, top_k):
    config = config_for(
        dense, init="granular", granularity=granularity, experts=experts, top_k=top_k, gate_std=0.5
    )
    summary = upcycle(config)
    assert summary["family"] == "mixtral"
    assert largest_difference(dense, config.out) < 1e-11
    assert read_spec(config.out).moe.expert_dim == LLAMA.ffn_dim // granularity


def test_parts_of_mlps_compute_the_same_with_normalised_gates_too(dense):
    config = config_for(
        dense, init="granular", granularity=2, experts=8, top_k=4, gate_norm_scale=2.0
    )
    upcycle(config)
    assert largest_difference(dense, config.out) < 1e-11


@pytest.mark.parametrize("layers", [{"every": 2}, {"layers": (0, 2)}], ids=["every", "list"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_some_layers_may_stay_dense(tmp_path, family, layers):
    dense = make_dense(tmp_path / "dense", DENSE[family])
    config = config_for(dense, **layers)
    upcycle(config)
    assert read_spec(config.out).moe_layers == ((1,) if "every" in layers else (0, 2))
    assert largest_difference(dense, config.out) < 1e-11


def test_mixing_models_that_are_equal_changes_nothing(dense):
    config = config_for(dense, init="mix", mix=(f"{dense}=3",))
    upcycle(config)
    assert largest_difference(dense, config.out) < 1e-11


def test_a_zero_gate_and_a_selection_bias_still_compute_the_same(dense):
    config = config_for(dense, gate_std=0.0, selection_bias=True)
    upcycle(config)
    assert largest_difference(dense, config.out) < 1e-11
    bias = tensors(config.out)["model.layers.0.block_sparse_moe.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert not bias.any()


def test_gates_at_inference_give_back_equal_experts_outputs_to_the_last_bit():
    experts_TK = torch.tensor([[0, 1, 2], [2, 0, 1]]).repeat(500, 1)
    plan = plan_dispatch(experts_TK, num_experts=3)
    gates_TK = normal((1000, 3), std=1.0, seed=0, name="gates").softmax(-1)
    y_TD = 1e4 * normal((1000, 8), std=1.0, seed=0, name="outputs")
    equal_ND = y_TD[plan.tokens_N]
    assert torch.equal(combine(equal_ND, sum_to_one(gates_TK), plan), y_TD)
    assert not torch.equal(combine(equal_ND, gates_TK, plan), y_TD)


# ---- which model comes of it


@pytest.mark.parametrize(
    ("name", "choices", "family"),
    [
        ("llama", {}, "mixtral"),
        ("llama tied, llama3 rope", {}, "mixtral"),
        ("mistral sliding", {}, "mixtral"),
        ("qwen2", {}, "qwen2_moe"),
        ("qwen2", {"every": 2}, "qwen2_moe"),
        ("qwen3", {}, "qwen3_moe"),
        ("skywork", {}, "skywork"),
        ("llama", {"gate_norm_scale": 1.0}, "skywork"),
        ("llama", {"every": 2}, "skywork"),
        ("llama", {"selection_bias": True}, "skywork"),
        ("llama with biases", {}, "skywork"),
        ("qwen3", {"gate_norm_scale": 1.0}, "skywork"),
    ],
)
def test_the_result_is_of_the_family_that_can_say_it(name, choices, family):
    config = UpcycleConfig(dense=Path("dense"), out=Path("out"), experts=4, **choices)
    spec = upcycled_spec(DENSE[name], config)
    assert spec.family == family
    assert spec.moe.num_experts == 4
    assert spec.moe.renormalize
    assert spec.moe.gate_norm_scale == choices.get("gate_norm_scale")


def test_everything_but_experts_and_routers_is_copied_byte_for_byte(dense):
    config = config_for(dense, init="noise")
    upcycle(config)
    before, after = tensors(dense), tensors(config.out)
    kept = [name for name in before if ".mlp." not in name]
    assert len(kept) == 3 + 6 * LLAMA.num_layers
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_tokenizer_and_generation_files_come_along(dense):
    (dense / "generation_config.json").write_text("{}")
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    config = config_for(dense)
    upcycle(config)
    assert (config.out / "generation_config.json").read_text() == "{}"
    assert (config.out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_dtype_of_the_dense_model_is_kept(dense, tmp_path):
    half = save_model(load_model(dense), tmp_path / "half", dtype=torch.bfloat16)
    config = config_for(half)
    upcycle(config)
    assert {tensor.dtype for tensor in tensors(config.out).values()} == {torch.bfloat16}
    biased = config_for(half, selection_bias=True, out=tmp_path / "biased")
    upcycle(biased)
    wide = [name for name, t in tensors(biased.out).items() if t.dtype == torch.float32]
    assert wide == [n for n in tensors(biased.out) if n.endswith("e_score_correction_bias")]
    assert len(wide) == LLAMA.num_layers
    assert read_config(config.out)["torch_dtype"] == "bfloat16"


def test_what_ran_is_written_beside_the_weights(dense):
    config = config_for(dense, init="drop", seed=7)
    upcycle(config)
    assert build(UpcycleConfig, load_toml(config.out / "upcycle.toml"), where="file") == config


# ---- initialisations


def expert(weights: dict[str, torch.Tensor], layer: int, index: int, matrix: str) -> torch.Tensor:
    return weights[f"model.layers.{layer}.block_sparse_moe.experts.{index}.{matrix}.weight"]


def test_noise_is_measured_in_the_weight_s_own_deviations():
    weight = normal((200, 300), std=3.0, seed=0, name="weight")
    noise = with_noise(weight, 0.1, seed=1, name="a") - weight
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)


def test_each_expert_gets_noise_of_its_own(dense):
    config = config_for(dense, init="noise", noise_std=0.5)
    upcycle(config)
    weights = tensors(config.out)
    first, second = (expert(weights, 0, index, "w1").flatten() for index in (0, 1))
    source = tensors(dense)["model.layers.0.mlp.gate_proj.weight"].flatten()
    together = torch.stack([first - source, second - source])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 0.2


def test_redrawn_entries_have_the_moments_of_those_they_replace():
    weight = normal((400, 100), std=0.5, mean=2.0, seed=0, name="weight")
    weight[200:] += 5.0  # the part that is kept must not count
    positions = torch.arange(200)
    redrawn = with_positions_redrawn(weight, positions, dim=0, seed=1, name="a")
    assert torch.equal(redrawn[200:], weight[200:])
    assert not (redrawn[:200] == weight[:200]).any()
    assert float(redrawn[:200].mean()) == pytest.approx(2.0, abs=0.02)
    assert float(redrawn[:200].std()) == pytest.approx(0.5, rel=0.03)


def test_half_of_each_expert_is_redrawn_at_the_same_positions_in_all_three_matrices(dense):
    config = config_for(dense, init="drop")
    upcycle(config)
    before, after = tensors(dense), tensors(config.out)
    chosen = []
    for index in range(4):
        changed = {}
        for matrix, name, dim in (("w1", "gate", 1), ("w3", "up", 1), ("w2", "down", 0)):
            source = before[f"model.layers.1.mlp.{name}_proj.weight"]
            differs = expert(after, 1, index, matrix) != source
            assert torch.equal(differs.any(dim), differs.all(dim))  # whole rows or columns
            changed[matrix] = differs.any(dim)
        assert torch.equal(changed["w1"], changed["w2"])
        assert torch.equal(changed["w1"], changed["w3"])
        assert int(changed["w1"].sum()) == LLAMA.ffn_dim // 2
        chosen.append(changed["w1"])
    assert len({tuple(positions.tolist()) for positions in chosen}) == 4


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 50), (1.0, 100), (0.004, 0), (0.255, 26)])
def test_the_drop_ratio_is_rounded_to_positions(ratio, count):
    positions = dropped_positions(100, ratio, seed=0, name="a")
    assert len(positions.unique()) == count
    weight = torch.ones(100, 3)
    redrawn = with_positions_redrawn(weight, positions, dim=0, seed=0, name="a")
    assert torch.equal(redrawn, weight)  # a deviation of 0 draws the mean again


def test_mixed_experts_come_from_their_models_and_the_rest_from_the_base(tmp_path):
    folders = [make_dense(tmp_path / f"m{seed}", seed=seed) for seed in range(4)]
    config = config_for(
        folders[0],
        experts=8,
        init="mix",
        mix=(f"{folders[1]}=3", f"{folders[2]}=3", f"{folders[3]}=1"),
    )
    upcycle(config)
    after, sources = tensors(config.out), [tensors(folder) for folder in folders]
    for index, owner in enumerate([1, 1, 1, 2, 2, 2, 3, 0]):
        for matrix, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            source = sources[owner][f"model.layers.2.mlp.{name}_proj.weight"]
            assert torch.equal(expert(after, 2, index, matrix), source)
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(after[name], sources[0][name])


def test_the_parts_of_an_mlp_sum_to_it_and_only_the_output_is_scaled():
    w1, w2 = torch.randn(12, 5, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    whole = (x @ w1.T).relu() @ w2.T
    parts = [
        (x @ part_of_mlp(w1, part, matrix="w1", granularity=4).T).relu()
        @ part_of_mlp(w2, part, matrix="w2", granularity=4).T
        for part in range(4)
    ]
    torch.testing.assert_close(sum(parts) / 4, whole)


def test_router_rows_of_one_group_are_equal_and_groups_differ():
    weight = router_weight(6, 5, std=0.02, granularity=2, seed=0, name="gate")
    assert torch.equal(weight[0::2], weight[1::2])
    assert len(weight.unique(dim=0)) == 3
    wide = router_weight(64, 500, std=0.3, granularity=1, seed=0, name="gate")
    assert float(wide.std()) == pytest.approx(0.3, rel=0.02)


def test_from_scratch_keeps_the_architecture_and_no_weight(dense):
    config = config_for(dense, from_scratch=True, scratch_std=0.1)
    summary = upcycle(config)
    before, after = tensors(dense), tensors(config.out)
    assert summary["init"] == "from scratch"
    assert read_spec(config.out) == upcycled_spec(read_spec(dense), config)
    for name, weight in after.items():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        elif "gate.weight" not in name:
            assert float(weight.std()) == pytest.approx(0.1, rel=0.15)
        assert name not in before or not torch.equal(weight, before[name])
    assert not torch.equal(expert(after, 0, 0, "w1"), expert(after, 0, 1, "w1"))
    assert not (config.out / "proof.json").exists()


@pytest.mark.parametrize("init", ["copy", "noise", "drop"])
def test_a_seed_gives_the_same_bytes_again_and_another_seed_others(dense, tmp_path, init):
    files = []
    for run, seed in enumerate((3, 3, 4)):
        out = tmp_path / f"out{run}"
        upcycle(config_for(dense, init=init, seed=seed, out=out))
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_random_numbers_do_not_depend_on_what_was_drawn_before():
    alone = normal((4, 4), std=1.0, seed=0, name="b")
    normal((9,), std=1.0, seed=0, name="a")
    assert torch.equal(normal((4, 4), std=1.0, seed=0, name="b"), alone)
    assert not torch.equal(normal((4, 4), std=1.0, seed=0, name="c"), alone)


# ---- the proof


def make_noisy(dense: Path) -> Path:
    config = config_for(dense, init="noise", noise_std=0.2, gate_std=0.5)
    upcycle(config)
    return config.out


@pytest.fixture
def noisy(dense):
    return make_noisy(dense)


@pytest.mark.parametrize("slice_bytes", [1 << 26, 600], ids=["whole", "in slices"])
@pytest.mark.parametrize("name", ["llama", "mistral sliding"])
@torch.no_grad()
def test_the_proof_says_what_two_loaded_models_say(tmp_path, name, monkeypatch, slice_bytes):
    dense = make_dense(tmp_path / "dense", DENSE[name])
    noisy = make_noisy(dense)
    monkeypatch.setattr(proof_module, "_SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(proof_module, "_ROW_TOKENS", 32)
    text = dense.parent / "text.txt"
    text.write_text("Experts see different tokens, " * 9, encoding="utf-8")
    result = prove(dense, noisy, text=text, tokens=96)
    ids_BS = torch.tensor(list(text.read_bytes()[:96])).view(3, 32)
    logits, hidden = [], []
    for folder in (dense, noisy):
        model = load_model(folder)
        seen = []
        for block in model.model.layers.values():
            block.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output[0]))
        logits.append(model(ids_BS))
        hidden.append(seen)
    difference = (logits[0] - logits[1]).abs()
    said = result["logits"]
    assert said["largest_difference"] == pytest.approx(float(difference.max()), rel=1e-3)
    assert said["mean_difference"] == pytest.approx(float(difference.mean()), rel=1e-3)
    assert said["largest_logit"] == pytest.approx(float(logits[0].abs().max()), rel=1e-4)
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()
    assert said["same_next_token"] == pytest.approx(float(same))
    assert 0 < said["same_next_token"] < 1
    for layer, one, other in zip(result["layers"], *hidden, strict=True):
        largest = float((one - other).abs().max())
        assert layer["largest_difference"] == pytest.approx(largest, rel=1e-3)
    assert result["verdict"] == "differs"


def test_the_proof_notices_one_expert_that_is_not_a_copy(dense):
    config = config_for(dense)
    upcycle(config)
    weights = tensors(config.out)
    expert(weights, 1, 3, "w2")[0, 0] += 0.05
    plan = [(name, weight.dtype, tuple(weight.shape)) for name, weight in weights.items()]
    with WeightWriter(config.out, plan) as writer:
        for name, weight in weights.items():
            writer.write(name, weight)
    result = prove(dense, config.out, tokens=64)
    assert result["verdict"] == "differs"
    assert result["layers"][0]["largest_difference"] < 1e-5
    assert result["layers"][1]["largest_difference"] > 1e-4


def test_proof_json_names_inputs_seed_text_and_every_layer(dense):
    config = config_for(dense, prove=True, proof_tokens=64, seed=9)
    summary = upcycle(config)
    written = json.loads((config.out / "proof.json").read_text())
    assert written == summary["proof"]
    assert written["init"] == "copy"
    assert written["expected"] == written["verdict"] == "exact"
    assert written["seed"] == 9
    assert written["dtype"] == "float32"
    assert [layer["layer"] for layer in written["layers"]] == [0, 1, 2]
    assert written["text"]["tokens"] == 64
    assert written["text"]["source"] == "source of Python's standard library"
    hashes = written["inputs"][str(dense)]
    assert set(hashes) == {"config.json", "model.safetensors"}
    assert all(len(digest) == 64 for digest in hashes.values())


def test_drop_is_not_expected_to_be_exact_and_is_not(dense):
    summary = upcycle(config_for(dense, init="drop", prove=True, proof_tokens=64))
    assert summary["proof"]["expected"] == "differs"
    assert summary["proof"]["verdict"] == "differs"


def test_a_float64_proof_leaves_no_rounding_to_argue_about(dense):
    config = config_for(
        dense, init="granular", granularity=2, prove=True, proof_tokens=64, proof_dtype="float64"
    )
    proof = upcycle(config)["proof"]
    assert proof["dtype"] == "float64"
    assert proof["logits"]["largest_difference"] < 1e-11


def test_a_short_text_is_run_whole_and_rows_are_equal(dense, noisy, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("seventeen letters", encoding="utf-8")
    assert prove(dense, noisy, text=text, tokens=512)["text"]["tokens"] == 17
    text.write_text("a" * 2000, encoding="utf-8")
    run = prove(dense, noisy, text=text, tokens=600)["text"]
    assert (run["tokens"], run["row_tokens"]) == (600, 300)


@pytest.mark.parametrize("content", [b"", b"a", b"\xff\xfe\x00"], ids=["empty", "one", "binary"])
def test_a_text_that_proves_nothing_is_refused_and_nothing_is_left(dense, tmp_path, content):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    config = config_for(dense, prove=True, proof_text=text)
    with pytest.raises(DataError, match="proof's text"):
        upcycle(config)
    assert not config.out.exists()


# ---- refusals


def damage(dense: Path, change) -> None:
    weights = tensors(dense)
    change(weights)
    plan = [(name, weight.dtype, tuple(weight.shape)) for name, weight in weights.items()]
    with WeightWriter(dense, plan) as writer:
        for name, weight in weights.items():
            writer.write(name, weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(dense, name, value):
    damage(dense, lambda weights: weights[name].view(-1)[3:4].fill_(value))
    config = config_for(dense)
    with pytest.raises(FolderError, match=name):
        upcycle(config)
    assert sorted(path.name for path in dense.parent.iterdir()) == ["dense"]


def test_an_moe_is_not_upcycled_again(dense):
    upcycle(config_for(dense))
    again = config_for(dense.parent / "moe", out=dense.parent / "again")
    with pytest.raises(ConfigError, match="4 experts already"):
        upcycle(again)


def test_a_quantised_folder_is_refused(dense):
    description = json.loads((dense / "config.json").read_text())
    description["quantization_config"] = {"quant_method": "compressed-tensors"}
    (dense / "config.json").write_text(json.dumps(description))
    with pytest.raises(FolderError, match="quantised"):
        upcycle(config_for(dense))


def test_models_of_two_shapes_are_not_mixed(dense, tmp_path):
    other = make_dense(tmp_path / "other", LLAMA.replace(ffn_dim=48))
    with pytest.raises(ConfigError, match=r"ffn_dim 48.*has 40"):
        upcycle(config_for(dense, init="mix", mix=(f"{other}=1",)))


def test_models_of_two_dtypes_are_not_mixed(dense, tmp_path):
    other = save_model(load_model(dense), tmp_path / "other", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="one dtype"):
        upcycle(config_for(dense, init="mix", mix=(f"{other}=1",)))


def test_a_taken_folder_is_left_alone_unless_overwriting(dense, tmp_path):
    out = tmp_path / "moe"
    out.mkdir()
    (out / "note.txt").write_text("mine")
    with pytest.raises(FolderError, match="not empty"):
        upcycle(config_for(dense))
    assert [path.name for path in out.iterdir()] == ["note.txt"]
    upcycle(config_for(dense, overwrite=True))
    assert not (out / "note.txt").exists()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"experts": 0}, "experts is 0"),
        ({"experts": 2, "top_k": 3}, "top_k is 3"),
        ({"gate_std": -1.0}, "gate_std is -1.0"),
        ({"gate_std": math.nan}, "gate_std is nan"),
        ({"gate_std": 0.0, "gate_norm_scale": 1.0}, "all logits equal"),
        ({"gate_norm_scale": 0.0}, "gate_norm_scale is 0"),
        ({"experts": 1, "top_k": 1, "gate_norm_scale": 1.0}, "2 experts or more"),
        ({"every": 0}, "every is 0"),
        ({"every": 2, "layers": (1,)}, "both say"),
        ({"init": "granular"}, "granularity from 2 on"),
        ({"granularity": 2}, "Say init granular"),
        ({"init": "granular", "granularity": 2, "top_k": 1}, "top_k is 1"),
        ({"init": "granular", "granularity": 2, "experts": 5}, "experts is 5"),
        (
            {"init": "granular", "granularity": 2, "experts": 2, "gate_norm_scale": 1.0},
            "one group",
        ),
        ({"init": "granular", "granularity": 2, "gate_std": 0.0}, "parts of different MLPs"),
        ({"drop_ratio": 0.3}, "Say init drop"),
        ({"init": "drop", "drop_ratio": 1.5}, "drop_ratio is 1.5"),
        ({"noise_std": 0.3}, "Say init noise"),
        ({"mix": ("a=1",)}, "Say init mix"),
        ({"init": "mix"}, "FOLDER=COUNT"),
        ({"init": "mix", "mix": ("a",)}, "FOLDER=COUNT"),
        ({"init": "mix", "mix": ("a=0",)}, "FOLDER=COUNT"),
        ({"init": "mix", "mix": ("a=3", "b=2")}, "asks for 5 experts"),
        ({"from_scratch": True, "init": "noise"}, "has no meaning"),
        ({"scratch_std": 0.1}, "without from_scratch"),
        ({"dense_tokens": 1e9}, "both budgets"),
        ({"proof_tokens": 1}, "proof_tokens is 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(choices, message):
    values = {"dense": Path("dense"), "out": Path("out"), "experts": 4, **choices}
    with pytest.raises(MoesaicError, match=message) as caught:
        UpcycleConfig(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"every": 4}, "no MoE layer"),
        ({"layers": (3,)}, "layer 3"),
        ({"layers": (1, 1)}, "twice"),
        ({"init": "granular", "granularity": 3, "experts": 6, "top_k": 3}, "does not divide"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(choices, message):
    values = {"dense": Path("dense"), "out": Path("out"), "experts": 4, **choices}
    with pytest.raises(ConfigError, match=message):
        upcycled_spec(LLAMA, UpcycleConfig(**values))


# ---- the verdict


@pytest.mark.parametrize(
    ("dense_tokens", "moe_tokens", "advice"),
    [
        (300e9, 300e9, "from scratch"),  # the report's 0.3 B study: MoE at 300 B costs 2 C
        (5.2e12, 1e12, "upcycle"),  # Skywork-MoE's own case
        (300e9, 100e9, "no rule"),  # 2/3 C, where the report saw a tie
        (0.0, 100e9, "from scratch"),
    ],
)
def test_the_verdict_follows_the_report(dense_tokens, moe_tokens, advice):
    config = UpcycleConfig(dense=Path("a"), out=Path("b"), experts=8)
    result = verdict(
        LLAMA,
        upcycled_spec(LLAMA, config),
        dense_tokens=dense_tokens,
        moe_tokens=moe_tokens,
        relative_cost=2.0,
    )
    assert result["advice"] == advice
    if dense_tokens:
        assert result["cost_ratio"] == pytest.approx(2 * moe_tokens / dense_tokens)
    assert 1 < result["flops_ratio"] < 2
    assert "\n" not in result["reason"]


def test_both_budgets_bring_a_verdict(dense):
    summary = upcycle(config_for(dense, dense_tokens=1e12, moe_tokens=1e9))
    assert summary["verdict"]["advice"] == "upcycle"
    assert summary["num_params"] == read_spec(dense.parent / "moe").num_params()


def test_more_experts_than_any_disk_holds_are_refused_at_once(dense, tmp_path):
    config = UpcycleConfig(dense=dense, out=tmp_path / "moe", experts=10**13, prove=False)
    with pytest.raises(FolderError, match="parameters, a byte each at the least"):
        upcycle(config)
    assert not (tmp_path / "moe").exists()
