"""Bytes that stored matrices, keys and values take."""

from __future__ import annotations

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
"""Bytes of one number."""

SCALED = ("float8", "int8")
"""Kinds that have a float32 scale a row."""

PACKED_ROWS = 32
"""The CPU kernels' tiles are this many rows high."""

PACKED_COLUMNS = 64
"""And this many columns wide."""


def stored_bytes(kind: str, rows: int, columns: int, *, packed: bool) -> int:
    """Bytes of a matrix with its scales; nothing where it has no rows or no columns.

    Args:
        kind: What a number is stored in, one of `ITEMSIZE`.
        rows: Output channels.
        columns: Input channels.
        packed: Whether it is stored as the CPU kernels read it, in whole tiles.
    """
    if not rows or not columns:
        return 0
    if packed:
        rows, columns = _up(rows, PACKED_ROWS), _up(columns, PACKED_COLUMNS)
    return rows * columns * ITEMSIZE[kind] + (4 * rows if kind in SCALED else 0)


def kv_bytes(kind: str, kv_heads: int, tokens: int, head_dim: int) -> int:
    """Bytes of keys and values of one layer."""
    return 2 * kv_heads * tokens * head_dim * ITEMSIZE[kind]


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
