"""POST /v1/chat/completions: messages through the model's chat template, and its answers back."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from moesaic.serving.engine.request import Event, Token
from moesaic.serving.server.faults import ApiFault
from moesaic.serving.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Content,
    FinishReason,
    Message,
    ReplyCall,
    ReplyFunction,
    ReplyMessage,
    TokenExperts,
    TokenLogprob,
    Tool,
    ToolMessage,
    TopLogprob,
)
from moesaic.serving.server.tools import Call, parser_of, required_schema, shows_tools
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


async def create_chat_completion(
    service: Service, http: HttpRequest, body: ChatRequest
) -> Response | ChatCompletion | None:
    """Answer a conversation; None to a client that has gone."""
    service.check_model(body.model)
    service.check_experts(body.experts)
    http.state.facts["user"] = body.user
    template = chat_template(service.engine.tokenizer, body)
    # A thread, because long conversations take long, and other answers are being written.
    prompt_ids = await asyncio.to_thread(encode_chat, service.engine.tokenizer, body)
    asked = body.max_completion_tokens
    asked = body.max_tokens if asked is None else asked
    shape = grammar(body.response_format)
    if body.tools and body.tool_choice not in (None, "auto", "none"):
        schema = required_schema(
            body.tools, body.tool_choice, parallel=body.parallel_tool_calls is not False
        )
        shape = {"json_schema": json.dumps(schema)}
    config = sampling(
        body,
        max_new_tokens=service.room(len(prompt_ids), asked, default=None),
        logprobs=body.logprobs,
        top_logprobs=body.top_logprobs,
        **shape,
    )
    work = Work(service, http)
    await work.begin([prompt_ids], config)
    answers = [_Answer(index, body, template) for index in range(config.n)]
    head: dict[str, Any] = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}
    if body.stream:
        pieces = _stream(work, answers, {**head, "model": service.name}, body)
        return EventStream(pieces, work, write_seconds=service.config.write_seconds)

    async def whole() -> ChatCompletion:
        async for events in work.events():
            for _, event in events:
                answers[event.index].add(event)
        choices = [answer.choice() for answer in answers]
        return ChatCompletion(**head, model=service.name, choices=choices, usage=work.usage())

    return await collected(http, work, whole())


# Messages to tokens


def chat_template(tokenizer: PreTrainedTokenizerFast, body: ChatRequest) -> str:
    """The model's template.

    Raises:
        ApiFault: It has none, or none that shows tools.
    """
    if not tokenizer.chat_template:
        raise ApiFault(
            400,
            "The model has no chat template. Use /v1/completions.",
            param="messages",
            code="no_chat_template",
        )
    shown = _shown_tools(body)
    template: str = tokenizer.get_chat_template(tools=shown)
    if shown and not shows_tools(template):
        raise ApiFault(
            400,
            "The model's chat template has no place for tools. Leave them out.",
            param="tools",
            code="tools_not_supported",
        )
    return template


def encode_chat(tokenizer: PreTrainedTokenizerFast, body: ChatRequest) -> list[int]:
    """Token ids of a conversation, up to where the assistant's answer begins."""
    try:
        text = tokenizer.apply_chat_template(
            [_for_template(message) for message in body.messages],
            tools=_shown_tools(body),
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # a template may raise anything, its own messages included
        reason = " ".join(str(error).split())[:300]
        raise ApiFault(
            400,
            f"The model's chat template does not take this conversation: {reason}",
            param="messages",
            code="template_refused",
        ) from error
    # The template writes its special tokens itself, such as the one that begins a text.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _shown_tools(body: ChatRequest) -> list[Any] | None:
    if not body.tools or body.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def _for_template(message: Message) -> dict[str, Any]:
    fields = message.model_dump(exclude_none=True, exclude={"annotations"})
    if message.role == "developer":
        fields["role"] = "system"
    fields["content"] = _text(message.content)
    if isinstance(message, AssistantMessage) and message.tool_calls:
        for call in fields["tool_calls"]:
            call["function"]["arguments"] = _parsed(call["function"]["arguments"])
    elif isinstance(message, ToolMessage):
        fields["name"] = fields.get("name", message.tool_call_id)
    return fields


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _parsed(arguments: str) -> Any:
    """Templates write arguments as JSON themselves, so they get the object."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


# Events to answers


class _Answer:
    """One of the n answers while it grows."""

    def __init__(self, index: int, body: ChatRequest, template: str) -> None:
        tools: Sequence[Tool] = body.tools or ()
        self.index = index
        self._body = body
        self._parser = parser_of(template, tools, body.tool_choice)
        self._calls: list[ReplyCall] = []
        self._text: list[str] = []
        self._tokens: list[Token] = []
        self._finish: FinishReason = "stop"

    def add(self, event: Event) -> list[dict[str, Any]]:
        """Take an event; give what it adds, as the deltas of a stream."""
        return list(self._add(event))

    def _add(self, event: Event) -> Iterator[dict[str, Any]]:
        if not self._body.stream:  # of which nothing is kept that was sent
            self._tokens += event.tokens
        pieces = list(self._parser.feed(event.text))
        if event.finish_reason is not None:
            pieces += self._parser.finish()
            self._finish = "length" if event.finish_reason == "length" else "stop"
        for piece in pieces:
            if not isinstance(piece, Call):
                if not self._body.stream:
                    self._text.append(piece)
                yield {"content": piece}
            elif self._may_call:
                function = ReplyFunction(name=piece.name, arguments=piece.arguments)
                call = ReplyCall(id=f"call_{secrets.token_hex(12)}", function=function)
                self._calls.append(call)
                yield {"tool_calls": [{"index": len(self._calls) - 1, **call.model_dump()}]}

    @property
    def _may_call(self) -> bool:
        return not self._calls or self._body.parallel_tool_calls is not False

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        return "tool_calls" if self._calls and self._finish == "stop" else self._finish

    def choice(self) -> ChatChoice:
        """The whole answer."""
        text = "".join(self._text)
        message = ReplyMessage(
            content=text if text or not self._calls else None, tool_calls=self._calls or None
        )
        return ChatChoice(
            index=self.index,
            message=message,
            logprobs=chat_logprobs(self._tokens) if self._body.logprobs else None,
            finish_reason=self.finish_reason,
            experts=token_experts(self._tokens) if self._body.experts else None,
        )


async def _stream(
    work: Work, answers: Sequence[_Answer], head: dict[str, Any], body: ChatRequest
) -> AsyncIterator[bytes]:
    counts = body.stream_options is not None and body.stream_options.include_usage

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if counts else {}
        return data(
            {**head, "object": "chat.completion.chunk", "choices": choices, **usage, **more}
        )

    def choice(answer: _Answer, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        fields = {"logprobs": None, "finish_reason": None, **more}
        return {"index": answer.index, "delta": delta, **fields}

    first = {"role": "assistant", "content": ""}
    yield b"".join(chunk([choice(answer, first)]) for answer in answers)
    async for events in work.events():
        written = b"" if events else KEEP_ALIVE
        for _, event in events:
            answer = answers[event.index]
            beside: dict[str, Any] = {}
            if event.tokens and body.logprobs:
                beside["logprobs"] = chat_logprobs(event.tokens).model_dump()
            if event.tokens and body.experts:
                beside["experts"] = [each.model_dump() for each in token_experts(event.tokens)]
            deltas = answer.add(event) or ([{"content": ""}] if beside else [])
            for delta in deltas:
                written += chunk([choice(answer, delta, **beside)])
                beside = {}
            if event.finish_reason is not None:
                written += chunk([choice(answer, {}, finish_reason=answer.finish_reason)])
        if written:
            yield written
    if counts:
        yield chunk([], usage=work.usage().model_dump())
    yield DONE


def chat_logprobs(tokens: Sequence[Token]) -> ChatLogprobs:
    """Tokens of an answer with their logprobs."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token.text,
                logprob=finite(token.logprob),
                bytes=list(token.raw),
                top_logprobs=[
                    TopLogprob(token=top.text, logprob=finite(top.logprob), bytes=list(top.raw))
                    for top in token.top
                ],
            )
            for token in tokens
        ]
    )


LEAST_LOGPROB = -9999.0
"""As OpenAI writes what has no probability at all; JSON has no infinity."""


def finite(logprob: float | None) -> float:
    """A logprob that JSON can hold."""
    return max(LEAST_LOGPROB, LEAST_LOGPROB if logprob is None else logprob)


def token_experts(tokens: Sequence[Token]) -> list[TokenExperts]:
    """Which experts each token used."""
    return [
        TokenExperts(text=token.text, experts=[list(layer) for layer in token.experts or ()])
        for token in tokens
    ]
