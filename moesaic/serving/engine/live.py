"""One answer on its way: from rows of scores to events."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from moesaic.serving.engine.grammar import Grammar
from moesaic.serving.engine.request import Event, FinishReason, Request, Token, Usage
from moesaic.serving.engine.sample import NO_TOKEN, Chooser, Scores, scored
from moesaic.serving.engine.scheduler import Answer
from moesaic.serving.engine.text import TextStream, TokenTexts


@dataclass(kw_only=True, eq=False, slots=True)
class Job:
    """A request and its answers."""

    request: Request
    number: int
    """Requests are counted as they come."""
    unended: int
    """Answers that have not ended."""
    lives: list[Live] = field(default_factory=list)
    held: list[Live] = field(default_factory=list)
    """Answers that wait until the first one has put the prompt into the cache."""
    is_deaf: bool = False
    """Whether it failed to take an event; it is given no more but the last ones."""


class Live:
    """One of the answers to a request.

    Args:
        job: The request.
        index: Which of its answers.
        texts: Of single tokens.
        stream: Turns its tokens into text.
        grammar: What it must follow.
        eos_token_ids: The model's end tokens.
    """

    def __init__(
        self,
        job: Job,
        index: int,
        *,
        texts: TokenTexts,
        stream: TextStream,
        grammar: Grammar | None,
        eos_token_ids: Collection[int],
    ) -> None:
        request = job.request
        sampling = request.sampling
        self.job, self.index = job, index
        self.chooser = Chooser(
            sampling,
            request.prompt_ids,
            seed=request.seed,
            index=index,
            logit_bias=sampling.logit_bias,
            grammar=grammar,
        )
        is_embedding = sampling.embedding != "none"
        self.scores_prompt = sampling.prompt_logprobs and index == 0 and not is_embedding
        self.answer = Answer(
            order=(job.number, index),
            tokens=list(request.prompt_ids),
            num_prompt=len(request.prompt_ids),
            every_row=self.scores_prompt or sampling.embedding == "mean",
            hidden=is_embedding,
        )
        self.wants_experts = sampling.experts
        self.wants_scores = sampling.logprobs
        self.num_chosen = 0
        self.has_ended = False
        self._most_new = sampling.max_new_tokens
        self._top = sampling.top_logprobs
        self._texts, self._stream = texts, stream
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        # A grammar allows an end token only where the answer may end.
        ends = () if sampling.ignore_eos and grammar is None else eos_token_ids
        self._ends = self._stop_token_ids.union(ends)
        self._sum_D: NDArray[np.float64] | None = None

    @property
    def only_scores(self) -> bool:
        """Whether no token is to be chosen."""
        return self._most_new == 0

    def score_prompt(self, start: int, logits_NV: Scores) -> Event | None:
        """Log probabilities of prompt tokens.

        Args:
            start: Position of the first row; each row scores the token after its position.
            logits_NV: Rows as the model gave them.
        """
        prompt = self.job.request.prompt_ids
        tokens = [self._token(prompt[0])] if start == 0 else []
        for position, logits_V in enumerate(logits_NV[: len(prompt) - 1 - start], start + 1):
            tokens.append(self._token(prompt[position], logits_V))
        return Event(index=self.index, prompt=tuple(tokens)) if tokens else None

    def add_hidden(self, hidden_ND: NDArray[np.float32]) -> None:
        """Take in hidden states, for an embedding."""
        if self._sum_D is None or self.job.request.sampling.embedding == "last":
            self._sum_D = np.zeros(hidden_ND.shape[1])
        self._sum_D += hidden_ND.sum(axis=0, dtype=np.float64)

    def embedding(self) -> Event:
        """The end of an embedding request."""
        assert self._sum_D is not None, f"{self.answer.order} has seen no hidden state"
        mean = self.job.request.sampling.embedding == "mean"
        vector_D = self._sum_D / (self.answer.num_prompt if mean else 1)
        return self.end("stop", embedding_D=from_numpy(vector_D.astype(np.float32)))

    def accept(self, token: int, logits_V: Scores | None, experts_LK: Tensor | None) -> Event:
        """Go on by one chosen token.

        Args:
            token: As `choose` chose it.
            logits_V: Scores as the model gave them, if log probabilities are wanted.
            experts_LK: Experts that worked where the token was chosen, if wanted.
        """
        grammar = self.chooser.grammar
        if token == NO_TOKEN:
            fault = (grammar.error if grammar else "") or "the model's scores are not numbers"
            return self.end("error", error=fault)
        self.num_chosen += 1
        if grammar is not None:
            grammar.add(token)
            if grammar.error:
                return self.end("error", error=grammar.error)
        if token in self._ends:
            stop = token if token in self._stop_token_ids else None
            return self.end("stop", text=self._stream.finish(), stop=stop)
        tokens = (self._token(token, logits_V, experts_LK),)
        self.chooser.add(token)
        self.answer.tokens.append(token)
        text = self._stream.add(token)
        is_complete = grammar is not None and grammar.is_complete
        if self._stream.stopped_by is None and not (
            is_complete or self.num_chosen == self._most_new
        ):
            return Event(index=self.index, text=text, tokens=tokens)
        text += self._stream.finish()
        stop_text = self._stream.stopped_by
        reason: FinishReason = "stop" if is_complete or stop_text is not None else "length"
        return self.end(reason, text=text, tokens=tokens, stop=stop_text)

    def end(
        self,
        reason: FinishReason,
        *,
        text: str = "",
        tokens: tuple[Token, ...] = (),
        stop: str | int | None = None,
        error: str = "",
        embedding_D: Tensor | None = None,
    ) -> Event:
        """The last event of this answer."""
        assert not self.has_ended, f"{self.answer.order} ends twice"
        self.has_ended = True
        self.job.unended -= 1
        return Event(
            index=self.index,
            text=text,
            tokens=tokens,
            finish_reason=reason,
            stop=stop,
            error=error,
            usage=Usage(self.answer.num_prompt, self.answer.cached_tokens, self.num_chosen),
            embedding_D=embedding_D,
            is_last=self.job.unended == 0,
        )

    def _token(
        self, token: int, logits_V: Scores | None = None, experts_LK: Tensor | None = None
    ) -> Token:
        if logits_V is None and experts_LK is None and not self.scores_prompt:
            return Token(token)
        text, raw = self._texts[token]
        experts = None if experts_LK is None else tuple(map(tuple, experts_LK.tolist()))
        if logits_V is None:
            return Token(token, text, raw, experts=experts)
        scores = scored(logits_V, token, self._top)
        top = tuple(
            Token(other, *self._texts[other], logprob=logprob) for other, logprob in scores.top
        )
        return Token(token, text, raw, scores.logprob, top, experts)
