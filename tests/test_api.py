"""The Python API: these names and no others, each importable."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import moesaic

VERBS = [
    "upcycle",
    "prepare",
    "plan_train",
    "plan_serve",
    "plan_check",
    "measure",
    "train",
    "evaluate",
    "quantize",
    "generate",
    "serve",
    "chat",
    "bench_serve",
    "inspect",
    "report",
    "demo",
]

ENGINE = ["Engine", "EngineConfig", "RequestConfig"]
"""What serves from Python."""


def config_of(verb: str) -> str:
    return "".join(word.capitalize() for word in verb.split("_")) + "Config"


def test_the_public_names_are_these() -> None:
    configs = [config_of(verb) for verb in VERBS]
    others = {"MoesaicError", "__version__", "load_model", *ENGINE}
    assert set(moesaic.__all__) == {*others, *VERBS, *configs}
    assert dir(moesaic) == sorted(moesaic.__all__)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_its_config_and_returns_a_dict(verb: str) -> None:
    config = getattr(moesaic, config_of(verb))
    assert dataclasses.is_dataclass(config)
    assert config.__dataclass_params__.frozen
    signature = inspect.signature(getattr(moesaic, verb), eval_str=True)
    first, *others = signature.parameters.values()
    assert first.annotation is config
    assert all(other.default is not inspect.Parameter.empty for other in others)


def test_load_model_takes_a_folder_and_a_dtype() -> None:
    parameters = list(inspect.signature(moesaic.load_model).parameters)
    assert parameters[:2] == ["folder", "dtype"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'upcylce'"):
        moesaic.upcylce  # noqa: B018 - the access is what is tested
