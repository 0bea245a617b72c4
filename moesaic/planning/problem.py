"""What the solver is asked and what it answers: units to cut into stages, and what to recompute.

A rank runs one or several stages. Its seconds are those of its units and of what it computes
again, over its speed. Its bytes are the state of its units, what each stage keeps of a micro-batch
times the micro-batches that the stage has in flight, and the largest transient of a choice it
made: one thing is computed again at a time. The slowest rank sets the pace of the pipeline.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.errors import PlanError
from moesaic.planning.split import Span


@dataclass(frozen=True)
class Choice:
    """One way to keep or to recompute the activations of a unit or of a layer."""

    recompute: str
    """`none`, `moe_activations`, `attention` or `full`."""

    seconds: float
    """Extra time to compute again, of one micro-batch."""

    kept_bytes: float
    """Activations kept from forward to backward, of one micro-batch."""

    transient_bytes: float = 0
    """Held only while it is computed again."""


@dataclass(frozen=True)
class Unit:
    """What is never cut: the embedding, one half of a layer, the head."""

    name: str
    seconds: float
    """Forward and backward of one micro-batch, nothing recomputed."""

    state_bytes: float
    """Weights, gradients and optimizer."""

    choices: tuple[Choice, ...]
    """The first recomputes nothing."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Units to be cut into `ranks` x `interleave` stages, each with at least one unit."""

    units: tuple[Unit, ...]

    layers: Mapping[int, tuple[Choice, ...]]
    """From the first unit of a layer to choices of that unit and the next together, where one
    stage holds both. Where a cut parts them each has its own."""

    cuts: frozenset[int]
    """Numbers of the units at which a stage may begin; the first stage begins at 0 anyway."""

    ranks: int

    interleave: int = 1
    """Stages a rank."""

    v_shaped: bool = False
    """Rank k has stages k and 2 * ranks - 1 - k, instead of k, k + ranks, k + 2 * ranks, ..."""

    in_flight: tuple[float, ...]
    """Micro-batches whose activations a stage keeps at its peak, for each stage."""

    budgets: tuple[float, ...]
    """Bytes of each rank for units, what they keep and transients."""

    speeds: tuple[float, ...]
    """Relative speed of each rank; 1.0 takes the units' seconds."""

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_units()
        room = 1 + len(self.cuts - {0})
        if room < self.stages:
            raise PlanError(
                f"{self.ranks} ranks with {self.interleave} stages each need {self.stages} "
                f"stages, but the model can be cut into {room} at most. Use fewer pipeline ranks "
                f"or a smaller interleave, or allow cuts inside layers."
            )

    def _check_lengths(self) -> None:
        if self.ranks < 1 or self.interleave < 1:
            raise PlanError(
                f"A pipeline has {self.ranks} ranks with {self.interleave} stages each. "
                f"Give at least 1 of both."
            )
        if self.v_shaped and self.interleave != 2:
            raise PlanError(
                f"A V-shaped pipeline has 2 stages a rank, not {self.interleave}. Set interleave 2."
            )
        for name, given, expected in (
            ("in_flight", self.in_flight, self.stages),
            ("budgets", self.budgets, self.ranks),
            ("speeds", self.speeds, self.ranks),
        ):
            if len(given) != expected:
                raise PlanError(f"{name} has {len(given)} values; give {expected}.")
        if min(self.speeds) <= 0 or min(self.in_flight) <= 0:
            raise PlanError(
                f"Speeds and in-flight counts are above 0, but the least are {min(self.speeds)} "
                f"and {min(self.in_flight)}."
            )

    def _check_units(self) -> None:
        count = len(self.units)
        if any(not 0 <= cut < count for cut in self.cuts):
            raise PlanError(f"Cuts are unit numbers from 0 to {count - 1}: {sorted(self.cuts)}.")
        firsts = sorted(self.layers)
        if any(first < 0 or first + 2 > count for first in firsts) or any(
            second - first < 2 for first, second in itertools.pairwise(firsts)
        ):
            raise PlanError(f"Layers begin at units {firsts} of {count}; each has 2 of its own.")
        if any(not choices for choices in self.layers.values()) or any(
            not unit.choices for unit in self.units
        ):
            raise PlanError("Every unit and layer needs at least one choice, the one of `none`.")
        if len({unit.name for unit in self.units}) < count:
            raise PlanError("Two units have the same name, by which a solution says what to do.")
        for unit in self.units:
            if unit.seconds < 0 or unit.state_bytes < 0:
                raise PlanError(f"Unit {unit.name} has negative seconds or bytes.")
        for choices in (*self.layers.values(), *(unit.choices for unit in self.units)):
            for choice in choices:
                if min(choice.seconds, choice.kept_bytes, choice.transient_bytes) < 0:
                    raise PlanError(f"Recompute {choice.recompute} has negative seconds or bytes.")

    @property
    def stages(self) -> int:
        """Stages of all ranks."""
        return self.ranks * self.interleave

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages of a rank, in the order that tokens pass."""
        if self.v_shaped:
            return (rank, 2 * self.ranks - 1 - rank)
        return tuple(range(rank, self.stages, self.ranks))


@dataclass(frozen=True)
class Solution:
    """Stages, what each recomputes, and what that takes."""

    stages: tuple[Span, ...]
    """Units of each stage, in the order that tokens pass."""

    recompute: Mapping[int | str, str]
    """Of each layer by its number, or of a unit by its name where a layer is cut or has no such
    choices; what recomputes nothing is left out."""

    bottleneck: float
    """Seconds of the slowest rank, for one micro-batch."""

    bound: float
    """No layout takes less; equal to `bottleneck` where that is proved to be the least."""

    rank_seconds: tuple[float, ...]
    rank_bytes: tuple[float, ...]
