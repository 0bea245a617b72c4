"""What one step of serving is asked, and what it answers.

A step takes some new tokens of any number of sequences, writes their keys and values into the
blocks of the cache that the caller chose, and returns scores of next tokens. Who is scheduled,
which block is whose, and which token is chosen from the scores is the caller's business; an
executor keeps nothing of a sequence but what lies in the blocks.

    executor = load_executor(folder, plan)
    prompt = Chunk(tokens=(5, 9, 2), start=0, blocks=(7,))
    scores = executor.step(Batch((prompt,))).logits_NV

Position p of a sequence lies in blocks[p // block_tokens], row p % block_tokens. Everything before
`start` must have been written there by earlier steps, or by another sequence that began with the
same tokens. Chunks of one step may share blocks that none of them writes.

Shapes.  T new tokens, those of the first chunk first    N rows of scores asked for
         V vocabulary    D model width    L MoE layers    K experts per token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moesaic.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.planning.serving.layout import ServeLayout


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one sequence does in one step."""

    tokens: tuple[int, ...]
    """New tokens, at least one."""

    start: int
    """Position of the first of them."""

    blocks: tuple[int, ...]
    """Block table, up to the block of the last new token at least; more is not looked at."""

    logits: int = 1
    """Of how many of its last positions scores are wanted; 0 for a prompt that goes on."""

    @property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step."""

    chunks: tuple[Chunk, ...]

    experts: bool = False
    """Whether to say which experts each token went to."""

    hidden: bool = False
    """Return normed hidden states instead of scores, for embeddings."""

    @property
    def num_tokens(self) -> int:
        """New tokens."""
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def num_rows(self) -> int:
        """Rows of scores that are asked for."""
        return sum(chunk.logits for chunk in self.chunks)

    def check(
        self, spec: ModelSpec, *, block_tokens: int, num_blocks: int, max_tokens: int
    ) -> None:
        """See that an executor of these sizes can do this step. Only a caller can break this."""
        assert self.chunks, "a step without chunks"
        assert self.num_tokens <= max_tokens, f"{self.num_tokens=}, {max_tokens=}"
        written: set[int] = set()
        for chunk in self.chunks:
            assert 0 <= chunk.start < chunk.end <= spec.max_positions, (
                f"{chunk.start=}, {chunk.end=}"
            )
            assert 0 <= chunk.logits <= len(chunk.tokens), f"{chunk.logits=}, {len(chunk.tokens)=}"
            lowest, highest = min(chunk.tokens), max(chunk.tokens)
            assert 0 <= lowest <= highest < spec.vocab_size, f"{lowest=}, {highest=}"
            used = chunk.blocks[: -(-chunk.end // block_tokens)]
            assert len(used) * block_tokens >= chunk.end, f"{len(used)=} blocks, {chunk.end=}"
            assert 0 <= min(used) <= max(used) < num_blocks, f"{used=}, {num_blocks=}"
            mine = set(used[chunk.start // block_tokens :])
            assert not mine & written, f"two chunks write {mine & written}"
            written |= mine


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step answers. Tensors are on the CPU, and the caller's to keep."""

    logits_NV: Tensor | None = None
    """Float32 scores: the rows of the first chunk first, in the order of its positions. None
    where the batch asked for hidden states."""

    hidden_ND: Tensor | None = None
    """Float32 hidden states after the last norm, of the same rows. None unless asked for."""

    experts_LTK: Tensor | None = None
    """Which experts each new token went to, best first, int64, one row of the first dim for each
    MoE layer. None unless asked for, or of a dense model."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes that a rank has allocated, counted by what was allocated, not by what was planned."""

    weights: int
    """Matrices, scales, norms and biases of the model."""

    kv_cache: int
    """All blocks of all layers."""


class Executor(Protocol):
    """A model that is loaded, with its cache. Calls come from one thread, one at a time."""

    spec: ModelSpec
    block_tokens: int
    """Positions in a block of the cache."""
    num_blocks: int
    """Blocks 0 to this - 1 may stand in a chunk's table, the same on every rank."""
    max_step_tokens: int
    """At most so many new tokens in a step."""
    layout: ServeLayout
    """Which rank holds what."""
    memory: Sequence[RankMemory]
    """What each rank has allocated."""

    def step(self, batch: Batch) -> StepResult:
        """Do one step. It returns when the scores are there.

        Raises:
            ServingError: Another rank is lost. No later step will succeed either.
        """

    def close(self) -> None:
        """Let go of the memory, and of the other ranks. Calling it twice does no harm."""
