"""Clusters: what strings and files say, where each number is from, and what is refused."""

import tomllib
from importlib import resources

import pytest

from moesaic.errors import PlanError
from moesaic.planning.cluster import preset_devices, read_cluster

NUMBERS = {
    "8x4090": (8, [("4090", 8, 1)]),
    "192x8xA800": (1536, [("A800", 8, 192)]),
    "64xH100": (64, [("H100", 8, 8)]),
    "12xH100": (12, [("H100", 8, 1), ("H100", 4, 1)]),
    "2xH100": (2, [("H100", 2, 1)]),
    "2xH100+6xA800": (8, [("H100", 2, 1), ("A800", 6, 1)]),
    "144xGB200": (144, [("GB200", 72, 2)]),
    "3x5xh200": (15, [("H200", 5, 3)]),
    "NVIDIA RTX 4090": (1, [("4090", 1, 1)]),
    "cpu2": (2, [("cpu", 2, 1)]),
    "cpu": (1, [("cpu", 1, 1)]),
}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_string_says_nodes_and_devices(text):
    ranks, nodes = NUMBERS[text]
    cluster = read_cluster(text)
    assert cluster.ranks == ranks
    assert [(node.device.name, node.count, many) for node, many in cluster.nodes] == nodes


@pytest.mark.parametrize("device", preset_devices())
def test_every_number_of_a_preset_has_a_source(device):
    path = resources.files("moesaic.planning") / "clusters" / f"{device}.toml"
    numbers = 0

    def check(table, where):
        nonlocal numbers
        for key, value in table.items():
            if isinstance(value, dict) and "value" in value:
                numbers += 1
                assert len(value["source"]) > 4, f"{where}.{key}"
            elif isinstance(value, dict):
                check(value, f"{where}.{key}")
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, dict):
                        check(item, f"{where}.{key}")
            else:
                assert isinstance(value, str) or key == "devices", f"{where}.{key}"

    check(tomllib.loads(path.read_text(encoding="utf-8")), device)
    assert numbers >= 12
    assert read_cluster(f"2x8x{device}").ranks == 16


def test_known_devices_have_their_datasheets_numbers():
    h100 = read_cluster("8xH100")
    node = h100.nodes[0][0]
    assert node.device.peak("bf16") == 989.4e12
    assert node.device.memory_bandwidth == 3.35e12
    assert node.link_bandwidth == 450e9
    assert h100.network_bandwidth == 50e9
    assert "datasheet" in node.device.sources["memory_bandwidth"]
    assert read_cluster("192x8xA800").network_bandwidth == 12.5e9


def test_ranks_are_dealt_to_nodes_in_order():
    cluster = read_cluster("2x2xH100+3x4xA800")
    assert [cluster.node_number(rank) for rank in range(16)] == [
        *[0, 0, 1, 1],
        *[2] * 4,
        *[3] * 4,
        *[4] * 4,
    ]
    assert [cluster.device(rank).name for rank in (0, 3, 4, 15)] == ["H100", "H100", "A800", "A800"]
    assert cluster.kinds_of(2, 3) == (2, 4)
    assert cluster.kinds_of(5, 4) == (5,)
    assert not cluster.is_uniform


def test_the_first_ranks_are_a_cluster_too():
    first = read_cluster("2x2xH100+3x4xA800").first(7)
    assert first.ranks == 7
    assert [(node.device.name, node.count, many) for node, many in first.nodes] == [
        ("H100", 2, 2),
        ("A800", 3, 1),
    ]
    with pytest.raises(PlanError, match="needs 17 devices"):
        read_cluster("2x2xH100+3x4xA800").first(17)


def test_a_mixed_cluster_has_the_slower_network():
    assert read_cluster("2xH100+6xA800").network_bandwidth == 12.5e9


FILE = """
name = "box"

[[nodes]]
device = "h100"
count = 2
devices = 4

[[nodes]]
count = 1
devices = 2
link_bandwidth = 20e9
link_latency = 1e-6

[nodes.device]
name = "other"
memory_bytes = { value = 48e9, source = "its label" }
memory_bandwidth = 1e12

[nodes.device.matmul_flops]
bf16 = 200e12

[network]
bandwidth = 10e9
latency = 0
"""


def test_a_file_mixes_presets_and_devices_of_its_own(tmp_path):
    path = tmp_path / "box.toml"
    path.write_text(FILE)
    cluster = read_cluster(path)
    assert cluster.name == "box"
    assert cluster.ranks == 10
    assert cluster.device(7).name == "H100"
    assert cluster.device(8).memory_bytes == 48e9
    assert cluster.device(8).sources["memory_bytes"] == "its label"
    assert cluster.network_bandwidth == 10e9
    assert read_cluster(str(path)) == cluster


BAD_STRINGS = {
    "8xFoo": "'Foo' is no device that the planner knows. Known are 3090, 4090, 4090-48gb, a100",
    "0xH100": "Give 1 to",
    "8x0xH100": "Give 1 to",
    "99999999xH100": "Give 1 to",
    "": "is no cluster. Write 8x4090",
    "8xH100+": "is no cluster",
    "nothing.toml": "not readable TOML",
}


@pytest.mark.parametrize("text", BAD_STRINGS)
def test_a_string_that_says_nothing_is_refused_with_the_way_out(text):
    with pytest.raises(PlanError, match=BAD_STRINGS[text]) as caught:
        read_cluster(text)
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "no bandwidth": ("bandwidth = 10e9", "bandwidth = 0", "bandwidth is 0. Give a number above 0"),
    "no link": ("link_bandwidth = 20e9", "link_bandwidth = 0.0", "link_bandwidth is 0.0"),
    "no memory": ("value = 48e9", "value = 0", "memory_bytes is 0"),
    "negative": ("memory_bandwidth = 1e12", "memory_bandwidth = -1.0", "Give a number above 0"),
    "text": ("memory_bandwidth = 1e12", 'memory_bandwidth = "1e12"', "a number is needed"),
    "infinite": ("memory_bandwidth = 1e12", "memory_bandwidth = inf", "above 0"),
    "unknown": ("latency = 0", "latency = 0\nlatence = 0", "'latence' is unknown"),
    "no device": ('device = "h100"', 'device = "h99"', "'h99' is no device"),
    "no rate": ("bf16 = 200e12", "", "none of bf16, fp8, fp32"),
    "no name": ("memory_bandwidth = 1e12", "", "memory_bandwidth is missing"),
    "half": ("devices = 4", "devices = 2.5", "Give a whole number"),
    "none": ("devices = 4", "devices = 0", "Give a number above 0"),
    "broken": ("[network]", "[network", "not readable TOML"),
}


@pytest.mark.parametrize(("old", "new", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_with_impossible_numbers_is_refused_in_one_line(tmp_path, old, new, message):
    assert old in FILE
    path = tmp_path / "box.toml"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(PlanError, match=message) as caught:
        read_cluster(path)
    assert "\n" not in str(caught.value)
