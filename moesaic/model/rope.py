"""Rotary position embedding (arXiv 2104.09864), half-split, with the usual context stretches.

Shapes.  S positions    C head width    H heads    B sequences
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.spec import RopeSpec


def rope_frequencies(rope: RopeSpec, head_dim: int, length: int) -> Tensor:
    """Angular frequency of each pair of channels.

    Args:
        rope: Base and stretch.
        head_dim: Width of a head, even.
        length: Positions in use; only `dynamic` scaling looks at it.

    Returns:
        Radians per position, (head_dim / 2,), float32.
    """
    theta = rope.theta
    if rope.scaling == "dynamic":
        # NTK-aware: beyond the original context the base grows with the length in use.
        original = rope.original_max_positions
        assert original is not None, f"{rope=}"
        stretched = max(length, original)
        growth = rope.factor * stretched / original - (rope.factor - 1)
        theta = theta * growth ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeSpec) -> Tensor:
    """Stretch long wavelengths, keep short ones, blend between (Llama 3.1's rule)."""
    original = rope.original_max_positions
    assert original is not None, f"{rope=}"
    turns = original * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def rope_tables(rope: RopeSpec, head_dim: int, positions_S: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each (S, head_dim), float32."""
    length = int(positions_S.max()) + 1 if rope.scaling == "dynamic" else 0
    frequencies = rope_frequencies(rope, head_dim, length).to(positions_S.device)
    angles = torch.outer(positions_S.float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Turn each pair (c, c + C/2) of channels by its position's angle; x's dtype is kept."""
    dtype = torch.promote_types(x_BHSC.dtype, torch.float32)
    wide = x_BHSC.to(dtype)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (wide * cos_SC.to(dtype) + turned * sin_SC.to(dtype)).to(x_BHSC.dtype)
