"""An executor without a model: what comes next is a function of all tokens so far.

It knows those tokens only from its blocks, where it writes what a step brings and from where it
reads everything before. So a wrong block table gives a wrong answer, as with a model, and mostly an
assertion before that: every row remembers which position was written there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from moesaic.serving.execution.batch import Batch, Chunk, StepResult
from tests.tiny import LLAMA

SPEC = dataclasses.replace(LLAMA, max_positions=256)
EMPTY = (-1, -1)


class FakeExecutor:
    """See the head of this module.

    Args:
        num_blocks: Blocks of its cache.
        block_tokens: Rows in each.
        max_step_tokens: Tokens it takes in one step.
        spec: Of the model it stands for.
    """

    def __init__(self, num_blocks=64, block_tokens=4, *, max_step_tokens=64, spec=SPEC):
        self.spec = spec
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.max_step_tokens = max_step_tokens
        self.layout, self.memory = None, ()
        self.blocks = [[EMPTY] * block_tokens for _ in range(num_blocks)]
        self.batches: list[Batch] = []
        self.fails_at: int | None = None
        self.before_step: Callable[[], None] = lambda: None
        self.is_closed = False

    def step(self, batch: Batch) -> StepResult:
        if self.fails_at is not None and len(self.batches) >= self.fails_at:
            raise RuntimeError("the machine\nis on fire")
        self.before_step()
        self.batches.append(batch)
        batch.check(
            self.spec,
            block_tokens=self.block_tokens,
            num_blocks=self.num_blocks,
            max_tokens=self.max_step_tokens,
        )
        for chunk in batch.chunks:
            for position, token in enumerate(chunk.tokens, chunk.start):
                self._block(chunk, position)[position % self.block_tokens] = (position, token)
        rows = [row for chunk in batch.chunks for row in self._rows(chunk)]
        rows_N = torch.from_numpy(np.stack(rows)) if rows else None
        return StepResult(
            logits_NV=None if batch.hidden else rows_N,
            hidden_ND=rows_N[:, :8].clone() if batch.hidden and rows else None,
            experts_LTK=experts(batch) if batch.experts else None,
        )

    def close(self) -> None:
        self.is_closed = True

    def _block(self, chunk: Chunk, position: int) -> list[tuple[int, int]]:
        return self.blocks[chunk.blocks[position // self.block_tokens]]

    def _rows(self, chunk: Chunk) -> list[np.ndarray]:
        read = [self._block(chunk, p)[p % self.block_tokens] for p in range(chunk.end)]
        assert [position for position, _ in read] == list(range(chunk.end)), f"{read=}"
        tokens = [token for _, token in read]
        return [
            scores(tokens[:end], self.spec.vocab_size)
            for end in range(chunk.end - chunk.logits + 1, chunk.end + 1)
        ]


def scores(tokens: Sequence[int], vocab_size: int = SPEC.vocab_size) -> np.ndarray:
    """Scores of what follows `tokens`, (V,), no two of them alike in practice."""
    return _scores(tuple(tokens), vocab_size).copy()


@functools.lru_cache(2**16)
def _scores(tokens: tuple[int, ...], vocab_size: int) -> np.ndarray:
    digest = hashlib.blake2b(np.asarray(tokens, np.int64).tobytes(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest))
    return generator.standard_normal(vocab_size, np.float32) * 2


def experts(batch: Batch) -> torch.Tensor:
    """Two layers of which each token uses two experts that follow from its number, (L, T, K)."""
    tokens_T = torch.tensor([token for chunk in batch.chunks for token in chunk.tokens])
    return torch.stack(
        [torch.stack([(tokens_T + l) % 4, (tokens_T + l + 1) % 4], 1) for l in (0, 1)]
    )


def greedy(prompt: Sequence[int], count: int) -> list[int]:
    """What follows a prompt, computed without any cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(scores(tokens).argmax()))
    return tokens[len(prompt) :]
