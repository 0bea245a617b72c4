"""Choose the next token of each answer from the scores of all.

Everything about a row depends on that row and its answer alone, and every answer draws from its
own random numbers, so a text does not depend on who else is being answered.

Shapes.  N rows    V vocabulary    C candidates
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesaic.serving.config import SamplingConfig
from moesaic.serving.engine.grammar import Grammar

Scores = NDArray[np.float32]
NO_TOKEN = -1
"""Stands where no token can be chosen: scores that are no numbers, or all forbidden."""

FLOORS = (1e-2, 1e-4, 1e-6)
"""Shares of the likeliest token's probability above which candidates are first looked for: sorting
a few hundred is a hundred times faster than sorting a vocabulary."""

PIECE = 512
"""Weights that are summed up at once where a whole vocabulary is drawn from."""


class Chooser:
    """What choosing the tokens of one answer needs to remember.

    Args:
        sampling: How to choose.
        prompt_ids: The prompt, for the repetition penalty.
        seed: Of its random numbers; None only at temperature 0.
        index: Which of the answers to the prompt this is.
        logit_bias: Added to the scores of these tokens.
        grammar: What the answer must follow.
    """

    def __init__(
        self,
        sampling: SamplingConfig,
        prompt_ids: Sequence[int] = (),
        *,
        seed: int | None = None,
        index: int = 0,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self.sampling = sampling
        self.grammar = grammar
        self.is_greedy = sampling.temperature == 0
        assert self.is_greedy or seed is not None, f"{sampling.temperature=} needs a seed"
        self._random = None if self.is_greedy else random.Random(f"{seed} {index}")
        self._bias_tokens = np.fromiter(logit_bias or (), np.int64)
        self._bias = np.fromiter((logit_bias or {}).values(), np.float32)
        self._counts = _Counts() if _counts_matter(sampling) else None
        self._seen = _Counts(prompt_ids) if sampling.repetition_penalty != 1 else None
        self.changes_scores = bool(
            self._bias.size or grammar or self._counts is not None or self._seen is not None
        )

    def change(self, logits_V: Scores) -> None:
        """Apply penalties, bias and grammar, in place."""
        sampling = self.sampling
        if self._seen is not None:
            seen, penalty = self._seen.tokens, np.float32(sampling.repetition_penalty)
            scores = logits_V[seen]
            logits_V[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
        if self._counts is not None:
            logits_V[self._counts.tokens] -= np.float32(
                sampling.frequency_penalty
            ) * self._counts.counts + np.float32(sampling.presence_penalty)
        if self._bias.size:
            logits_V[self._bias_tokens] += self._bias
        if self.grammar is not None:
            self.grammar.forbid(logits_V)

    def draw(self, logits_V: Scores) -> int:
        """A token by chance, as likely as the scores and the sampling say."""
        assert self._random is not None, f"{self.sampling.temperature=}"
        return drawn(logits_V, self.sampling, self._random.random())

    def add(self, token: int) -> None:
        """Remember what was chosen. The grammar is told by its owner."""
        for counts in (self._counts, self._seen):
            if counts is not None:
                counts.add(token)


def _counts_matter(sampling: SamplingConfig) -> bool:
    return sampling.frequency_penalty != 0 or sampling.presence_penalty != 0


class _Counts:
    """Which tokens came so far, and how often, as arrays that grow."""

    def __init__(self, tokens: Collection[int] = ()) -> None:
        self._place: dict[int, int] = {}
        self._tokens = np.empty(max(64, 2 * len(tokens)), np.int64)
        self._counts = np.empty(self._tokens.size, np.float32)
        for token in tokens:
            self.add(token)

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._tokens[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._place)]

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is not None:
            self._counts[place] += 1
            return
        place = self._place[token] = len(self._place)
        if place == self._tokens.size:
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.empty_like(self._counts)])
        self._tokens[place], self._counts[place] = token, 1


def choose(logits_NV: Scores, choosers: Sequence[Chooser]) -> list[int]:
    """Choose a token for every row; `NO_TOKEN` where there is none.

    Args:
        logits_NV: Scores, (N, V); rows whose chooser changes scores are changed.
        choosers: One a row.
    """
    for row, chooser in enumerate(choosers):
        if chooser.changes_scores:
            chooser.change(logits_NV[row])
    tokens_N = logits_NV.argmax(axis=1)
    # A NaN is the maximum of its row, so looking at the maximum finds it.
    is_number_N = np.isfinite(logits_NV[np.arange(len(choosers)), tokens_N])
    tokens: list[int] = tokens_N.tolist()
    for row, chooser in enumerate(choosers):
        if not is_number_N[row]:
            tokens[row] = NO_TOKEN
        elif not chooser.is_greedy:
            tokens[row] = chooser.draw(logits_NV[row])
    return tokens


def drawn(logits_V: Scores, sampling: SamplingConfig, chance: float) -> int:
    """The token that a random number stands for.

    Args:
        logits_V: Scores, at least one of them finite and none NaN.
        sampling: Temperature above 0, and which tokens may be chosen.
        chance: Uniform in [0, 1).
    """
    weights_V = logits_V / np.float32(sampling.temperature)
    weights_V -= weights_V.max()
    np.exp(weights_V, out=weights_V)  # the likeliest has weight 1
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return _at_of_many(weights_V, chance)
    tokens_C = _kept(weights_V, sampling)
    return int(tokens_C[_at(np.cumsum(weights_V[tokens_C], dtype=np.float64), chance)])


def _at(sums_C: NDArray[np.float64], chance: float) -> int:
    """Where `chance` of the whole sum is passed; never at a weight of 0."""
    place = int(np.searchsorted(sums_C, chance * sums_C[-1], side="right"))
    if place == len(sums_C):  # rounded up to the whole
        place = int(np.searchsorted(sums_C, sums_C[-1], side="left"))
    return place


def _at_of_many(weights_V: Scores, chance: float) -> int:
    """The same for single weights: first in which piece, then where in it, which is faster."""
    starts = np.arange(0, weights_V.size, PIECE)
    sums = np.cumsum(np.add.reduceat(weights_V, starts, dtype=np.float64))
    piece = _at(sums, chance)
    before = float(sums[piece - 1]) if piece else 0.0
    inner = np.cumsum(weights_V[piece * PIECE : (piece + 1) * PIECE], dtype=np.float64)
    return piece * PIECE + _at(inner, (chance * float(sums[-1]) - before) / float(inner[-1]))


def _kept(weights_V: Scores, sampling: SamplingConfig) -> NDArray[np.int64]:
    """Tokens that may be chosen, likeliest first."""
    top_k = min(sampling.top_k, weights_V.size)
    whole = float(weights_V.sum(dtype=np.float64))
    tokens_C = _candidates(weights_V, sampling, whole)
    # Stable, so that equal ones go by their number.
    tokens_C = tokens_C[np.argsort(-weights_V[tokens_C], kind="stable")]
    if top_k:
        tokens_C = tokens_C[:top_k]
    if sampling.top_p < 1:
        sums_C = np.cumsum(weights_V[tokens_C], dtype=np.float64)
        share = sampling.top_p * (sums_C[-1] if top_k else whole)
        # A token stays when those before it have not reached top_p; the first always does.
        tokens_C = tokens_C[: int(np.searchsorted(sums_C, share, side="left")) + 1]
    if sampling.min_p > 0:
        tokens_C = tokens_C[weights_V[tokens_C] >= np.float32(sampling.min_p)]
    return tokens_C


def _candidates(weights_V: Scores, sampling: SamplingConfig, whole: float) -> NDArray[np.int64]:
    """A few tokens, in any order, among which are all that may be chosen."""
    if sampling.top_k == 0 and sampling.top_p == 1:
        return np.flatnonzero(weights_V >= np.float32(sampling.min_p))
    for floor in FLOORS:
        tokens_C = np.flatnonzero(weights_V >= floor)
        if sampling.top_k:
            suffices = len(tokens_C) >= sampling.top_k
        else:
            suffices = weights_V[tokens_C].sum(dtype=np.float64) >= sampling.top_p * whole
        if suffices:
            return tokens_C
    return np.flatnonzero(weights_V)


class Scored(NamedTuple):
    """Log probabilities in one row."""

    logprob: float
    """Of the token asked about."""
    top: list[tuple[int, float]]
    """The likeliest tokens and theirs, likeliest first."""


def scored(logits_V: Scores, token: int, top: int) -> Scored:
    """Log probability of a token, and the `top` likeliest ones with theirs.

    Args:
        logits_V: Scores as the model gave them.
        token: Whose log probability is wanted.
        top: How many of the likeliest are wanted too.
    """
    shifted_V = logits_V - logits_V.max()
    norm = float(np.log(np.exp(shifted_V).sum(dtype=np.float64)))
    best: list[int] = []
    if top:
        top = min(top, logits_V.size)
        some = np.argpartition(-logits_V, top - 1)[:top]
        best = some[np.lexsort((some, -logits_V[some]))].tolist()
    return Scored(
        float(shifted_V[token]) - norm, [(other, float(shifted_V[other]) - norm) for other in best]
    )
