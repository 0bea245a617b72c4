"""What `moesaic quantize` may be asked. Nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How a model folder becomes one of 8-bit weights."""

    model: Path
    """Hugging Face folder with 16-bit or 32-bit weights, dense or MoE."""

    out: Path
    """Folder to write, in compressed-tensors' layout, with quantization.json beside the weights."""

    format: Literal["float8", "int8"] = "float8"
    """What weights become: e4m3 floats, or integers. Both are of one size; GPUs multiply either in
    8 bits, and which of them costs less loss depends on the weights."""

    scheme: Literal["channel", "tensor"] = "channel"
    """Weights that share a scale. `channel`: one row; engines round activations token by token.
    `tensor`: the whole matrix, and both input matrices of an expert together, as Skywork-MoE's
    engine wants them. int8 has `channel` alone."""

    data: Path | None = None
    """Token folder on whose held-out split the loss is measured before and after; none skips it."""

    max_sequences: int | None = None
    """Held-out sequences to read; none reads all."""

    batch_size: int = 4
    """Sequences in one forward pass of that measurement."""

    overwrite: bool = False
    """Replace `out` if it is there."""

    def __post_init__(self) -> None:
        if self.format == "int8" and self.scheme != "channel":
            raise ConfigError(
                f"scheme is {self.scheme}, but int8 weights are read with a scale a row. "
                f"Use scheme channel, or format float8."
            )
        for name in ("max_sequences", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}. Read at least 1 sequence.")
