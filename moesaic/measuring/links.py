"""How long ranks take to tell each other something, by kind of exchange and size.

The exchanges are those of training, through the groups that training makes: on one machine's
processors through shared memory where training does so, through gloo or NCCL elsewhere. A line

    seconds = latency + bytes / bandwidth

is laid through what was measured, so that its relative errors are small at every size. Bytes are
those that a rank gets from the others (of a sum: that it adds to its part).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import NamedTuple

import torch

from moesaic.measuring.rounds import Action, Samples, summary
from moesaic.parallel.group import Group
from moesaic.parallel.world import World
from moesaic.planning.measured import LinkKind, MeasuredLink

SMALLEST = 2**12
"""Bytes of the smallest exchange."""

STEP = 4
"""Each next one has so many times more."""

QUICK = 2**18
"""Bytes below which an exchange is repeated, because a clock and late ranks would hide it."""

REPEATS = 8


class Line(NamedTuple):
    """A line through points of bytes and seconds."""

    latency: float
    bandwidth: float
    residual: float
    """Median over the points of the relative distance."""
    largest_residual: float


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """The line whose relative errors have the least sum of squares, latency at least 0.

    Args:
        points: Bytes and seconds, both above 0; at least one.
    """
    # With u = 1/t and v = bytes/t, minimise the sum of (latency u + slowness v - 1)^2.
    u = [1 / seconds for _, seconds in points]
    v = [count / seconds for count, seconds in points]
    uu, vv = sum(a * a for a in u), sum(b * b for b in v)
    uv = sum(a * b for a, b in zip(u, v, strict=True))
    su, sv = sum(u), sum(v)
    determinant = uu * vv - uv * uv
    latency = slowness = -1.0
    if determinant > 1e-12 * uu * vv:
        latency = (su * vv - sv * uv) / determinant
        slowness = (sv * uu - su * uv) / determinant
    if latency < 0 or slowness <= 0:
        latency, slowness = 0.0, sv / vv
    errors = [abs(latency * a + slowness * b - 1) for a, b in zip(u, v, strict=True)]
    return Line(latency, 1 / slowness, median(errors), max(errors))


@dataclass
class Exchange:
    """One kind of exchange in one group, with one size."""

    kind: LinkKind
    group: Group
    near: int
    moved: int
    """Bytes that each rank gets."""
    repeats: int
    run: Callable[[], object]
    name: str

    def prepare(self) -> None:
        """Nothing."""

    def forward(self) -> Sequence[Action]:
        """The exchange."""
        return (Action("exchange", self._repeat),)

    def backward(self) -> Sequence[Action]:
        """Nothing."""
        return ()

    def _repeat(self) -> None:
        for _ in range(self.repeats):
            self.run()


def exchanges(world: World, largest: int) -> list[Exchange]:
    """Every exchange that the ranks of this world can have in training."""
    groups = {
        "tp": world.groups.tp,
        "ep": world.groups.ep,
        "etp": world.groups.etp,
        "shards": world.dense_shards,
    }
    found: list[Exchange] = []
    known: set[tuple[int, int]] = set()
    for name, group in groups.items():
        near = _near(group, world.everyone)
        # Groups of the same size and neighbourhood are one to the planner.
        if group.size == 1 or (group.size, near) in known:
            continue
        known.add((group.size, near))
        found += _in_group(name, group, near, largest, world.device)
    if world.everyone.size > 1:
        everyone = world.everyone
        found += _sums(everyone, _near(everyone, everyone), largest, world.device)
        for distance in sorted({1, everyone.size // 2}):
            found += _sends(everyone, distance, largest, world.device)
    return found


def sizes(largest: int) -> Iterator[int]:
    """Bytes to try."""
    size = SMALLEST
    while size <= largest:
        yield size
        size *= STEP


def _near(group: Group, everyone: Group) -> int:
    """Ranks of a group on one machine: the most that any has, so that all say the same."""
    hosts = group.objects(socket.gethostname())
    counts: list[int] = everyone.objects(hosts.count(hosts[group.rank]))
    return max(counts)


def _in_group(
    name: str, group: Group, near: int, largest: int, device: torch.device
) -> Iterator[Exchange]:
    n = group.size
    for size in sizes(largest):
        # Float32, as gradients and most of what FSDP gathers are.
        count = max(1, size // (4 * n))
        part, whole = torch.ones(count, device=device), torch.ones(count * n, device=device)
        rows = [count] * n
        runs: dict[LinkKind, Callable[[], object]] = {
            "gather": partial(group.gather, part, rows),
            "scatter_sum": partial(group.scatter_sum, whole, rows),
            "all_to_all": partial(group.exchange, whole, rows, rows),
        }
        for kind, run in runs.items():
            yield _exchange(kind, group, near, 4 * count * (n - 1), run, f"{kind} {name}")


def _sums(group: Group, near: int, largest: int, device: torch.device) -> Iterator[Exchange]:
    for size in sizes(largest):
        x = torch.zeros(size // 4, device=device)
        moved = size * (group.size - 1) // group.size
        yield _exchange("sum", group, near, moved, partial(group.sum_, x), "sum")


def _sends(group: Group, distance: int, largest: int, device: torch.device) -> Iterator[Exchange]:
    hosts = group.objects(socket.gethostname())
    near = 2 if hosts[0] == hosts[distance] else 1
    pair = Group(2, group.rank % 2, group.process_group)
    for size in sizes(largest):
        x = torch.zeros(size // 4, device=device)

        run = partial(group.pass_on, x, distance=distance)
        yield _exchange("send", pair, near, size, run, f"send {distance}")


def _exchange(
    kind: LinkKind, group: Group, near: int, moved: int, run: Callable[[], object], name: str
) -> Exchange:
    repeats = REPEATS if moved < QUICK else 1
    return Exchange(kind, group, near, moved, repeats, run, f"{name} {moved}")


def measured_links(found: Sequence[Exchange], samples: Samples) -> tuple[MeasuredLink, ...]:
    """A line for each kind of exchange over each kind of group."""
    points: dict[tuple[LinkKind, int, int], list[tuple[float, float, float]]] = {}
    for one in found:
        middle, width = summary(samples[one.name, "exchange"])
        key = one.kind, one.group.size, one.near
        points.setdefault(key, []).append(
            (float(one.moved), middle / one.repeats, width / one.repeats)
        )
    links = []
    for (kind, ranks, near), of_kind in points.items():
        line = fit_line([(moved, seconds) for moved, seconds, _ in of_kind])
        links.append(
            MeasuredLink(
                kind=kind,
                ranks=ranks,
                near=near,
                points=tuple(sorted(of_kind)),
                **line._asdict(),
            )
        )
    return tuple(links)
