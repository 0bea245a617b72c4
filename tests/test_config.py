"""TOML and flags to frozen dataclasses and back."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from moesaic.config import build, leaves, load_toml, merge, to_toml
from moesaic.errors import ConfigError, FolderError


@dataclass(frozen=True, kw_only=True)
class RateConfig:
    """A section."""

    lr: float = 1e-5
    """Learning rate,
    in two lines."""

    shape: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr is {self.lr}. It must be above 0.")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of a list of sections."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Every kind of value a config may hold."""

    out: Path
    """Where it goes."""

    steps: int = 3
    verbose: bool = False
    factor: float | None = 1.25
    recompute: Literal["none", "all"] | int | tuple[int, ...] = "none"
    betas: tuple[float, float] = (0.9, 0.95)
    freeze: tuple[str, ...] = ()
    weights: Mapping[str, float] | None = None
    rate: RateConfig = field(default_factory=RateConfig)
    sources: tuple[SourceConfig, ...] = ()


AWKWARD = 'tab\t quote" back\\slash\nline \x7f \x00 \u00e9 \U0001f600 = # ]'

ROUND_TRIPS = {
    "defaults": JobConfig(out=Path("runs/a")),
    "everything": JobConfig(
        out=Path(AWKWARD),
        steps=-7,
        verbose=True,
        factor=None,
        recompute=(1, 2),
        betas=(1e-300, math.pi),
        freeze=("*.self_attn.*", AWKWARD),
        weights={"code": 7.0, AWKWARD: 1e22, "a.b": 0.1},
        rate=RateConfig(lr=3e-4, shape="constant"),
        sources=(SourceConfig(name="a"), SourceConfig(name="b", weight=2.0)),
    ),
    "infinite": JobConfig(out=Path("x"), factor=math.inf, weights={}, recompute=2),
    "a word that is also a spelling of None": JobConfig(out=Path("x"), recompute="none"),
}


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_what_is_written_is_read_back_as_the_same_config(config: JobConfig) -> None:
    assert build(JobConfig, tomllib.loads(to_toml(config)), where="the test") == config


def test_every_default_is_written() -> None:
    written = tomllib.loads(to_toml(JobConfig(out=Path("x"))))
    assert set(written) == {leaf.name for leaf in dataclasses.fields(JobConfig)}
    assert set(written["rate"]) == {"lr", "shape"}
    assert written["weights"] == "none"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({}, "r.toml: out is missing. It must be a path."),
    "unknown, near another": (
        {"out": "x", "step": 1},
        "r.toml: unknown key step. Did you mean steps?",
    ),
    "unknown in a section": (
        {"out": "x", "rate": {"lrr": 1}},
        "r.toml: unknown key rate.lrr. Did you mean rate.lr?",
    ),
    "unknown, near nothing": (
        {"out": "x", "rate": {"momentum": 1}},
        "r.toml: unknown key rate.momentum. Known are rate.lr, rate.shape.",
    ),
    "text for a number": (
        {"out": "x", "rate": {"lr": "fast"}},
        'r.toml: rate.lr is "fast", but must be a number.',
    ),
    "fraction for a whole number": (
        {"out": "x", "steps": 1.5},
        "r.toml: steps is 1.5, but must be a whole number.",
    ),
    "more than TOML can say": (
        {"out": "x", "steps": 2**63},
        "r.toml: steps is 9223372036854775808, but whole numbers have 64 bits.",
    ),
    "true for a whole number": (
        {"out": "x", "steps": True},
        "r.toml: steps is true, but must be a whole number.",
    ),
    "a number for true": (
        {"out": "x", "verbose": 1},
        "r.toml: verbose is 1, but must be true or false.",
    ),
    "no such choice": (
        {"out": "x", "rate": {"shape": "cosin"}},
        'r.toml: rate.shape is "cosin", but must be one of "cosine", "constant".',
    ),
    "a value for a section": (
        {"out": "x", "rate": 3},
        "r.toml: rate is 3, but must be a section with lr, shape.",
    ),
    "too few items": (
        {"out": "x", "betas": [0.9]},
        "r.toml: betas is [0.9], but must be a list of 2: a number, a number.",
    ),
    "a wrong item": (
        {"out": "x", "freeze": ["a", 3]},
        "r.toml: freeze[1] is 3, but must be text.",
    ),
    "a wrong value in a table": (
        {"out": "x", "weights": {"code": "much"}},
        'r.toml: weights.code is "much", but must be a number.',
    ),
    "unknown in a list of sections": (
        {"out": "x", "sources": [{"name": "a"}, {"nam": "b"}]},
        "r.toml: unknown key sources[1].nam. Did you mean sources[1].name?",
    ),
    "an empty path": ({"out": ""}, 'r.toml: out is "", but must be a path.'),
}


@pytest.mark.parametrize(("values", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_names_key_value_and_what_was_wanted(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build(JobConfig, values, where="r.toml")
    assert str(error.value) == message


def test_checks_of_the_dataclass_itself_are_made() -> None:
    with pytest.raises(ConfigError, match="lr is -1"):
        build(JobConfig, {"out": "x", "rate": {"lr": -1}}, where="r.toml")


def test_a_whole_number_becomes_a_float_where_one_is_wanted() -> None:
    rate = build(JobConfig, {"out": "x", "rate": {"lr": 1}}, where="r.toml").rate
    assert (rate.lr, type(rate.lr)) == (1.0, float)


def test_none_is_spelled_out() -> None:
    assert build(JobConfig, {"out": "x", "factor": "none"}, where="r.toml").factor is None


def test_merge_lays_sections_over_each_other_and_changes_neither() -> None:
    base = {"a": 1, "rate": {"lr": 1, "shape": "cosine"}}
    override = {"rate": {"lr": 2}, "b": 3}
    assert merge(base, override) == {"a": 1, "rate": {"lr": 2, "shape": "cosine"}, "b": 3}
    assert base == {"a": 1, "rate": {"lr": 1, "shape": "cosine"}}
    assert override == {"rate": {"lr": 2}, "b": 3}


def test_leaves_carry_dotted_names_defaults_and_docs() -> None:
    found = {leaf.name: leaf for leaf in leaves(JobConfig)}
    assert found["out"].default is dataclasses.MISSING
    assert found["out"].doc == "Where it goes."
    assert found["rate.lr"].default == 1e-5
    assert found["rate.lr"].doc == "Learning rate, in two lines."
    assert "rate" not in found
    assert found["sources"].default == ()


def test_a_recipe_that_is_not_there_or_not_toml_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"recipe .*missing.toml: No such file"):
        load_toml(tmp_path / "missing.toml")
    (tmp_path / "broken.toml").write_text("a = \n")
    with pytest.raises(ConfigError, match=r"broken.toml is not TOML: .*line 1"):
        load_toml(tmp_path / "broken.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.toml is not TOML"):
        load_toml(tmp_path / "binary.toml")
