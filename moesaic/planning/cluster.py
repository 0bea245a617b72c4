"""What the planner must know of a cluster: its devices, and how fast bytes move between them.

A cluster is a row of nodes. Inside a node every device has a link to the others, between nodes
each has its share of the network; the speeds are bytes a second in one direction, for one device.
Presets lie in `clusters/`, one TOML file a device, with the source of each number beside it. A
cluster's own file is of the same form; `device = "h100"` in its [[nodes]] takes a preset's device,
and what is left out there takes the preset's value:

    [[nodes]]       device (a name or a table), devices, count, link_bandwidth, link_latency,
                    link_efficiency, sum_bandwidth, sum_latency, peer_bandwidth
    [network]       bandwidth, latency

Most clusters need no file, only a string:

    64xH100         64 devices, in nodes as they are sold (8)
    192x8xA800      192 nodes of 8
    2xH100+6xA800   a node of 2 and a node of 6
    cpu2            two ranks on the cores of one machine
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from moesaic.errors import PlanError

DTYPES = ("bf16", "fp8", "fp32")
"""What matrix products run in."""


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One device, as the planner sees it."""

    name: str
    memory_bytes: float
    """That programs can have."""
    memory_bandwidth: float
    """Bytes a second."""
    memory_efficiency: float
    """Part of it that kernels reach which only move bytes."""
    matmul_flops: Mapping[str, float]
    """Dense peak of matrix products by dtype, operations a second."""
    matmul_efficiency: Mapping[str, float]
    """Part of that peak which the best-shaped products reach, measured alone."""
    sustained: float
    """Part of that which is left when every product of a step runs, for hours, under the device's
    power limit."""
    flash_efficiency: tuple[float, float]
    """Part of the bf16 peak that fused attention reaches on long sequences: forward, backward."""
    units: int
    """Multiprocessors, over which a product's tiles are dealt; 0 where that does not matter."""
    launch_seconds: float
    """That the host needs to start one kernel."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each number is from."""

    def peak(self, dtype: str) -> float:
        """Dense peak of matrix products.

        Raises:
            PlanError: The device does not multiply in this dtype.
        """
        if dtype not in self.matmul_flops:
            raise PlanError(
                f"{self.name} has no {dtype} matrix products. "
                f"Use {' or '.join(sorted(self.matmul_flops))}."
            )
        return self.matmul_flops[dtype]


@dataclass(frozen=True, kw_only=True)
class NodeSpec:
    """Devices of one kind with fast links between them."""

    device: DeviceSpec
    count: int
    """Devices in the node."""
    link_bandwidth: float
    """Bytes a second, one device, one direction."""
    link_efficiency: float
    """Part of it that collectives reach."""
    link_latency: float
    """Seconds of one step of an exchange inside the node."""
    sum_bandwidth: float
    """Bytes a second that a ring's sum of a few rows reaches, as in serving; not given: the part
    of the links that collectives reach."""
    sum_latency: float
    """Seconds of one of its steps; not given: as for any exchange."""
    peer_bandwidth: float | None = None
    """The same as `sum_bandwidth` where a driver lets consumer cards reach each other's memory;
    None: the driver makes no difference."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each number is from."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Nodes and the network between them. Ranks are dealt to nodes in order."""

    name: str
    nodes: tuple[tuple[NodeSpec, int], ...]
    """Nodes of each kind, and how many."""
    network_bandwidth: float
    """Bytes a second, one device, one direction."""
    network_latency: float
    """Seconds of one step across the network."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where the network's numbers are from."""

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return sum(node.count * count for node, count in self.nodes)

    @property
    def is_uniform(self) -> bool:
        """Whether all devices are of one kind."""
        return len({node.device.name for node, _ in self.nodes}) == 1

    @property
    def devices(self) -> tuple[DeviceSpec, ...]:
        """The kinds of device, in the order of their ranks."""
        return tuple({node.device.name: node.device for node, _ in self.nodes}.values())

    def device(self, rank: int) -> DeviceSpec:
        """The device of a rank."""
        return self.node(rank).device

    def node(self, rank: int) -> NodeSpec:
        """The kind of node that a rank is in."""
        for node, count in self.nodes:
            if rank < node.count * count:
                return node
            rank -= node.count * count
        raise PlanError(f"{self.name} has {self.ranks} devices, numbered from 0.")

    def kinds_of(self, first: int, count: int) -> tuple[int, ...]:
        """One rank of each kind of device among `count` ranks from `first` on."""
        found: dict[str, int] = {}
        start = 0
        for node, nodes in self.nodes:
            end = start + node.count * nodes
            if start < first + count and first < end:
                found.setdefault(node.device.name, max(start, first))
            start = end
        return tuple(found.values())

    def node_number(self, rank: int) -> int:
        """Which node a rank is in."""
        before = 0
        for node, count in self.nodes:
            if rank < node.count * count:
                return before + rank // node.count
            rank -= node.count * count
            before += count
        raise PlanError(f"{self.name} has {self.ranks} devices, numbered from 0.")

    def first(self, ranks: int) -> ClusterSpec:
        """The part of the cluster that has the first so many ranks.

        Raises:
            PlanError: There are not so many.
        """
        if not 1 <= ranks <= self.ranks:
            raise PlanError(f"The plan needs {ranks} devices, but {self.name} has {self.ranks}.")
        kept: list[tuple[NodeSpec, int]] = []
        left = ranks
        for node, count in self.nodes:
            whole, rest = divmod(min(left, node.count * count), node.count)
            kept += [(node, whole)] * (whole > 0)
            kept += [(replace(node, count=rest), 1)] * (rest > 0)
            left -= whole * node.count + rest
        return replace(self, nodes=tuple(kept))


def preset_devices() -> list[str]:
    """Devices that a cluster's string may name."""
    folder = resources.files("moesaic.planning") / "clusters"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir())


def read_cluster(text: str | Path) -> ClusterSpec:
    """A cluster from a string such as `64xH100`, or from a TOML file.

    Raises:
        PlanError: No such device or file, or numbers that cannot be.
    """
    name = str(text)
    if Path(text).suffix == ".toml" or Path(text).is_file():
        return _read_file(Path(text))
    return join([_read_part(part.strip()) for part in name.split("+")], name=name)


def join(parts: list[ClusterSpec], *, name: str) -> ClusterSpec:
    """Clusters side by side, on the slower one's network."""
    slowest = min(parts, key=lambda part: part.network_bandwidth)
    return replace(
        slowest,
        name=name,
        nodes=tuple(node for part in parts for node in part.nodes),
        network_latency=max(part.network_latency for part in parts),
    )


_PART = re.compile(r"(?:(\d+)\s*[x×*]\s*)?(?:(\d+)\s*[x×*]\s*)?([A-Za-z0-9_. -]*[A-Za-z0-9])")


def _read_part(text: str) -> ClusterSpec:
    cpu = re.fullmatch(r"cpu(\d*)", text.lower())
    match = _PART.fullmatch(text)
    if cpu:
        first, second, device = None, cpu[1] or "1", "cpu"
    elif match:
        first, second, device = match.groups()
        if second is None:
            first, second = None, first or "1"
    else:
        raise PlanError(
            f"{text!r} is no cluster. Write 8x4090, 192x8xA800, 2xH100+6xA800, cpu2, or the name "
            f"of a TOML file."
        )
    preset = _preset(device)
    node, _ = preset.nodes[0]
    sizes = [int(size) for size in (first, second) if size is not None]
    if 0 in sizes or max(sizes) > 2**20:
        raise PlanError(f"{text!r} has {min(sizes)} devices or too many. Give 1 to {2**20}.")
    if first is not None:
        nodes: tuple[tuple[NodeSpec, int], ...] = ((replace(node, count=sizes[1]), sizes[0]),)
    elif device == "cpu":
        nodes = ((replace(node, count=sizes[0]), 1),)
    else:
        whole, rest = divmod(sizes[0], node.count)
        nodes = tuple(
            (replace(node, count=size), count)
            for size, count in ((node.count, whole), (rest, 1))
            if size and count
        )
    return replace(preset, name=text, nodes=nodes)


def _preset(device: str) -> ClusterSpec:
    presets = _presets()
    key = re.sub(r"[\s_.-]", "", device.lower())
    for noise in ("nvidia", "amd", "geforce", "rtx", "hgx", "dgx"):
        key = key.removeprefix(noise)
    if key not in presets:
        raise PlanError(
            f"{device!r} is no device that the planner knows. "
            f"Known are {', '.join(preset_devices())}; any other goes into a TOML file."
        )
    return presets[key]


@cache
def _presets() -> dict[str, ClusterSpec]:
    found = {}
    for item in (resources.files("moesaic.planning") / "clusters").iterdir():
        raw = tomllib.loads(item.read_text(encoding="utf-8"))
        cluster = _cluster_of(raw, where=item.name)
        for alias in (item.name.removesuffix(".toml"), *raw.get("aliases", ())):
            found[re.sub(r"[\s_.-]", "", alias.lower())] = cluster
    return found


def _read_file(path: Path) -> ClusterSpec:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path} is not readable TOML: {error}.") from None
    return _cluster_of(raw, where=str(path))


def _cluster_of(raw: Mapping[str, Any], *, where: str) -> ClusterSpec:
    table = _Table(raw, where)
    groups = raw.get("nodes")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise PlanError(f"{where}: [[nodes]] is missing. Give one for each kind of node.")
    if not groups:
        raise PlanError(f"{where}: there are no [[nodes]].")
    nodes = []
    preset: ClusterSpec | None = None
    for number, group in enumerate(groups):
        part = _Table(group, f"{where}, nodes {number}")
        device, preset = _device_of(part)
        base = preset.nodes[0][0] if preset else None
        link, latency = (base.link_bandwidth, base.link_latency) if base else (None, None)
        reached = base.link_efficiency if base else DEFAULT_LINK
        bandwidth = part.number("link_bandwidth", link)
        efficiency = part.part("link_efficiency", reached)
        step = part.number("link_latency", latency, zero=True)
        # What is known of a preset's sums says nothing of other links.
        same = base if base and bandwidth == link and step == latency else None
        peer = same.peer_bandwidth if same else None
        node = NodeSpec(
            device=device,
            count=part.whole("devices", base.count if base else None),
            link_bandwidth=bandwidth,
            link_efficiency=efficiency,
            link_latency=step,
            sum_bandwidth=part.number(
                "sum_bandwidth", same.sum_bandwidth if same else bandwidth * efficiency
            ),
            sum_latency=part.number("sum_latency", same.sum_latency if same else step, zero=True),
            peer_bandwidth=part.number("peer_bandwidth", peer)
            if "peer_bandwidth" in part.raw
            else peer,
            sources=part.sources,
        )
        nodes.append((node, part.whole("count", 1)))
        part.refuse_others(
            *("device", "devices", "count", "link_bandwidth", "link_efficiency", "link_latency"),
            *("sum_bandwidth", "sum_latency", "peer_bandwidth"),
        )
    network = _Table(table.table("network"), f"{where}, network")
    speed, delay = (preset.network_bandwidth, preset.network_latency) if preset else (None, None)
    cluster = ClusterSpec(
        name=str(raw.get("name", Path(where).stem)),
        nodes=tuple(nodes),
        network_bandwidth=network.number("bandwidth", speed),
        network_latency=network.number("latency", delay, zero=True),
        sources=network.sources,
    )
    network.refuse_others("bandwidth", "latency")
    table.refuse_others("name", "aliases", "nodes", "network")
    return cluster


def _device_of(part: _Table) -> tuple[DeviceSpec, ClusterSpec | None]:
    named = part.raw.get("device")
    if isinstance(named, str):
        preset = _preset(named)
        return preset.nodes[0][0].device, preset
    device = _Table(part.table("device"), f"{part.where}, device")
    flops = _Table(device.table("matmul_flops"), f"{device.where}, matmul_flops")
    best = _Table(device.table("matmul_efficiency"), f"{device.where}, matmul_efficiency")
    flash = _Table(device.table("flash_efficiency"), f"{device.where}, flash_efficiency")
    peaks = {dtype: flops.number(dtype) for dtype in DTYPES if dtype in flops.raw}
    if not peaks:
        raise PlanError(f"{flops.where}: none of {', '.join(DTYPES)} is given.")
    spec = DeviceSpec(
        name=str(device.raw.get("name", "device")),
        memory_bytes=device.number("memory_bytes"),
        memory_bandwidth=device.number("memory_bandwidth"),
        memory_efficiency=device.part("memory_efficiency", DEFAULT_MEMORY),
        matmul_flops=peaks,
        matmul_efficiency={dtype: best.part(dtype, DEFAULT_EFFICIENCY) for dtype in peaks},
        sustained=device.part("sustained", DEFAULT_SUSTAINED),
        flash_efficiency=(
            flash.part("forward", DEFAULT_FLASH[0]),
            flash.part("backward", DEFAULT_FLASH[1]),
        ),
        units=device.whole("units", 0, zero=True),
        launch_seconds=device.number("launch_seconds", DEFAULT_LAUNCH, zero=True),
        sources={
            **device.sources,
            **{f"matmul_flops.{key}": text for key, text in flops.sources.items()},
            **{f"matmul_efficiency.{key}": text for key, text in best.sources.items()},
            **{f"flash_efficiency.{key}": text for key, text in flash.sources.items()},
        },
    )
    device.refuse_others(
        *("name", "memory_bytes", "memory_bandwidth", "matmul_flops", "matmul_efficiency"),
        *("memory_efficiency", "sustained", "flash_efficiency", "units", "launch_seconds"),
    )
    flops.refuse_others(*DTYPES)
    best.refuse_others(*DTYPES)
    flash.refuse_others("forward", "backward")
    return spec, None


DEFAULT_EFFICIENCY = 0.75
"""Of a device that does not say: the middle of the presets'."""

DEFAULT_SUSTAINED = 0.8
"""Of a device that does not say: the middle of the presets'."""

DEFAULT_MEMORY = 0.8
"""Of a device that does not say. Ours: streaming kernels reach 0.85 to 0.92 of the bandwidth,
norms and permutes less."""

DEFAULT_LINK = 0.8
"""Of links that do not say. NCCL's gathers on 8 GPUs with NVLink reach 0.77 to 0.83, DeepEP's
all-to-all 153 of 200 GB/s on an H800."""

DEFAULT_FLASH = (0.6, 0.5)
"""Of a device that does not say: the middle of the presets'."""

DEFAULT_LAUNCH = 6e-6
"""Of a device that does not say. Ours: what eager PyTorch needs for one operator, 5 to 10 us."""


class _Table:
    """A TOML table whose numbers stand as `{ value = 1e9, source = "..." }`, or alone."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.sources: dict[str, str] = {}

    def table(self, key: str) -> Mapping[str, Any]:
        value = self.raw.get(key, {})
        if not isinstance(value, Mapping):
            raise PlanError(f"{self.where}: {key} is {value!r}; a table is needed.")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise PlanError(f"{self.where}: {key} is missing.")
            return default
        if isinstance(value, Mapping):
            self.sources[key] = str(value.get("source", ""))
            value = value.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(f"{self.where}: {key} is {value!r}; a number is needed.")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise PlanError(f"{self.where}: {key} is {value}. Give a number above 0.")
        return float(value)

    def part(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if value > 1:
            raise PlanError(f"{self.where}: {key} is {value}. Give the part reached, up to 1.")
        return value

    def whole(self, key: str, default: int | None, *, zero: bool = False) -> int:
        value = self.number(key, default, zero=zero)
        if value != int(value) or value > 2**20:
            raise PlanError(f"{self.where}: {key} is {value}. Give a whole number to {2**20}.")
        return int(value)

    def refuse_others(self, *known: str) -> None:
        for key in self.raw:
            if key not in known:
                raise PlanError(f"{self.where}: {key!r} is unknown. Known are {', '.join(known)}.")
