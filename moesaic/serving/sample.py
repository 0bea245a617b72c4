"""Choose the next token from the scores of all.

Shapes.  V vocabulary
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from moesaic.serving.config import SamplingConfig


def next_token(
    logits_V: Tensor,
    sampling: SamplingConfig,
    *,
    seen: Collection[int],
    generator: torch.Generator | None,
) -> int:
    """Choose one token.

    Args:
        logits_V: Scores, (V,), at least float32, on the CPU.
        sampling: How to choose.
        seen: Tokens of the prompt and the answer so far, for the repetition penalty.
        generator: Random numbers, unless the temperature is 0.
    """
    if sampling.repetition_penalty != 1:
        logits_V = _penalised(logits_V, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs_V = _kept(logits_V / sampling.temperature, sampling).softmax(dim=0)
    return int(torch.multinomial(probs_V, 1, generator=generator))


def _penalised(logits_V: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    tokens = torch.tensor(sorted(set(seen)), dtype=torch.int64)
    scores = logits_V[tokens]
    return logits_V.index_copy(
        0, tokens, torch.where(scores < 0, scores * penalty, scores / penalty)
    )


def _kept(logits_V: Tensor, sampling: SamplingConfig) -> Tensor:
    """The scores, with minus infinity for tokens that may not be chosen."""
    if 0 < sampling.top_k < logits_V.numel():
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    if sampling.top_p < 1:
        sorted_V, order_V = logits_V.sort(descending=True)
        probs_V = sorted_V.softmax(dim=0)
        # A token stays when those before it have not reached top_p; the first always does.
        dropped_V = probs_V.cumsum(dim=0) - probs_V >= sampling.top_p
        logits_V = logits_V.masked_fill(
            torch.zeros_like(dropped_V).scatter(0, order_V, dropped_V), -torch.inf
        )
    if sampling.min_p > 0:
        probs_V = logits_V.softmax(dim=0)
        logits_V = logits_V.masked_fill(probs_V < sampling.min_p * probs_V.max(), -torch.inf)
    return logits_V
