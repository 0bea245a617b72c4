"""How `config.json` says that weights have 8 bits: the words of compressed-tensors.

format     weights          scales                         compressed-tensors' name
float8     float8_e4m3fn    a row, or the whole matrix     float-quantized
int8       int8             a row                          int-quantized
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from moesaic.errors import SpecError

Format = Literal["float8", "int8"]

Scheme = Literal["channel", "tensor"]
"""Weights that share a scale: a row, or the whole matrix."""

IN_WORDS: Mapping[str, str] = {"float8": "FP8", "int8": "int8"}
"""What people call the formats."""

_NAMES = {"float8": "float-quantized", "int8": "int-quantized"}
_TYPES = {"float8": "float", "int8": "int"}
_SCHEMES: Mapping[str, tuple[Scheme, ...]] = {"float8": ("channel", "tensor"), "int8": ("channel",)}
_ACTIVATION_STRATEGY = {"channel": "token", "tensor": "tensor"}


class Quantization(NamedTuple):
    """How the weights of a folder were rounded."""

    format: Format
    scheme: Scheme


def compressed_tensors_config(
    scheme: Scheme, ignore: Sequence[str], *, format: Format = "float8"
) -> dict[str, Any]:
    """What `config.json` says under `quantization_config`.

    Args:
        scheme: How weights were rounded, and activations shall be.
        ignore: Linear layers that stay as they are: names, or `re:` and a pattern.
        format: What they became.
    """
    assert scheme in _SCHEMES[format], f"{format=}, {scheme=}"
    number = {"num_bits": 8, "type": _TYPES[format], "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": _NAMES[format],
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


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """How the weights of a folder were rounded.

    Args:
        config: Its `config.json`.

    Returns:
        Format and scheme, or None when the folder is not quantised.

    Raises:
        SpecError: It is quantised in a way that is not read here.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return None
    method = f"{stated.get('quant_method')} {stated.get('format', '')}".strip()
    formats: tuple[Format, ...] = ("float8", "int8")
    for format in formats:
        if method == f"compressed-tensors {_NAMES[format]}":
            return Quantization(format, _scheme_of(stated, format))
    raise SpecError(
        f"The weights are quantised as {method}, which is not read here. "
        "Use the 16-bit model, or one in compressed-tensors' float-quantized or int-quantized "
        "format."
    )


def _scheme_of(stated: Mapping[str, Any], format: Format) -> Scheme:
    groups = stated.get("config_groups", {}).values()
    weights = [group.get("weights") or {} for group in groups]
    strategies = {weight.get("strategy") for weight in weights}
    fits = all(
        weight.get("num_bits") == 8
        and weight.get("type") == _TYPES[format]
        # Offsets stand in tensors of their own, which are not read.
        and weight.get("symmetric", True)
        for weight in weights
    )
    for scheme in _SCHEMES[format]:
        if fits and strategies == {scheme}:
            return scheme
    what = "8-bit floats" if format == "float8" else "symmetric 8-bit integers"
    raise SpecError(
        f"The weights are quantised by {', '.join(sorted(map(str, strategies))) or 'no rule'}, "
        f"but of this format only {what} with a scale per "
        f"{' or per '.join(_SCHEMES[format])} are read here."
    )
