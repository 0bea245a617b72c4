"""Whose each block of the cache is.

Every block is in one of three states, and `check` holds that they add up:

    used     in the tables of one or more sequences, which is counted
    cached   in no table, but full of known tokens: kept until room is needed, oldest use first
    free     neither

A full block is known by a digest of its tokens and of all before it, so a prompt that begins like
an earlier one takes over that one's blocks. Nothing is copied: only full blocks are shared, and
nobody writes into a full block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def extend_digests(digests: list[bytes], tokens: Sequence[int], block_tokens: int) -> None:
    """Add the digests of full blocks of `tokens` that are not there yet."""
    for start in range(len(digests) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        before = digests[-1] if digests else b""
        content = array("q", tokens[start : start + block_tokens]).tobytes()
        # 128 bits, so that two texts never meet, not even on purpose: who shares a block reads
        # another's text.
        digests.append(hashlib.blake2b(before + content, digest_size=16).digest())


class BlockPool:
    """Hands out blocks, and keeps full ones for prompts that begin alike.

    Args:
        num_blocks: Blocks 0 to this - 1.
        keep: Whether to keep full blocks that nobody uses.
    """

    def __init__(self, num_blocks: int, *, keep: bool = True) -> None:
        self.num_blocks = num_blocks
        self._keep = keep
        self._users = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest use first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks in no table that hold known tokens."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks in some table."""
        return self.num_blocks - self.num_available

    def take(self, count: int) -> list[int]:
        """Hand out `count` blocks, giving up the cached ones that were used longest ago."""
        assert count <= self.num_available, f"{count=}, {self.num_available=}"
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._give_up()
            self._users[block] = 1
            blocks.append(block)
        return blocks

    def _give_up(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        return block

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The blocks that hold the beginning of a sequence, as far as it is known. Takes none."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Put blocks that `find` found into one more table."""
        for block in blocks:
            if self._users[block] == 0:
                del self._cached[block]
            self._users[block] += 1

    def num_cached_of(self, blocks: Iterable[int]) -> int:
        """How many of these are in no table, so that sharing them makes fewer available."""
        return sum(self._users[block] == 0 for block in blocks)

    def learn(self, block: int, digest: bytes) -> None:
        """Say what a used block is full of, once its keys and values are written."""
        assert self._users[block] > 0, f"{block=} is in no table"
        # Two sequences may have computed the same tokens; the first one's block stays the known.
        if self._keep and digest not in self._block_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Take a table's blocks back. Its last ones will be given up first: fewer begin alike."""
        for block in reversed(blocks):
            assert self._users[block] > 0, f"{block=} is in no table"
            self._users[block] -= 1
            if self._users[block] > 0:
                continue
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """See that every block is accounted for.

        Args:
            tables: Those of all sequences that have one.
        """
        users = Counter(block for table in tables for block in table)
        counted = {block: count for block, count in enumerate(self._users) if count}
        assert counted == users, f"{counted=}, but tables hold {dict(users)}"
        used, free, cached = len(counted), len(set(self._free)), len(self._cached)
        assert used + free + cached == self.num_blocks, f"{used=}, {free=}, {cached=}"
        assert len(self._free) == free, "a block is free twice"
        idle = {*self._free, *self._cached}
        assert len(idle) == free + cached, "a block is free and cached"
        assert not idle & counted.keys(), f"{idle & counted.keys()} are used and idle"
        known = {block: digest for digest, block in self._block_of.items()}
        assert known == self._digest_of, f"{len(known)=}, {len(self._digest_of)=}"
        assert self._cached.keys() <= known.keys(), "a cached block holds unknown tokens"
        assert not known.keys() & set(self._free), "a free block is known"
