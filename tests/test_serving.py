"""Generation: what is chosen, when it stops, and that it equals transformers' own."""

import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from moesaic.data.tokenizer import load_tokenizer
from moesaic.errors import ConfigError, FolderError, PlanError
from moesaic.planning.serving.plan import ServePlan
from moesaic.quantizing.config import QuantizeConfig
from moesaic.quantizing.quantize import quantize
from moesaic.serving.config import EngineConfig, GenerateConfig, RequestConfig, SamplingConfig
from moesaic.serving.engine.engine import Engine
from moesaic.serving.engine.load import plan_of
from moesaic.serving.engine.sample import NO_TOKEN, Chooser, choose, drawn, scored
from moesaic.serving.engine.text import TextStream, TokenTexts
from moesaic.serving.generate import encode_prompt, generate
from tests.tiny import EOS, LLAMA, MIXTRAL, TINY, tiny_folder, tiny_model, token_ids

PROMPT = [5, 40, 7, 200, 33]
LOGITS = [0.0, 3.0, 1.0, 2.0, -1.0]
DRAWS = 4000
BRIEF = RequestConfig(max_new_tokens=4)


def draw(logits, sampling, *, seen=(), chosen=(), **more) -> int:
    """One token, after a prompt `seen` and an answer `chosen`."""
    seed = None if sampling.temperature == 0 else 0
    chooser = Chooser(sampling, list(seen), seed=seed, **more)
    for token in chosen:
        chooser.add(token)
    return choose(np.array([logits], np.float32), [chooser])[0]


def frequencies(sampling: SamplingConfig) -> torch.Tensor:
    chooser = Chooser(sampling, seed=0)
    rows = np.array([LOGITS] * DRAWS, np.float32)
    tokens = choose(rows, [chooser] * DRAWS)
    return torch.bincount(torch.tensor(tokens), minlength=len(LOGITS)) / DRAWS


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
        # Of three tokens 0.67, 0.24 and 0.09 are left.
        (SamplingConfig(temperature=1.0, top_k=3, top_p=0.66), 1.0, (1,)),
        (SamplingConfig(temperature=1.0, top_k=3, top_p=0.92), 1.0, (1, 2, 3)),
    ],
    ids=str,
)
def test_tokens_come_as_often_as_their_probabilities_say(sampling, temperature, kept):
    wanted = expected([score / temperature for score in LOGITS], kept)
    # Four standard errors of a share over the draws.
    torch.testing.assert_close(frequencies(sampling), wanted, atol=2 / math.sqrt(DRAWS), rtol=0)


def test_temperature_0_takes_the_likeliest():
    assert draw(LOGITS, SamplingConfig()) == 1


def test_the_repetition_penalty_lowers_seen_tokens_of_either_sign():
    # 3.0 / 2 falls below 2.0.
    sampling = SamplingConfig(repetition_penalty=2.0)
    assert draw(LOGITS, sampling, seen=[1, 1]) == 3
    assert draw(LOGITS, sampling, chosen=[1]) == 3
    # -1 * 2 falls below -1.5, which -1 / 2 would not.
    assert draw([-1.0, -1.5], sampling, seen=[0]) == 1


def test_other_penalties_count_what_was_chosen_and_not_the_prompt():
    presence = SamplingConfig(presence_penalty=1.5)
    assert draw(LOGITS, presence, seen=[1, 1, 1]) == 1
    assert draw(LOGITS, presence, chosen=[1]) == 3
    frequency = SamplingConfig(frequency_penalty=0.6)
    assert [draw(LOGITS, frequency, chosen=[1] * count) for count in (1, 2)] == [1, 3]
    # Subtracted from whatever the score is.
    assert draw([-1.0, -1.2], SamplingConfig(presence_penalty=0.3), chosen=[0]) == 1


def test_a_bias_is_added_to_the_scores_of_its_tokens():
    assert draw(LOGITS, SamplingConfig(), logit_bias={4: 5.0, 1: -0.5}) == 4
    assert draw(LOGITS, SamplingConfig(temperature=1.0, top_k=1), logit_bias={1: -1.5}) == 3


def test_many_seen_tokens_are_all_remembered():
    seen = [token % 150 for token in range(400)]
    logits = np.linspace(2, 1, 200)
    assert draw(logits, SamplingConfig(repetition_penalty=3.0), seen=seen) == 150
    assert draw(logits, SamplingConfig(frequency_penalty=1.0), chosen=seen) == 150


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_scores_that_are_not_numbers_choose_no_token(wrong):
    for sampling in (SamplingConfig(), SamplingConfig(temperature=1.0)):
        assert draw([0.0, wrong, 1.0], sampling) == NO_TOKEN
        assert draw([-math.inf] * 3, sampling) == NO_TOKEN


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {}], ids=str)
def test_a_row_is_drawn_as_if_it_were_alone(sampling):
    rows = np.random.default_rng(0).standard_normal((6, 5003)).astype(np.float32)
    config = SamplingConfig(temperature=1.5, **sampling)
    together = choose(rows.copy(), [Chooser(config, seed=seed) for seed in range(6)])
    alone = [choose(rows[i : i + 1].copy(), [Chooser(config, seed=i)])[0] for i in range(6)]
    assert together == alone


def test_log_probabilities_are_those_of_the_whole_row():
    row = np.random.default_rng(0).standard_normal(999).astype(np.float32) * 5
    wanted = torch.from_numpy(row).double().log_softmax(0)
    found = scored(row, 7, 20)
    assert found.logprob == pytest.approx(float(wanted[7]), abs=1e-5)
    assert [token for token, _ in found.top] == wanted.topk(20).indices.tolist()
    assert scored(row, 7, 0).top == []


def engine_of(folder, **limits):
    """An engine over a real, tiny model."""
    limits = {"kv_tokens": 256, "block_tokens": 4, "max_sequences": 4} | limits
    return Engine.load(EngineConfig(model=folder, dtype="float32", **limits))


def ask_one(folder, prompt=PROMPT, **sampling):
    with engine_of(folder) as engine:
        return engine.generate([prompt], RequestConfig(**({"ignore_eos": True} | sampling)))[0]


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_are_those_of_a_full_forward_pass_each_time(tmp_path, name):
    model = tiny_model(TINY[name])
    answer = ask_one(tiny_folder(tmp_path / "m", TINY[name]), max_new_tokens=12)
    tokens = list(PROMPT)
    for token in answer.token_ids:
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
    ours = ask_one(folder, max_new_tokens=16, repetition_penalty=penalty, ignore_eos=False)
    wanted = theirs[0, len(PROMPT) :].tolist()
    assert list(ours.token_ids) == (wanted[: wanted.index(EOS)] if EOS in wanted else wanted)


WAYS = {
    "all at once": {},
    "in chunks": {"max_step_tokens": 7},
    "without a prefix cache": {"prefix_cache": False},
    "preempted": {"kv_tokens": 64, "max_step_tokens": 9},
    "preempted, without a prefix cache": {"kv_tokens": 64, "prefix_cache": False},
    "two at a time": {"max_sequences": 2, "max_step_tokens": 2},
}


@pytest.mark.parametrize("name", ["mistral", "qwen3", "mixtral", "qwen2_moe", "skywork moe"])
def test_tokens_are_those_of_batch_1_however_they_are_computed(tmp_path, name):
    folder = tiny_folder(tmp_path / "m", TINY[name])
    ids = token_ids(8, 40, seed=3).tolist()
    # Some begin alike, lengths are mixed.
    prompts = [ids[i % 3][: 3 + 2 * i] + ids[i][: 1 + i] for i in range(8)]
    sampling = RequestConfig(max_new_tokens=20, ignore_eos=True)
    with engine_of(folder, max_sequences=1, prefix_cache=False) as engine:
        wanted = [engine.generate([prompt], sampling)[0].token_ids for prompt in prompts]
    for way, limits in WAYS.items():
        with engine_of(folder, **limits) as engine:
            for _ in range(2):  # the second time the cache knows the prompts
                answers = engine.generate(prompts, sampling)
                assert [answer.token_ids for answer in answers] == wanted, way
            engine.check()
            statistics = engine.statistics()
        assert (statistics.preemptions > 0) == way.startswith("preempted"), way
        assert (statistics.cached_tokens > 0) == limits.get("prefix_cache", True), way


def test_prompt_scores_are_the_models(tmp_path):
    folder = tiny_folder(tmp_path / "m", MIXTRAL)
    prompt = token_ids(1, 30).tolist()[0]
    with torch.no_grad():
        logprobs_SV = tiny_model(MIXTRAL)(torch.tensor([prompt]))[0].log_softmax(-1)
    with engine_of(folder, max_step_tokens=8) as engine:
        sampling = RequestConfig(prompt_logprobs=True, max_new_tokens=0)
        [answer] = engine.generate([prompt], sampling)
    wanted = [float(logprobs_SV[p - 1, prompt[p]]) for p in range(1, 30)]
    assert [token.logprob for token in answer.prompt[1:]] == pytest.approx(wanted, abs=1e-4)


def test_embeddings_are_the_models_hidden_states(tmp_path):
    folder = tiny_folder(tmp_path / "m", MIXTRAL)
    prompt = token_ids(1, 30).tolist()[0]
    with torch.no_grad():
        hidden_SD = tiny_model(MIXTRAL).hidden(torch.tensor([prompt]))[0][0]
    for kind, wanted in (("last", hidden_SD[-1]), ("mean", hidden_SD.mean(0))):
        with engine_of(folder, max_step_tokens=8) as engine:
            [answer] = engine.generate([prompt], RequestConfig(embedding=kind))
        torch.testing.assert_close(answer.embedding_D, wanted, atol=1e-4, rtol=1e-4)


def test_experts_of_every_layer_are_told(tmp_path):
    answer = ask_one(tiny_folder(tmp_path / "m", MIXTRAL), experts=True, max_new_tokens=3)
    for token in answer.tokens:
        assert len(token.experts) == MIXTRAL.num_layers
        assert all(len(set(layer)) == 2 and max(layer) < 4 for layer in token.experts)
    dense = tiny_folder(tmp_path / "d", LLAMA)
    assert ask_one(dense, experts=True, max_new_tokens=1).tokens[0].experts is None


def test_the_same_seed_gives_the_same_text_and_another_another(tmp_path):
    folder = tiny_folder(tmp_path / "m", LLAMA)
    first, again, other = (
        ask_one(folder, temperature=1.0, max_new_tokens=20, seed=seed).token_ids
        for seed in (1, 1, 2)
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


def test_generation_config_adds_end_tokens(folder):
    prompt = encode_prompt(load_tokenizer(folder), "the layer")
    [first] = ask_one(folder, prompt, max_new_tokens=1).token_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, first]}))
    answer = ask(folder)
    assert (answer["new_tokens"], answer["finish_reason"]) == (0, "stop")


def test_an_answer_can_be_held_to_a_schema(folder):
    schema = '{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}'
    answer = ask(folder, json_schema=schema, temperature=1.0, seed=1, max_new_tokens=40)
    assert set(json.loads(answer["text"])) <= {"a", "b"}
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("format", ["float8", "int8"])
def test_an_8_bit_folder_answers_from_the_weights_it_has(folder, tmp_path, format):
    quantize(QuantizeConfig(model=folder, out=tmp_path / "q", format=format))
    wide = ask(tmp_path / "q", weights="float32")["text"]
    assert ask(tmp_path / "q")["text"] == wide
    assert plan_of(EngineConfig(model=tmp_path / "q")).weights == format
    assert plan_of(EngineConfig(model=folder)).weights == "bfloat16"


def test_half_a_character_waits_for_the_rest(folder):
    tokenizer = load_tokenizer(folder)
    text = "naïve 模型 🎉!"
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer(text)["input_ids"]]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == text


def test_text_is_that_of_all_tokens_whatever_bytes_they_are(folder):
    tokenizer = load_tokenizer(folder)
    for tokens in token_ids(200, 40).tolist():
        stream = TextStream(tokenizer)
        text = "".join(stream.add(token) for token in tokens) + stream.finish()
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_bytes_that_are_no_character_do_not_wait_for_ever(folder):
    tokenizer = load_tokenizer(folder)
    [half] = tokenizer("模")["input_ids"][:1]
    stream = TextStream(tokenizer)
    given = "".join(stream.add(half) for _ in range(100))
    assert len(given) > 90


def test_tokens_alone_are_the_bytes_of_the_text(folder):
    tokenizer = load_tokenizer(folder)
    text = "naïve 模型 🎉!"
    texts = TokenTexts(tokenizer)
    assert b"".join(texts[token][1] for token in tokenizer(text)["input_ids"]) == text.encode()
    assert texts[EOS] == ("</s>", b"</s>")
    assert texts[9999] == ("", b"")


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
        ({"presence_penalty": 1e9}, "presence_penalty is "),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"regex": "a", "json_schema": "{}"}, "Both regex and json_schema"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": '{"type": 3}'}, "json_schema cannot be used"),
        ({"regex": "(a"}, "regex cannot be used"),
        ({"stop_token_ids": (999,)}, "vocabulary ends at 299"),
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


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (RequestConfig, {"n": 0}, "n is 0"),
        (RequestConfig, {"n": 2, "embedding": "mean"}, "n is 2"),
        (RequestConfig, {"top_logprobs": 3}, "without logprobs"),
        (RequestConfig, {"logprobs": True, "top_logprobs": 101}, "top_logprobs is 101"),
        (RequestConfig, {"logit_bias": {3: math.inf}}, "logit_bias of token 3 is inf"),
        (RequestConfig, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (EngineConfig, {"max_sequences": 0}, "max_sequences is 0"),
        (EngineConfig, {"max_sequences": 9, "max_step_tokens": 8}, "takes one token a step"),
        (EngineConfig, {"max_waiting": -1}, "max_waiting is -1"),
        (EngineConfig, {"memory_gib": 0.0}, "memory_gib is 0.0"),
    ],
    ids=str,
)
def test_what_no_request_or_engine_can_be_is_refused_in_one_line(
    tmp_path, config, changes, message
):
    needed = {"model": tmp_path} if config is EngineConfig else {}
    with pytest.raises(ConfigError, match=message) as error:
        config(**needed, **changes)
    assert "\n" not in str(error.value)


def test_a_client_may_say_what_greedy_choice_ignores():
    RequestConfig(temperature=0, top_p=0.9, seed=3)


@contextmanager
def refused(kind, message):
    with pytest.raises(kind, match=message) as error:
        yield
    assert "\n" not in str(error.value)


def test_config_and_plan_that_contradict_each_other_are_refused(folder, tmp_path):
    path = tmp_path / "plan.json"
    ServePlan(weights="int8", kv_cache="float32", kv_blocks=8).save(path)
    EngineConfig(model=folder, plan=path)
    for changes, name in (
        ({"weights": "float8"}, "weights is float8"),
        ({"kv_cache": "float8"}, "kv_cache is float8"),
        ({"block_tokens": 8}, "block_tokens is 8"),
        ({"kv_tokens": 64}, "kv_tokens is 64"),
    ):
        with refused(ConfigError, name):
            engine_of(folder, **({"plan": path, "kv_tokens": None, "block_tokens": None} | changes))
    with engine_of(folder, plan=path, kv_tokens=None, block_tokens=None) as engine:
        assert engine.max_context == LLAMA.max_positions
        assert engine.executor.num_blocks == 8


def test_what_does_not_fit_is_refused_before_it_is_loaded(folder):
    with refused(PlanError, "GiB"):
        engine_of(folder, memory_gib=1e-6)
    with refused(PlanError, "GiB"):
        engine_of(folder, kv_tokens=10**12)
    with refused(FolderError, "tokenizer"):
        (folder / "tokenizer.json").unlink()
        engine_of(folder)


def test_every_token_of_a_large_vocabulary_is_drawn_as_often_as_its_probability_says():
    row = np.zeros(2000, np.float32)
    row[[3, 511, 512, 1999]] = math.log(1000)
    chooser = Chooser(SamplingConfig(temperature=1.0), seed=0)
    tokens = np.array(choose(np.repeat(row[None], DRAWS, 0), [chooser] * DRAWS))
    for token in (3, 511, 512, 1999):
        wanted = 1000 / (4 * 1000 + 1996)
        assert (tokens == token).mean() == pytest.approx(wanted, abs=2 / math.sqrt(DRAWS))
    others = tokens[~np.isin(tokens, [3, 511, 512, 1999])]
    assert others.mean() == pytest.approx(1000, abs=60)


@pytest.mark.parametrize("chance", [0.0, 0.5, 1 - 2**-53])
def test_what_has_no_probability_is_never_drawn(chance):
    row = np.full(1500, -np.inf, np.float32)
    row[700] = 1.0
    for options in ({}, {"top_k": 9}, {"top_p": 0.5}, {"min_p": 0.1}):
        assert drawn(row, SamplingConfig(temperature=1.0, **options), chance) == 700
