"""What one HTTP request has the engine do: its prompts, its events as they come, its end.

However the HTTP request ends, its work in the engine ends with it: answered, refused, out of
time, or its client gone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moesaic.errors import ConfigError, ServingError, Unavailable
from moesaic.serving.config import RequestConfig, ServeConfig
from moesaic.serving.engine.engine import Engine
from moesaic.serving.engine.request import Event
from moesaic.serving.server.delivery import Inbox, Post
from moesaic.serving.server.faults import ApiFault
from moesaic.serving.server.metrics import Metrics
from moesaic.serving.server.protocol import (
    CachedTokens,
    JsonFormat,
    RegexFormat,
    SamplingFields,
    SchemaFormat,
    Usage,
)

KEEP_ALIVE_SECONDS = 15.0
"""A stream says so often that it is still there, for whatever stands between it and its client."""

KEEP_ALIVE = b": still working\n\n"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Service:
    """What endpoints share."""

    engine: Engine
    config: ServeConfig
    name: str
    """What the model is called."""
    created: int
    """When it began to be served, in Unix seconds."""
    post: Post
    metrics: Metrics

    def check_model(self, model: str) -> None:
        """Refuse another model than the one that is served."""
        if model != self.name:
            raise ApiFault(
                404,
                f"There is no model {model!r} here, only {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    def check_experts(self, asked: bool | None) -> None:
        """Refuse to tell the experts of a model that has none."""
        if asked and self.engine.executor.spec.moe is None:
            raise ApiFault(
                400, "The model is dense: it has no experts.", param="experts", code="no_experts"
            )

    def room(self, prompt_tokens: int, asked: int | None, *, default: int | None) -> int:
        """New tokens that an answer may have.

        Args:
            prompt_tokens: Of the prompt.
            asked: What the request says; None if nothing.
            default: Then so many; None for as many as there is room for.
        """
        room = self.engine.max_context - prompt_tokens
        limit = self.config.max_new_tokens
        if asked is not None and limit is not None and asked > limit:
            raise ApiFault(
                400,
                f"max_tokens is {asked}, but this server gives {limit} at most.",
                param="max_tokens",
                code="max_tokens_too_large",
            )
        if prompt_tokens < 1:
            raise ApiFault(400, "The prompt is empty.", code="empty_prompt")
        if room < max(asked or 0, 0 if asked == 0 else 1):
            new = "" if asked is None else f" and {asked} of the answer"
            raise ApiFault(
                400,
                f"The model's context is {self.engine.max_context} tokens, but there are "
                f"{prompt_tokens} of the prompt{new}. Shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
            )
        if asked is not None:
            return asked
        limits = [room, *(each for each in (limit, default) if each is not None)]
        return min(limits)


def sampling(body: SamplingFields, **more: Any) -> RequestConfig:
    """What a request asks of the engine; `more` is what chat and completions spell apart."""
    temperature = 1.0 if body.temperature is None else body.temperature
    fields = {
        "temperature": temperature,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty,
        "logit_bias": _bias(body.logit_bias),
        "n": body.n,
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": body.ignore_eos,
        "experts": body.experts,
        **more,
    }
    if temperature > 0:  # at 0 the likeliest token is taken, whatever these say
        fields.update(top_p=body.top_p, top_k=body.top_k, min_p=body.min_p, seed=body.seed)
    try:
        return RequestConfig(**{name: value for name, value in fields.items() if value is not None})
    except ConfigError as error:
        raise ApiFault(400, str(error), code="invalid_value") from error


def _bias(given: dict[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    wrong = [token for token in given if not (token.isascii() and token.isdigit())]
    if wrong:
        raise ApiFault(
            400, f"{wrong[0]!r} is no token id.", param="logit_bias", code="invalid_value"
        )
    return {int(token): bias for token, bias in given.items()}


def grammar(shape: object) -> dict[str, str]:
    """A response format as the engine's grammar."""
    if isinstance(shape, JsonFormat):
        return {"json_schema": '{"type": "object"}'}
    if isinstance(shape, SchemaFormat):
        return {"json_schema": json.dumps(shape.json_schema.schema_)}
    if isinstance(shape, RegexFormat):
        return {"regex": shape.regex}
    return {}


class Work:
    """The prompts of one HTTP request in the engine. Used as a context, which ends them."""

    def __init__(self, service: Service, http: HttpRequest) -> None:
        self._service = service
        self._inbox = Inbox(service.post)
        self._facts: dict[str, Any] = http.state.facts
        self._id: str = http.state.request_id
        self._began: float = http.state.began
        self._end = asyncio.get_running_loop().time() + service.config.request_seconds
        self._open: dict[int, str] = {}
        self._counts: dict[tuple[int, int], tuple[int, int]] = {}
        self._prompts: dict[int, tuple[int, int]] = {}
        self._first: float | None = None
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *what: object) -> None:
        self.close()

    async def begin(self, prompts: Sequence[Sequence[int]], config: RequestConfig) -> None:
        """Hand the prompts to the engine.

        Raises:
            ApiFault: It does not take them.
        """
        self._facts["prompts"] = len(prompts) if len(prompts) > 1 else None
        most = self._service.config.max_sequences + self._service.config.max_waiting
        if len(prompts) * config.n > most:
            raise ApiFault(
                400,
                f"{len(prompts)} prompts with {config.n} answers each are more than the {most} "
                f"answers that this server takes at a time. Send fewer at once.",
                code="too_many_answers",
            )
        try:
            for number, prompt_ids in enumerate(prompts):
                # A thread, because a grammar may have to be compiled.
                request = await asyncio.to_thread(self._submit, number, prompt_ids, config)
                self._open[number] = request
        except BaseException:
            self.close()
            raise

    def _submit(self, number: int, prompt_ids: Sequence[int], config: RequestConfig) -> str:
        request_id = f"{self._id}-{id(self):x}-{number}"  # unique, whatever clients call theirs
        try:
            self._service.engine.submit(
                prompt_ids, config, request_id=request_id, on_event=self._inbox.address(number)
            )
        except ConfigError as error:
            raise ApiFault(400, str(error), code="invalid_value") from error
        except Unavailable as error:
            raise ApiFault(503, str(error), code="overloaded") from error
        except ServingError as error:
            raise ApiFault(500, str(error), code="engine_error") from error
        return request_id

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """What comes, with the number of its prompt, until every answer has ended.

        An empty list says only that time has passed.

        Raises:
            ApiFault: An answer failed, or there is no time left.
        """
        while self._open:
            try:
                async with asyncio.timeout_at(self._end):
                    try:
                        async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                            events = await self._inbox.take()
                    except TimeoutError:
                        if asyncio.get_running_loop().time() >= self._end:
                            raise
                        events = []
            except TimeoutError:
                seconds = self._service.config.request_seconds
                raise ApiFault(
                    408, f"The answer took longer than {seconds:g} s.", code="timeout"
                ) from None
            for number, event in events:
                self._note(number, event)
            yield events

    def _note(self, number: int, event: Event) -> None:
        if event.tokens:
            self._last = event.time
            if self._first is None:
                self._first = event.time
                self._service.metrics.first_token_seconds.observe(event.time - self._began)
        if event.usage is not None:
            usage = event.usage
            self._counts[number, event.index] = (usage.completion_tokens, usage.cached_tokens)
            self._prompts[number] = (usage.prompt_tokens, usage.cached_tokens)
        if event.is_last:
            self._open.pop(number, None)
        if event.finish_reason == "error":
            raise ApiFault(500, event.error or "The engine failed.", code="engine_error")
        if event.finish_reason == "cancelled":
            if self._inbox.is_overfull:
                raise ApiFault(408, "The answer was not read.", code="unread")
            raise ApiFault(503, "The server is stopping.", code="draining")

    def usage(self) -> Usage:
        """What all answers took, as far as they have ended."""
        prompt = sum(tokens for tokens, _ in self._prompts.values())
        cached = sum(tokens for _, tokens in self._prompts.values())
        completion = sum(tokens for tokens, _ in self._counts.values())
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=cached),
        )

    def close(self) -> None:
        """End what has not ended, and write down what was done."""
        for request_id in self._open.values():
            self._service.engine.cancel(request_id)
        if self._open:
            self._facts["cancelled"] = True
        self._open.clear()
        metrics = self._service.metrics
        metrics.request_seconds.observe(time.perf_counter() - self._began)
        usage = self.usage()
        self._facts.update(
            prompt_tokens=usage.prompt_tokens or None,
            cached_tokens=usage.prompt_tokens_details.cached_tokens or None,
            completion_tokens=usage.completion_tokens or None,
        )
        if self._first is not None:
            self._facts["first_token_seconds"] = round(self._first - self._began, 4)
            steps = max((tokens for tokens, _ in self._counts.values()), default=0) - 1
            if steps > 0:
                metrics.token_seconds.observe((self._last - self._first) / steps)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Do `work`, but stop it when the client goes; None then."""
    doing = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait([doing, listening], return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (doing, listening):
            task.cancel()
        await asyncio.gather(doing, listening, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, from pieces that are made as the client reads them.

    Args:
        pieces: Bytes to send. What it raises is sent as one last event.
        work: Closed when the stream ends, however it does.
        write_seconds: A client that reads nothing for so long is given up.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], work: Work, *, write_seconds: float) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._pieces, self._work, self._write_seconds = pieces, work, write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        facts = scope["state"]["facts"]
        try:
            with self._work:
                start = {"status": self.status_code, "headers": self.raw_headers}
                await send({"type": "http.response.start", **start})
                ended = await while_connected(receive, self._write(send, facts))
            if not ended:
                facts.setdefault("fault", "the client went away")
        except TimeoutError:
            # Without its end the response is broken off, and its connection closed.
            facts["fault"] = f"the client read nothing for {self._write_seconds:g} s"

    async def _write(self, send: Send, facts: dict[str, Any]) -> bool:
        async def body(piece: bytes, *, more: bool) -> None:
            async with asyncio.timeout(self._write_seconds):
                await send({"type": "http.response.body", "body": piece, "more_body": more})

        try:
            async for piece in self._pieces:
                await body(piece, more=True)
        except ApiFault as fault:
            facts["fault"] = fault.body["error"]["message"]
            await body(data(fault.body), more=True)
        await body(b"", more=False)
        return True


def data(value: object) -> bytes:
    """One server-sent event."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode("utf-8", "replace")


DONE = b"data: [DONE]\n\n"


async def collected(
    http: HttpRequest, work: Work, answer: Coroutine[Any, Any, Result]
) -> Result | None:
    """The whole answer, or nothing to nobody once the client has gone."""
    with work:
        return await while_connected(http.receive, answer)
