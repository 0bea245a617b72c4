"""Whether the experts' C++ operations can be used here; they are compiled when first asked for."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from moesaic.native import Library

LIBRARY = Library(
    "grouped_swiglu",
    sources=(Path(__file__).with_name("grouped_swiglu.cpp"),),
    features=("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16"),
    needs=("avx512_bf16",),
)


@functools.cache
def available() -> bool:
    """Whether the operations `torch.ops.moesaic.swiglu_*` can be used; builds them if need be."""
    return LIBRARY.load() and bool(torch.ops.moesaic.swiglu_is_supported())
