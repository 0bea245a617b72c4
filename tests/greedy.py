"""The plainest use of an executor: take the likeliest token, again and again."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.serving.execution.batch import Batch, Chunk, Executor


class Sequences:
    """Sequences that decode together, each with blocks of its own.

    Args:
        executor: What computes.
        prompts: Token ids of each.
        new: Tokens to add to each.
    """

    def __init__(self, executor: Executor, prompts: Sequence[Sequence[int]], *, new: int) -> None:
        self.executor = executor
        self.tokens = [list(prompt) for prompt in prompts]
        self.prompts = [len(prompt) for prompt in prompts]
        self.done = [0] * len(prompts)
        """Positions of each that lie in the cache."""
        self.ends = [len(prompt) + new for prompt in prompts]
        needed = [-(-end // executor.block_tokens) for end in self.ends]
        tables: list[list[int]] = [[] for _ in prompts]
        block = 0
        # In turns, so that no sequence's blocks lie side by side.
        while any(len(table) < count for table, count in zip(tables, needed, strict=True)):
            for table, count in zip(tables, needed, strict=True):
                if len(table) < count:
                    table.append(block)
                    block += 1
        assert block <= executor.num_blocks, f"{block=}, {executor.num_blocks=}"
        self.tables = [tuple(table) for table in tables]

    def step(self, *, chunk: int | None = None, first: int | None = None) -> bool:
        """Take every sequence one chunk or one token further; False when all are done.

        Args:
            chunk: New tokens of a prompt in one step; None: as many as the executor takes.
            first: Start no sequence from this one on.
        """
        chunks, members = [], []
        left = self.executor.max_step_tokens
        for number, tokens in enumerate(self.tokens[:first]):
            start = self.done[number]
            if len(tokens) == self.ends[number] or left == 0:
                continue
            new = tokens[start : start + min(left, chunk or left)]
            is_last = start + len(new) == len(tokens)
            chunks.append(Chunk(tuple(new), start, self.tables[number], logits=int(is_last)))
            members.append((number, is_last))
            left -= len(new)
            self.done[number] += len(new)
        if not chunks:
            return False
        logits = self.executor.step(Batch(tuple(chunks))).logits_NV
        assert logits is not None
        tokens_N = iter(logits.argmax(dim=-1).tolist())
        for number, is_last in members:
            if is_last:
                self.tokens[number].append(next(tokens_N))
        return True

    @property
    def answers(self) -> list[list[int]]:
        """What came after each prompt."""
        return [tokens[start:] for tokens, start in zip(self.tokens, self.prompts, strict=True)]


def greedy(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    *,
    new: int,
    chunk: int | None = None,
    staggered: bool = False,
) -> list[list[int]]:
    """`new` tokens after each prompt.

    Args:
        executor: What computes.
        prompts: Token ids of each.
        new: Tokens.
        chunk: Tokens of a prompt that go through the model in one step.
        staggered: Begin with one sequence, and let another join after every step.
    """
    sequences = Sequences(executor, prompts, new=new)
    joined = 1 if staggered else len(prompts)
    while sequences.step(chunk=chunk, first=joined) or joined < len(prompts):
        joined = min(joined + 1, len(prompts))
    return sequences.answers
