"""Generation: what is chosen, when it stops, and that it equals transformers' own."""

import json
import math

import pytest
import torch

from moesaic.data.tokenizer import load_tokenizer
from moesaic.errors import ConfigError
from moesaic.model.build import load_model
from moesaic.quantizing.config import QuantizeConfig
from moesaic.quantizing.quantize import quantize
from moesaic.serving.config import GenerateConfig, SamplingConfig
from moesaic.serving.generate import encode_prompt, generate, generate_text, generate_tokens
from moesaic.serving.sample import next_token
from moesaic.serving.text import TextStream
from tests.tiny import EOS, LLAMA, MIXTRAL, TINY, tiny_folder, tiny_model

PROMPT = [5, 40, 7, 200, 33]
LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
DRAWS = 4000
BRIEF = SamplingConfig(max_new_tokens=4)


def frequencies(sampling: SamplingConfig, *, seen: tuple[int, ...] = ()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(LOGITS))
    for _ in range(DRAWS):
        counts[next_token(LOGITS, sampling, seen=seen, generator=generator)] += 1
    return counts / DRAWS


def expected(logits: list[float], kept: tuple[int, ...]) -> torch.Tensor:
    """Softmax over the kept tokens, by hand."""
    weights = [math.exp(x) if token in kept else 0.0 for token, x in enumerate(logits)]
    return torch.tensor(weights) / sum(weights)


@pytest.mark.parametrize(
    ("sampling", "temperature", "kept"),
    [
        (SamplingConfig(temperature=1.0), 1.0, (0, 1, 2, 3, 4)),
        (SamplingConfig(temperature=2.0), 2.0, (0, 1, 2, 3, 4)),
        (SamplingConfig(temperature=1.0, top_k=2), 1.0, (1, 3)),
        # Probabilities are 0.64, 0.24, 0.09, 0.03, 0.01.
        (SamplingConfig(temperature=1.0, top_p=0.6), 1.0, (1,)),
        (SamplingConfig(temperature=1.0, top_p=0.7), 1.0, (1, 3)),
        (SamplingConfig(temperature=1.0, top_p=0.9), 1.0, (1, 2, 3)),
        (SamplingConfig(temperature=1.0, min_p=0.2), 1.0, (1, 3)),
        (SamplingConfig(temperature=1.0, top_k=3, min_p=0.2), 1.0, (1, 3)),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probabilities_say(sampling, temperature, kept):
    wanted = expected((LOGITS / temperature).tolist(), kept)
    # Four standard errors of a share over the draws.
    torch.testing.assert_close(frequencies(sampling), wanted, atol=2 / math.sqrt(DRAWS), rtol=0)


def test_temperature_0_takes_the_likeliest():
    assert next_token(LOGITS, SamplingConfig(), seen=(), generator=None) == 1


def test_the_repetition_penalty_lowers_seen_tokens_of_either_sign():
    # 3.0 / 2 falls below 2.0.
    sampling = SamplingConfig(repetition_penalty=2.0)
    assert next_token(LOGITS, sampling, seen=[1, 1], generator=None) == 3
    # -1 * 2 falls below -1.5, which -1 / 2 would not.
    logits = torch.tensor([-1.0, -1.5])
    assert next_token(logits, sampling, seen=[0], generator=None) == 1


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_are_those_of_a_full_forward_pass_each_time(name):
    model = tiny_model(TINY[name])
    sampling = SamplingConfig(max_new_tokens=12)
    tokens = list(PROMPT)
    for token in generate_tokens(model, PROMPT, sampling=sampling):
        with torch.no_grad():
            assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)
    assert len(tokens) == len(PROMPT) + 12


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("skywork")])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers(tmp_path, name, penalty):
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / "m", TINY[name])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=16,
        do_sample=False,
        repetition_penalty=penalty,
    )
    sampling = SamplingConfig(max_new_tokens=16, repetition_penalty=penalty)
    ours = list(generate_tokens(load_model(folder), PROMPT, sampling=sampling))
    wanted = theirs[0, len(PROMPT) :].tolist()
    if EOS in wanted:
        ours = ours[: len(wanted)]
    assert ours == wanted


def test_the_same_seed_gives_the_same_text_and_another_another():
    model = tiny_model(LLAMA)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=20)
    first, again, other = (
        list(generate_tokens(model, PROMPT, sampling=sampling, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "m", MIXTRAL)


def ask(folder, **changes):
    settings = {"model": folder, "prompt": "the layer", "dtype": "float32", "max_new_tokens": 12}
    return generate(GenerateConfig(**(settings | changes)))


def test_the_chat_template_is_used_unless_raw(folder):
    tokenizer = load_tokenizer(folder)
    chat = tokenizer.decode(encode_prompt(tokenizer, "hi", system="be brief"))
    assert chat == "<|system|>be brief</s><|user|>hi</s><|assistant|>"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", raw=True)) == "hi"
    assert ask(folder)["prompt_tokens"] > ask(folder, raw=True)["prompt_tokens"]


def test_a_system_message_without_a_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="chat template"):
        ask(folder, system="be brief")


def test_pieces_join_to_the_text(folder):
    pieces = []
    config = GenerateConfig(
        model=folder, prompt="the layer", temperature=1.5, seed=3, max_new_tokens=24
    )
    answer = generate(config, on_text=pieces.append)
    assert "".join(pieces) == answer["text"]
    assert len(pieces) > 3
    assert answer["new_tokens"] == 24
    assert answer["finish_reason"] == "length"
    json.dumps(answer)


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(folder):
    settings = {"temperature": 1.5, "seed": 3, "raw": True, "max_new_tokens": 24}
    whole = ask(folder, **settings)["text"]
    stop = whole[6:9]
    pieces = []
    settings |= {"prompt": "the layer", "dtype": "float32", "stop": (stop,)}
    config = GenerateConfig(model=folder, **settings)
    answer = generate(config, on_text=pieces.append)
    assert answer["text"] == whole[: whole.index(stop)]
    assert "".join(pieces) == answer["text"]
    assert answer["finish_reason"] == "stop"
    assert answer["new_tokens"] < 24


def test_an_end_token_ends_the_answer(folder):
    first = next(iter(generate_tokens(load_model(folder), PROMPT, sampling=BRIEF)))
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    prompt = tokenizer.decode(PROMPT)
    answer = generate_text(
        model, tokenizer, prompt, sampling=BRIEF, raw=True, eos_token_ids=[first]
    )
    assert tokenizer(prompt)["input_ids"] == PROMPT
    assert answer.tokens == ()
    assert answer.finish_reason == "stop"


def test_generation_config_adds_end_tokens(folder):
    ids = encode_prompt(load_tokenizer(folder), "the layer")
    first = next(iter(generate_tokens(load_model(folder), ids, sampling=BRIEF)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, first]}))
    assert ask(folder)["new_tokens"] == 0


def test_an_fp8_folder_answers_and_says_that_it_is_widened(folder, tmp_path, capsys):
    quantize(QuantizeConfig(model=folder, out=tmp_path / "q"))
    capsys.readouterr()
    answer = ask(tmp_path / "q", dtype="bfloat16")
    assert answer["new_tokens"] > 0
    assert "widened to bfloat16" in " ".join(capsys.readouterr().err.split())


def test_half_a_character_waits_for_the_rest(folder):
    tokenizer = load_tokenizer(folder)
    text = "naïve 模型 🎉!"
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer(text)["input_ids"]]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == text


def test_what_may_begin_a_stop_text_is_held_back_until_it_does_not(folder):
    tokenizer = load_tokenizer(folder)
    stream = TextStream(tokenizer, ["END."])
    given = ""
    tokens = tokenizer("an ENDED thing")["input_ids"]
    for count, token in enumerate(tokens, start=1):
        given += stream.add(token)
        read = tokenizer.decode(tokens[:count])
        waiting = [start for start in ("E", "EN", "END") if read.endswith(start)]
        assert given == read.removesuffix(max(waiting, key=len, default=""))
    assert given + stream.finish() == "an ENDED thing"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "min_p": 1.0}, "min_p is 1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300"),
        ({"repetition_penalty": 1e300}, "repetition_penalty is "),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ("",)}, "stop text is empty"),
        ({"top_p": 0.9}, "temperature 0"),
        ({"seed": 1}, "temperature 0"),
        ({"raw": True, "system": "x"}, "raw leaves out"),
        ({"prompt": "", "raw": True}, "prompt is empty"),
        ({"max_new_tokens": 64}, "context of 64"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(folder, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        ask(folder, **changes)
    assert "\n" not in str(error.value)
