"""When each action of a pipeline happens, and how many micro-batches a stage keeps meanwhile.

A rank does its actions in order. It begins a forward pass when it has the result of the stage
before, and a backward pass when it has the gradient from the stage after. Sending works as it does
in training, which matters where sending takes long or stages are unlike:

    A message travels from when both ends have asked for it, and takes `send_seconds`. Nothing
    travels between two stages of one rank.

    gpipe asks for a message when it needs it, and does not wait for what it sends.

    1f1b asks with each message that it sends for the next it needs, and before it asks for more
    waits for both.

    The others send after each turn (in dualpipev F and then B) and never wait for it. A rank asks
    for a message where torch puts that in its list of actions: after those that come before the
    sender's turn when the ranks go by turns.

All of that is known before any time is, so a schedule is compiled once to a row of sums, each of a
duration and the later of two moments, and a simulation only adds them up.

What is left out: messages between two ranks do not slow each other, nor the work of either.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.actions import Action, Kind, Turn, actions, turns, undivided
from moesaic.planning.plan import Schedule
from moesaic.planning.schedules import stages_of


@dataclass(frozen=True)
class StageSeconds:
    """How long the work on one micro-batch in one stage takes."""

    forward: float

    input_gradient: float
    """The part of the backward pass for which the stage before waits."""

    weight_gradient: float
    """The rest of the backward pass."""

    recompute: float = 0.0
    """Of the forward pass, what the backward pass computes again."""

    is_compiled: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether its backward pass is never split in two."""
        return self.is_compiled or self.recompute > 0


class Done(NamedTuple):
    """An action, and when it was done."""

    action: Action
    rank: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a simulation came to."""

    seconds: float
    """From the first action to the end of the last."""

    busy: tuple[float, ...]
    """Seconds that each rank works and does not wait."""

    _program: _Program
    _moments: list[float]
    """When each sum of the program is reached."""
    _whole: frozenset[int]
    """Stages that do not split their backward pass."""

    @functools.cached_property
    def done(self) -> tuple[Done, ...]:
        """Every action, rank by rank, in the order in which the rank does it."""
        found = []
        for rank, steps in enumerate(self._steps):
            for action, end in steps:
                first, second, _ = self._program.sums[end - 1]
                start = max(self._moments[first], self._moments[second])
                found.append(Done(action, rank, start, self._moments[end]))
        return tuple(found)

    @functools.cached_property
    def ends(self) -> tuple[float, ...]:
        """When each rank has done its last action."""
        return tuple(self._moments[steps[-1][1]] for steps in self._program.steps)

    @functools.cached_property
    def in_flight(self) -> tuple[int, ...]:
        """The most micro-batches of which each stage keeps activations at once."""
        return _most_in_flight([[action for action, _ in steps] for steps in self._steps])

    @functools.cached_property
    def _steps(self) -> list[list[tuple[Action, int]]]:
        """What each rank does, and the moment at which that is done."""
        return [
            [
                (as_done, end)
                for action, end in steps
                if (as_done := undivided(action, self._whole)) is not None
            ]
            for steps in self._program.steps
        ]

    def peak(
        self, kept_bytes: Sequence[float], deferred_bytes: Sequence[float] | None = None
    ) -> tuple[float, ...]:
        """The most bytes that each rank keeps for micro-batches at once, over all its stages.

        Activations are kept from F to B, or to W: what I has no more use for is little. Between I
        and W there are also the gradients that W starts from.

        Args:
            kept_bytes: Of each stage, what one micro-batch keeps from its forward pass.
            deferred_bytes: Of each stage, the gradients that one micro-batch keeps from I to W.
                None: none.
        """
        none = [0.0] * len(kept_bytes)
        gradients = none if deferred_bytes is None else deferred_bytes
        peaks = []
        for steps in self._steps:
            bytes_now = most = 0.0
            for (kind, stage, _), _ in steps:
                if kind == "F":
                    bytes_now += kept_bytes[stage]
                elif kind == "I" and stage:
                    bytes_now += gradients[stage]
                most = max(most, bytes_now)
                if kind == "B":
                    bytes_now -= kept_bytes[stage]
                elif kind == "W":
                    bytes_now -= kept_bytes[stage] + (gradients[stage] if stage else 0.0)
            peaks.append(most)
        return tuple(peaks)


def simulate(
    schedule: Schedule,
    stage_seconds: Sequence[StageSeconds],
    *,
    ranks: int,
    micro_batches: int,
    send_seconds: float | Sequence[float] = 0.0,
    action_seconds: float = 0.0,
) -> Timeline:
    """Find out when each action of a pipeline happens.

    Args:
        schedule: Its name.
        stage_seconds: Of each stage, in the order that tokens pass.
        ranks: Pipeline ranks.
        micro_batches: In a step, of one data-parallel rank.
        send_seconds: That a message takes to another rank; or, for each stage but the last, that
            one to the next stage takes, and one back.
        action_seconds: That every action takes besides.

    Raises:
        PlanError: The schedule cannot run so many stages or micro-batches, or a duration is no
            duration.
    """
    stages = len(stage_seconds)
    hops = [send_seconds] * (stages - 1) if isinstance(send_seconds, (int, float)) else send_seconds
    if len(hops) != stages - 1:
        raise PlanError(
            f"There are {len(hops)} durations of sending between {stages} stages. "
            f"Give one for each stage but the last."
        )
    whole = frozenset(stage for stage, of in enumerate(stage_seconds) if of.is_whole)
    program = _compile(schedule, ranks, stages, micro_batches)
    durations = _durations(stage_seconds, hops, action_seconds)
    moments = [0.0]
    reach = moments.append
    for first, second, duration in program.sums:
        earlier, later = moments[first], moments[second]
        reach((earlier if earlier > later else later) + durations[duration])
    return Timeline(
        seconds=max(moments[steps[-1][1]] for steps in program.steps),
        busy=tuple(
            sum(durations[code] * count for code, count in counts) for counts in program.counts
        ),
        _program=program,
        _moments=moments,
        _whole=whole,
    )


def in_flight(
    schedule: Schedule,
    *,
    ranks: int,
    stages: int,
    micro_batches: int,
    whole: Collection[int] = (),
) -> tuple[int, ...]:
    """The most micro-batches of which each stage keeps activations at once.

    Args and Raises: as `actions` has them.
    """
    return _most_in_flight(
        actions(schedule, ranks=ranks, stages=stages, micro_batches=micro_batches, whole=whole)
    )


def _most_in_flight(orders: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    now: Counter[int] = Counter()
    most: Counter[int] = Counter()
    for order in orders:
        for kind, stage, _ in order:
            if kind == "F":
                now[stage] += 1
                most[stage] = max(most[stage], now[stage])
            elif kind != "I":
                now[stage] -= 1
    return tuple(most[stage] for stage in range(len(most)))


# --- Durations -------------------------------------------------------------------------------

_KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


def _durations(
    stages: Sequence[StageSeconds], hops: Sequence[float], action_seconds: float
) -> list[float]:
    """Nothing; each kind of action in each stage; each hop. `_Tape` numbers them alike."""
    parts = [(of.forward, of.input_gradient, of.weight_gradient, of.recompute) for of in stages]
    for seconds in (*itertools.chain.from_iterable(parts), *hops, action_seconds):
        if not 0 <= seconds < math.inf:
            raise PlanError(f"A stage or a message takes {seconds} s. Give 0 or more.")
    durations = [0.0]
    for kind in _KINDS:
        durations += [
            _work_seconds(kind, stage, of, action_seconds) for stage, of in enumerate(stages)
        ]
    return durations + list(hops)


def _work_seconds(kind: Kind, stage: int, of: StageSeconds, action_seconds: float) -> float:
    if kind == "F":
        return of.forward + action_seconds
    if of.is_whole and kind == "W":
        return 0.0
    backward = of.recompute + of.input_gradient + of.weight_gradient
    if of.is_whole or kind == "B":
        return backward + action_seconds
    # The first stage has no input that wants a gradient.
    if stage == 0:
        return (backward if kind == "W" else 0.0) + action_seconds
    return (of.input_gradient if kind == "I" else of.weight_gradient) + action_seconds


# --- Which moments follow from which ---------------------------------------------------------

_Message = tuple[bool, int, int]
"""Whether it goes forwards, the stage that it is for, and its micro-batch."""


@dataclass(frozen=True)
class _Program:
    """How to find every moment of a pipeline from durations, without looking at the schedule."""

    sums: list[tuple[int, int, int]]
    """Moment n + 1 is the later of two before it, and a duration more; moment 0 is the start."""

    steps: list[list[tuple[Action, int]]]
    """What each rank does, and the moment at which that is done."""

    counts: list[list[tuple[int, int]]]
    """Of each rank, durations and how often it works so long."""


class _Tape:
    """Where a program is written.

    Args:
        ranks: Pipeline ranks.
        stages: Of all ranks.
        rank_of: Of each stage, who runs it.
    """

    def __init__(self, ranks: int, stages: int, rank_of: list[int]) -> None:
        self.stages, self.rank_of = stages, rank_of
        self.sums: list[tuple[int, int, int]] = []
        self.steps: list[list[tuple[Action, int]]] = [[] for _ in range(ranks)]
        self.clocks = [0] * ranks
        """The moment up to which each rank has come."""
        self.arrivals: dict[_Message, int] = {}
        """The moment at which a message is there; 0 where it need not travel."""
        self._asked: dict[_Message, int] = {}
        self._work = {
            (kind, stage): 1 + number * stages + stage
            for number, kind in enumerate(_KINDS)
            for stage in range(stages)
        }

    def later(self, first: int, second: int, duration: int = 0) -> int:
        """The moment that is a duration after the later of two."""
        self.sums.append((first, second, duration))
        return len(self.sums)

    def needs(self, action: Action) -> _Message | None:
        """What an action waits for, of another stage."""
        kind, stage, micro_batch = action
        if kind == "F":
            return (True, stage, micro_batch) if stage else None
        return (False, stage, micro_batch) if kind != "W" and stage < self.stages - 1 else None

    def gives(self, action: Action) -> _Message | None:
        """What an action makes for another stage."""
        kind, stage, micro_batch = action
        if kind == "F":
            return (True, stage + 1, micro_batch) if stage < self.stages - 1 else None
        return (False, stage - 1, micro_batch) if kind != "W" and stage else None

    def travel(self, message: _Message, first: int, second: int) -> None:
        """Let a message go when both its ends have asked for it."""
        is_forward, stage, _ = message
        hop = 1 + len(_KINDS) * self.stages + (stage - 1 if is_forward else stage)
        self.arrivals[message] = self.later(first, second, hop)

    def ask(self, message: _Message | None, rank: int) -> None:
        """Let a rank ask for a message, at whose other end is another that does."""
        if message is None:
            return
        other = self._asked.pop(message, None)
        if other is None:
            self._asked[message] = self.clocks[rank]
        else:
            self.travel(message, other, self.clocks[rank])

    def run(self, action: Action, arrival: int) -> None:
        """Let an action be done when its rank is there and what it needs has arrived."""
        rank = self.rank_of[action.stage]
        end = self.later(self.clocks[rank], arrival, self._work[action[:2]])
        self.clocks[rank] = end
        self.steps[rank].append((action, end))

    def program(self) -> _Program:
        """What was written."""
        counts = [Counter(self.sums[end - 1][2] for _, end in steps) for steps in self.steps]
        return _Program(self.sums, self.steps, [list(count.items()) for count in counts])


@functools.lru_cache(maxsize=16)
def _compile(schedule: Schedule, ranks: int, stages: int, micro_batches: int) -> _Program:
    taken = turns(schedule, ranks=ranks, stages=stages, micro_batches=micro_batches)
    own = [stages_of(rank, schedule, ranks=ranks, stages=stages) for rank in range(ranks)]
    rank_of = [next(r for r, numbers in enumerate(own) if n in numbers) for n in range(stages)]
    tape = _Tape(ranks, stages, rank_of)
    if ranks == 1 or schedule in ("gpipe", "1f1b"):
        _in_pairs(tape, taken, waits_to_send=schedule == "1f1b")
    else:
        _by_turns(tape, [_with_pauses(of_rank, micro_batches) for of_rank in taken])
    return tape.program()


def _in_pairs(tape: _Tape, taken: Sequence[Sequence[Turn]], *, waits_to_send: bool) -> None:
    """One stage a rank: asks for messages as it comes to them, often for two at once."""
    ranks = [
        _one_stage(tape, rank, [action for (action,) in of_rank], waits_to_send=waits_to_send)
        for rank, of_rank in enumerate(taken)
    ]
    while ranks:
        ranks = [rank for rank in ranks if next(rank, None) is not None]


def _one_stage(
    tape: _Tape, rank: int, order: Sequence[Action], *, waits_to_send: bool
) -> Iterator[_Message]:
    """Write down what a rank does; yields messages that nobody has sent or received yet."""
    previous: Action | None = None
    unsent: _Message | None = None

    def wait(message: _Message | None) -> Iterator[_Message]:
        if message is not None:
            while message not in tape.arrivals:
                yield message
            tape.clocks[rank] = tape.later(tape.clocks[rank], tape.arrivals[message])

    for action in order:
        if waits_to_send:
            yield from wait(unsent)
        sent = None if previous is None else tape.gives(previous)
        tape.ask(sent, rank)
        tape.ask(tape.needs(action), rank)
        yield from wait(tape.needs(action))
        tape.run(action, 0)
        previous, unsent = action, sent
    if previous is not None:
        tape.ask(tape.gives(previous), rank)


def _by_turns(tape: _Tape, taken: Sequence[Sequence[Turn]]) -> None:
    """Several stages a rank: what one makes in its turn, others ask for before their next turns."""
    at = [0] * len(taken)
    ranks = [rank for rank, of_rank in enumerate(taken) if of_rank]
    arrivals, clocks = tape.arrivals, tape.clocks
    while ranks:
        before = sum(at)
        for rank in ranks:
            turn = taken[rank][at[rank]]
            needs = [tape.needs(action) for action in turn]
            if any(message is not None and message not in arrivals for message in needs):
                continue
            for action, message in zip(turn, needs, strict=True):
                tape.run(action, 0 if message is None else arrivals.pop(message))
            for action in turn:
                message = tape.gives(action)
                if message is None:
                    continue
                other = tape.rank_of[message[1]]
                if other == rank:
                    arrivals[message] = 0
                else:
                    tape.travel(message, clocks[rank], clocks[other])
            at[rank] += 1
        assert sum(at) > before, f"{at=} of {[len(of_rank) for of_rank in taken]}"
        ranks = [rank for rank in ranks if at[rank] < len(taken[rank])]


def _with_pauses(taken: Sequence[Turn], micro_batches: int) -> list[Turn]:
    """Turns in which torch does what training leaves to FSDP, and so nothing, among the others.

    They are there to gather the weights of the next three stages that a rank works on, to let go
    of others, and to reduce the gradients of a stage after its last backward pass.
    """
    ahead: list[list[int]] = []
    coming: list[int] = []
    for turn in reversed(taken):
        for action in reversed(turn):
            if action.stage in coming:
                coming.remove(action.stage)
            coming.insert(0, action.stage)
        ahead.append(coming[:3])
    found: list[Turn] = []
    gathered: set[int] = set()
    finished: Counter[int] = Counter()
    for turn, stages in zip(taken, reversed(ahead), strict=True):
        found += [()] * len(gathered.symmetric_difference(stages))
        gathered = set(stages)
        found.append(turn)
        for kind, stage, _ in turn:
            finished[stage] += kind in ("B", "W")
            if kind in ("B", "W") and finished[stage] == micro_batches:
                found.append(())
    return found + [()] * len(gathered)
