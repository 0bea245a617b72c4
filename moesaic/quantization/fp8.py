"""FP8 weights: e4m3 numbers times a float32 scale, in the layout of compressed-tensors.

A weight w becomes q = round(w / s) in e4m3, whose largest value is 448, with s = max|w| / 448
taken over one row (scheme `channel`) or over the whole matrix (`tensor`, Skywork-MoE's). The
product q * s is read back. On disk a linear layer X has `X.weight` (float8_e4m3fn) and
`X.weight_scale` (float32, (O, 1) or (1,)), and `config.json` says how an engine shall
round activations: one scale a token for `channel`, one a tensor for `tensor`, both found
while running. Skywork's third choice, activation scales fixed beforehand, is left out: it
is the least accurate of the three and needs calibration text.

Shapes.  O output channels    I input channels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import SpecError

Scheme = Literal["channel", "tensor"]

FP8_MAX = 448.0
"""Largest e4m3 number."""

_ACTIVATION_STRATEGY = {"channel": "token", "tensor": "tensor"}
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
    """Read FP8 weights back.

    Args:
        w_OI: (O, I), float8_e4m3fn.
        scale: (O, 1), (1,) or ().
        dtype: Of the result; the product is taken in float32.
    """
    return (w_OI.float() * scale.float()).to(dtype)


def compressed_tensors_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """What `config.json` says under `quantization_config`.

    Args:
        scheme: How weights were rounded, and activations shall be.
        ignore: Linear layers that stay as they are: names, or `re:` and a pattern.
    """
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": scheme, "dynamic": False},
                "input_activations": {
                    **number,
                    "strategy": _ACTIVATION_STRATEGY[scheme],
                    "dynamic": True,
                },
                "output_activations": None,
            }
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """How the weights of a folder were rounded.

    Args:
        config: Its `config.json`.

    Returns:
        The scheme, or None when the folder is not quantised.

    Raises:
        SpecError: It is quantised in a way that is not read here.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = f"{quantization.get('quant_method')} {quantization.get('format', '')}".strip()
    if method != "compressed-tensors float-quantized":
        raise SpecError(
            f"The weights are quantised as {method}, which is not read here. "
            "Use the 16-bit model, or one in compressed-tensors' float-quantized format."
        )
    groups = quantization.get("config_groups", {}).values()
    weights = [group.get("weights") or {} for group in groups]
    strategies = {weight.get("strategy") for weight in weights}
    is_fp8 = all(w.get("num_bits") == 8 and w.get("type") == "float" for w in weights)
    for scheme in get_args(Scheme):
        if is_fp8 and strategies == {scheme}:
            return scheme  # type: ignore[no-any-return]
    raise SpecError(
        f"The weights are quantised by {', '.join(sorted(map(str, strategies))) or 'no rule'}, "
        "but only 8-bit floats with a scale per channel or per tensor are read here."
    )
