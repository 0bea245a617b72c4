"""Machine code for sm89 and sm90 is made of every kernel, without a GPU, and fits one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024}
"""What a block of programs may use."""

SPILLED_BYTES = 64
"""Of a thread; a few that are moved once do not show, a sum that lies in memory does."""

KERNELS = {"_attend", "_join", "_rotate_and_store", "_rms_norm", "_schedule", "_grouped"}
KERNELS |= {"_gated_sum", "_round_rows", "_linear"}


@pytest.fixture(
    scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)], ids=str
)
def compiled(request, tmp_path_factory):
    """What came of each kernel and target."""
    variables = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    variables["TRITON_INTERPRET"] = "0"
    command = [sys.executable, "-m", "tests.compile_kernels", request.param]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_becomes_machine_code_that_fits(compiled):
    assert {(one["kernel"], one["target"]) for one in compiled} == {
        (kernel, target) for kernel in KERNELS for target in SHARED_BYTES
    }
    for one in compiled:
        assert one["shared_bytes"] <= SHARED_BYTES[one["target"]], one
        assert one["spilled_bytes"] <= SPILLED_BYTES, one


def test_rounded_rows_meet_8_bit_weights_in_8_bit_products(compiled):
    """But for few rows on sm90, where triton widens both to float16, which holds them exactly."""
    products = {89: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", 90: "e4m3.e4m3"}
    for one in compiled:
        has_rounded_rows = one["kernel"] in ("_grouped", "_linear") and one["is_8_bit"]
        if has_rounded_rows and not (one["target"] == 90 and one["rows"] == 16):
            assert all(products[one["target"]] in product for product in one["products"]), one
            assert one["products"], one
