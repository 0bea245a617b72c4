"""Which part of every tensor a rank holds: nothing is lost, and nothing is there by accident."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch

from moesaic.checkpoint.pieces import Piece, model_shapes, pieces
from moesaic.model.transformer import Transformer
from moesaic.parallel.group import Groups
from moesaic.planning.layout import Layout, fit, num_units, unit_names
from moesaic.planning.plan import Splits, TrainPlan
from moesaic.planning.split import Split
from moesaic.spec import ModelSpec, MoESpec
from tests.tiny import LLAMA, TINY, VOCAB_SIZE

MODELS: dict[str, ModelSpec] = {
    **TINY,
    "everything that a model may have": LLAMA.replace(
        family="skywork",
        qkv_bias=True,
        out_bias=True,
        qk_norm=True,
        tied_embeddings=True,
        num_heads=9,
        num_kv_heads=3,
        num_layers=4,
        moe=MoESpec(
            num_experts=6,
            top_k=2,
            expert_dim=20,
            gate_norm_scale=1.0,
            selection_bias=True,
            shared_expert_dim=16,
        ),
        moe_layers=(1, 3),
    ),
}

PLANS: dict[str, TrainPlan] = {
    "one rank": TrainPlan(),
    "tp 2": TrainPlan(tp=2),
    "tp 4, idle ranks": TrainPlan(tp=4),
    "tp 2 by hand": TrainPlan(
        tp=2,
        splits=Splits(
            ffn=Split.from_counts([0, 1]),  # stretched to the model's width by `fitted`
            vocab=Split.from_counts([1, 2]),
            experts=Split.from_counts([1, 0]),
        ),
    ),
    "dp 2 x tp 2": TrainPlan(dp=2, tp=2),
    "dp 2 x tp 3, ep 6": TrainPlan(dp=2, tp=3, experts_over="ep"),
    "dp 2 x tp 3, ep 2": TrainPlan(dp=2, tp=3, experts_over="ep", ep=2),
    "dp 4, ep 4": TrainPlan(dp=4, experts_over="ep"),
    "dp 2 x tp 2, etp": TrainPlan(dp=2, tp=2, experts_over="etp"),
    "dp 4 x tp 2, etp, ep 2": TrainPlan(dp=4, tp=2, experts_over="etp", ep=2),
    "pp 2 x dp 2 x tp 2": TrainPlan(pp=2, dp=2, tp=2, shard=1),
    "pp 2, zbv of half layers": TrainPlan(pp=2, tp=2, schedule="zbv"),
    "pp 3, one with the embedding alone": TrainPlan(pp=3),
}

EDGES = {
    "pp 2, zbv of half layers": [0, 2, 3, 6],
    "pp 3, one with the embedding alone": [0, 1, 4],
}
"""Units at which the stages of these plans begin."""


def fitted(plan: TrainPlan, spec: ModelSpec, name: str) -> Layout:
    """The plan with its hand-made splits and stages stretched to this model."""
    totals = {
        "ffn": spec.ffn_dim,
        "vocab": VOCAB_SIZE,
        "experts": 0 if spec.moe is None else spec.moe.num_experts,
    }
    raw = plan.to_json()
    if spec.moe is None:
        raw["splits"].pop("experts", None)
    for key, spans in raw["splits"].items():
        counts = [end - start for start, end in spans]
        least = totals[key] // sum(counts)
        sizes = [count * least for count in counts]
        sizes[-1] += totals[key] - sum(sizes)
        raw["splits"][key] = [list(span) for span in Split.from_counts(sizes).spans]
    if plan.tp > spec.num_kv_heads:
        raw["splits"]["kv_heads"] = Split.balanced(spec.num_kv_heads, plan.tp).spans
        raw = json.loads(json.dumps(raw))
    if name in EDGES:
        names = unit_names(spec)
        edges = [*EDGES[name], num_units(spec)]
        raw["stages"] = [
            {"first": names[start], "last": names[end - 1]}
            for start, end in itertools.pairwise(edges)
        ]
    return fit(TrainPlan.from_json(raw), spec)


CASES = [
    pytest.param(fitted(plan, spec, name), id=f"{model}-{name}")
    for model, spec in MODELS.items()
    for name, plan in PLANS.items()
    if spec.moe is not None or plan.experts_over == "edp"
]


def held_by(layout: Layout, rank: int) -> list[dict[str, Piece]]:
    """Pieces of each stage that a rank runs."""
    stages = layout.stages_of(layout.place(rank).pp)
    return [pieces(layout.spec, layout.shard(rank), layout.stages[stage]) for stage in stages]


@pytest.mark.parametrize("layout", CASES)
def test_the_ranks_of_a_stage_hold_every_value_once_apart_from_copies(layout: Layout) -> None:
    plan = layout.plan
    for number, units in enumerate(layout.stages):
        ranks = [
            rank
            for rank in range(plan.world_size)
            if number in layout.stages_of(layout.place(rank).pp)
        ]
        held = [pieces(layout.spec, layout.shard(rank), units) for rank in ranks]
        for name, first in held[0].items():
            times = np.zeros(first.shape, dtype=int)
            for of_rank in held:
                times[of_rank[name].slices] += 1
            copies = (
                plan.expert_data_ranks
                if first.is_expert
                else plan.dp
                if first.is_cut
                else plan.dp * plan.tp
            )
            assert (times == copies).all(), name


@pytest.mark.parametrize("layout", CASES)
def test_the_stages_together_hold_every_tensor(layout: Layout) -> None:
    held: list[str] = []
    for units in layout.stages:
        held += pieces(layout.spec, layout.shard(0), units)
    names = set(model_shapes(layout.spec))
    assert set(held) == names
    is_doubled = layout.spec.tied_embeddings and len(layout.stages) > 1
    twice = {"model.embed_tokens.weight"} if is_doubled else set()
    assert {name for name in names if held.count(name) > 1} == twice


@pytest.mark.parametrize("layout", CASES)
def test_what_data_parallel_ranks_share_is_there_once_in_each_replica(layout: Layout) -> None:
    plan = layout.plan
    for name, whole in model_shapes(layout.spec).items():
        times = np.zeros(whole, dtype=int)
        copies = 0
        for rank in range(plan.world_size):
            place = layout.place(rank)
            for of_stage in held_by(layout, rank):
                if name not in of_stage:
                    continue
                piece = of_stage[name]
                position, shards = place.dp, plan.dense_shards
                if piece.is_expert:
                    position, shards = place.edp, plan.expert_shards
                times[piece.share(shards, position % shards).slices] += 1
                ranks = plan.expert_data_ranks if piece.is_expert else plan.dp
                # A tensor that is not cut lies on every tensor rank, too.
                alike = 1 if piece.is_cut else plan.tp
                copies = ranks // shards * alike
        is_doubled = (
            layout.spec.tied_embeddings
            and len(layout.stages) > 1
            and name == "model.embed_tokens.weight"
        )
        assert (times == copies * (1 + is_doubled)).all(), name


@pytest.mark.parametrize("layout", CASES)
def test_pieces_are_as_large_as_the_parameters_of_that_ranks_stage(layout: Layout) -> None:
    for rank in range(layout.plan.world_size):
        stages = layout.stages_of(layout.place(rank).pp)
        for stage, found in zip(stages, held_by(layout, rank), strict=True):
            with torch.device("meta"):
                # Only sizes matter here, so the ranks that would hold the rest may be missing.
                model = Transformer(layout.spec, layout.shard(rank), Groups(), layout.stages[stage])
            shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
            assert shapes == {name: piece.local_shape for name, piece in found.items()}
            assert all(piece.numel == math.prod(shapes[name]) for name, piece in found.items())


def test_heads_are_cut_between_groups_and_never_inside() -> None:
    spec = MODELS["everything that a model may have"]
    layout = fit(TrainPlan(tp=2), spec)
    attention = "model.layers.0.self_attn"
    for rank, (heads, groups) in enumerate([((0, 6), (0, 2)), ((6, 9), (2, 3))]):
        found = pieces(spec, layout.shard(rank), layout.stages[0])
        query, key = ((8 * start, 8 * end) for start, end in (heads, groups))
        assert found[f"{attention}.q_proj.weight"].spans == (query, (0, 32))
        assert found[f"{attention}.q_proj.bias"].spans == (query,)
        assert found[f"{attention}.v_proj.weight"].spans == (key, (0, 32))
        assert found[f"{attention}.o_proj.weight"].spans == ((0, 32), query)
        assert found[f"{attention}.o_proj.bias"].spans == ((0, 32),)
        assert not found[f"{attention}.o_proj.bias"].is_cut


def test_an_experts_columns_are_the_rows_of_two_matrices_and_the_columns_of_the_third() -> None:
    spec = MODELS["everything that a model may have"]
    layout = fit(TrainPlan(dp=2, tp=2, experts_over="etp"), spec)
    found = pieces(spec, layout.shard(3), layout.stages[0])
    experts = "model.layers.1.block_sparse_moe.experts"
    assert found[f"{experts}.w1"].spans == ((3, 6), (10, 20), (0, 32))
    assert found[f"{experts}.w3"].spans == ((3, 6), (10, 20), (0, 32))
    assert found[f"{experts}.w2"].spans == ((3, 6), (0, 32), (10, 20))


def test_a_shard_beyond_the_last_position_holds_nothing() -> None:
    piece = Piece((3, 4), ((0, 3), (0, 4)), is_cut=False, is_expert=False)
    shapes = [piece.share(4, shard).local_shape for shard in range(4)]
    assert shapes == [(1, 4), (1, 4), (1, 4), (0, 4)]
    assert piece.share(4, 3).numel == 0


def test_a_position_is_found_in_the_piece_that_holds_it_and_in_no_other() -> None:
    piece = Piece((8, 4), ((2, 5), (0, 4)), is_cut=True, is_expert=True)
    assert [piece.part_of(0, position) for position in (1, 2, 4, 5)] == [None, 0, 2, None]
    assert piece.offsets == (2, 0)
