"""One step of a model over a paged cache computes what the model does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moesaic.checkpoint.folder import read_spec
from moesaic.errors import ConfigError, FolderError, PlanError
from moesaic.model.build import load_model
from moesaic.planning.serving.layout import fit
from moesaic.planning.serving.ledger import ledger
from moesaic.planning.serving.plan import ServePlan
from moesaic.quantizing.config import QuantizeConfig
from moesaic.quantizing.quantize import quantize
from moesaic.serving.execution.batch import Batch, Chunk
from moesaic.serving.execution.layers import allocate_cache
from moesaic.serving.execution.packed import NativeLayers
from moesaic.serving.execution.runner import ModelExecutor, load_executor
from moesaic.serving.execution.weights import RankReader
from moesaic.serving.native import build
from moesaic.spec import MoESpec, RopeSpec
from tests.greedy import greedy
from tests.tiny import LLAMA, MIXTRAL, QWEN2, TINY, tiny_folder, token_ids

FLOAT32 = ServePlan(weights="float32", kv_cache="float32", block_tokens=4, kv_blocks=64)

SPECS = {
    **TINY,
    "biased everywhere": LLAMA.replace(
        family="skywork", qkv_bias=True, out_bias=True, qk_norm=True
    ),
    "some layers slide": LLAMA.replace(family="skywork", sliding_window=5, sliding_layers=(1,)),
    "llama 3's rope": LLAMA.replace(
        rope=RopeSpec(scaling="llama3", factor=4.0, original_max_positions=16)
    ),
    "linear rope": LLAMA.replace(rope=RopeSpec(scaling="linear", factor=2.0)),
    "dynamic rope": LLAMA.replace(
        rope=RopeSpec(scaling="dynamic", factor=2.0, original_max_positions=64)
    ),
    "tied": LLAMA.replace(tied_embeddings=True),
    "everything of an MoE": LLAMA.replace(
        family="skywork",
        moe=MoESpec(
            num_experts=5,
            top_k=3,
            expert_dim=24,
            renormalize=False,
            gate_norm_scale=2.0,
            selection_bias=True,
            shared_expert_dim=16,
        ),
        moe_layers=(1, 2),
    ),
}


def executor_of(folder, plan=FLOAT32, **changes):
    return load_executor(folder, plan, **({"dtype": "float32", "max_step_tokens": 64} | changes))


def logits_of(executor, ids, *, chunk=None):
    """Scores at every position, in steps of `chunk` tokens."""
    found = []
    for start in range(0, len(ids), chunk or len(ids)):
        tokens = tuple(ids[start : start + (chunk or len(ids))])
        blocks = tuple(range(7, 7 + 16))
        found.append(
            executor.step(Batch((Chunk(tokens, start, blocks, logits=len(tokens)),))).logits_NV
        )
    return torch.cat(found)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk", [None, 7, 1])
def test_scores_at_every_position_are_the_model_s(tmp_path, name, chunk):
    folder = tiny_folder(tmp_path / "m", SPECS[name], tokenizer=False)
    ids = token_ids(1, 23, seed=1)
    with torch.no_grad():
        wanted = load_model(folder)(ids)[0]
    torch.testing.assert_close(
        logits_of(executor_of(folder), ids[0].tolist(), chunk=chunk), wanted, atol=2e-5, rtol=1e-5
    )


PROMPTS = [token_ids(1, length, seed=length)[0].tolist() for length in (3, 17, 1, 8, 30)]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "mixtral", "skywork moe"])
@pytest.mark.parametrize(
    "how",
    [{}, {"chunk": 5}, {"staggered": True}, {"chunk": 3, "staggered": True}],
    ids=["together", "in chunks", "staggered", "both"],
)
def test_mixed_batches_answer_as_each_sequence_alone(tmp_path, name, how):
    folder = tiny_folder(tmp_path / "m", TINY[name], tokenizer=False)
    model = load_model(folder)
    wanted = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        wanted.append(tokens[len(prompt) :])
    assert greedy(executor_of(folder), PROMPTS, new=6, **how) == wanted


def test_sequences_share_blocks_that_none_of_them_writes(tmp_path):
    folder = tiny_folder(tmp_path / "m", MIXTRAL, tokenizer=False)
    executor, model = executor_of(folder), load_model(folder)
    first, second = token_ids(2, 12, seed=3).tolist()
    second[:8] = first[:8]
    executor.step(Batch((Chunk(tuple(first), 0, (5, 2, 9)),)))
    shared = Chunk(tuple(second[8:]), 8, (5, 2, 11), logits=4)
    with torch.no_grad():
        wanted = model(torch.tensor([second]))[0, 8:]
    found = executor.step(Batch((shared, Chunk((7,), 12, (5, 2, 9, 1))))).logits_NV
    torch.testing.assert_close(found[:4], wanted, atol=2e-5, rtol=1e-5)


def test_only_the_scores_asked_for_come_back_chunk_by_chunk(tmp_path):
    folder = tiny_folder(tmp_path / "m", LLAMA, tokenizer=False)
    executor = executor_of(folder)
    one, two = (tuple(ids) for ids in token_ids(2, 6, seed=5).tolist())
    every = executor.step(Batch((Chunk(one, 0, (0, 1), 6), Chunk(two, 0, (2, 3), 6)))).logits_NV
    some = executor.step(Batch((Chunk(one, 0, (0, 1), 2), Chunk(two, 0, (2, 3), 0)))).logits_NV
    torch.testing.assert_close(some, every[4:6])
    none = executor.step(Batch((Chunk(one, 0, (0, 1), 0),))).logits_NV
    assert none.shape == (0, LLAMA.vocab_size)


def test_hidden_states_are_those_before_the_head(tmp_path):
    folder = tiny_folder(tmp_path / "m", LLAMA, tokenizer=False)
    ids = token_ids(1, 9, seed=2)
    with torch.no_grad():
        wanted, _ = load_model(folder).hidden(ids)
    chunk = Chunk(tuple(ids[0].tolist()), 0, (0, 1, 2), logits=9)
    result = executor_of(folder).step(Batch((chunk,), hidden=True))
    assert result.logits_NV is None
    torch.testing.assert_close(result.hidden_ND, wanted[0], atol=2e-5, rtol=1e-5)


def test_the_experts_of_each_token_are_told(tmp_path):
    spec = SPECS["everything of an MoE"]
    folder = tiny_folder(tmp_path / "m", spec, tokenizer=False)
    ids = token_ids(1, 9, seed=2)
    seen = {}
    model = load_model(folder)
    for layer in spec.moe_layers:
        gate = model.model.layers[str(layer)].block_sparse_moe.gate
        choose = gate.choose
        gate.choose = lambda logits, layer=layer, choose=choose: seen.setdefault(
            layer, choose(logits)
        )
    with torch.no_grad():
        model(ids)
    chunk = Chunk(tuple(ids[0].tolist()), 0, (0, 1, 2))
    executor = executor_of(folder)
    found = executor.step(Batch((chunk,), experts=True)).experts_LTK
    assert found.shape == (2, 9, 3)
    for row, layer in zip(found, spec.moe_layers, strict=True):
        assert torch.equal(row, seen[layer].experts_TK)
    assert executor.step(Batch((chunk,))).experts_LTK is None


STORED = [
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float8", "bfloat16"),
    ("bfloat16", "int8", "bfloat16"),
    ("bfloat16", "bfloat16", "float8"),
    ("float32", "float8", "float32"),
    ("float32", "int8", "float8"),
    ("float32", "bfloat16", "bfloat16"),
]


@pytest.mark.parametrize(("dtype", "weights", "kv_cache"), STORED, ids=map("-".join, STORED))
@pytest.mark.parametrize("name", ["tied", "everything of an MoE", "qwen2"])
def test_rounded_weights_and_caches_are_near_and_take_the_bytes_of_the_ledger(
    tmp_path, name, dtype, weights, kv_cache
):
    folder = tiny_folder(tmp_path / "m", SPECS[name], tokenizer=False)
    ids = token_ids(1, 23, seed=1)[0].tolist()
    exact = logits_of(executor_of(folder), ids)
    plan = replace(FLOAT32, weights=weights, kv_cache=kv_cache)
    executor = executor_of(folder, plan, dtype=dtype, implementation="torch")
    found = logits_of(executor, ids, chunk=9)
    # Some roundings of 1/16 of a number at the most, in three layers.
    assert float((found - exact).std() / exact.std()) < 0.15
    [planned] = ledger(executor.layout, dtype=dtype, packed=False, max_step_tokens=64)
    [allocated] = executor.memory
    assert (allocated.weights, allocated.kv_cache) == (planned.weight_bytes, planned.kv_bytes)


KINDS = [("bfloat16", "bfloat16"), ("float8", "bfloat16"), ("int8", "float8")]


def native_executor(folder, plan, *, native):
    layout = fit(plan, read_spec(folder))
    with RankReader(folder, layout, dtype="bfloat16") as reader:
        layers = NativeLayers(reader, native=native)
    return ModelExecutor(layout, layers, allocate_cache(layout, 0, plan.kv_blocks))


@pytest.mark.parametrize("native", [False, True], ids=["torch path", "C++"])
@pytest.mark.parametrize(("weights", "kv_cache"), KINDS, ids=map("-".join, KINDS))
@pytest.mark.parametrize("name", SPECS)
def test_packed_layers_are_as_near_as_torch_s(tmp_path, name, weights, kv_cache, native):
    if native and not build.available():
        pytest.skip("the C++ kernels cannot be used here")
    folder = tiny_folder(tmp_path / "m", SPECS[name], tokenizer=False, dtype=torch.bfloat16)
    ids = token_ids(1, 23, seed=1)[0].tolist()
    exact = logits_of(executor_of(folder), ids)
    plan = replace(FLOAT32, weights=weights, kv_cache=kv_cache)
    torch_s = executor_of(folder, plan, dtype="bfloat16", implementation="torch")
    executor = native_executor(folder, plan, native=native)
    theirs, found = (logits_of(each, ids, chunk=9) for each in (torch_s, executor))
    # The median: a router may decide a near tie otherwise, and that token differs by more.
    error, allowed = ((part - exact).abs().mean(dim=1).median() for part in (found, theirs))
    assert float(error) < 1.5 * float(allowed)
    if native:
        [planned] = ledger(executor.layout, dtype="bfloat16", packed=True, max_step_tokens=64)
        [allocated] = executor.memory
        assert (allocated.weights, allocated.kv_cache) == (planned.weight_bytes, planned.kv_bytes)


@pytest.mark.parametrize("format", ["float8", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_quantised_folder_is_what_quantising_while_loading_gives(tmp_path, name, format):
    folder = tiny_folder(tmp_path / "m", TINY[name], tokenizer=False, dtype=torch.bfloat16)
    quantize(QuantizeConfig(model=folder, out=tmp_path / "q", format=format))
    ids = token_ids(1, 11, seed=4)[0].tolist()
    plan = replace(FLOAT32, weights=format)
    before, after = (logits_of(executor_of(path, plan), ids) for path in (folder, tmp_path / "q"))
    assert torch.equal(before, after)


def test_a_scale_for_the_whole_matrix_becomes_one_a_row(tmp_path):
    folder = tiny_folder(tmp_path / "m", MIXTRAL, tokenizer=False)
    quantize(QuantizeConfig(model=folder, out=tmp_path / "q", scheme="tensor"))
    ids = token_ids(1, 11, seed=4)
    plan = replace(FLOAT32, weights="float8")
    with torch.no_grad():
        wanted = load_model(tmp_path / "q")(ids)[0]
    found = logits_of(executor_of(tmp_path / "q", plan), ids[0].tolist())
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("plan", "changes", "error", "message"),
    [
        ({"ranks": 2}, {}, PlanError, "plan is for 2 ranks, but 1 was started"),
        ({"model": {"num_heads": 5}}, {}, PlanError, "another model"),
        ({"kv_blocks": None}, {}, PlanError, "neither kv_blocks nor memory_bytes"),
        ({"memory_bytes": (1000,)}, {}, PlanError, "Rank 0 needs"),
        ({"kv_blocks": 2**40}, {}, PlanError, "GiB are free"),
        ({}, {"dtype": "bfloat16"}, PlanError, "weights is float32"),
        ({}, {"implementation": "native"}, ConfigError, "dtype is float32"),
        ({"experts": "whole"}, {}, PlanError, "dense"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line_before_weights_are_read(
    tmp_path, monkeypatch, plan, changes, error, message
):
    folder = tiny_folder(tmp_path / "m", LLAMA, tokenizer=False)
    monkeypatch.setattr(
        "moesaic.serving.execution.runner.RankReader", lambda *_, **__: pytest.fail("read")
    )
    with pytest.raises(error, match=message) as found:
        executor_of(folder, replace(FLOAT32, **plan), **changes)
    assert "\n" not in str(found.value)


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny_folder(tmp_path / "m", QWEN2, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match=r"lacks model\.layers\.1\.self_attn\.k_proj\.bias"):
        executor_of(folder)


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny_folder(tmp_path / "m", LLAMA, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FolderError, match=r"down_proj.*NaN"):
        executor_of(folder)


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk((), 0, (0,)),
        Chunk((300,), 0, (0,)),
        Chunk((1,), 4, (0,)),
        Chunk((1,), 0, (64,)),
        Chunk((1,) * 65, 0, tuple(range(17))),
        Chunk((1, 2), 0, (0,), logits=3),
    ],
    ids=["empty", "unknown token", "no block", "no such block", "beyond the context", "logits"],
)
def test_a_step_that_makes_no_sense_is_not_computed(tmp_path, chunk):
    executor = executor_of(tiny_folder(tmp_path / "m", LLAMA, tokenizer=False))
    with pytest.raises((AssertionError, ValueError)):
        executor.step(Batch((chunk,)))


def test_two_chunks_may_not_write_one_block(tmp_path):
    executor = executor_of(tiny_folder(tmp_path / "m", LLAMA, tokenizer=False))
    with pytest.raises(AssertionError, match="two chunks write"):
        executor.step(Batch((Chunk((1,), 0, (3,)), Chunk((2,), 0, (3,)))))
