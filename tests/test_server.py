"""The server around an engine that computes nothing: bodies, faults, limits, streams, draining."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from tests.fake_engine import EXPERTS, FakeEngine
from tests.http_server import Running, running
from tests.tiny import TINY, tiny_tokenizer

TOOLS_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "write <tool_call>{{ '{' }}}</tool_call>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASK = [{"role": "user", "content": "hi"}]
CHAT = {"model": "tiny", "messages": ASK}
TEXT = {"model": "tiny", "prompt": "hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tool_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_tokenizer(tmp_path_factory.mktemp("tools"))
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Running]:
    with running(FakeEngine(tokenizer), max_body_bytes=100_000, max_new_tokens=500) as server:
        yield server


def post(server: Running, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=20, **options)


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def fault(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def wait_for(condition: Callable[[], Any], *, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


def log_of(server: Running) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.getvalue().splitlines()]


# Answers


def test_a_chat_is_answered_whole(server: Running) -> None:
    answer = post(server, "chat/completions", CHAT).json()
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len("Hello there")
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 11


def test_a_chat_is_answered_piece_by_piece_with_usage_when_asked(server: Running) -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = chunks(post(server, "chat/completions", body))
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == "Hello there"
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"
    assert all(piece["usage"] is None for piece in pieces)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 11


def test_the_template_sees_every_message(server: Running) -> None:
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}],
        },
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "refusal": None, "annotations": []},
        {"role": "user", "content": "bye"},
    ]
    post(server, "chat/completions", {**CHAT, "messages": messages}).raise_for_status()
    prompt = server.engine.tokenizer.decode(server.engine.taken[-1].prompt_ids)
    assert prompt == (
        "<|system|>be\nbrief</s><|user|>hi</s><|assistant|>hello</s><|user|>bye</s><|assistant|>"
    )


def test_every_answer_of_several_has_its_own_number(server: Running) -> None:
    answer = post(server, "chat/completions", {**CHAT, "n": 3}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    body = {**TEXT, "prompt": ["a", "b"], "n": 2, "stream": True}
    ended = [c for piece in chunks(post(server, "completions", body)) for c in piece["choices"]]
    assert {choice["index"] for choice in ended if choice["finish_reason"]} == {0, 1, 2, 3}


def test_logprobs_come_with_bytes_and_the_next_best(server: Running) -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    content = post(server, "chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "?", "logprob": -2.0, "bytes": [63]},
        ],
    }
    streamed = chunks(post(server, "chat/completions", {**body, "stream": True}))
    found = [piece["choices"][0].get("logprobs") for piece in streamed]
    assert [token for logprobs in found if logprobs for token in logprobs["content"]] == content


def test_a_prompt_is_scored_as_lm_evaluation_harness_asks(server: Running) -> None:
    body = {**TEXT, "prompt": [5, 6, 7], "max_tokens": 1, "logprobs": 1, "echo": True}
    choice = post(server, "completions", {**body, "temperature": 0, "seed": 1}).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["t5", "t6", "t7", "H"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][3] == {"H": -0.5}
    assert logprobs["text_offset"] == [0, 2, 4, 6]
    assert choice["text"].endswith("H")


def test_echo_gives_the_prompt_back_with_every_answer(server: Running) -> None:
    answer = post(server, "completions", {**TEXT, "echo": True, "n": 2}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["hiHello there"] * 2
    streamed = chunks(post(server, "completions", {**TEXT, "echo": True, "stream": True}))
    assert "".join(piece["choices"][0]["text"] for piece in streamed) == "hiHello there"
    nothing = post(server, "completions", {**TEXT, "echo": True, "max_tokens": 0}).json()
    assert nothing["choices"][0]["text"] == "hi"


def test_embeddings_have_length_one_in_either_encoding(server: Running) -> None:
    body = {"model": "tiny", "input": ["a", "b c"]}
    plain = post(server, "embeddings", body).json()
    assert plain["pooling"] == "mean"
    assert sum(value**2 for value in plain["data"][1]["embedding"]) == pytest.approx(1)
    packed = post(server, "embeddings", {**body, "encoding_format": "base64"}).json()
    assert isinstance(packed["data"][0]["embedding"], str)


def test_experts_are_told_when_asked_for(server: Running) -> None:
    choice = post(server, "chat/completions", {**CHAT, "experts": True}).json()["choices"][0]
    assert choice["experts"][0] == {"text": "H", "experts": [list(layer) for layer in EXPERTS]}
    assert "experts" not in post(server, "chat/completions", CHAT).json()["choices"][0]


def test_a_dense_model_has_no_experts_to_tell(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer)
    engine.executor.spec = TINY["llama"]
    with running(engine) as server:
        assert (
            fault(post(server, "chat/completions", {**CHAT, "experts": True}))["param"] == "experts"
        )
        [model] = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert model["moesaic"] == {"chat": True, "moe": None}


def test_models_are_listed_and_found_by_name(server: Running) -> None:
    [listed] = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert listed["id"] == "tiny"
    assert httpx.get(f"{server.url}/v1/models/tiny").json() == listed
    assert fault(httpx.get(f"{server.url}/v1/models/gpt-4"))["code"] == "model_not_found"


def test_metrics_count_what_was_answered(server: Running) -> None:
    post(server, "chat/completions", CHAT)
    text = httpx.get(f"{server.url}/metrics").text
    line = 'moesaic_http_requests_total{path="/v1/chat/completions",status="200"}'
    assert any(each.startswith(line) for each in text.splitlines())
    assert 'moesaic_answers_total{reason="stop"}' in text
    assert "moesaic_blocks_free" in text


# Calls


def say(tool_tokenizer: Any, text: str, **body: Any) -> Iterator[dict[str, Any]]:
    """The message and the joined deltas of a model that says `text`, with the finish reason."""
    with running(FakeEngine(tool_tokenizer, text)) as server:
        body = {**CHAT, "tools": [WEATHER], **body}
        whole = post(server, "chat/completions", body).json()["choices"][0]
        yield {**whole["message"], "finish_reason": whole["finish_reason"]}
        streamed = chunks(post(server, "chat/completions", {**body, "stream": True}))
        deltas = [piece["choices"][0]["delta"] for piece in streamed]
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        text = "".join(delta.get("content", "") for delta in deltas)
        reason = streamed[-1]["choices"][0]["finish_reason"]
        yield {"content": text or None, "tool_calls": calls, "finish_reason": reason}


def test_calls_between_tags_are_found(tool_tokenizer: Any) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    for answer in say(tool_tokenizer, f"Let me see.\n{call}\n{call}"):
        assert answer["content"] == "Let me see."
        assert [each["function"]["name"] for each in answer["tool_calls"]] == ["weather"] * 2
        assert json.loads(answer["tool_calls"][0]["function"]["arguments"]) == {"city": "Bonn"}
        assert answer["finish_reason"] == "tool_calls"
    for answer in say(tool_tokenizer, f"{call}{call}", parallel_tool_calls=False):
        assert len(answer["tool_calls"]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a < b and <tool> is no <tool_cal",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        "<tool_call>not json</tool_call> and more",
        '<tool_call>{"name": "weather", "arg',
    ],
)
def test_what_is_no_call_is_text(text: str, tool_tokenizer: Any) -> None:
    for answer in say(tool_tokenizer, text):
        assert answer["content"] == text
        assert not answer.get("tool_calls")
        assert answer["finish_reason"] == "stop"


def test_a_required_call_is_asked_of_the_grammar(tool_tokenizer: Any) -> None:
    text = '[{"name": "weather", "arguments": {"city": "Bonn"}}]'
    with running(FakeEngine(tool_tokenizer, text)) as server:
        body = {**CHAT, "tools": [WEATHER], "tool_choice": "required"}
        choice = post(server, "chat/completions", body).json()["choices"][0]
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bonn"}'
        schema = json.loads(server.engine.taken[-1].sampling.json_schema)
        assert schema["items"]["anyOf"][0]["properties"]["name"] == {"const": "weather"}
        cut = post(server, "chat/completions", {**body, "max_tokens": 20}).json()["choices"][0]
        assert cut["finish_reason"] == "length"
        assert "tool_calls" not in cut["message"]


def test_a_template_gets_arguments_as_an_object(tool_tokenizer: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    with running(FakeEngine(tool_tokenizer)) as server:
        post(server, "chat/completions", {**CHAT, "messages": messages}).raise_for_status()
        prompt = tool_tokenizer.decode(server.engine.taken[-1].prompt_ids)
    assert prompt == '<|user|>hi</s><|assistant|>{"a": 1}</s><|tool|>rain</s><|assistant|>'


def test_a_template_without_tools_takes_none(server: Running) -> None:
    error = fault(post(server, "chat/completions", {**CHAT, "tools": [WEATHER]}))
    assert (error["param"], error["code"]) == ("tools", "tools_not_supported")


# Faults


REFUSED = {
    "an unknown field": ({**CHAT, "reasoning_effort": "low"}, "reasoning_effort"),
    "a field of a message": (
        {**CHAT, "messages": [{**ASK[0], "cache": 1}]},
        "messages[0].cache",
    ),
    "an image": (
        {
            **CHAT,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        },
        "messages[0].content[0].image_url",
    ),
    "a wrong type": ({**CHAT, "temperature": "hot"}, "temperature"),
    "a value out of range": ({**CHAT, "temperature": 3}, "temperature"),
    "a missing field": ({"model": "tiny"}, "messages"),
    "no message": ({**CHAT, "messages": []}, "messages"),
    "an unknown role": ({**CHAT, "messages": [{"role": "king", "content": ""}]}, "messages[0]"),
    "storing": ({**CHAT, "store": True}, "store"),
    "top_logprobs alone": ({**CHAT, "top_logprobs": 2}, None),
    "no token": ({**CHAT, "logit_bias": {"x": 1}}, "logit_bias"),
    "too many tokens": ({**CHAT, "max_tokens": 501}, "max_tokens"),
    "half a surrogate pair": ({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, None),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_refused_by_name(body: Any, param: str, server: Running) -> None:
    text = json.dumps(body)
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/chat/completions", content=text, headers=headers)
    assert response.status_code == 400
    assert fault(response)["param"] == param
    assert fault(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"nul", b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 50_000, b"\xff", b'"\xff"'],
    ids=lambda body: repr(body[:8]),
)
def test_a_body_that_is_no_object_of_json_is_refused(body: bytes, server: Running) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert response.status_code == 400
    fault(response)


def test_another_model_a_path_or_a_method_are_not_there(server: Running) -> None:
    response = post(server, "chat/completions", {**CHAT, "model": "gpt"})
    assert (response.status_code, fault(response)["code"]) == (404, "model_not_found")
    assert httpx.get(f"{server.url}/v2").status_code == 404
    response = httpx.get(f"{server.url}/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    fault(response)


def test_a_prompt_beyond_the_context_is_refused(server: Running) -> None:
    response = post(server, "completions", {**TEXT, "prompt": [5] * 5000})
    assert (response.status_code, fault(response)["code"]) == (400, "context_length_exceeded")


def test_a_body_that_is_too_large_is_refused_however_it_comes(server: Running) -> None:
    large = json.dumps({**TEXT, "prompt": "x" * 200_000}).encode()
    url, headers = f"{server.url}/v1/completions", {"Content-Type": "application/json"}
    for content in (large, iter([large[:90_000], large[90_000:]])):
        response = httpx.post(url, content=content, headers=headers)
        assert (response.status_code, fault(response)["code"]) == (413, "body_too_large")


def test_more_answers_than_can_ever_be_taken_are_refused(server: Running) -> None:
    response = post(server, "completions", {**TEXT, "prompt": ["a"] * 30, "n": 10})
    assert (response.status_code, fault(response)["code"]) == (400, "too_many_answers")


def test_a_connection_without_a_request_is_closed(tokenizer: Any) -> None:
    with running(FakeEngine(tokenizer), body_seconds=0.5) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for sent in (b"", b"POST /v1/completions HTTP/1.1\r\n"):
            with socket.create_connection((host, int(port)), timeout=10) as client:
                client.sendall(sent)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1000) == b""


def test_only_who_has_a_key_is_answered(tokenizer: Any) -> None:
    with running(FakeEngine(tokenizer), keys=("one", "two")) as server:
        for given in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic two"}):
            response = post(server, "chat/completions", CHAT, headers=given)
            assert (response.status_code, fault(response)["code"]) == (401, "invalid_api_key")
        headers = {"Authorization": "Bearer two"}
        assert post(server, "chat/completions", CHAT, headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_server_that_is_full_says_when_to_come_again(tokenizer: Any) -> None:
    with running(FakeEngine(tokenizer, places=0)) as server:
        response = post(server, "chat/completions", CHAT)
        assert (response.status_code, fault(response)["code"]) == (503, "overloaded")
        assert int(response.headers["retry-after"]) > 0


def test_a_fault_of_the_engine_is_told_before_and_within_a_stream(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer, "x" * 50, pause=0.01)
    with running(engine) as server:
        threading.Timer(0.2, setattr, (engine, "fault", "out of order")).start()
        response = post(server, "chat/completions", {**CHAT, "stream": True})
        last = response.text.strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "out of order"
        response = post(server, "chat/completions", CHAT)
        assert (response.status_code, fault(response)["message"]) == (500, "out of order")


def test_an_answer_that_takes_too_long_is_ended(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer, "x" * 1000, pause=0.02)
    with running(engine, request_seconds=0.3) as server:
        response = post(server, "chat/completions", CHAT)
        assert (response.status_code, fault(response)["code"]) == (408, "timeout")
        engine.wait_until_idle(2)


def test_a_fault_of_the_server_is_500_and_names_nothing(tokenizer: Any, capsys: Any) -> None:
    engine = FakeEngine(tokenizer)
    engine.submit = lambda *args, **more: 1 / 0  # type: ignore[method-assign]
    with running(engine) as server:
        response = post(server, "chat/completions", CHAT)
        assert response.status_code == 500
        assert "ZeroDivision" not in response.text
    assert "ZeroDivisionError" in capsys.readouterr().err


# Clients that go, or do not read


def test_a_client_that_goes_ends_its_request(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer, "x" * 1000, pause=0.02)
    with running(engine) as server:
        url = f"{server.url}/v1/chat/completions"
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=CHAT, timeout=0.5)
        engine.wait_until_idle(2)
        with httpx.stream("POST", url, json={**CHAT, "stream": True}) as response:
            next(response.iter_lines())
        engine.wait_until_idle(2)
    assert engine.finished == {"cancelled": 2}


def raw_request(
    server: Running, body: dict[str, Any], *, window: int | None = None
) -> socket.socket:
    """Send a request by hand, and read nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.socket()
    if window:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    client.connect((host, int(port)))
    text = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
    return client


def test_a_client_that_never_reads_is_given_up(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer, "x" * 100_000, context=200_000)
    body = {**CHAT, "stream": True, "logprobs": True, "top_logprobs": 2}
    with running(engine, write_seconds=1.0) as server, raw_request(server, body, window=4096):
        wait_for(lambda: engine.finished == {"cancelled": 1}, seconds=15)
        wait_for(lambda: server.gate.in_flight == 0)


def test_a_body_that_does_not_come_is_not_waited_for(tokenizer: Any) -> None:
    with running(FakeEngine(tokenizer), body_seconds=0.5) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


# The end


def test_draining_finishes_what_was_begun_and_takes_nothing_new(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer, "x" * 100, pause=0.02)
    with running(engine) as server:
        answers: list[httpx.Response] = []
        begun = threading.Thread(
            target=lambda: answers.append(post(server, "chat/completions", CHAT))
        )
        begun.start()
        wait_for(lambda: engine.taken)
        server.gate.ask_to_stop()
        response = post(server, "chat/completions", CHAT)
        assert (response.status_code, fault(response)["code"]) == (503, "draining")
        assert int(response.headers["retry-after"]) > 0
        assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
        begun.join()
        assert answers[0].json()["choices"][0]["message"]["content"] == "x" * 100
    assert server.result["drained"] is True


def test_draining_ends_after_its_time(tokenizer: Any) -> None:
    engine = FakeEngine(tokenizer, "x" * 10_000, pause=0.02)
    with running(engine, drain_seconds=0.3) as server:
        client = raw_request(server, CHAT)
        wait_for(lambda: engine.taken)
    client.close()
    assert server.result["drained"] is False
    engine.wait_until_idle(2)


# The log


def test_a_request_is_one_line_with_its_id(server: Running) -> None:
    headers = {"X-Request-ID": "mine-1"}
    response = post(server, "chat/completions", {**CHAT, "user": "ann"}, headers=headers)
    assert response.headers["x-request-id"] == "mine-1"
    [line] = [each for each in log_of(server) if each.get("id") == "mine-1"]
    assert line["status"] == 200
    assert line["path"] == "/v1/chat/completions"
    assert line["completion_tokens"] == 11
    assert line["user"] == "ann"
    assert 0 <= line["first_token_seconds"] <= line["seconds"]
    response = post(server, "chat/completions", CHAT, headers={"X-Request-ID": "a b"})
    assert len(response.headers["x-request-id"]) == 24


def test_the_page_and_its_script_ask_nothing_of_other_servers(server: Running) -> None:
    page = httpx.get(server.url)
    script = httpx.get(f"{server.url}/page.js")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for text in (page.text, script.text):
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "https://" not in text
