"""FP8 weights: e4m3 numbers times a float32 scale, in the layout of compressed-tensors.

A weight w becomes q = round(w / s) in e4m3, whose largest value is 448, with s = max|w| / 448
taken over one row (scheme `channel`) or over the whole matrix (`tensor`, Skywork-MoE's). The
product q * s is read back. On disk a linear layer X has `X.weight` (float8_e4m3fn) and
`X.weight_scale` (float32, (O, 1) or (1,)), and `config.json` (`quantization.compressed`) says how
an engine shall round activations: one scale a token for `channel`, one a tensor for `tensor`,
both found while running. Skywork's third choice, activation scales fixed beforehand, is left out:
it is the least accurate of the three and needs calibration text.

Shapes.  O output channels    I input channels
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0
"""Largest e4m3 number."""

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_per_channel(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row with its own scale.

    Args:
        w_OI: A weight, (O, I), finite, of any float type.

    Returns:
        w_OI: (O, I), float8_e4m3fn.
        scale_O1: (O, 1), float32.
    """
    scale_O1 = scale_of(w_OI.float().abs().amax(dim=1, keepdim=True))
    return round_to_fp8(w_OI, scale_O1), scale_O1


def quantize_per_tensor(w_OI: Tensor, *, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a whole weight with one scale.

    Args:
        w_OI: A weight, (O, I), finite, of any float type.
        largest: Largest magnitude among all weights that share the scale; None for its own.

    Returns:
        w_OI: (O, I), float8_e4m3fn.
        scale: (1,), float32.
    """
    if largest is None:
        largest = w_OI.float().abs().amax()
    scale = scale_of(largest).reshape(1)
    return round_to_fp8(w_OI, scale), scale


def scale_of(largest: Tensor) -> Tensor:
    """The scale that maps `largest`, a magnitude, to the largest e4m3 number."""
    # All-zero rows exist (a silent shared expert), and 0 / 0 is no weight.
    return (largest / FP8_MAX).clamp_min(_SMALLEST_SCALE)


def round_to_fp8(w_OI: Tensor, scale: Tensor) -> Tensor:
    """Nearest e4m3 numbers to w / scale, ties to even."""
    # The cast makes NaN of what overflows, and the division may round just past the limit.
    return (w_OI.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def dequantize(w_OI: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Read FP8 weights back, or others that were divided by a scale.

    Args:
        w_OI: (O, I), float8_e4m3fn or int8.
        scale: (O, 1), (1,) or ().
        dtype: Of the result; the product is taken in float32.
    """
    return (w_OI.float() * scale.float()).to(dtype)
