"""Weights of 8-bit integers: whole numbers from -127 to 127 times a float32 scale a row.

A weight w becomes q = round(w / s), ties to even, with s = max|w| / 127 over its row. It costs as
many bytes as FP8 and is the finer of the two where the weights of a row are of a size: its steps
are all alike, where those of e4m3 grow with the number. On disk it is compressed-tensors' format
`int-quantized`: `X.weight` (int8) and `X.weight_scale` (float32, (O, 1)). -128 is never written.

Shapes.  O output channels    I input channels
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127.0
"""Largest magnitude that is used."""

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_per_channel(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row with its own scale.

    Args:
        w_OI: A weight, (O, I), finite, of any float type.

    Returns:
        w_OI: (O, I), int8.
        scale_O1: (O, 1), float32.
    """
    wide_OI = w_OI.float()
    # All-zero rows exist (a silent shared expert), and 0 / 0 is no weight.
    scale_O1 = (wide_OI.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp_min(_SMALLEST_SCALE)
    return (wide_OI / scale_O1).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale_O1
