"""What is asked of the engine, and what it answers, piece by piece.

A request is one prompt and `n` answers to it. Each answer arrives as events; the last event of
an answer has a `finish_reason`, and the last of the request has `is_last`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from moesaic.serving.config import RequestConfig

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: an end token, a stop token, a stop text, or a grammar that allows no more; `length`:
max_new_tokens were reached; `cancelled`: `Engine.cancel`, or the engine closed; `error`: a fault,
and `Event.error` says which."""


class Token(NamedTuple):
    """A token of an answer or a prompt."""

    id: int
    text: str = ""
    """The token alone; half a character is a replacement character. Empty unless scores or experts
    were asked for."""
    raw: bytes = b""
    """The bytes it stands for, as `text` has them only where they are whole characters."""
    logprob: float | None = None
    """Log probability that the model gave it before any penalty, bias, temperature or grammar;
    None unless asked for, and of a prompt's first token."""
    top: tuple[Token, ...] = ()
    """The likeliest tokens in its place, likeliest first."""
    experts: tuple[tuple[int, ...], ...] | None = None
    """Experts of each MoE layer that worked where this token was chosen, that is on the token
    before it. None unless asked for, or of a dense model."""


class Usage(NamedTuple):
    """What an answer took."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values were there already."""
    completion_tokens: int
    """Chosen tokens, the end token among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The next piece of an answer."""

    index: int = 0
    """Which of the n answers."""

    text: str = ""
    """What is certain now: no half character, and nothing that may begin a stop text."""

    tokens: tuple[Token, ...] = ()
    """Tokens chosen since the last event. Their text may come later."""

    prompt: tuple[Token, ...] = ()
    """Scores of prompt tokens, in order, chunk by chunk; only in events of answer 0."""

    finish_reason: FinishReason | None = None
    """Why the answer ends with this event; None: it goes on."""

    stop: str | int | None = None
    """The stop text or stop token that ended it, where one did."""

    error: str = ""
    """What went wrong, one line, where the finish reason is `error`."""

    usage: Usage | None = None
    """With the finish reason."""

    embedding_D: Tensor | None = None
    """The answer to an embedding request, (D,) float32, with the finish reason."""

    is_last: bool = False
    """Whether every answer of the request has now ended."""

    time: float = field(default_factory=time.perf_counter)
    """When it was so, as `time.perf_counter` counts."""


OnEvent = Callable[[Event], None]
"""Called on the engine's thread, in order; must return at once. Should it raise, its request is
cancelled."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A request that the engine took. `Engine.cancel(request.id)` ends it early."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: RequestConfig
    seed: int | None
    """The seed in use: the one asked for or one drawn for it; None at temperature 0."""
    on_event: OnEvent
    arrived: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One whole answer, for library use."""

    text: str
    tokens: tuple[Token, ...]
    """Chosen tokens without the end token or stop token."""
    finish_reason: FinishReason
    index: int
    """Which of the n answers to its prompt."""
    usage: Usage
    seed: int | None
    error: str = ""
    stop: str | int | None = None
    prompt: tuple[Token, ...] = ()
    """Scores of the prompt's tokens, if asked for."""
    embedding_D: Tensor | None = None
    """The answer to an embedding request."""
    first_token_seconds: float | None = None
    """From submission to the first token; None if there was none."""
    decode_seconds: float = 0.0
    """From the first token to the last."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids alone."""
        return tuple(token.id for token in self.tokens)


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """What the engine holds now, and what it did since it began."""

    running: int = 0
    """Answers being computed."""
    waiting: int = 0
    """Answers that wait for a place, preempted ones among them."""
    blocks: int = 0
    """Blocks of the cache; those used, cached and free add up to it."""
    blocks_used: int = 0
    blocks_cached: int = 0
    """Held by no answer, kept for prompts that begin alike; given up when room is needed."""
    blocks_free: int = 0
    requests: int = 0
    """Requests taken."""
    finished: dict[str, int] = field(default_factory=dict)
    """Answers ended, by finish reason."""
    prompt_tokens: int = 0
    """Of answers that ended."""
    cached_tokens: int = 0
    """Prompt tokens among them that were found in the cache."""
    computed_tokens: int = 0
    """Positions that went through the model, recomputed ones among them."""
    generated_tokens: int = 0
    """Tokens chosen."""
    preemptions: int = 0
    steps: int = 0
    last_step_seconds: float = 0.0
    """Of the last step, the executor's part and the engine's own together."""
    executor_seconds: float = 0.0
    """Sum of the executor's parts."""
    engine_seconds: float = 0.0
    """Sum of the engine's own parts: schedule, sample, turn into text, deliver."""
    is_broken: bool = False
    """The executor failed; nothing is taken any more."""
    is_draining: bool = False
    """Nothing new is taken; what was taken is finished."""
