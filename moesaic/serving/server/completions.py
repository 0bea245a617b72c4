"""POST /v1/completions: a text goes on, prompts as text or as token ids.

With `echo` and `logprobs` it scores what it is given, which is how lm-evaluation-harness
measures a model over HTTP.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from moesaic.serving.engine.request import Event, Token
from moesaic.serving.server.chat import finite, token_experts
from moesaic.serving.server.faults import ApiFault
from moesaic.serving.server.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from moesaic.serving.server.work import (
    DONE,
    KEEP_ALIVE,
    EventStream,
    Service,
    Work,
    collected,
    data,
    grammar,
    sampling,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_TOKENS = 16
"""New tokens unless max_tokens says otherwise, as in OpenAI's API."""


async def create_completion(
    service: Service, http: HttpRequest, body: CompletionRequest
) -> Response | Completion | None:
    """Continue texts; None to a client that has gone."""
    service.check_model(body.model)
    service.check_experts(body.experts)
    http.state.facts["user"] = body.user
    tokenizer = service.engine.tokenizer
    prompts = await asyncio.to_thread(encode_prompts, tokenizer, body.prompt)
    longest = max(len(prompt) for prompt in prompts)
    if not all(prompts):
        raise ApiFault(400, "A prompt is empty.", param="prompt", code="empty_prompt")
    config = sampling(
        body,
        max_new_tokens=service.room(longest, body.max_tokens, default=DEFAULT_TOKENS),
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs,
        prompt_logprobs=(body.echo and body.logprobs is not None) or body.max_tokens == 0,
        **grammar(body.response_format),
    )
    work = Work(service, http)
    await work.begin(prompts, config)
    answers = [
        _Answer(number * config.n + index, body, text)
        for number, text in enumerate(_echoes(tokenizer, body.prompt, prompts))
        for index in range(config.n)
    ]
    head: dict[str, Any] = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time())}
    if body.stream:
        pieces = _stream(work, answers, {**head, "model": service.name}, body, config.n)
        return EventStream(pieces, work, write_seconds=service.config.write_seconds)

    async def whole() -> Completion:
        async for events in work.events():
            for number, event in events:
                # The prompt's scores come once, but each of the n answers begins with the prompt.
                if event.prompt and event.index == 0:
                    for answer in answers[number * config.n : (number + 1) * config.n]:
                        answer.scored += event.prompt
                answers[number * config.n + event.index].add(event)
        choices = [answer.choice() for answer in answers]
        return Completion(**head, model=service.name, choices=choices, usage=work.usage())

    return await collected(http, work, whole())


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> list[list[int]]:
    """Token ids of one prompt or several."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return [
        list(tokenizer(one, verbose=False)["input_ids"]) if isinstance(one, str) else list(one)
        for one in prompt
    ]


def _echoes(tokenizer: PreTrainedTokenizerFast, prompt: Any, ids: list[list[int]]) -> list[str]:
    """The text of each prompt: as it was sent, or of the ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], str):
        return list(prompt)
    return [str(tokenizer.decode(one, skip_special_tokens=False)) for one in ids]


class _Answer:
    """One answer while it grows."""

    def __init__(self, index: int, body: CompletionRequest, prompt: str) -> None:
        self.index = index
        self._body = body
        self._echo = prompt if body.echo else ""
        self.scored: list[Token] = []
        """The prompt's tokens, once they have scores."""
        self._text: list[str] = []
        self._tokens: list[Token] = []
        self._offset = 0
        self._finish: Any = "stop"

    def add(self, event: Event) -> None:
        """Take an event."""
        self._text.append(event.text)
        self._tokens += event.tokens
        if event.finish_reason is not None:
            self._finish = "length" if event.finish_reason == "length" else "stop"

    def choice(self) -> CompletionChoice:
        """The whole answer, or what has come since the last time."""
        prompt = self.scored if self._body.echo else []
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._logprobs([*prompt, *self._tokens])
        choice = CompletionChoice(
            index=self.index,
            text=self._echo + "".join(self._text),
            logprobs=logprobs,
            finish_reason=self._finish,
            experts=token_experts(self._tokens) if self._body.experts else None,
        )
        self._echo, self._text, self._tokens, self.scored = "", [], [], []
        return choice

    def _logprobs(self, tokens: Sequence[Token]) -> CompletionLogprobs:
        names = [spelled(token) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return CompletionLogprobs(
            tokens=names,
            # The first token of a prompt has nothing before it that it could follow from.
            token_logprobs=[
                None if token.logprob is None else finite(token.logprob) for token in tokens
            ],
            top_logprobs=[_top(token) for token in tokens],
            text_offset=offsets,
        )


def _top(token: Token) -> dict[str, float] | None:
    """The likeliest tokens and the one itself, by their spelling."""
    if token.logprob is None:
        return None
    listed = {spelled(top): finite(top.logprob) for top in reversed(token.top)}
    return {**listed, spelled(token): finite(token.logprob)}


def spelled(token: Token) -> str:
    """A token's text, or its bytes where it is no whole characters: two tokens, two spellings."""
    if token.raw and "\N{REPLACEMENT CHARACTER}" in token.text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
    return token.text


async def _stream(
    work: Work, answers: Sequence[_Answer], head: dict[str, Any], body: CompletionRequest, n: int
) -> AsyncIterator[bytes]:
    counts = body.stream_options is not None and body.stream_options.include_usage

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if counts else {}
        return data({**head, "object": "text_completion", "choices": choices, **usage, **more})

    async for events in work.events():
        written = b"" if events else KEEP_ALIVE
        for number, event in events:
            if event.prompt and event.index == 0:
                for answer in answers[number * n : (number + 1) * n]:
                    answer.scored += event.prompt
            answer = answers[number * n + event.index]
            answer.add(event)
            if event.finish_reason is None and not (event.text or event.tokens or event.prompt):
                continue
            choice = answer.choice().model_dump()
            if not body.experts:
                del choice["experts"]
            if event.finish_reason is None:
                choice["finish_reason"] = None
            written += chunk([choice])
        if written:
            yield written
    if counts:
        yield chunk([], usage=work.usage().model_dump())
    yield DONE
