"""Say which rows of a token folder make up each step.

The answer is computed from the seed and the step alone, so nothing has to be saved to resume:
ask for the next step. Sources are mixed by a repeating pattern that holds each of them
exactly in proportion to its weight and spreads it evenly. Within a source every row is
read once before any is read again, in an order that differs from epoch to epoch.

Shapes.
    B rows in a micro-batch     S tokens in a row
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import ConfigError

LARGEST_PATTERN = 100_000
"""Rows after which the mixture must come out exactly."""


class Batch(NamedTuple):
    """Rows of a step, as the model takes them. Each is (B, S), int64."""

    input_ids_BS: Tensor
    targets_BS: Tensor
    """What to predict at each place; -100 where nothing is."""
    documents_BS: Tensor
    """Tokens attend to each other only where these are equal, within a row."""


class BatchOrder:
    """The rows of every step.

    Args:
        folder: Where the rows lie.
        split: `train` or `heldout`.
        batch_size: Rows in a step.
        seed: Another seed, another order.
        weights: Shares of the sources, in place of those in the folder; a source that is
            not named, or has weight 0, is left out.

    Raises:
        ConfigError: If the weights make no mixture, or a source has no row to give.
    """

    def __init__(
        self,
        folder: TokenFolder,
        *,
        split: str = "train",
        batch_size: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}. Take at least 1 row a step.")
        self.folder = folder
        self.split = split
        self.batch_size = batch_size
        shares = _shares(folder, weights)
        self._sources = list(shares)
        for name in self._sources:
            if not folder.num_sequences(split, name):
                raise ConfigError(
                    f"{folder.path} has no {split} rows of {name}. Leave it out of the weights."
                )
        self._pattern = mixture_pattern(list(shares.values()))
        # Where in the pattern each source stands, to count how often it came before.
        self._places = [
            [place for place, source in enumerate(self._pattern) if source == number]
            for number in range(len(self._sources))
        ]
        self._keys = [_key(seed, split, name) for name in self._sources]

    def row(self, n: int) -> tuple[str, int]:
        """The source and the row in it that is the `n`-th to be read, counting from 0."""
        block, place = divmod(n, len(self._pattern))
        source = self._pattern[place]
        places = self._places[source]
        drawn = block * len(places) + bisect_left(places, place)
        rows = self.folder.num_sequences(self.split, self._sources[source])
        epoch, position = divmod(drawn, rows)
        return self._sources[source], shuffled(position, rows, key=self._keys[source] + epoch)

    def batch(self, step: int, micro: int = 0, micros: int = 1) -> Batch:
        """Micro-batch `micro` of `micros` of a step, each counting from 0.

        Micro-batches need not be equal: they are the spans of `batch_size` rows that
        end at `(micro + 1) * batch_size // micros`. Together they are the step's batch.

        Raises:
            ConfigError: If there is no such micro-batch.
        """
        if not (step >= 0 and 0 <= micro < micros <= self.batch_size):
            raise ConfigError(
                f"There is no micro-batch {micro} of {micros} in step {step} of "
                f"{self.batch_size} rows. Use at most {self.batch_size} micro-batches."
            )
        first, end = (self.batch_size * edge // micros for edge in (micro, micro + 1))
        start = step * self.batch_size
        rows = [
            self.folder.row(self.split, *self.row(n)) for n in range(start + first, start + end)
        ]
        return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def mixture_pattern(weights: list[Fraction]) -> list[int]:
    """Which source each row of a block comes from.

    The block is exactly in proportion, and any beginning of it, for each source, by less than
    one row not (Tijdeman, The chairman assignment problem, 1980).

    Raises:
        ConfigError: If no block of at most `LARGEST_PATTERN` rows is in proportion.
    """
    scale = math.lcm(*(weight.denominator for weight in weights))
    counts = [int(weight * scale) for weight in weights]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    length = sum(counts)
    if length > LARGEST_PATTERN:
        raise ConfigError(
            f"The mixture weights come out exactly only after {length:,} rows. "
            f"Use rounder weights, such as 7, 2 and 1."
        )
    if len(counts) == 1:
        return [0]
    # A source is owed `debts[i] / length` rows. Of those owed enough, the one goes first whose
    # debt would be the first to grow too large.
    enough, debts, pattern = 2 * len(counts) - 2, [0] * len(counts), []
    for _ in range(length):
        debts = [debt + count for debt, count in zip(debts, counts, strict=True)]
        _, first = min(
            (Fraction((enough - 1) * length - enough * debt, count), source)
            for source, (debt, count) in enumerate(zip(debts, counts, strict=True))
            if enough * debt >= length
        )
        debts[first] -= length
        pattern.append(first)
    return pattern


def shuffled(position: int, length: int, *, key: int) -> int:
    """Where `position` goes in a permutation of `range(length)` chosen by `key`.

    A Feistel network over the next even number of bits, walked until it lands inside the
    range (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). It needs no table,
    however many rows there are, and does not depend on any library's random numbers.
    """
    assert 0 <= position < length, f"{position=}, {length=}"
    half = max(3, ((length - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    # Mixed twice, or neighbouring keys would share all their turns but one.
    turns = [_mix(_mix(key) + turn) for turn in range(8)]
    while True:
        left, right = position >> half, position & low
        for turn in turns:
            left, right = right, left ^ (_mix(right ^ turn) & low)
        position = left << half | right
        if position < length:
            return position


def _mix(value: int) -> int:
    # The finaliser of splitmix64 (Steele, Lea and Flood, 2014).
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def _key(seed: int, split: str, source: str) -> int:
    digest = hashlib.sha256(f"{seed} {split} {source}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _shares(folder: TokenFolder, weights: Mapping[str, float] | None) -> dict[str, Fraction]:
    chosen = folder.weights if weights is None else weights
    for name, weight in chosen.items():
        if name not in folder.sources:
            raise ConfigError(
                f"A weight names {name!r}; {folder.path} has {', '.join(folder.sources)}."
            )
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"The weight of {name} is {weight}. Use a number from 0 up.")
    # Through the decimal spelling, so that 0.7 is 7/10 and not the nearest binary fraction.
    shares = {
        name: Fraction(str(chosen[name])) for name in folder.sources if chosen.get(name, 0) > 0
    }
    if not shares:
        raise ConfigError("Every mixture weight is 0. Give at least one source a weight above 0.")
    return shares
