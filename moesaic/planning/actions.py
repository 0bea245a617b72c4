"""What each pipeline rank does under every schedule, in the order in which training does it.

    F   the forward pass of one micro-batch through one stage
    B   its whole backward pass
    I   the gradient of the stage's input, for which the stage before waits
    W   the gradients of the stage's weights, later

Training runs the schedules of `torch.distributed.pipelining`, and these are their orders. What else
is known of how it runs them:

    the first stage of all has no input that wants a gradient: its I does nothing, and its W is the
        whole backward pass
    a stage that recomputes something, or is compiled, does at I its whole backward pass, and
        nothing at W: it is one of `whole`

Sources: 1F1B and its interleaved form, arXiv 2104.04473; zb1p and zbv, arXiv 2401.10241; dualpipev,
https://github.com/deepseek-ai/DualPipe; torch 2.13 where it differs from these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from typing import Literal, NamedTuple

from moesaic.planning.plan import Schedule
from moesaic.planning.schedules import check_micro_batches, check_stages, rounds, stages_of

Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """A piece of work on one micro-batch in one stage."""

    kind: Kind
    stage: int
    micro_batch: int


Turn = tuple[Action, ...]
"""What a rank does before it sends anything: one action, or in dualpipev F and then B."""

_Work = tuple[Kind, int]
"""A kind and a stage. Each stage takes its micro-batches in order, so that their numbers follow."""


def actions(
    schedule: Schedule,
    *,
    ranks: int,
    stages: int,
    micro_batches: int,
    whole: Collection[int] = (),
) -> list[list[Action]]:
    """What each pipeline rank does, in order.

    Args:
        schedule: Its name.
        ranks: Pipeline ranks.
        stages: Of all ranks together.
        micro_batches: In a step, of one data-parallel rank.
        whole: Stages that never run their backward pass in two parts.

    Raises:
        PlanError: The schedule cannot run so many stages or micro-batches.
    """
    found = turns(schedule, ranks=ranks, stages=stages, micro_batches=micro_batches)
    return [
        [
            as_done
            for turn in of_rank
            for action in turn
            if (as_done := undivided(action, whole)) is not None
        ]
        for of_rank in found
    ]


def turns(schedule: Schedule, *, ranks: int, stages: int, micro_batches: int) -> list[list[Turn]]:
    """The actions of each rank, those together between which it sends nothing. Raises PlanError."""
    check_stages(schedule, ranks=ranks, stages=stages)
    check_micro_batches(schedule, micro_batches, ranks=ranks, stages=stages)
    found = []
    for rank in range(ranks):
        own = stages_of(rank, schedule, ranks=ranks, stages=stages)
        work: Iterable[tuple[_Work, ...]]
        if ranks == 1 or schedule == "1f1b":
            work = _one_by_one(own[0], ranks - rank, micro_batches)
        elif schedule == "gpipe":
            work = [((kind, own[0]),) for kind in _FB for _ in range(micro_batches)]
        elif schedule == "zbv":
            work = _zbv(own, rank, ranks, micro_batches)
        elif schedule == "dualpipev":
            work = _dualpipev(own, rank, ranks, micro_batches)
        else:
            work = _interleaved(own, rank, ranks, micro_batches, is_split=schedule == "zb1p")
        found.append(_numbered(work, micro_batches))
    return found


_FB: tuple[Kind, Kind] = ("F", "B")


def undivided(action: Action, whole: Collection[int]) -> Action | None:
    """What an action is if the stages of `whole` go back at once; None if nothing is left of it."""
    kind, stage, _ = action
    if stage not in whole or kind in _FB:
        return action
    return action._replace(kind="B") if kind == "I" else None


def _numbered(work: Iterable[tuple[_Work, ...]], micro_batches: int) -> list[Turn]:
    """Give every action its micro-batch, and leave out what is for none."""
    forward: dict[int, int] = {}
    backward: dict[int, int] = {}
    divided: dict[int, deque[int]] = {}
    found = []
    for turn in work:
        numbered = []
        for kind, stage in turn:
            if kind == "W":
                number = divided[stage].popleft()
            else:
                numbers = forward if kind == "F" else backward
                number = numbers.get(stage, 0)
                numbers[stage] = number + 1
                if kind == "I":
                    divided.setdefault(stage, deque()).append(number)
            if number < micro_batches:
                numbered.append(Action(kind, stage, number))
        if numbered:
            found.append(tuple(numbered))
    return found


def _one_by_one(stage: int, ahead: int, micro_batches: int) -> Iterator[tuple[_Work, ...]]:
    """Up to `ahead` micro-batches in flight, then backward and forward passes by turns."""
    for number in range(micro_batches + ahead - 1):
        if number < micro_batches:
            yield (("F", stage),)
        if number >= ahead - 1:
            yield (("B", stage),)


def _interleaved(
    own: tuple[int, ...], rank: int, ranks: int, micro_batches: int, *, is_split: bool
) -> Iterator[tuple[_Work, ...]]:
    """1F1B over several stages a rank, a round of micro-batches through each of them in turn.

    Split, a rank is half as far ahead, and its W are as many backward passes late as its number.
    """
    count = len(own)
    in_round = micro_batches // rounds(micro_batches, ranks)
    total = count * micro_batches
    hops = ranks - 1 - rank
    ahead = min((count - 1) * in_round + hops * (1 if is_split else 2), total)

    def stage(step: int) -> int:
        return step // in_round % count

    for step in range(ahead):
        yield (("F", own[stage(step)]),)
    for step in range(total):
        if ahead + step < total:
            yield (("F", own[stage(ahead + step)]),)
        yield (("I" if is_split else "B", own[-1 - stage(step)]),)
        if is_split and step >= rank:
            yield (("W", own[-1 - stage(step - rank)]),)
    if is_split:
        for step in range(max(total - rank, 0), total):
            yield (("W", own[-1 - stage(step)]),)


def _zbv(
    own: tuple[int, ...], rank: int, ranks: int, micro_batches: int
) -> Iterator[tuple[_Work, ...]]:
    """Down the ranks and up again, with W where a rank would wait.

    Written for at least 2 * ranks - 1 micro-batches; those that are not there are left out after.
    """
    down, up = own
    count = max(2 * ranks - 1, micro_batches)
    found: list[_Work] = []

    def add(times: int, *work: _Work) -> None:
        found.extend(work * times)

    add(2 * (ranks - rank) - 1, ("F", down))
    add(rank, ("F", up), ("F", down))
    add(ranks - rank, ("F", up), ("I", up), ("W", up))
    passed = 2 * ranks - 1 - rank
    for number in range(count - ranks):
        add(passed + number < count, ("F", down))
        add(1, ("I", down), ("W", down), ("F", up), ("I", up), ("W", up))
    add(rank, ("I", down), ("I", up))
    add(ranks - rank, ("I", down), ("W", down))
    add(rank, ("W", up))
    add(rank, ("W", down))
    for one in found:
        yield (one,)


def _dualpipev(
    own: tuple[int, ...], rank: int, ranks: int, micro_batches: int
) -> Iterator[tuple[_Work, ...]]:
    """Down the ranks and up again, one direction's F together with the other's B."""
    down, up = own
    hops = ranks - 1 - rank
    waiting: deque[int] = deque()

    def backward(stage: int, *, is_split: bool) -> tuple[_Work, ...]:
        if is_split:
            waiting.append(stage)
        return (("I" if is_split else "B", stage),)

    def weights() -> Iterator[tuple[_Work, ...]]:
        if waiting:
            yield (("W", waiting.popleft()),)

    for _ in range(2 * hops):
        yield (("F", down),)
    for _ in range(rank + 1):
        yield (("F", down),)
        yield (("F", up),)
    for _ in range(hops):
        yield backward(up, is_split=True)
        yield from weights()
        yield (("F", up),)
    for number in range(micro_batches - 2 * ranks + rank + 1):
        if number == 0 and hops == 0:
            yield (("F", down),)
            yield (("B", up),)
        else:
            yield (("F", down), ("B", up))
        yield (("F", up), ("B", down))
    for _ in range(hops):
        yield (("B", up),)
        yield (("F", up), ("B", down))
    # The second half of what is left waits with its W. On odd ranks it begins with an up.
    half, is_odd = (rank + 1) // 2, rank % 2 == 1
    for number in range(rank + 1):
        yield backward(up, is_split=number > half or (number == half and is_odd))
        yield backward(down, is_split=number >= half)
    for _ in range(hops):
        yield from weights()
        yield backward(down, is_split=True)
    for _ in range(rank + 1):
        yield from weights()
