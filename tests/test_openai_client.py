"""OpenAI's own client against the real engine: each understands what the other sends."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from moesaic.serving.config import EngineConfig
from moesaic.serving.engine.engine import Engine
from tests.http_server import Running, running
from tests.test_server import TOOLS_TEMPLATE, WEATHER, wait_for
from tests.tiny import TINY, tiny_folder

ASK: Any = [{"role": "user", "content": "the model is a layer"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["moe", "dense"]}, "experts": {"enum": [1, 2, 8]}},
    "required": ["kind", "experts"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tiny_folder(
        tmp_path_factory.mktemp("model") / "moe", TINY["mixtral"].replace(max_positions=2048)
    )
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    config = EngineConfig(
        model=folder, dtype="float32", implementation="torch", kv_tokens=4096, max_waiting=64
    )
    with Engine.load(config) as engine, running(engine) as server:
        yield server
        wait_for(lambda: engine.statistics().running == 0)
        engine.check()


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def say(client: openai.OpenAI, **options: Any) -> Any:
    given = {"messages": ASK, "max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model="tiny", **given)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = say(client)
    assert whole.choices[0].finish_reason == "length"
    chunks = list(say(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_the_same_seed_gives_the_same_answers(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = say(client, temperature=1, seed=seed, n=3, max_tokens=24)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) == 3


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI) -> None:
    text = say(client, max_tokens=24).choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        if stream:
            chunks = list(say(client, max_tokens=24, stop=[stop, "never"], stream=True))
            got = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = say(client, max_tokens=24, stop=stop).choices[0]
            got, reason = choice.message.content, choice.finish_reason
        assert got == text[: text.index(stop)]
        assert reason == "stop"


def test_logprobs_are_those_of_the_tokens(client: openai.OpenAI) -> None:
    content = say(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 12
    for token in content:
        assert token.top_logprobs[0].logprob == pytest.approx(
            token.logprob
        )  # it took the likeliest
        assert sorted(token.top_logprobs, key=lambda top: -top.logprob) == token.top_logprobs
    whole = b"".join(bytes(token.bytes) for token in content)
    text = say(client).choices[0].message.content
    assert whole.decode(errors="replace").startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_a_bias_decides_what_is_said(client: openai.OpenAI) -> None:
    answer = say(client, logit_bias={"65": 100}, max_tokens=4)
    text = answer.choices[0].message.content
    assert len(set(text)) == 1
    assert len(text) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_a_json_schema(client: openai.OpenAI, stream: bool) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "kind", "schema": SCHEMA}}
    options = {"response_format": form, "max_tokens": 200, "temperature": 1, "seed": 3}
    if stream:
        chunks = list(say(client, stream=True, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = say(client, **options).choices[0].message.content
    value = json.loads(text)
    assert value["kind"] in ("moe", "dense")
    assert value["experts"] in (1, 2, 8)


def test_a_required_function_is_called_with_its_arguments(client: openai.OpenAI) -> None:
    tool: Any = {
        "type": "function",
        "function": {
            "name": "count",
            "parameters": {
                "$defs": {"number": {"enum": [1, 2, 3]}},
                "type": "object",
                "properties": {"of": {"$ref": "#/$defs/number"}},
                "required": ["of"],
                "additionalProperties": False,
            },
        },
    }
    named: Any = {"type": "function", "function": {"name": "count"}}
    for choice in ("required", named):
        options = {"tools": [tool, WEATHER], "tool_choice": choice, "max_tokens": 300}
        if choice == "required":
            options["tools"] = [tool]
        options |= {"parallel_tool_calls": False, "temperature": 1, "seed": 5}
        answer = say(client, **options).choices[0]
        assert answer.finish_reason == "tool_calls"
        [call] = answer.message.tool_calls
        assert call.function.name == "count"
        assert json.loads(call.function.arguments)["of"] in (1, 2, 3)
        deltas = [chunk.choices[0].delta for chunk in say(client, stream=True, **options)]
        [streamed] = [each for delta in deltas for each in delta.tool_calls or ()]
        assert streamed.function.model_dump() == call.function.model_dump()


def test_an_answer_can_be_given_back_with_its_calls(client: openai.OpenAI) -> None:
    options = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 400}
    message = (
        say(client, **options, parallel_tool_calls=False, seed=2, temperature=1).choices[0].message
    )
    told = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    again = say(client, messages=[*ASK, message, told], tools=[WEATHER])
    assert again.choices[0].finish_reason == "length"


def test_text_is_continued_from_text_and_from_tokens(
    client: openai.OpenAI, server: Running
) -> None:
    ids = server.engine.tokenizer("the model").input_ids
    options: Any = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    one = client.completions.create(prompt="the model", **options)
    two = client.completions.create(prompt=[ids, ids], **options)
    assert [choice.text for choice in two.choices] == [one.choices[0].text] * 2
    streamed = client.completions.create(prompt="the model", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text


def test_a_prompt_is_scored_with_echo(client: openai.OpenAI, server: Running) -> None:
    ids = server.engine.tokenizer("the model is a layer").input_ids
    options: Any = {"model": "tiny", "temperature": 0, "logprobs": 1, "echo": True}
    scored = client.completions.create(prompt=ids, max_tokens=1, **options).choices[0].logprobs
    assert len(scored.tokens) == len(ids) + 1
    assert scored.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in scored.token_logprobs[1:])
    # What the model would say next is scored the same where it stands in the prompt.
    best = int(server.engine.tokenizer.convert_tokens_to_ids("a"))
    more = (
        client.completions.create(prompt=[*ids, best], max_tokens=0, **options).choices[0].logprobs
    )
    assert more.token_logprobs[1 : len(ids)] == pytest.approx(scored.token_logprobs[1 : len(ids)])
    assert len(more.tokens) == len(ids) + 1


def test_embeddings_come_as_the_client_wants_them(client: openai.OpenAI) -> None:
    one = client.embeddings.create(model="tiny", input="the model").data[0].embedding
    both = client.embeddings.create(
        model="tiny", input=["the model", "a layer"], encoding_format="float"
    )
    assert one == pytest.approx(both.data[0].embedding, abs=1e-6)
    assert sum(value * value for value in one) == pytest.approx(1, abs=1e-5)
    last = client.embeddings.create(model="tiny", input="the model", extra_body={"pooling": "last"})
    assert last.data[0].embedding != pytest.approx(one, abs=1e-3)


def test_experts_come_with_each_token(client: openai.OpenAI) -> None:
    answer = say(client, extra_body={"experts": True})
    told = answer.choices[0].experts
    assert len(told) == 12
    for token in told:
        assert len(token["experts"]) == 3
        assert all(len(set(layer)) == 2 and max(layer) < 4 for layer in token["experts"])


def test_faults_are_raised_as_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="gpt-4o", messages=ASK)
    with pytest.raises(openai.BadRequestError, match="context") as too_long:
        say(client, max_tokens=4000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="reasoning_effort is not supported") as caught:
        say(client, reasoning_effort="low")
    assert caught.value.param == "reasoning_effort"
    with pytest.raises(openai.BadRequestError):
        say(
            client,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            },
        )


def test_a_cancelled_answer_frees_its_place(client: openai.OpenAI, server: Running) -> None:
    engine = server.engine
    before = engine.statistics().finished.get("cancelled", 0)
    with say(client, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
    wait_for(lambda: engine.statistics().finished.get("cancelled", 0) == before + 1)
    wait_for(lambda: engine.statistics().blocks_used == 0)
    engine.check()


def test_many_clients_at_once_get_what_each_gets_alone(server: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:

            async def one(number: int) -> str:
                answer = await client.completions.create(
                    model="tiny", prompt=[5 + number, 9, 40], max_tokens=10 + number, temperature=0
                )
                return answer.choices[0].text

            together = await asyncio.gather(*(one(number) for number in range(12)))
            alone = [await one(number) for number in range(12)]
        assert together == alone
        return together

    assert len(set(asyncio.run(ask()))) > 1


def test_the_snippets_of_the_document_run(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    document = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    first, last = re.findall(r"^```python\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    for old, new in (("http://127.0.0.1:8000", server.url), ('"fp8"', '"tiny", max_tokens=4')):
        assert old in first
        first = first.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(first, "docs/serving.md", "exec"), names)
    names["client"].close()
    assert names["answer"].choices[0].finish_reason == "length"
    (tmp_path / "moe").symlink_to(server.engine.config.model)
    monkeypatch.chdir(tmp_path)
    exec(compile(last.replace('Path("moe")', 'Path("moe"), kv_tokens=64'), "docs", "exec"), {})
    assert capsys.readouterr().out


def test_usage_counts_what_was_in_the_cache(client: openai.OpenAI) -> None:
    prompt = list(range(100, 180))
    first, second = (
        client.completions.create(model="tiny", prompt=prompt, max_tokens=1).usage for _ in range(2)
    )
    assert first.prompt_tokens == second.prompt_tokens == 80
    assert second.prompt_tokens_details.cached_tokens >= 64
