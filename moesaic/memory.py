"""How a training process asks the C library for memory.

A step allocates and frees every gradient. glibc would map fresh pages for the large ones each
time, and the page faults take up to a tenth of a step on a CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Names of the two settings in glibc's malloc.h."""
_TRIM_DEFAULT, _MMAP_DEFAULT = 128 * 1024, 65_536


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Within it, freed blocks are kept and reused; at its end they go back to the system.

    Where the C library has no such settings, nothing happens.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError):
        yield
        return
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        mallopt(_TRIM_THRESHOLD, _TRIM_DEFAULT)
        mallopt(_MMAP_MAX, _MMAP_DEFAULT)
        gc.collect()
        malloc_trim(0)
