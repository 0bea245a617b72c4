"""Compile what calls would launch, for GPUs that are not there: `python -m tests.compile_kernels`.

The driver is one that only names a GPU, sm89 and sm90 in turn, and launches are left out. The
Python that chooses grids, tiles and arguments runs on tensors without memory, triton specialises
and compiles what it asks for as it would on a GPU, and ptxas makes machine code. Prints what came
of it as JSON. Without `all` only a few combinations of types and sizes are compiled, every kernel
among them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moesaic.serving.cuda.attention import attend, tiles_of
from moesaic.serving.cuda.cache import HeadNorms, Places, rms_norm, rotate_and_store
from moesaic.serving.cuda.experts import experts
from moesaic.serving.cuda.linear import linear
from moesaic.serving.cuda.tiles import Weight

TARGETS = (89, 90)


class Driver:
    """Says which GPU is there, and can do nothing with it."""

    target = TARGETS[0]

    def get_current_device(self) -> int:
        return self.target  # compiled kernels are kept by device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)


driver = Driver()
run = JITFunction.run
found: list[dict[str, object]] = []
seen: set[str] = set()


def compile_only(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
    """What `kernel[grid](*args, **kwargs)` does here: all but the launch."""
    assert all(0 < size < 2**16 for size in grid[1:]), f"{grid=}"
    for driver.target in TARGETS:
        made = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        if made.hash in seen:
            continue
        seen.add(made.hash)
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        found.append(
            {
                "kernel": kernel.fn.__name__,
                "target": driver.target,
                "shared_bytes": made.metadata.shared,
                "spilled_bytes": spilled_bytes(made.asm["ptx"], driver.target),
                "is_8_bit": given.get("x_scale_ptr") is not None,
                "products": products(made.asm["ptx"]),
                "rows": given.get("ROWS"),
            }
        )


def products(ptx: str) -> list[str]:
    """Which instructions multiply matrices."""
    words = {word for word in ptx.split() if word.startswith(("mma.sync", "wgmma.mma_async"))}
    return sorted(words)


def spilled_bytes(ptx: str, target: int) -> int:
    """Bytes of a thread's registers that ptxas moves to memory."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        arch = "sm_90a" if target == 90 else f"sm_{target}"
        command = [ptxas, "-v", f"--gpu-name={arch}", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    words = done.stderr.split()
    return int(words[words.index("spill") - 2]) if "spill" in words else 0


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(*shape: int, kind: str) -> Weight:
    """A weight without numbers, as Skywork-MoE's on one of eight cards."""
    if kind == "bfloat16":
        return Weight(empty(*shape))
    *experts, rows, columns = shape
    blocks = (-(-rows // 128), -(-columns // 128))
    scales = {"row": (rows, 1), "tensor": (1, 1), "block": blocks, "int8": (rows, 1)}[kind]
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return Weight(empty(*shape, dtype=dtype), empty(*experts, *scales, dtype=torch.float32))


def compile_products(*, has_all: bool) -> None:
    width, inner, num_experts, top_k = 4608, 1536, 16, 2
    kinds = [("row", "float8"), ("block", "wide")]
    if has_all:
        kinds += [("bfloat16", "wide"), ("int8", "wide"), ("row", "wide"), ("block", "float8")]
    for tokens in (1, 256, 2048) if has_all else (1, 2048):  # every tile
        for kind, activations in kinds:
            weights = [
                weight(num_experts, *shape, kind=kind)
                for shape in ((inner, width), (inner, width), (width, inner))
            ]
            chosen_TK = empty(tokens, top_k, dtype=torch.int64)
            gates_TK = empty(tokens, top_k, dtype=torch.float32)
            x_TD = empty(tokens, width)
            experts(x_TD, chosen_TK, gates_TK, *weights, activations=activations)
            linear(x_TD, weight(1920, width, kind=kind), activations=activations)


def compile_attention(*, has_all: bool) -> None:
    caches = (torch.float8_e4m3fn, torch.bfloat16)
    for heads, kv_heads, width in ((5, 5, 128), (9, 3, 64)) if has_all else ((5, 5, 128),):
        for cache in caches if has_all else caches[:1]:
            pools = [empty(100, kv_heads, 16, width, dtype=cache) for _ in "kv"]
            tables = empty(3, 8, dtype=torch.int32)
            for window in (100, None) if has_all else (100,):
                tiles = tiles_of([1, 90], [4, 8], group=heads // kv_heads, device="meta")
                attend(empty(91, heads, width), *pools, tables, tiles, window=window)
            angles = empty(3, width, dtype=torch.float32)
            places = Places(angles, angles, *(empty(3, dtype=torch.int64) for _ in "br"))
            norms = HeadNorms(*(empty(width, dtype=torch.float32) for _ in "qk"), 1e-6)
            for some in (norms, None) if has_all else (norms,):
                qkv = empty(3, (heads + 2 * kv_heads) * width)
                rotate_and_store(qkv, places, *pools, some)
    rms_norm(empty(3, 4608), empty(4608, dtype=torch.float32), 1e-6)


if __name__ == "__main__":
    triton.runtime.driver.set_active(driver)
    JITFunction.run = compile_only
    compile_attention(has_all="all" in sys.argv)
    compile_products(has_all="all" in sys.argv)
    print(json.dumps(found))
