"""Rank 0 tells the others what to compute; they do it until they are told to end.

What is told is a list of integers (`Group.tell`):

    0                           end
    1                           nothing to do, but rank 0 lives
    2, experts, hidden, and for each chunk: start, logits, counts, tokens, blocks

While there is nothing to compute, rank 0 says so every `ALIVE_SECONDS`: no wait of another rank
then lasts as long as the time-outs of the connections and of the watch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from moesaic.parallel.group import Group
from moesaic.parallel.watch import Watch
from moesaic.serving.execution.batch import Batch, Chunk

END, ALIVE, STEP = range(3)

ALIVE_SECONDS = 10.0
"""Pause between two signs of life. Ours: far less than any time-out."""


def encode(batch: Batch) -> list[int]:
    """A step as it is told."""
    numbers = [STEP, int(batch.experts), int(batch.hidden)]
    for chunk in batch.chunks:
        numbers += [chunk.start, chunk.logits, len(chunk.tokens), len(chunk.blocks)]
        numbers += [*chunk.tokens, *chunk.blocks]
    return numbers


def decode(numbers: Sequence[int]) -> Batch:
    """What `encode` was given."""
    assert numbers[0] == STEP, f"{numbers[:1]=}"
    chunks, place = [], 3
    while place < len(numbers):
        start, logits, tokens, blocks = numbers[place : place + 4]
        middle, place = place + 4 + tokens, place + 4 + tokens + blocks
        chunks.append(
            Chunk(
                tokens=tuple(numbers[middle - tokens : middle]),
                start=start,
                blocks=tuple(numbers[middle:place]),
                logits=logits,
            )
        )
    return Batch(tuple(chunks), experts=bool(numbers[1]), hidden=bool(numbers[2]))


class Announcer:
    """Rank 0's side. Steps come from one thread at a time; a thread of its own says it lives.

    Args:
        group: The ranks.
        watch: Is told of each step and sign of life.
    """

    def __init__(self, group: Group, watch: Watch | None = None) -> None:
        self._group, self._watch = group, watch
        self._lock = threading.Lock()
        self._has_ended = threading.Event()
        self._last = time.monotonic()
        self._steps = 0
        self._is_broken = False
        self._thread = threading.Thread(target=self._keep_alive, name="moesaic-alive", daemon=True)
        self._thread.start()

    @contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """Tell the others a step, which all compute within the block."""
        with self._lock:
            try:
                self._group.tell(encode(batch))
                yield
            except BaseException:
                self._is_broken = True
                raise
            self._steps += 1
            self._went_on()

    def close(self) -> None:
        """Tell the others to end, unless they cannot hear it. Calling it twice does no harm."""
        with self._lock:
            if self._has_ended.is_set():
                return
            self._has_ended.set()
            if not self._is_broken:
                self._group.tell([END])
        self._thread.join()

    def _keep_alive(self) -> None:
        while not self._has_ended.wait(ALIVE_SECONDS / 4):
            # Who computes shows in other ways that it lives, and who hangs shall not seem to.
            if not self._lock.acquire(blocking=False):
                continue
            try:
                if self._has_ended.is_set() or self._is_broken:
                    return
                if time.monotonic() - self._last > ALIVE_SECONDS:
                    self._group.tell([ALIVE])
                    self._went_on()
            except RuntimeError:  # a rank is gone: the next step will say so
                self._is_broken = True
                return
            finally:
                self._lock.release()

    def _went_on(self) -> None:
        self._last = time.monotonic()
        if self._watch is not None:
            self._watch.progress(self._steps)


def listen(group: Group, watch: Watch | None = None) -> Iterator[Batch]:
    """The other ranks' side: each step that rank 0 tells, until it tells the end."""
    steps = 0
    while True:
        numbers = group.tell(None)
        if numbers[0] == END:
            return
        if numbers[0] == STEP:
            yield decode(numbers)
            steps += 1
        if watch is not None:
            watch.progress(steps)
