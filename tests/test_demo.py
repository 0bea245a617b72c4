"""The whole path on a tiny model: every stage runs, leaves its folder, and is not done twice."""

import json

import pytest

from moesaic.cli.demo import story
from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import ConfigError
from moesaic.model.build import load_model
from moesaic.studies.config import DemoConfig
from moesaic.studies.demo import LABELS, demo

STAGES = [
    "dense",
    "upcycled",
    "tokens",
    "trained",
    "control",
    "fp8",
    "heldout",
    "answers",
    "report",
]


def config(out, **changes):
    settings = {"out": out, "quick": True, "steps": 40, "lr": 3e-3, "experts": 4}
    return DemoConfig(**(settings | changes))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return demo(config(tmp_path_factory.mktemp("demo") / "demo"))


@pytest.fixture
def out(first):
    from pathlib import Path

    return Path(first["report"]).parent


def test_training_lowers_the_loss_on_files_it_never_saw(first):
    assert [row["label"] for row in first["heldout"]] == list(LABELS)
    assert first["gain"] > 0.2
    assert first["gain_of_control"] > 0.2
    assert abs(first["fp8_cost"]) < 0.02


def test_the_upcycled_model_is_the_dense_one(first):
    assert first["largest_logit_difference"] < 1e-4
    dense, upcycled = first["heldout"][:2]
    assert upcycled["loss"] == pytest.approx(dense["loss"], abs=1e-3)


def test_experts_have_drifted_apart_in_training(out):
    w1 = load_model(out / "trained" / "model").model.layers["0"].block_sparse_moe.experts.w1
    assert not w1[0].equal(w1[1])
    w1 = load_model(out / "upcycled").model.layers["0"].block_sparse_moe.experts.w1
    assert w1[0].equal(w1[1])


def test_training_and_held_out_text_are_of_different_files(first, out):
    tokens = TokenFolder(out / "tokens")
    tokens.verify()
    assert first["data"]["licence"] == "PSF-2.0"
    assert first["data"]["heldout"]["documents"] == 2
    assert first["data"]["train"]["documents"] > 5
    assert first["data"]["seen_tokens"] == 40 * 2 * 32


def test_the_report_has_losses_and_answers_in_it(first, out):
    page = (out / "report.html").read_text(encoding="utf-8")
    for label in LABELS:
        assert label in page
    assert first["answers"][0]["prompt"] in page
    samples = json.loads((out / "trained" / "samples.json").read_text())
    assert [sample["model"] for sample in samples] == list(LABELS)


def test_checkpoints_do_not_stay(out):
    assert not (out / "trained" / "checkpoints").exists()
    assert not (out / "control" / "checkpoints").exists()


def test_what_is_printed_ends_with_the_path_of_the_page(first):
    lines = list(story(first))
    assert lines[-1] == first["report"]
    assert any(line.startswith("total") for line in lines)


def test_a_second_run_does_nothing(first, out):
    again = demo(config(out))
    assert all(stage["was_there"] for stage in again["stages"])
    assert [stage["name"] for stage in again["stages"]] == STAGES
    assert again["heldout"] == first["heldout"]


def test_another_question_asks_again_and_trains_nothing(first, out):
    again = demo(config(out, question="Who are you?"))
    done = [stage["name"] for stage in again["stages"] if not stage["was_there"]]
    assert done == ["answers", "report"]
    assert again["answers"][0]["prompt"] == "Who are you?"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1}, "steps is 1"),
        ({"question": ""}, "question is empty"),
        ({"top_k": 9}, "top_k"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        demo(config(tmp_path / "demo", **changes))
    assert not (tmp_path / "demo").exists()
