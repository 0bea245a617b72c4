"""What to compute in the next step, and where in the cache.

Answers that run are served in the order in which they arrived. In each step

1. every answer that outgrew its blocks takes one more; where none is left, the newest answer that
   runs is preempted: its blocks are taken back, and it waits to be computed anew from its tokens,
   which it keeps;
2. answers that wait are admitted, oldest first, while there is a place, work left in the step and
   room for all tokens they have;
3. the token budget goes to answers that need one token for their next (nobody who is being
   answered waits for somebody's long prompt), and then to prompts, chunk by chunk.

The oldest answer is never preempted and always moves on, and no answer may be longer than the
cache, so every answer ends.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from moesaic.serving.engine.blocks import BlockPool, extend_digests


@dataclass(kw_only=True, eq=False, slots=True)
class Answer:
    """One answer as the scheduler sees it: tokens, and how far they are computed."""

    order: tuple[int, int]
    """Number of its request, and which answer to it; lower is older."""

    tokens: list[int]
    """The prompt and what was chosen since. The engine appends to it."""

    num_prompt: int

    every_row: bool = False
    """Whether scores are wanted after every token, and not only after the last."""

    hidden: bool = False
    """Whether hidden states are wanted in place of scores."""

    computed: int = 0
    """Positions whose keys and values lie in its blocks."""

    rows_given: int = 0
    """With `every_row`: positions whose scores were given; they are not given again."""

    blocks: list[int] = field(default_factory=list)
    table: tuple[int, ...] = ()
    """`blocks`, as the executor wants them."""

    digests: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were needed."""

    learned: int = 0
    """Blocks at its beginning that the pool knows to be full."""

    cached_tokens: int = 0
    """Prompt tokens that were in the cache when it was first admitted."""

    was_admitted: bool = False

    @property
    def remaining(self) -> int:
        """Tokens that must go through the model before the next one can be chosen."""
        return len(self.tokens) - self.computed


class Work(NamedTuple):
    """What one answer does in a step."""

    answer: Answer
    start: int
    end: int
    rows: int
    """After how many of its last tokens scores are wanted."""


class Scheduler:
    """Decides step by step. Not thread-safe.

    Args:
        num_blocks: Blocks of the cache.
        block_tokens: Positions in each.
        max_sequences: Answers that run at the same time.
        max_step_tokens: Tokens in one step.
        max_step_rows: Rows that answers with `every_row` may ask for in a step, beside the one
            that every answer may.
        prefix_cache: Whether to reuse blocks of prompts that begin alike.
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        *,
        max_sequences: int,
        max_step_tokens: int,
        max_step_rows: int = 256,
        prefix_cache: bool = True,
    ) -> None:
        self.block_tokens = block_tokens
        self.pool = BlockPool(num_blocks, keep=prefix_cache)
        self.running: list[Answer] = []
        """Oldest first."""
        self.waiting: list[Answer] = []
        """Oldest first."""
        self.num_preemptions = 0
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens
        self._max_step_rows = max_step_rows
        self._prefix_cache = prefix_cache
        self._hidden_turn = False

    def add(self, answer: Answer) -> None:
        """Take in an answer, which waits for its turn."""
        blocks = self._blocks_for(len(answer.tokens))
        assert blocks <= self.pool.num_blocks, f"{blocks=}, {self.pool.num_blocks=}"
        insort(self.waiting, answer, key=_order)

    def remove(self, answer: Answer) -> None:
        """Let go of an answer that has ended, wherever it is."""
        if answer in self.running:
            self.running.remove(answer)
            self._take_back(answer)
        else:
            self.waiting.remove(answer)

    def schedule(self) -> list[Work]:
        """What to compute next; empty only if nobody runs or waits. All of one kind: either
        `hidden` or not."""
        if self._grow() == 0:
            self._admit()
        hidden = self._whose_turn()
        tokens, rows = self._max_step_tokens, self._max_step_rows
        works = []
        for answer in self._by_urgency():
            if tokens == 0:
                break
            if answer.hidden is hidden:
                work = self._work(answer, min(tokens, rows + 1) if answer.every_row else tokens)
                works.append(work)
                tokens -= work.end - work.start
                rows -= max(0, work.rows - 1)
        return works

    def done(self, work: Work) -> None:
        """Say that a step has computed this, before the token chosen from it is appended."""
        answer = work.answer
        answer.computed = work.end
        if answer.every_row:
            answer.rows_given = max(answer.rows_given, work.end)
        full = answer.computed // self.block_tokens
        if self._prefix_cache and full > answer.learned:
            extend_digests(answer.digests, answer.tokens, self.block_tokens)
            for index in range(answer.learned, full):
                self.pool.learn(answer.blocks[index], answer.digests[index])
            answer.learned = full

    def check(self) -> None:
        """See that no block is lost, and that tables fit what is computed."""
        self.pool.check(answer.blocks for answer in self.running)
        for answer in self.waiting:
            assert not answer.blocks, f"{answer.order} waits and holds {answer.blocks}"
        for answer in self.running:
            room = len(answer.blocks) * self.block_tokens
            assert answer.computed <= min(room, len(answer.tokens)), f"{answer=}, {room=}"
            assert answer.table == tuple(answer.blocks), f"{answer.table=}, {answer.blocks=}"
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_order), f"{[answer.order for answer in queue]}"

    def _grow(self) -> int:
        """Give every running answer blocks for all its tokens; how many were preempted for it."""
        before = self.num_preemptions
        for answer in list(self.running):
            missing = self._blocks_for(len(answer.tokens)) - len(answer.blocks)
            while answer.blocks and missing > self.pool.num_available:
                self._preempt(self.running[-1])
            if not answer.blocks:  # preempted, as is whoever is newer
                break
            if missing > 0:
                answer.blocks += self.pool.take(missing)
                answer.table = tuple(answer.blocks)
        return self.num_preemptions - before

    def _preempt(self, answer: Answer) -> None:
        popped = self.running.pop()
        assert popped is answer, f"{popped.order=}, {answer.order=}"
        self._take_back(answer)
        insort(self.waiting, answer, key=_order)
        self.num_preemptions += 1

    def _take_back(self, answer: Answer) -> None:
        self.pool.release(answer.blocks)
        answer.blocks, answer.table = [], ()
        answer.computed = answer.learned = 0

    def _admit(self) -> None:
        pending = sum(answer.remaining for answer in self.running)
        while (
            self.waiting
            and len(self.running) < self._max_sequences
            and pending < self._max_step_tokens
            and self._place(self.waiting[0])
        ):
            answer = self.waiting.pop(0)
            insort(self.running, answer, key=_order)
            pending += answer.remaining

    def _place(self, answer: Answer) -> bool:
        """Give an answer blocks for all its tokens, if there is room."""
        found = self._find(answer)
        missing = self._blocks_for(len(answer.tokens)) - len(found)
        # One more for each that runs, or the newcomer would soon be preempted.
        room = self.pool.num_available - self.pool.num_cached_of(found)
        if room < missing + (len(self.running) if self.running else 0):
            return False
        self.pool.share(found)
        answer.blocks = found + self.pool.take(missing)
        answer.table = tuple(answer.blocks)
        answer.computed = len(found) * self.block_tokens
        answer.learned = len(found)
        if not answer.was_admitted:
            answer.was_admitted = True
            answer.cached_tokens = answer.computed
        return True

    def _find(self, answer: Answer) -> list[int]:
        # Whoever wants scores after every token must compute every token, the first time.
        if not self._prefix_cache or (answer.every_row and answer.rows_given < answer.num_prompt):
            return []
        extend_digests(answer.digests, answer.tokens, self.block_tokens)
        # At least the last token is computed: its scores are wanted.
        return self.pool.find(answer.digests[: (len(answer.tokens) - 1) // self.block_tokens])

    def _whose_turn(self) -> bool:
        """Whether this step is for hidden states. Where both kinds run they take turns."""
        kinds = {answer.hidden for answer in self.running}
        self._hidden_turn = not self._hidden_turn if len(kinds) == 2 else True in kinds
        return self._hidden_turn

    def _by_urgency(self) -> Iterator[Answer]:
        yield from (answer for answer in self.running if answer.remaining == 1)
        yield from (answer for answer in self.running if answer.remaining > 1)

    def _work(self, answer: Answer, budget: int) -> Work:
        start = answer.computed
        end = min(len(answer.tokens), start + budget)
        if answer.every_row:
            rows = max(0, end - max(start, answer.rows_given))
        else:
            rows = int(end == len(answer.tokens))
        return Work(answer, start, end, rows)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


def _order(answer: Answer) -> tuple[int, int]:
    return answer.order
