"""What training asks of the C library's allocator, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

REUSE = """
import json, resource, torch
from pathlib import Path
from moesaic.memory import reused_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(mebibytes << 18) for mebibytes in (64, 28, 64, 50)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident_mebibytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

before = resident_mebibytes()
with reused_memory():
    faults = [faults_of_a_step() for _ in range(12)][-1]
    kept = resident_mebibytes() - before
print(json.dumps({"faults": faults, "kept": kept, "left": resident_mebibytes() - before}))
"""


@pytest.fixture(scope="module")
def figures():
    done = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_reused_without_page_faults(figures):
    # 206 MiB are some 50,000 faults when mapped anew. The first rounds still lay out the heap.
    assert figures["faults"] < 1000
    assert figures["kept"] > 100


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_goes_back_to_the_system_at_the_end(figures):
    assert figures["left"] < 20
