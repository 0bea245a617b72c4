"""The job behind `moesaic chat`: a conversation at the terminal, with a folder or with a server.

The engine that serves answers here too. An empty line or Ctrl-D ends; Ctrl-C stops an answer;
`/new` forgets what was said.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from moesaic.console import note
from moesaic.errors import ConfigError, MoesaicError
from moesaic.serving.client import client_of, first_model, stream
from moesaic.serving.config import ChatConfig, EngineConfig, RequestConfig

TIMEOUT_SECONDS = 600.0

Message = dict[str, str]


class Partner(Protocol):
    """Whoever answers."""

    name: str

    def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        """The answer to a conversation, piece by piece."""


def chat(
    config: ChatConfig,
    *,
    on_text: Callable[[str], None] | None = None,
    lines: Iterator[str] | None = None,
) -> dict[str, Any]:
    """Talk until there is nothing more to say.

    Args:
        config: With whom, and how.
        on_text: Called with each piece of an answer as it arrives.
        lines: What is said; none reads the terminal, or what is piped in.

    Returns:
        The `model`'s name, the `messages`, and the answers' `seconds`.

    Raises:
        ConfigError: There is no such folder or server, or no chat template.
        ServingError: The server cannot be reached.
    """
    give, lines = on_text or (lambda text: None), lines or _typed()
    messages: list[Message] = []
    system = [{"role": "system", "content": config.system}] if config.system else []
    seconds: list[float] = []
    # One loop for all answers, which runs only while one is awaited: at the prompt Ctrl-C ends.
    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        partner = _partner(config, runner, stack)
        if sys.stdin.isatty():
            note(f"Talking to {partner.name}. An empty line ends, /new begins anew.")
        for line in lines:
            if not line.strip():
                break
            if line.strip() == "/new":
                messages.clear()
                continue
            messages.append({"role": "user", "content": line.strip()})
            began = time.perf_counter()
            pieces: list[str] = []

            def on_piece(piece: str, pieces: list[str] = pieces) -> None:
                pieces.append(piece)
                give(piece)

            try:
                runner.run(_answer(partner, [*system, *messages], on_piece))
            except KeyboardInterrupt:
                pass  # what there is of it counts as the answer
            except ConfigError as error:  # such as a conversation beyond the context
                note(f"{error} (/new begins anew)")
                messages.pop()
                continue
            give("\n")
            seconds.append(time.perf_counter() - began)
            messages.append({"role": "assistant", "content": "".join(pieces)})
    return {"model": partner.name, "messages": messages, "seconds": seconds}


async def _answer(
    partner: Partner, messages: list[Message], on_piece: Callable[[str], None]
) -> None:
    async with contextlib.aclosing(partner.answer(messages)) as pieces:
        async for piece in pieces:
            on_piece(piece)


def _typed() -> Iterator[str]:
    """Lines of the terminal, with a prompt where somebody sees it."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _partner(config: ChatConfig, runner: asyncio.Runner, stack: contextlib.ExitStack) -> Partner:
    if config.model.startswith(("http://", "https://")):
        client = client_of(config.model, config.api_key, timeout_seconds=TIMEOUT_SECONDS)
        stack.callback(lambda: runner.run(client.aclose()))
        return _Server(client, config.name or runner.run(first_model(client)), config)
    if config.name is not None or config.api_key is not None:
        raise ConfigError("name and api_key are for a server, but model is a folder. Drop them.")
    # The engine brings torch, which a conversation with a server does without.
    from moesaic.serving.engine.engine import Engine

    engine = Engine.load(EngineConfig(model=Path(config.model), max_sequences=1))
    stack.callback(engine.close)
    if not engine.tokenizer.chat_template:
        raise ConfigError(
            f"{config.model} has no chat template. Use generate, or an instruction-tuned model."
        )
    return _Folder(engine, config)


class _Server:
    def __init__(self, client: Any, name: str, config: ChatConfig) -> None:
        self.name, self._client, self._config = name, client, config

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        config = self._config
        body: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "temperature": config.temperature,
            "max_tokens": config.max_new_tokens,
        }
        if config.temperature > 0:
            body["top_p"] = config.top_p
            if config.seed is not None:
                body["seed"] = config.seed
        async with contextlib.aclosing(stream(self._client, "chat/completions", body)) as chunks:
            async for chunk in chunks:
                for choice in chunk["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text


class _Folder:
    def __init__(self, engine: Any, config: ChatConfig) -> None:
        self.name, self._engine, self._config = config.model, engine, config

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        config, engine = self._config, self._engine
        prompt_ids = self._encode(messages)
        room = engine.max_context - len(prompt_ids)
        if room < 1:
            raise ConfigError(
                f"The conversation has {len(prompt_ids)} tokens, but the context is "
                f"{engine.max_context}."
            )
        sampling = RequestConfig(
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            max_new_tokens=min(room, config.max_new_tokens),
        )
        async with contextlib.aclosing(engine.stream(prompt_ids, sampling)) as events:
            async for event in events:
                if event.finish_reason == "error":
                    raise MoesaicError(event.error)
                if event.text:
                    yield event.text

    def _encode(self, messages: list[Message]) -> list[int]:
        from jinja2 import TemplateError

        tokenizer = self._engine.tokenizer
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ConfigError(f"The chat template refuses this: {error}.") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
