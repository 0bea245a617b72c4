"""Splits, plans and layouts: who holds what, worked out without torch."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import FolderError, PlanError
from moesaic.planning.layout import (
    Layout,
    default_stages,
    fit,
    holds,
    layers_of,
    num_units,
    unit_names,
    whole,
)
from moesaic.planning.plan import Splits, Stage, TrainPlan
from moesaic.planning.split import Split, cut
from moesaic.spec import PRESETS, ModelSpec, MoESpec

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "recipes" / "plans").glob("*.json"))
EXAMPLES = re.findall(r"^```json\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)

SMOLLM2 = PRESETS["smollm2-135m"].replace(
    family="mixtral",
    moe=MoESpec(num_experts=8, top_k=2, expert_dim=1536),
    moe_layers=tuple(range(30)),
)
"""SmolLM2-135M as `moesaic upcycle --experts 8 --top-k 2` makes it: 9 heads on 3 of keys."""

HEAD = {"format": "moesaic-train-plan", "version": 1}


def plan_of(**fields: Any) -> TrainPlan:
    """A plan as its file would say it."""
    return TrainPlan.from_json({**HEAD, **fields})


# --- Split -------------------------------------------------------------------------------------

SPLITS = {
    "even": Split.from_counts([8, 8], unit=4),
    "uneven": Split.from_counts([6, 10], unit=4),
    "idle rank": Split.from_counts([16, 0], unit=4),
    "idle first": Split.from_counts([0, 3, 2]),
    "one rank": Split.from_counts([5]),
    "nothing to hold": Split.from_counts([0, 0]),
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_counts_become_spans_that_hold_every_position_once(split: Split) -> None:
    held = [position for start, end in split.spans for position in range(start, end)]
    assert held == list(range(split.total))
    assert split.is_partition
    assert sum(split.sizes) == split.total


@pytest.mark.parametrize("total", range(12))
@pytest.mark.parametrize("parts", range(1, 6))
def test_a_balanced_split_differs_by_one_at_most_and_gives_the_first_more(
    total: int, parts: int
) -> None:
    sizes = Split.balanced(total, parts).sizes
    assert len(sizes) == parts
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert list(sizes) == sorted(sizes, reverse=True)


def test_a_unit_scales_every_span() -> None:
    assert Split.balanced(3, 2, unit=64).spans == ((0, 128), (128, 192))
    assert Split.balanced(3, 2).scaled(64) == Split.balanced(3, 2, unit=64)


@pytest.mark.parametrize(
    "spans",
    [((0, 32), (0, 32), (32, 64)), ((0, 2), (3, 4)), ((2, 4), (0, 2)), ((1, 2),), ()],
    ids=["shared", "gap", "out of order", "late start", "no rank"],
)
def test_spans_that_hold_a_position_not_once_or_not_in_order_are_no_partition(
    spans: tuple[tuple[int, int], ...],
) -> None:
    assert not Split(spans).is_partition


@pytest.mark.parametrize("span", [(2, 1), (-1, 3)])
def test_a_span_that_cannot_be_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match=rf"Rank 1 .* holds {span[0]} to {span[1]}"):
        Split(((0, 2), span))


@pytest.mark.parametrize("length", range(10))
@pytest.mark.parametrize("parts", range(1, 6))
def test_shards_are_ceil_sized_and_hold_every_position_of_the_span_once(
    length: int, parts: int
) -> None:
    spans = [cut((7, 7 + length), parts, part) for part in range(parts)]
    assert [p for span in spans for p in range(*span)] == list(range(7, 7 + length))
    full = -(-length // parts)
    sizes = [end - start for start, end in spans]
    assert all(size == full for size in sizes[: length // full if full else 0])


# --- TrainPlan ---------------------------------------------------------------------------------

EVERYTHING = TrainPlan(
    pp=2,
    dp=2,
    tp=2,
    experts_over="etp",
    ep=2,
    dispatch="all_gather",
    deduplicate=False,
    splits=Splits(
        kv_heads=Split.from_counts([2, 1]), expert_columns=Split.from_counts([1000, 536])
    ),
    zero=3,
    shard=1,
    schedule="zbv",
    stages=(
        Stage("embedding", "7.attention"),
        Stage("7.feed_forward", "14.feed_forward"),
        Stage("15.attention", "29.attention"),
        Stage("29.feed_forward", "head"),
    ),
    recompute={0: "full", 29: "attention", 3: "moe_activations"},
    micro_batch=3,
    about={"by": "hand", "seconds": 0.25},
)
"""A plan with no default left in it."""


@pytest.mark.parametrize("plan", [TrainPlan(), EVERYTHING], ids=["defaults", "everything"])
def test_a_plan_comes_back_from_its_file_as_it_was(plan: TrainPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert TrainPlan.load(tmp_path / "plan.json") == plan
    assert TrainPlan.from_json(plan.to_json()) == plan


def test_what_a_file_leaves_out_takes_its_default() -> None:
    assert plan_of() == TrainPlan()
    assert plan_of(ep=None, shard=None, micro_batch=None, stages=None) == TrainPlan()
    plan = plan_of(tp=2, splits={"experts": [[0, 1], [1, 4]]}, recompute={"2": "full"})
    assert plan == TrainPlan(
        tp=2, splits=Splits(experts=Split(((0, 1), (1, 4)))), recompute={2: "full"}
    )


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"tp": 4}, (4, 1, 1)),
        ({"dp": 2, "tp": 4}, (4, 1, 2)),
        ({"dp": 2, "tp": 4, "experts_over": "ep"}, (8, 1, 1)),
        ({"dp": 2, "tp": 4, "experts_over": "ep", "ep": 4}, (4, 1, 2)),
        ({"dp": 4, "tp": 2, "experts_over": "etp"}, (4, 2, 1)),
        ({"dp": 4, "tp": 2, "experts_over": "etp", "ep": 1}, (1, 2, 4)),
    ],
)
def test_the_ranks_of_the_experts_view_multiply_to_those_of_a_stage(
    fields: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    plan = plan_of(pp=3, **fields)
    found = plan.expert_ranks, plan.expert_tensor_ranks, plan.expert_data_ranks
    assert found == sizes
    assert plan.world_size == 3 * plan.dp * plan.tp == 3 * sizes[0] * sizes[1] * sizes[2]


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no rank": ({"dp": 0}, "dp is 0. It must be at least 1"),
    "a negative size": ({"tp": -2}, "tp is -2"),
    "a fraction": ({"pp": 1.5}, "pp is 1.5. It must be a whole number"),
    "truth for a number": ({"tp": True}, "tp is True"),
    "text for a number": ({"dp": "2"}, "dp is '2'"),
    "null where there is no choice": ({"pp": None}, "pp is None"),
    "null for zero": ({"zero": None}, "zero is None"),
    "more ranks than there are": ({"pp": 10**4000, "dp": 10**4000}, "1048576 ranks"),
    "an unknown key": ({"tensor": 2}, "'tensor' is unknown. A plan has about, "),
    "an unknown way of experts": ({"experts_over": "tp"}, "experts_over is 'tp'"),
    "an unknown schedule": ({"schedule": "2f2b"}, "schedule is '2f2b'. .*'dualpipev'"),
    "an unknown dispatch": ({"dispatch": ["auto"]}, "dispatch is"),
    "an unknown zero": ({"zero": 4}, "zero is 4. It must be one of 1, 2, 3"),
    "no truth value": ({"deduplicate": 1}, "deduplicate is 1. It must be true or false"),
    "no object about": ({"about": "me"}, "about must be an object"),
    "ep that is not tp": ({"tp": 4, "ep": 2}, "ep is 2 with experts over edp.* must be 4"),
    "ep that does not divide": (
        {"dp": 2, "tp": 3, "experts_over": "ep", "ep": 4},
        "ep is 4 .* a divisor of 6",
    ),
    "shard that does not divide": ({"dp": 4, "shard": 3}, "over 3 of 4 data-parallel ranks"),
    "an unknown split": ({"splits": {"heads": [[0, 1]]}}, "splits must be an object with some of"),
    "splits that are a list": ({"splits": [[0, 1]]}, "splits must be an object"),
    "counts for spans": ({"splits": {"experts": [4, 4]}}, "splits.experts must be a list of"),
    "a span of three": ({"splits": {"ffn": [[0, 1, 2]]}}, "splits.ffn must be a list of"),
    "a span of truth": ({"splits": {"ffn": [[False, 1]]}}, "splits.ffn must be a list of"),
    "a span backwards": ({"splits": {"ffn": [[3, 1]]}}, "splits.ffn: Rank 0 .* holds 3 to 1"),
    "stages by count": (
        {"stages": [15, 15]},
        'stages must be a list of objects, each with "first"',
    ),
    "a stage without an end": ({"stages": [{"first": "embedding"}]}, "stages must be a list of"),
    "a stage of numbers": ({"stages": [{"first": 0, "last": 61}]}, "stages must be a list of"),
    "recompute as a list": ({"recompute": [0, 1]}, "recompute must be an object"),
    "an unknown recompute": ({"recompute": {"0": "some"}}, "recompute has '0': 'some'"),
    "a layer that is no number": ({"recompute": {"all": "full"}}, "recompute has 'all'"),
    "a layer in strange digits": ({"recompute": {"²": "full"}}, "recompute has '²'"),
    "a part that no layer has": ({"recompute": {"3.head": "full"}}, "recompute has '3.head'"),
    "a layer spelled twice": ({"recompute": {"00": "full"}}, "recompute has '00'"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_a_plan_that_contradicts_itself_is_refused_in_one_line(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message) as error:
        plan_of(**fields)
    assert "\n" not in str(error.value)


BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    "another format": ('{"format": "moesaic-tokens", "version": 1}', '"moesaic-train-plan"'),
    "no object": ("[1, 2]", "No plan"),
    "no version": ('{"format": "moesaic-train-plan"}', "Version None is unknown; this reads 1"),
    "a later version": ('{"format": "moesaic-train-plan", "version": 2}', "Version 2 is unknown"),
    "no number": ('{"format": "moesaic-train-plan", "version": true}', "Version True is unknown"),
    "cut short": ('{"format": "moesaic', "is not readable JSON"),
    "no text": (b"\xff\xfe\x00", "is not readable JSON"),
    "a key twice": (
        '{"format": "moesaic-train-plan", "version": 1, "tp": 2, "tp": 4}',
        "'tp' stands there twice",
    ),
    "no JSON number": (
        '{"format": "moesaic-train-plan", "version": 1, "about": {"x": NaN}}',
        "NaN is no number",
    ),
    "nested without end": ("[" * 100_000, "is not readable JSON"),
    "a bad value": ('{"format": "moesaic-train-plan", "version": 1, "tp": 0}', "tp is 0"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_is_no_plan_is_refused_in_one_line_with_its_name(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(PlanError, match=message) as error:
        TrainPlan.load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.json cannot be read: No such file"):
        TrainPlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        TrainPlan.load(tmp_path)
    with pytest.raises(FolderError, match="no folder"):
        TrainPlan().save(tmp_path / "nowhere" / "plan.json")


# --- Layout ------------------------------------------------------------------------------------


def test_a_rank_alone_holds_everything() -> None:
    shard = whole(SMOLLM2)
    assert (shard.kv_heads, shard.heads) == ((0, 3), (0, 9))
    assert (shard.vocab, shard.experts, shard.expert_columns) == ((0, 49_152), (0, 8), (0, 1536))
    layout = fit(TrainPlan(), SMOLLM2)
    assert layout.stages == ((0, num_units(SMOLLM2)),)
    assert layout.stages_of(0) == (0,)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "edp": {"pp": 2, "dp": 2, "tp": 2},
    "edp over 3": {"dp": 2, "tp": 3},
    "ep": {"dp": 2, "tp": 2, "experts_over": "ep"},
    "ep of 2 across data and tensor ranks": {"dp": 2, "tp": 3, "experts_over": "ep", "ep": 2},
    "etp": {"pp": 2, "dp": 4, "tp": 2, "experts_over": "etp", "ep": 2},
}


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_rank_has_one_place_in_each_view(fields: dict[str, Any]) -> None:
    plan = plan_of(**fields)
    layout = fit(plan, SMOLLM2)
    places = [layout.place(rank) for rank in range(plan.world_size)]
    for rank, place in enumerate(places):
        assert rank == (place.pp * plan.dp + place.dp) * plan.tp + place.tp
        edp, ep, etp = plan.expert_data_ranks, plan.expert_ranks, plan.expert_tensor_ranks
        assert rank == ((place.pp * edp + place.edp) * ep + place.ep) * etp + place.etp
        assert max(place.edp - edp, place.ep - ep, place.etp - etp, place.tp - plan.tp) < 0
    assert len({(place.pp, place.edp, place.ep, place.etp) for place in places}) == len(places)


def test_experts_over_edp_are_those_of_the_tensor_ranks() -> None:
    layout = fit(plan_of(pp=2, dp=2, tp=2), SMOLLM2)
    assert all(layout.place(rank).ep == layout.place(rank).tp for rank in range(8))


def test_experts_over_etp_have_their_columns_on_the_tensor_ranks() -> None:
    layout = fit(plan_of(dp=2, tp=2, experts_over="etp"), SMOLLM2)
    for rank in range(4):
        place, shard = layout.place(rank), layout.shard(rank)
        assert (place.ep, place.etp) == (place.dp, place.tp)
        assert shard.experts == ((0, 4), (4, 8))[place.dp]
        assert shard.expert_columns == ((0, 768), (768, 1536))[place.tp]


@pytest.mark.parametrize(
    ("tp", "heads"),
    [(1, [9]), (2, [6, 3]), (3, [3, 3, 3]), (4, [3, 3, 3, 0])],
)
def test_query_heads_go_with_their_key_value_head(tp: int, heads: list[int]) -> None:
    kv_heads = Split.balanced(3, tp).spans
    layout = fit(plan_of(tp=tp, splits={"kv_heads": [list(span) for span in kv_heads]}), SMOLLM2)
    spans = [layout.shard(rank).heads for rank in range(tp)]
    assert [end - start for start, end in spans] == heads
    for rank, (start, end) in enumerate(spans):
        first, last = layout.shard(rank).kv_heads
        assert (start, end) == (3 * first, 3 * last)


def test_36_heads_over_8_ranks_are_5_and_4_each() -> None:
    layout = fit(plan_of(tp=8), PRESETS["skywork-moe-146b"])
    assert layout.kv_heads.sizes == (5, 5, 5, 5, 4, 4, 4, 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tp": 3}, "all_to_all"),
        ({"tp": 2}, "all_gather"),
        ({"tp": 2, "dispatch": "all_to_all"}, "all_to_all"),
        ({"tp": 3, "dispatch": "all_gather"}, "all_gather"),
        ({"tp": 2, "dp": 2, "experts_over": "ep"}, "all_to_all"),
    ],
)
def test_tokens_go_all_to_all_where_top_k_is_below_the_ranks_unless_told(
    fields: dict[str, Any], expected: str
) -> None:
    assert fit(plan_of(**fields), SMOLLM2).dispatch == expected
    assert fit(plan_of(**fields), SMOLLM2).shard(0).dispatch == expected


def test_units_have_names_in_the_order_that_tokens_pass() -> None:
    tiny = SMOLLM2.replace(num_layers=2, moe_layers=(0, 1))
    assert unit_names(tiny) == [
        "embedding",
        "0.attention",
        "0.feed_forward",
        "1.attention",
        "1.feed_forward",
        "head",
    ]
    assert num_units(tiny) == 6


@pytest.mark.parametrize("layers", range(1, 9))
def test_default_stages_have_whole_layers_as_equal_as_can_be(layers: int) -> None:
    spec = SMOLLM2.replace(num_layers=layers, moe_layers=tuple(range(layers)))
    for count in range(1, layers + 1):
        stages = default_stages(spec, count)
        assert [stage[0] for stage in stages] == [0, *(end for _, end in stages[:-1])]
        assert stages[-1][1] == num_units(spec)
        held = [layers_of(stage, spec) for stage in stages]
        assert [layer for of_stage in held for layer in of_stage] == list(range(layers))
        assert max(map(len, held)) - min(map(len, held)) <= 1
        assert holds(stages[0], 0)
        assert holds(stages[-1], num_units(spec) - 1)


def test_a_stage_may_be_cut_inside_a_layer_or_hold_one_end_alone() -> None:
    names = [("embedding", "embedding"), ("0.attention", "4.attention"), ("4.feed_forward", "head")]
    stages = [{"first": first, "last": last} for first, last in names]
    layout = fit(plan_of(pp=3, stages=stages), SMOLLM2)
    assert layout.stages == ((0, 1), (1, 10), (10, 62))
    assert layers_of(layout.stages[0], SMOLLM2) == []
    assert layers_of(layout.stages[1], SMOLLM2)[-1] == layers_of(layout.stages[2], SMOLLM2)[0] == 4


@pytest.mark.parametrize(
    ("schedule", "count", "expected"),
    [
        ("1f1b", 3, [(0,), (1,), (2,)]),
        ("gpipe", 3, [(0,), (1,), (2,)]),
        ("interleaved", 6, [(0, 3), (1, 4), (2, 5)]),
        ("zb1p", 3, [(0,), (1,), (2,)]),
        ("zbv", 6, [(0, 5), (1, 4), (2, 3)]),
        ("dualpipev", 6, [(0, 5), (1, 4), (2, 3)]),
    ],
)
def test_a_schedule_says_how_many_stages_a_rank_runs_and_which(
    schedule: str, count: int, expected: list[tuple[int, ...]]
) -> None:
    layout = fit(plan_of(pp=3, schedule=schedule), SMOLLM2)
    assert len(layout.stages) == count
    assert [layout.stages_of(pp) for pp in range(3)] == expected


def test_interleaved_ranks_may_run_more_than_two_stages() -> None:
    edges = [0, 5, 11, 17, 23, 31, 62]
    names = unit_names(SMOLLM2)
    stages = [
        {"first": names[start], "last": names[end - 1]} for start, end in itertools.pairwise(edges)
    ]
    layout = fit(plan_of(pp=2, schedule="interleaved", stages=stages), SMOLLM2)
    assert [layout.stages_of(pp) for pp in range(2)] == [(0, 2, 4), (1, 3, 5)]


def test_a_layer_that_a_plan_does_not_name_keeps_its_activations() -> None:
    layout = fit(plan_of(recompute={"3": "full"}), SMOLLM2)
    assert layout.recompute(0) == {3: "full"}
    assert layout.recompute(0, {3: "none", 4: "attention"}) == {4: "attention"}


def test_the_halves_of_a_cut_layer_recompute_what_is_said_of_them():
    def in_both(recompute: dict[str, str]) -> list[str]:
        plan = plan_of(
            pp=2,
            stages=[
                {"first": "embedding", "last": "3.attention"},
                {"first": "3.feed_forward", "last": "head"},
            ],
            recompute=recompute,
        )
        layout = fit(plan, SMOLLM2)
        return [layout.recompute(stage).get(3, "none") for stage in (0, 1)]

    assert in_both({"3": "full"}) == ["full", "full"]
    assert in_both({"3": "attention"}) == ["attention", "none"]
    assert in_both({"3": "moe_activations"}) == ["none", "moe_activations"]
    assert in_both({"3.attention": "full", "3.feed_forward": "moe_activations"}) == [
        "full",
        "moe_activations",
    ]
    assert in_both({"3": "full", "3.attention": "none"}) == ["none", "full"]


def test_the_summary_says_the_ranks_the_layers_and_the_heads() -> None:
    summary = fit(plan_of(pp=2, tp=2), SMOLLM2).summary()
    assert summary == (
        "pp 2 x dp 1 x tp 2, experts over edp 2, 1f1b, layers and ends 15.5+15.5, heads 6+3"
    )


def stages_of(*names: str) -> dict[str, Any]:
    return {
        "pp": len(names) // 2,
        "stages": [
            {"first": first, "last": last}
            for first, last in zip(names[::2], names[1::2], strict=True)
        ],
    }


DENSE = PRESETS["smollm2-135m"]
BAD_FITS: dict[str, tuple[ModelSpec, dict[str, Any], str]] = {
    "experts of a dense model": (DENSE, {"dp": 2, "experts_over": "ep"}, "the model is dense"),
    "a split of a dense model's experts": (
        DENSE,
        {"tp": 2, "splits": {"experts": [[0, 4], [4, 8]]}},
        "splits.experts is .* 0 exactly once",
    ),
    "too few spans": (SMOLLM2, {"tp": 2, "splits": {"vocab": [[0, 49152]]}}, "has 1 spans, but 2"),
    "a gap": (
        SMOLLM2,
        {"tp": 2, "splits": {"kv_heads": [[0, 1], [2, 3]]}},
        r"splits.kv_heads is \[\[0, 1\], \[2, 3\]\], which does not hold each of the model's 3",
    ),
    "another model's width": (
        SMOLLM2,
        {"tp": 2, "splits": {"ffn": [[0, 6144], [6144, 12288]]}},
        "the model's 1536",
    ),
    "a rank without a head": (SMOLLM2, {"tp": 4}, "tp is 4, but the model has 3 key-value heads"),
    "a layer too far": (SMOLLM2, {"recompute": {"30": "full"}}, "layer 30, but .* 0 to 29"),
    "half a layer that is not cut": (
        SMOLLM2,
        {"recompute": {"3.attention": "full"}},
        "recomputes 3.attention, but no stage begins at 3.feed_forward",
    ),
    "more stages than layers": (SMOLLM2, {"pp": 31}, "31 stages, but the model only 30 layers"),
    "an unknown unit": (
        SMOLLM2,
        stages_of("embedding", "norm"),
        "Stage 0 of the plan names 'norm'",
    ),
    "a stage backwards": (
        SMOLLM2,
        stages_of("embedding", "0.attention", "1.attention", "0.feed_forward"),
        "Stage 1 of the plan ends with '0.feed_forward', which comes before '1.attention'",
    ),
    "a unit left out": (
        SMOLLM2,
        stages_of("embedding", "0.attention", "1.attention", "head"),
        "must begin with '0.feed_forward'",
    ),
    "a unit twice": (
        SMOLLM2,
        stages_of("embedding", "head", "29.feed_forward", "head"),
        "must begin with nothing more",
    ),
    "no head": (SMOLLM2, stages_of("embedding", "29.feed_forward"), "must end with 'head'"),
    "several stages of one rank": (
        SMOLLM2,
        {
            **stages_of("embedding", "7.attention", "7.feed_forward", "head"),
            "pp": 1,
            "schedule": "interleaved",
        },
        "The plan has 2 stages, but pp 1",
    ),
    "a stage too few": (
        SMOLLM2,
        {**stages_of("embedding", "7.attention", "7.feed_forward", "head"), "pp": 3},
        "The plan has 2 stages, but 1f1b runs 1 on each of its 3 pipeline ranks",
    ),
    "a V with one stage a rank": (
        SMOLLM2,
        {**stages_of("embedding", "7.attention", "7.feed_forward", "head"), "schedule": "zbv"},
        "The plan has 2 stages, but zbv runs 2 on each of its 2 pipeline ranks. Give 4",
    ),
    "stages that do not divide": (
        SMOLLM2,
        {
            **stages_of("embedding", "7.attention", "7.feed_forward", "9.attention")
            | {"pp": 2, "schedule": "interleaved"},
            "stages": [
                {"first": "embedding", "last": "0.attention"},
                {"first": "0.feed_forward", "last": "1.attention"},
                {"first": "1.feed_forward", "last": "head"},
            ],
        },
        "3 stages for 2 pipeline ranks",
    ),
    "no stage at all": (SMOLLM2, {"stages": []}, "The plan has 0 stages"),
}


@pytest.mark.parametrize(("spec", "fields", "message"), BAD_FITS.values(), ids=BAD_FITS.keys())
def test_a_plan_that_is_not_for_this_model_is_refused_in_one_line(
    spec: ModelSpec, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message) as error:
        fit(plan_of(**fields), spec)
    assert "\n" not in str(error.value)


# --- What people read and write ----------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_plans_fit_the_model_they_name(path: Path) -> None:
    plan = TrainPlan.load(path)
    layout = fit(plan, SMOLLM2)
    assert plan.world_size > 1
    assert layout.summary().startswith(f"pp {plan.pp} x dp {plan.dp} x tp {plan.tp}")


def test_a_recipe_splits_9_heads_as_6_and_3_and_makes_up_for_it() -> None:
    layout = fit(TrainPlan.load(ROOT / "recipes" / "plans" / "edp2.json"), SMOLLM2)
    shards = [layout.shard(rank) for rank in (0, 1)]
    assert [shard.heads for shard in shards] == [(0, 6), (6, 9)]
    assert [shard.experts for shard in shards] == [(0, 4), (4, 8)]
    weights = [
        30
        * 2
        * 576
        * 64
        * (shard.heads[1] - shard.heads[0] + shard.kv_heads[1] - shard.kv_heads[0])
        + 576 * (shard.vocab[1] - shard.vocab[0])
        for shard in shards
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_plans_in_the_document_fit_the_model_they_are_for(text: str) -> None:
    fit(TrainPlan.from_json(json.loads(text)), SMOLLM2)


def test_the_document_names_every_field_and_every_choice() -> None:
    plan = EVERYTHING.to_json()
    words = {*plan, *(f"splits.{name}" for name in Splits.__dataclass_fields__)}
    words |= {"gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipev"}
    words |= {"moe_activations", "attention", "full", "edp", "etp", "all_to_all", "all_gather"}
    assert {word for word in words if f"`{word}`" not in DOCUMENT} == set()


def _everything_held(layout: Layout, rank: int) -> dict[str, Any]:
    """What the document's reader finds out, as the layout says it."""
    place, shard = layout.place(rank), layout.shard(rank)
    names = unit_names(layout.spec)
    return {
        "units": [
            [names[unit] for unit in range(*layout.stages[stage])]
            for stage in layout.stages_of(place.pp)
        ],
        "kv_heads": shard.kv_heads,
        "ffn": shard.ffn,
        "shared_ffn": shard.shared_ffn,
        "vocab": shard.vocab,
        "experts": shard.experts,
        "expert_columns": shard.expert_columns,
    }


@pytest.mark.parametrize(
    "raw",
    [
        HEAD,
        EVERYTHING.to_json(),
        *(json.loads(text) for text in EXAMPLES),
        *(json.loads(path.read_text()) for path in RECIPES),
        {**HEAD, "pp": 3, "dp": 2, "tp": 3, "experts_over": "ep", "ep": 2},
        {**HEAD, "pp": 2, "tp": 3, "schedule": "interleaved"},
        {**HEAD, "pp": 2, "schedule": "dualpipev"},
        {**HEAD, "pp": 2, "schedule": "zb1p"},
    ],
)
def test_the_documents_reader_finds_what_the_layout_finds(raw: dict[str, Any]) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    reader: dict[str, Any] = {}
    exec(compile(source, "docs/plan.md", "exec"), reader)
    layout = fit(TrainPlan.from_json(raw), SMOLLM2)
    model = {
        "layers": SMOLLM2.num_layers,
        "kv_heads": 3,
        "ffn": 1536,
        "shared_ffn": 0,
        "vocab": 49_152,
        "experts": 8,
        "expert_columns": 1536,
    }
    for rank in range(layout.plan.world_size):
        assert reader["held_by"](raw, rank, model) == _everything_held(layout, rank)


def test_planning_loads_nothing_but_the_standard_library_and_is_there_at_once() -> None:
    code = (
        "import sys, time; before = set(sys.modules); begin = time.perf_counter()\n"
        "import moesaic.planning.layout\n"
        "seconds = time.perf_counter() - begin\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)), seconds)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        loaded, taken = done.stdout.rsplit(maxsplit=1)
        assert loaded == "['moesaic']"
        seconds.append(float(taken))
    # Some 30 ms on an idle core; torch alone takes more than a second.
    assert min(seconds) < 0.3
