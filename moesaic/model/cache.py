"""Keys and values of the tokens already read, kept for generation.

Shapes.  B sequences    H key-value heads    L cached positions    C head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.spec import ModelSpec


class KVCache:
    """One contiguous buffer of rotated keys and one of values for each layer."""

    def __init__(
        self,
        spec: ModelSpec,
        batch: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (spec.num_layers, batch, spec.num_kv_heads, max_length, spec.head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0
        """Positions that every layer has written."""

    def extend(self, layer: int, keys_BHSC: Tensor, values_BHSC: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of S new positions; return all so far, each (B, H, L, C)."""
        end = self.length + keys_BHSC.shape[2]
        self._keys[layer, :, :, self.length : end] = keys_BHSC
        self._values[layer, :, :, self.length : end] = values_BHSC
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def reserve(self, new: int) -> None:
        """Check that `new` positions fit.

        Raises:
            ConfigError: They do not.
        """
        if self.length + new > self.max_length:
            raise ConfigError(
                f"The cache holds {self.max_length} positions and has {self.length}; "
                f"{new} more do not fit. Make it longer or ask for fewer tokens."
            )

    def advance(self, new: int) -> None:
        """Count `new` positions as written, once every layer has extended."""
        self.length += new
