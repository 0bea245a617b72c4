"""Answer many requests at once over one executor.

One thread does all that touches a request's state: it takes in what was submitted and cancelled,
asks the scheduler what to compute, has the executor compute it, samples, turns tokens into text
and delivers events. Other threads only leave things in its inbox.

    engine = Engine.load(EngineConfig(model=folder))
    [answer] = engine.generate(["The capital of France is"], RequestConfig(max_new_tokens=8))
    async for event in engine.stream(prompt_ids, RequestConfig()): ...
    engine.close()
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from typing import TYPE_CHECKING

from moesaic.serving.config import EngineConfig, RequestConfig
from moesaic.serving.engine.request import Completion, EngineStatistics, Event, OnEvent, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from moesaic.serving.execution.batch import Executor


class Engine:
    """Answers requests until it is closed.

    Args:
        executor: The model; the engine closes it.
        tokenizer: Its tokenizer.
        config: Limits. What is about loading is not read here.
        eos_token_ids: Tokens that end an answer.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: PreTrainedTokenizerFast,
        config: EngineConfig,
        *,
        eos_token_ids: Collection[int],
    ) -> None:
        self.executor, self.tokenizer, self.config = executor, tokenizer, config
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_context = 0
        """Tokens that prompt and answer may have together."""
        raise NotImplementedError

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Load model and tokenizer as the config says.

        Raises:
            MoesaicError: The folder, the plan or the memory does not allow it.
        """
        raise NotImplementedError

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: RequestConfig,
        *,
        request_id: str | None = None,
        on_event: OnEvent,
    ) -> Request:
        """Take a request; thread-safe, and returns at once unless there is a grammar to compile.

        Raises:
            ConfigError: The prompt is empty or, with max_new_tokens, too long; a token id is not
                of the vocabulary; the grammar cannot be used; the request id is in use.
            Unavailable: Too many wait already, or the engine is draining or closed.
            ServingError: The engine is broken.
        """
        raise NotImplementedError

    def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: RequestConfig,
        *,
        request_id: str | None = None,
    ) -> AsyncIterator[Event]:
        """The events of one request, as they come. Leaving the loop early cancels the request.

        Raises what `submit` raises, when the first event is asked for.
        """
        raise NotImplementedError

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: RequestConfig
    ) -> list[Completion]:
        """Answer many prompts, texts as they stand or token ids: the n answers of the first first.

        Waits for room rather than raise `Unavailable` where too many would wait.
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        """End a request early; its answers get finish reason `cancelled`. Unknown or ended: no-op."""
        raise NotImplementedError

    def statistics(self) -> EngineStatistics:
        """As of the last step."""
        raise NotImplementedError

    def check(self) -> None:
        """See that no block is lost: free + used + cached == all, and counts agree with tables."""
        raise NotImplementedError

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new, and wait until what was taken is done; False if that took too long."""
        raise NotImplementedError

    def close(self) -> None:
        """Cancel what is left, end the thread and close the executor. Twice does no harm."""
        raise NotImplementedError
