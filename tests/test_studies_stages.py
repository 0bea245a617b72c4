"""A study does each stage once, and again exactly when something it depends on has changed."""

import json

import pytest

from moesaic.errors import ConfigError, FolderError
from moesaic.studies.stages import Stage, run_stages


class Study:
    """Two stages, each writing a file: `second` copies what `first` wrote."""

    def __init__(self, folder):
        self.folder = folder
        self.did = []
        self.asked = {"first": "a", "second": "b"}
        self.fault = None
        self.is_resumable = False

    def write(self, name, text):
        self.did.append(name)
        (self.folder / name).mkdir()
        (self.folder / name / "text").write_text(text)
        if self.fault == name:
            raise ConfigError("stop here")
        return {"text": text}

    def run(self):
        first, second = self.folder / "first", self.folder / "second"
        stages = [
            Stage(
                name="first",
                title="Write",
                makes=first,
                asked=self.asked["first"],
                run=lambda: self.write("first", self.asked["first"]),
            ),
            Stage(
                name="second",
                title="Copy",
                makes=second,
                asked=self.asked["second"],
                needs=("first",),
                is_resumable=self.is_resumable,
                run=lambda: self.write("second", (first / "text").read_text()),
            ),
        ]
        self.did.clear()
        done = run_stages(stages, self.folder / "stages")
        assert (second / "text").read_text() == done["second"].result["text"]
        return done


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


def test_a_second_run_does_nothing_and_says_the_same(study):
    first = study.run()
    assert study.did == ["first", "second"]
    second = study.run()
    assert study.did == []
    assert all(done.was_skipped for done in second.values())
    for name in ("first", "second"):
        assert second[name].result == first[name].result
        assert second[name].seconds == first[name].seconds


def test_a_stage_asked_differently_is_done_again_and_so_is_what_used_it(study):
    study.run()
    study.asked["first"] = "another"
    done = study.run()
    assert study.did == ["first", "second"]
    assert done["second"].result == {"text": "another"}


def test_a_stage_that_nothing_before_it_changed_is_done_alone(study):
    study.run()
    study.asked["second"] = "another"
    study.run()
    assert study.did == ["second"]


def test_what_was_removed_is_made_again(study):
    study.run()
    (study.folder / "second" / "text").unlink()
    (study.folder / "second").rmdir()
    study.run()
    assert study.did == ["second"]


def test_a_stage_that_failed_is_done_again_from_nothing(study):
    study.fault = "second"
    with pytest.raises(ConfigError):
        study.run()
    study.fault = None
    study.run()
    assert study.did == ["second"]


def test_a_resumable_stage_that_failed_finds_what_it_left(study):
    study.is_resumable, study.fault = True, "second"
    with pytest.raises(ConfigError):
        study.run()
    with pytest.raises(FileExistsError):  # `write` makes its folder anew, so it must be there
        study.run()


def test_a_resumable_stage_asked_differently_begins_from_nothing(study):
    study.is_resumable, study.fault = True, "second"
    with pytest.raises(ConfigError):
        study.run()
    study.fault, study.asked["second"] = None, "another"
    study.run()
    assert study.did == ["second"]


def test_a_folder_that_no_stage_made_is_never_removed(study):
    (study.folder / "second").mkdir()
    (study.folder / "second" / "precious").write_text("mine")
    with pytest.raises(FolderError, match="was not made here"):
        study.run()
    assert (study.folder / "second" / "precious").read_text() == "mine"


@pytest.mark.parametrize("damage", ["", "[]", '{"key": 3}'], ids=["empty", "a list", "half"])
def test_a_damaged_record_counts_as_not_done(study, damage):
    study.run()
    record = study.folder / "stages" / "second.json"
    record.write_text(damage)
    if json.loads(damage or "[]") == []:
        with pytest.raises(FolderError, match="was not made here"):
            study.run()
    else:
        study.run()
        assert study.did == ["second"]


def test_time_and_memory_are_measured(study):
    done = study.run()["first"]
    assert 0 <= done.seconds < 60
    assert done.peak_memory_bytes is None or done.peak_memory_bytes > 1 << 20
