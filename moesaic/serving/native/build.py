"""Whether the C++ kernels can be used here; they are compiled when first asked for."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from moesaic.native import Library

LIBRARY = Library(
    "serving",
    sources=(Path(__file__).with_name("kernels.cpp"),),
    headers=tuple(sorted(Path(__file__).parent.glob("*.h"))),
    features=(
        *("avx512f", "avx512bw", "avx512vl", "avx512dq"),
        *("avx512bf16", "avx512vbmi", "avx512vnni", "gfni"),
        *("amx-tile", "amx-bf16", "amx-int8"),
    ),
    needs=("avx512_bf16", "avx512vbmi", "avx512_vnni", "gfni"),
)


@functools.cache
def available() -> bool:
    """Whether the C++ kernels can be used; builds them if need be."""
    if not LIBRARY.sources[0].exists():
        return False
    return LIBRARY.load() and bool(torch.ops.moesaic_serving.is_supported())
