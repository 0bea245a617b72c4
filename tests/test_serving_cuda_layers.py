"""A model whose layers are Triton's answers as one whose layers are torch's, graphs or not."""

from __future__ import annotations

import pytest
import torch

from moesaic.checkpoint.folder import read_spec
from moesaic.planning.serving.layout import fit
from moesaic.planning.serving.plan import ServePlan
from moesaic.serving.execution.batch import Batch, Chunk
from moesaic.serving.execution.layers import Step, TorchLayers, allocate_cache
from moesaic.serving.execution.runner import ModelExecutor, takes_cuda
from moesaic.serving.execution.weights import RankReader
from moesaic.spec import MoESpec
from tests.tiny import LLAMA, MIXTRAL, TINY, tiny_folder, token_ids
from tests.triton_interpreter import DEVICE  # skips where the kernels below cannot be imported

# isort: split
from moesaic.serving.cuda import attention
from moesaic.serving.cuda.graphs import SIZES, DecodeGraphs
from moesaic.serving.cuda.layers import CudaLayers

EVERYTHING = LLAMA.replace(
    family="skywork",
    num_heads=6,
    num_kv_heads=2,
    qkv_bias=True,
    out_bias=True,
    qk_norm=True,
    num_layers=2,
    sliding_window=5,
    sliding_layers=(1,),
    moe=MoESpec(
        num_experts=5,
        top_k=3,
        expert_dim=24,
        gate_norm_scale=2.0,
        selection_bias=True,
        shared_expert_dim=16,
    ),
    moe_layers=(1,),
)
DENSE = TINY["qwen3"].replace(num_layers=1)
MIXTRAL = MIXTRAL.replace(num_layers=1, moe_layers=(0,))
SPECS = {"qwen3": DENSE, "mixtral": MIXTRAL, "everything": EVERYTHING}


def executor_of(folder, kind, *, dtype="float32", rank=0, **plan):
    plan = ServePlan(block_tokens=4, kv_blocks=64, **plan)
    layout = fit(plan, read_spec(folder))
    with RankReader(folder, layout, rank=rank, dtype=dtype) as reader:
        layers = kind(reader, DEVICE)
    return ModelExecutor(layout, layers, allocate_cache(layout, rank, 64, DEVICE))


@pytest.fixture(autouse=True)
def few_parts(monkeypatch):
    """The interpreter takes a millisecond a program, however little that does."""
    monkeypatch.setattr(attention, "ENOUGH_PROGRAMS", 8)


def steps_of(executor, *, decodes=2):
    """Scores of a prompt in two chunks beside another one, then of single tokens."""
    one, two = (ids[0].tolist() for ids in (token_ids(1, 8, seed=1), token_ids(1, 3, seed=2)))
    tables = (3, 9, 4, 11, 20, 21), (8, 5, 17, 2)
    batches = [
        Batch((Chunk(tuple(one[:5]), 0, tables[0], logits=5),), experts=True),
        Batch((Chunk(tuple(one[5:]), 5, tables[0]), Chunk(tuple(two), 0, tables[1], logits=2))),
    ]
    for n in range(decodes):
        both = (Chunk((20 + n,), 8 + n, tables[0]), Chunk((30 + n,), 3 + n, tables[1]))
        batches.append(Batch(both[: 2 - n // 2 % 2], experts=True))
    return [executor.step(batch) for batch in batches]


@pytest.mark.parametrize("name", SPECS)
def test_scores_in_float32_are_torch_s(tmp_path, name):
    folder = tiny_folder(tmp_path / "m", SPECS[name], tokenizer=False)
    plan = {"weights": "float32", "kv_cache": "float32"}
    wanted = steps_of(executor_of(folder, TorchLayers, **plan))
    found = steps_of(executor_of(folder, CudaLayers, **plan))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.logits_NV, theirs.logits_NV, atol=2e-5, rtol=1e-5)
        assert (ours.experts_LTK is None) == (theirs.experts_LTK is None)
        if ours.experts_LTK is not None:
            assert torch.equal(ours.experts_LTK, theirs.experts_LTK)


@pytest.mark.parametrize(
    ("dtype", "weights", "kv_cache", "bound"),
    [
        ("float32", "float8", "float32", 1e-5),
        ("float32", "int8", "float8", 0.01),  # a key may be rounded to the neighbour, 1/16 away
        ("bfloat16", "float8", "bfloat16", 0.02),  # rounded once where torch's layers round twice
    ],
)
def test_scores_from_rounded_weights_are_torch_s(tmp_path, dtype, weights, kv_cache, bound):
    folder = tiny_folder(tmp_path / "m", DENSE, tokenizer=False)
    plan = {"dtype": dtype, "weights": weights, "kv_cache": kv_cache}
    found, wanted = (
        torch.cat([result.logits_NV for result in steps_of(executor_of(folder, kind, **plan))])
        for kind in (CudaLayers, TorchLayers)
    )
    assert float((found - wanted).std() / wanted.std()) < bound


def test_rows_rounded_to_e4m3_are_near(tmp_path):
    folder = tiny_folder(tmp_path / "m", MIXTRAL, tokenizer=False)
    plan = {"weights": "float8", "kv_cache": "float32"}
    executor = executor_of(folder, CudaLayers, **plan)
    wide = torch.cat([result.logits_NV for result in steps_of(executor)])
    executor = executor_of(folder, CudaLayers, **plan)
    executor.layers.activations = "float8"
    rounded = torch.cat([result.logits_NV for result in steps_of(executor)])
    assert 0 < float((rounded - wide).std() / wide.std()) < 0.15


@pytest.mark.parametrize("experts", ["columns", "whole"])
def test_what_ranks_add_is_what_one_rank_has(tmp_path, experts):
    """Each half of a layer, by hand: five ranks share six query heads and two key-value heads."""
    folder = tiny_folder(tmp_path / "m", EVERYTHING, tokenizer=False)
    plan = {"weights": "float32", "kv_cache": "float32", "experts": experts}
    whole = executor_of(folder, CudaLayers, **plan)
    parts = [executor_of(folder, CudaLayers, rank=r, ranks=5, **plan) for r in range(5)]
    x_TD = token_ids(1, 3 * 32, seed=4).view(3, 32).float().to(DEVICE) / 300 - 0.5
    chunk = Chunk((5, 6, 7), 0, (3, 1))
    step = step_of(whole, Batch((chunk,)))
    for executor in (whole, *parts):
        executor.layers.embed(step)  # begins the step
    for layer in range(2):
        wanted = whole.layers.attend(layer, x_TD, step, whole.pools[layer])
        found = sum(part.layers.attend(layer, x_TD, step, part.pools[layer]) for part in parts)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
        wanted, chosen = whole.layers.feed_forward(layer, x_TD)
        added = [part.layers.feed_forward(layer, x_TD) for part in parts]
        torch.testing.assert_close(sum(y for y, _ in added), wanted, atol=2e-5, rtol=1e-5)
        assert all(chosen is None or torch.equal(k, chosen) for _, k in added)


def step_of(executor, batch):
    return Step.of(
        batch, frequencies=executor._frequencies, block_tokens=4, device=executor.layers.device
    )


class Replay:
    """Computes again what was captured, into the tensors that came of it first."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        x_TD, experts = run()

        def replay():
            self.replayed += 1
            again_TD, again = run()
            for kept, now in zip((x_TD, *experts), (again_TD, *again), strict=True):
                kept.copy_(now)

        return (x_TD, experts), replay


def test_steps_through_graphs_answer_as_without(tmp_path):
    folder = tiny_folder(tmp_path / "m", EVERYTHING, tokenizer=False)
    plan = {"weights": "float32", "kv_cache": "float32"}
    wanted = steps_of(executor_of(folder, CudaLayers, **plan), decodes=4)
    executor, capture = executor_of(folder, CudaLayers, **plan), Replay()
    executor.forward = DecodeGraphs(executor.through_layers, table_blocks=16, capture=capture)
    found = steps_of(executor, decodes=4)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.logits_NV, theirs.logits_NV, atol=1e-5, rtol=1e-5)
        if theirs.experts_LTK is not None:
            assert torch.equal(ours.experts_LTK, theirs.experts_LTK)
    assert (capture.captured, capture.replayed) == (2, 4), "one and two tokens; four steps"


def test_a_step_is_padded_to_the_next_size_with_its_own_tokens(tmp_path):
    folder = tiny_folder(tmp_path / "m", LLAMA, tokenizer=False)
    executor = executor_of(folder, TorchLayers, weights="float32", kv_cache="float32")
    seen = []

    def forward(step):
        seen.append((step.tokens_T.tolist(), step.blocks_T.tolist(), step.tables_SB.tolist()))
        return step.tokens_T[:, None].float() * 10, []

    graphs = DecodeGraphs(forward, table_blocks=4, capture=Replay())
    five = tuple(Chunk((50 + n,), n, (n, 30 + n)) for n in range(5))
    x_TD, _ = graphs(step_of(executor, Batch(five)))
    assert x_TD[:, 0].tolist() == [500, 510, 520, 530, 540]
    tokens, blocks, tables = seen[-1]
    assert tokens == [50, 51, 52, 53, 54, 50, 51, 52]
    assert blocks[5:] == blocks[:3]
    assert [row[0] for row in tables] == [0, 1, 2, 3, 4, 0, 1, 2]
    graphs(step_of(executor, Batch((Chunk((1, 2), 0, (0,)),))))
    assert seen[-1][0] == [1, 2], "a prompt goes past the graphs"
    many = tuple(Chunk((1,), 0, (n,)) for n in range(SIZES[-1] + 1))
    assert len(graphs(step_of(executor, Batch(many)))[0]) == SIZES[-1] + 1


def test_our_kernels_are_taken_on_cuda_in_bfloat16():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert takes_cuda("auto", dtype="bfloat16", device=cuda)
    assert not takes_cuda("auto", dtype="float32", device=cuda)
    assert not takes_cuda("torch", dtype="bfloat16", device=cuda)
    assert not takes_cuda("auto", dtype="bfloat16", device=cpu)
