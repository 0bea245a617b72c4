"""Who holds what while a model is served, and how many bytes that is."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from moesaic.errors import PlanError
from moesaic.planning.serving.layout import ServeLayout, apportion, deal, fit
from moesaic.planning.serving.ledger import binding_rank, ledger, matrices
from moesaic.planning.serving.plan import ServePlan, facts_of
from moesaic.planning.serving.storage import stored_bytes
from moesaic.spec import PRESETS, ModelSpec, MoESpec
from tests.tiny import TINY

SKYWORK = PRESETS["skywork-moe-146b"]
CARD = 24_564 * 2**20


# --- Random models and plans ---------------------------------------------------------------------


def random_spec(seed: int) -> ModelSpec:
    """Heads, columns, experts and layers that seldom divide by anything."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 36])
    layers = rng.randint(1, 9)
    moe_layers = tuple(layer for layer in range(layers) if rng.random() < 0.7)
    moe = MoESpec(
        num_experts=rng.randint(1, 9),
        top_k=1,
        expert_dim=rng.choice([24, 64, 96, 320, 640, 1536]),
        shared_expert_dim=rng.choice([0, 0, 48, 256]),
        selection_bias=rng.random() < 0.5,
    )
    return ModelSpec(
        family="skywork",
        vocab_size=rng.choice([300, 512, 1000, 4096]),
        hidden_dim=rng.choice([32, 40, 576]),
        ffn_dim=rng.choice([48, 100, 384, 1536, 1408]),
        num_layers=layers,
        num_heads=kv_heads * rng.choice([1, 2, 3, 5]),
        num_kv_heads=kv_heads,
        head_dim=rng.choice([8, 12, 64]),
        max_positions=64,
        qkv_bias=rng.random() < 0.5,
        out_bias=rng.random() < 0.5,
        qk_norm=rng.random() < 0.5,
        tied_embeddings=rng.random() < 0.5,
        moe=moe if moe_layers else None,
        moe_layers=moe_layers,
    )


def random_plan(seed: int, spec: ModelSpec) -> ServePlan:
    """Any number of ranks, equal or weighted, some of them idle."""
    rng = random.Random(seed)
    ranks = rng.choice([1, 2, 3, 4, 5, 7, 8, 11, 13])

    def shares() -> tuple[float, ...] | None:
        values = [rng.choice([0, 1, 1, 2, 0.7, 5.5]) for _ in range(ranks)]
        return tuple(values) if any(values) and rng.random() < 0.5 else None

    return ServePlan(
        ranks=ranks,
        heads=rng.choice(["rotated", "fixed"]),
        experts="whole" if spec.moe and rng.random() < 0.5 else "columns",
        shares=shares(),
        head_shares=shares(),
        weights=rng.choice(["float32", "bfloat16", "float8", "int8"]),
        kv_cache=rng.choice(["float32", "bfloat16", "float8"]),
        kv_blocks=rng.randint(1, 9),
    )


def layouts(count: int):
    for seed in range(count):
        spec = random_spec(seed)
        yield fit(random_plan(1000 + seed, spec), spec)


def positions(spans) -> Counter:
    """How many ranks hold each position."""
    return Counter(position for start, end in spans for position in range(start, end))


def once(total: int) -> Counter:
    return Counter(range(total))


# --- Everything is held, and once ----------------------------------------------------------------


def test_every_row_column_and_head_is_held_once():
    for layout in layouts(150):
        spec, moe = layout.spec, layout.spec.moe
        assert positions(layout.vocab.spans) == once(spec.vocab_size)
        for layer, splits in enumerate(layout.layers):
            assert positions(splits.heads.spans) == once(spec.num_heads)
            has_moe = moe is not None and spec.is_moe_layer(layer)
            assert positions(splits.ffn.spans) == once(0 if has_moe else spec.ffn_dim)
            shared = moe.shared_expert_dim if has_moe else 0
            assert positions(splits.shared_ffn.spans) == once(shared)
            held = Counter(
                (expert, column)
                for rank in range(layout.plan.ranks)
                for expert in range(*splits.experts.spans[rank])
                for column in range(*splits.expert_columns.spans[rank])
            )
            sizes = (moe.num_experts, moe.expert_dim) if has_moe else (0, 0)
            assert held == Counter((e, c) for e in range(sizes[0]) for c in range(sizes[1]))
            if has_moe and layout.plan.experts == "whole":
                assert set(splits.expert_columns.spans) == {(0, moe.expert_dim)}


def test_a_rank_holds_the_key_value_heads_that_its_query_heads_read_and_no_other():
    shared = 0
    for layout in layouts(150):
        spec = layout.spec
        group = spec.num_heads // spec.num_kv_heads
        for splits in layout.layers:
            for heads, kv_heads in zip(splits.heads.spans, splits.kv_heads.spans, strict=True):
                assert {head // group for head in range(*heads)} == set(range(*kv_heads))
                # The kernels need every key-value head to serve as many query heads.
                assert kv_heads[0] == kv_heads[1] or (
                    (heads[1] - heads[0]) % (kv_heads[1] - kv_heads[0]) == 0
                )
            counts = positions(splits.kv_heads.spans)
            assert set(counts) == set(range(spec.num_kv_heads))
            active = sum(
                1 for share in layout.plan.head_shares or layout.plan.shares or () if share
            )
            if spec.num_kv_heads >= (active or layout.plan.ranks):
                assert set(counts.values()) == {1}
            else:
                assert max(splits.kv_heads.sizes) == 1
                shared += 1
    assert shared > 50


def test_a_rank_with_no_share_holds_nothing():
    spec = TINY["skywork moe"]
    layout = fit(ServePlan(ranks=3, shares=(1, 0, 2), head_shares=(0, 1, 1)), spec)
    for layer in range(spec.num_layers):
        assert layout.layer(0, layer).heads == (0, 0)
        first, end = layout.layer(1, layer).expert_columns
        assert first == end
    assert layout.vocab.sizes[1] == 0


@pytest.mark.parametrize("weights", ["float8", "bfloat16"])
@pytest.mark.parametrize(("columns", "ranks", "unit"), [
    (12_288, 8, 128), (12_288, 7, 128), (1536, 2, 128), (1536, 8, 64), (1536, 7, 32),
    (1408, 11, 128), (1408, 8, 64), (100, 3, 1), (48, 2, 1), (48, 3, 16), (48, 7, 1),
])  # fmt: skip
def test_columns_stay_together_in_the_largest_unit_that_leaves_ranks_alike(
    columns, ranks, unit, weights
):
    spec = PRESETS["smollm2-135m"].replace(ffn_dim=columns)
    layout = fit(ServePlan(ranks=ranks, weights=weights), spec)
    edges = [edge for splits in layout.layers for span in splits.ffn.spans for edge in span]
    whole = math.gcd(*edges)
    assert whole % unit == 0
    fullest = max(max(splits.ffn.sizes) for splits in layout.layers)
    assert fullest <= 1.1 * math.ceil(columns / ranks)
    larger = [u for u in (128, 64, 32, 16) if u > unit and columns % u == 0]
    assert all(math.ceil(columns / u / ranks) * u > 1.1 * -(-columns // ranks) for u in larger)


# --- Nobody is always the fullest ----------------------------------------------------------------


def test_a_rotated_remainder_leaves_no_rank_fuller_than_another_by_more_than_one():
    rng = random.Random(0)
    for _ in range(400):
        total, ranks, layers = rng.randint(1, 130), rng.randint(1, 17), rng.randint(1, 80)
        counts = deal(total, [Fraction(1, ranks)] * ranks, layers, rotated=True)
        assert all(sum(layer) == total for layer in counts)
        assert all(max(layer) - min(layer) <= 1 for layer in counts)
        sums = [sum(rank) for rank in zip(*counts, strict=True)]
        # As small as it can be: they add up to total x layers.
        assert max(sums) - min(sums) == (0 if total * layers % ranks == 0 else 1)


def test_a_weighted_rotation_keeps_its_shares_in_every_layer_and_over_all():
    rng = random.Random(1)
    for _ in range(300):
        ranks, layers, total = rng.randint(1, 9), rng.randint(1, 40), rng.randint(1, 60)
        weights = [rng.choice([0, 1, 2, 3.5, 10]) for _ in range(ranks)]
        weights[0] = weights[0] or 1
        shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        counts = deal(total, shares, layers, rotated=True)
        assert all(sum(layer) == total for layer in counts)
        for rank, column in enumerate(zip(*counts, strict=True)):
            mean = Fraction(sum(column), layers)
            assert set(column) <= {math.floor(mean), math.ceil(mean)}
            assert mean == 0 or shares[rank] > 0


def test_no_other_dealing_has_a_smaller_largest_load():
    rng = random.Random(2)

    def every(total, ranks):
        if ranks == 1:
            yield (total,)
            return
        for first in range(total + 1):
            for rest in every(total - first, ranks - 1):
                yield (first, *rest)

    for _ in range(60):
        total, ranks = rng.randint(0, 9), rng.randint(1, 4)
        shares = [Fraction(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(ranks)]

        def largest(counts, shares=shares):
            return max(count / share for count, share in zip(counts, shares, strict=True))

        counts = apportion(total, shares)
        assert sum(counts) == total
        assert largest(counts) == min(map(largest, every(total, ranks)))


def head_sums(spec: ModelSpec, ranks: int, heads="rotated") -> tuple[list[int], list[int]]:
    """Query heads and key-value heads of each rank over all layers."""
    layout = fit(ServePlan(ranks=ranks, heads=heads), spec)
    queries = [sum(splits.heads.sizes[rank] for splits in layout.layers) for rank in range(ranks)]
    return queries, [layout.kv_heads_of(rank) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", range(1, 37))
@pytest.mark.parametrize(("layers", "heads"), [(52, 36), (30, 9), (80, 64), (13, 40)])
def test_no_rank_is_the_fullest_for_any_number_of_ranks(layers, heads, ranks):
    spec = SKYWORK.replace(
        num_layers=layers, num_heads=heads, num_kv_heads=heads, moe=None, moe_layers=()
    )
    queries, kv_heads = head_sums(spec, ranks)
    assert queries == kv_heads or ranks > heads
    least = 0 if layers * heads % ranks == 0 else 1
    assert max(kv_heads) - min(kv_heads) == least


def least_spread(sizes: tuple[int, ...], layers: int) -> int:
    """Smallest difference of sums if the same sizes may go to any ranks in each layer (HiGHS).

    Counts of each size on each rank suffice: any such table is a union of layers (König).
    """
    values, ranks = sorted(set(sizes)), len(sizes)
    width = len(values)
    rows, low, high = [], [], []

    def add(row, least, most):
        rows.append(row)
        low.append(least)
        high.append(most)

    for rank in range(ranks):
        row = np.zeros(ranks * width + 2)
        row[rank * width : (rank + 1) * width] = 1
        add(row, layers, layers)
        for last, least, most in ((-1, -np.inf, 0), (-2, 0, np.inf)):
            row = np.zeros(ranks * width + 2)
            row[rank * width : (rank + 1) * width] = values
            row[last] = -1
            add(row, least, most)
    for number, value in enumerate(values):
        row = np.zeros(ranks * width + 2)
        row[number : ranks * width : width] = 1
        add(row, layers * sizes.count(value), layers * sizes.count(value))
    costs = np.zeros(ranks * width + 2)
    costs[-2:] = -1, 1
    found = milp(
        costs,
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, np.inf),
    )
    return round(found.fun)


@pytest.mark.parametrize(
    ("kv_heads", "group", "ranks", "layers"),
    [
        *[(3, 3, 4, 30), (3, 3, 5, 30), (3, 3, 7, 30), (3, 3, 8, 30), (2, 7, 3, 24), (2, 7, 5, 24)],
        *[(4, 8, 5, 22), (4, 8, 7, 22), (8, 4, 9, 32), (8, 8, 12, 80), (1, 8, 3, 5), (2, 3, 3, 7)],
    ],
)
def test_shared_key_value_heads_weigh_the_same_and_query_heads_differ_as_little_as_can_be(
    kv_heads, group, ranks, layers
):
    spec = PRESETS["smollm2-135m"].replace(
        num_layers=layers, num_heads=kv_heads * group, num_kv_heads=kv_heads
    )
    queries, kv = head_sums(spec, ranks)
    assert set(kv) == {layers}
    sizes = fit(ServePlan(ranks=ranks), spec).layers[0].heads.sizes
    # No key-value head has fewer ranks than it could have.
    assert max(sizes) == math.ceil(group / (ranks // kv_heads))
    assert max(queries) - min(queries) == least_spread(sizes, layers)


def test_rotating_the_remainder_of_36_heads_over_8_ranks_leaves_12_percent_more_cache():
    budget = int(0.95 * CARD) - 2**29

    def tokens(heads):
        plan = ServePlan(ranks=8, heads=heads, weights="float8", memory_bytes=(budget,) * 8)
        ranks = ledger(fit(plan, SKYWORK), dtype="bfloat16", packed=False, max_step_tokens=2048)
        return ranks[0].kv_blocks * plan.block_tokens

    assert 1.12 <= tokens("rotated") / tokens("fixed") <= 1.13
    assert set(head_sums(SKYWORK, 8)[1]) == {234}
    assert max(head_sums(SKYWORK, 8, "fixed")[1]) == 260


# --- The ledger ----------------------------------------------------------------------------------


def counted(layout: ServeLayout, rank: int, *, item: int, packed: bool) -> int:
    """Bytes of a rank's weights, counted tensor by tensor and not through the planner's list."""
    spec, plan = layout.spec, layout.plan
    weight = {"float32": 4, "bfloat16": 2, "float8": 1, "int8": 1}[plan.weights]
    scale = 4 if plan.weights in ("float8", "int8") else 0

    def matrix(rows, columns, size=weight, scale=scale):
        if rows * columns == 0:
            return 0
        if packed:
            rows, columns = rows + -rows % 32, columns + -columns % 64
        return rows * columns * size + rows * scale

    width, vocab = spec.hidden_dim, len(range(*layout.vocab.spans[rank]))
    total = 4 * width + vocab * width * item
    if packed:
        total += matrix(vocab, width, item, 0)
    elif not spec.tied_embeddings:
        total += vocab * width * item
    for layer in range(spec.num_layers):
        here = layout.layer(rank, layer)
        q, kv = len(range(*here.heads)), len(range(*here.kv_heads))
        total += 2 * 4 * width + (2 * 4 * spec.head_dim if spec.qk_norm else 0)
        total += matrix((q + 2 * kv) * spec.head_dim, width) + matrix(width, q * spec.head_dim)
        total += 4 * (q + 2 * kv) * spec.head_dim if spec.qkv_bias else 0
        total += 4 * width if spec.out_bias and rank == 0 else 0
        if not spec.is_moe_layer(layer):
            columns = len(range(*here.ffn))
            total += 2 * matrix(columns, width) + matrix(width, columns)
            continue
        moe = spec.moe
        total += 4 * moe.num_experts * (width + moe.selection_bias)
        for _ in range(*here.experts):
            columns = len(range(*here.expert_columns))
            total += 2 * matrix(columns, width) + matrix(width, columns)
        if moe.shared_expert_dim:
            columns = len(range(*here.shared_ffn))
            total += 2 * matrix(columns, width) + matrix(width, columns) + 4 * width
    return total


@pytest.mark.parametrize("packed", [False, True])
def test_the_ledger_is_what_a_count_of_every_tensor_gives(packed):
    for number, layout in enumerate(layouts(120)):
        dtype, item = (("float32", 4), ("bfloat16", 2))[number % 2]
        ranks = ledger(layout, dtype=dtype, packed=packed, max_step_tokens=64)
        kv_item = {"float32": 4, "bfloat16": 2, "float8": 1}[layout.plan.kv_cache]
        for rank, one in enumerate(ranks):
            assert one.weight_bytes == counted(layout, rank, item=item, packed=packed)
            heads = sum(
                len(range(*layout.layer(rank, l).kv_heads)) for l in range(layout.spec.num_layers)
            )
            block = 2 * heads * layout.plan.block_tokens * layout.spec.head_dim * kv_item
            assert one.kv_bytes == block * layout.plan.kv_blocks
            assert one.total_bytes == one.weight_bytes + one.kv_bytes + one.workspace_bytes


def test_all_ranks_together_hold_the_models_parameters():
    for name, spec in {**TINY, "skywork": SKYWORK}.items():
        if spec.tied_embeddings:
            continue
        for plan in (ServePlan(ranks=1), ServePlan(ranks=spec.num_kv_heads)):
            layout = fit(plan, spec)
            numbers = 0
            for rank in range(plan.ranks):
                for matrix in matrices(layout, rank, dtype="bfloat16", packed=False):
                    is_copy = rank > 0 and matrix.part in ("norms", "router")
                    gate = matrix.part == "shared_expert" and matrix.rows == 1
                    if not is_copy and not (rank > 0 and gate):
                        numbers += matrix.copies * matrix.rows * matrix.columns
            assert numbers == spec.num_params(), name


def test_stored_bytes_are_whole_tiles_where_packed():
    assert stored_bytes("bfloat16", 33, 65, packed=False) == 33 * 65 * 2
    assert stored_bytes("bfloat16", 33, 65, packed=True) == 64 * 128 * 2
    assert stored_bytes("float8", 33, 65, packed=True) == 64 * 128 + 64 * 4
    assert stored_bytes("int8", 33, 65, packed=False) == 33 * 65 + 33 * 4
    assert stored_bytes("int8", 0, 65, packed=True) == stored_bytes("int8", 9, 0, packed=False) == 0


def test_the_rank_with_the_least_room_sets_the_number_of_blocks():
    spec = TINY["skywork dense"]
    budgets = (400_000, 200_000, 300_000)
    plan = ServePlan(ranks=3, memory_bytes=budgets)
    ranks = ledger(fit(plan, spec), dtype="bfloat16", packed=False, max_step_tokens=8)
    assert binding_rank(ranks) == 1
    assert {one.kv_blocks for one in ranks} == {ranks[1].blocks_that_fit}
    for one, budget in zip(ranks, budgets, strict=True):
        assert one.total_bytes <= budget
    one = ranks[1]
    assert one.total_bytes + one.kv_block_bytes > budgets[1]


# --- The file, and what is refused ---------------------------------------------------------------


def test_a_saved_plan_is_read_back(tmp_path):
    for seed in range(20):
        spec = random_spec(seed)
        plan = random_plan(seed, spec)
        kept = ServePlan(**{**plan.__dict__, "model": facts_of(spec), "about": {"why": "é"}})
        kept.save(tmp_path / "plan.json")
        assert ServePlan.load(tmp_path / "plan.json") == kept
        assert fit(kept, spec).layers == fit(plan, spec).layers


GOOD = {"format": "moesaic-serve-plan", "version": 1, "ranks": 3}
BAD_FILES = {
    "no JSON": ("{", "not readable JSON"),
    "not an object": ("[]", "No plan for serving"),
    "another format": ('{"format": "moesaic-train-plan", "version": 1}', "No plan for serving"),
    "another version": (json.dumps({**GOOD, "version": 2}), "Version 2 is unknown"),
    "unknown key": (json.dumps({**GOOD, "rank": 3}), "'rank' is unknown"),
    "twice": ('{"format": "moesaic-serve-plan", "version": 1, "version": 1}', "twice"),
    "NaN": ('{"format": "moesaic-serve-plan", "version": 1, "shares": [NaN]}', "NaN is no number"),
    "zero ranks": (json.dumps({**GOOD, "ranks": 0}), "ranks is 0"),
    "half a rank": (json.dumps({**GOOD, "ranks": 1.5}), "ranks is 1.5"),
    "truth": (json.dumps({**GOOD, "ranks": True}), "ranks is True"),
    "too many": (json.dumps({**GOOD, "ranks": 10**9}), "up to 4096"),
    "two shares": (json.dumps({**GOOD, "shares": [1, 2]}), "2 numbers, but the plan 3 ranks"),
    "shares below 0": (json.dumps({**GOOD, "shares": [1, 2, -1]}), "shares has -1"),
    "no shares": (json.dumps({**GOOD, "shares": [0, 0, 0]}), "0 for every rank"),
    "shares of text": (json.dumps({**GOOD, "shares": ["a", 1, 1]}), "shares has 'a'"),
    "a share": (json.dumps({**GOOD, "shares": 3}), "a list"),
    "half a byte": (json.dumps({**GOOD, "memory_bytes": [1.5, 1, 1]}), "memory_bytes has 1.5"),
    "unknown kind": (json.dumps({**GOOD, "weights": "int4"}), "weights is 'int4'"),
    "unhashable kind": (json.dumps({**GOOD, "weights": ["int8"]}), "weights is"),
    "no blocks": (json.dumps({**GOOD, "kv_blocks": 0}), "kv_blocks is 0"),
    "odd model": (json.dumps({**GOOD, "model": 3}), "model must be an object"),
    "odd about": (json.dumps({**GOOD, "about": []}), "about must be an object"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line(name, tmp_path):
    text, why = BAD_FILES[name]
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        ServePlan.load(path)
    message = str(caught.value)
    assert why in message
    assert str(path) in message
    assert "\n" not in message


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        ServePlan.load(tmp_path / "none.json")


def test_a_plan_for_another_model_is_refused():
    plan = ServePlan(model=facts_of(TINY["llama"]))
    fit(plan, TINY["llama"])
    for name in ("qwen3", "mixtral", "skywork dense"):
        with pytest.raises(PlanError, match="for another model"):
            fit(plan, TINY[name])
    with pytest.raises(PlanError, match="for another model"):
        fit(ServePlan(model=facts_of(TINY["mixtral"])), TINY["llama"])


def test_whole_experts_of_a_dense_model_are_refused():
    with pytest.raises(PlanError, match="the model is dense"):
        fit(ServePlan(experts="whole"), TINY["llama"])


def test_too_little_memory_is_refused_with_the_numbers():
    plan = ServePlan(ranks=2, weights="float8", memory_bytes=(CARD, CARD))
    with pytest.raises(PlanError, match=r"Rank 0 needs .* may allocate 23\.99 GiB"):
        ledger(fit(plan, SKYWORK), dtype="bfloat16", packed=False, max_step_tokens=2048)
    spec = TINY["llama"]
    plan = ServePlan(kv_blocks=1_000_000, memory_bytes=(10_000_000,))
    with pytest.raises(PlanError, match="16000000 positions"):
        ledger(fit(plan, spec), dtype="float32", packed=False, max_step_tokens=8)
    with pytest.raises(PlanError, match="neither kv_blocks nor memory_bytes"):
        ledger(fit(ServePlan(), spec), dtype="float32", packed=False, max_step_tokens=8)
