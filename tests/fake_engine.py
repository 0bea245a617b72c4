"""An engine that says what it is told to, at the pace it is told, and computes nothing.

What the server does with requests, slow clients and faults is seen with this one; what the engine
does with a model is tested with the real one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from moesaic.errors import ConfigError, ServingError, Unavailable
from moesaic.serving.config import RequestConfig
from moesaic.serving.engine.request import (
    EngineStatistics,
    Event,
    FinishReason,
    Request,
    Token,
    Usage,
)
from tests.tiny import TINY

EXPERTS = ((1, 3), (0, 2), (2, 1))


class FakeEngine:
    """Says `text`, one character a token, to whatever it is asked.

    Args:
        tokenizer: Turns prompts into tokens.
        text: What it says, or a function of the prompt's text.
        pause: Seconds from token to token.
        context: Tokens of prompt and answer together.
        places: Answers at the same time; more are not taken.
    """

    def __init__(
        self,
        tokenizer: Any,
        text: str | Callable[[str], str] = "Hello there",
        *,
        pause: float = 0.0,
        context: int = 4096,
        places: int = 10**6,
    ) -> None:
        self.executor = SimpleNamespace(spec=TINY["mixtral"])
        self.tokenizer, self.max_context = tokenizer, context
        self.text, self.pause, self.places = text, pause, places
        self.taken: list[Request] = []
        self.finished: Counter[str] = Counter()
        self.fault: str | None = None
        self.is_broken = False
        self._cancelled: set[str] = set()
        self._open: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: RequestConfig,
        *,
        request_id: str,
        on_event: Callable[[Event], None],
    ) -> Request:
        if self.is_broken:
            raise ServingError("The engine is broken.")
        if len(self._open) >= self.places:
            raise Unavailable("Too many wait.")
        if any(token >= 300 for token in prompt_ids):
            raise ConfigError("The prompt has a token that is none.")
        request = Request(
            id=request_id,
            prompt_ids=tuple(prompt_ids),
            sampling=sampling,
            seed=sampling.seed,
            on_event=on_event,
        )
        thread = threading.Thread(target=self._answer, args=(request,), daemon=True)
        with self._lock:
            self.taken.append(request)
            self._open[request_id] = thread
        thread.start()
        return request

    def cancel(self, request_id: str) -> None:
        self._cancelled.add(request_id)

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            running=len(self._open), finished=dict(self.finished), is_broken=self.is_broken
        )

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end:
            time.sleep(0.01)
        assert not self._open, f"{len(self._open)} requests did not end"

    def _answer(self, request: Request) -> None:
        try:
            self._say(request)
        except Exception:  # the one who listens has had enough
            self._end(request, 0, "cancelled", 0, is_last=True)
        finally:
            with self._lock:
                del self._open[request.id]

    def _say(self, request: Request) -> None:
        sampling, length = request.sampling, len(request.prompt_ids)
        if sampling.embedding != "none":
            state = torch.arange(1.0, 5.0) * length
            usage = Usage(length, 0, 0)
            request.on_event(
                Event(embedding_D=state, finish_reason="stop", usage=usage, is_last=True)
            )
            return
        prompt = str(self.tokenizer.decode(list(request.prompt_ids)))
        text = self.text if isinstance(self.text, str) else self.text(prompt)
        if sampling.prompt_logprobs:
            scored = [Token(id=token, text=f"t{token}") for token in request.prompt_ids]
            scored[1:] = [token._replace(logprob=-1.0) for token in scored[1:]]
            request.on_event(Event(prompt=tuple(scored)))
        for index in range(sampling.n):
            reason: FinishReason = "stop"
            said = 0
            for character in text:
                if said >= sampling.max_new_tokens:
                    reason = "length"
                    break
                if request.id in self._cancelled or self.fault is not None:
                    reason = "cancelled" if self.fault is None else "error"
                    break
                if any((text[: said + 1]).endswith(stop) for stop in sampling.stop):
                    break
                said += 1
                request.on_event(
                    Event(index=index, text=character, tokens=(self._token(character, sampling),))
                )
                time.sleep(self.pause)
            self._end(request, index, reason, said, is_last=index == sampling.n - 1)

    def _token(self, character: str, sampling: RequestConfig) -> Token:
        raw = character.encode()
        other = Token(id=1, text="?", raw=b"?", logprob=-2.0)
        mine = Token(id=ord(character), text=character, raw=raw, logprob=-0.5)
        return mine._replace(
            top=(mine, other)[: sampling.top_logprobs],
            experts=EXPERTS if sampling.experts else None,
        )

    def _end(
        self, request: Request, index: int, reason: FinishReason, said: int, *, is_last: bool
    ) -> None:
        self.finished[reason] += 1
        usage = Usage(len(request.prompt_ids), 0, said)
        error = self.fault or ""
        request.on_event(
            Event(index=index, finish_reason=reason, usage=usage, is_last=is_last, error=error)
        )
