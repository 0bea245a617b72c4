"""Read a model folder's weights as numbers of 16 or 32 bits, quantised or not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.folder import TensorInfo, WeightReader, read_config
from moesaic.errors import FolderError
from moesaic.quantization.compressed import IN_WORDS, Format, quantization_of
from moesaic.quantization.fp8 import dequantize


class WideReader(WeightReader):
    """A `WeightReader` to which a quantised folder looks as if it had never been quantised.

    `entries` leaves the scales out and says float32 for weights of 8 bits; `read` returns them
    multiplied out, and `read_stored` as they are. Of a folder that is not quantised it changes
    nothing.

    Raises:
        FolderError: As `WeightReader`, or a weight of 8 bits has no scale, or one of a wrong shape.
        SpecError: The folder is quantised in a way that is not read.
    """

    def __init__(self, folder: Path | str) -> None:
        self.quantization = quantization_of(read_config(folder))
        """How the folder is quantised; None when it is not."""
        super().__init__(folder)
        self._scales: dict[str, str] = {}
        if self.quantization is not None:
            self._pair_scales(self.quantization.format)

    def read(self, name: str) -> Tensor:
        tensor, scale = self.read_stored(name)
        return tensor if scale is None else dequantize(tensor, scale)

    def read_stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """One tensor as it is on disk, and what it is to be multiplied with, if anything.

        Raises:
            FolderError: As `WeightReader.read`.
        """
        scale = self._scales.get(name)
        return super().read(name), None if scale is None else super().read(scale)

    def _pair_scales(self, format: Format) -> None:
        stored = dict(self.entries)
        dtype = torch.int8 if format == "int8" else torch.float8_e4m3fn
        for name, info in stored.items():
            if info.dtype != dtype:
                continue
            scale = f"{name}_scale"
            if scale not in stored:
                self.close()
                raise FolderError(
                    f"{name} is {IN_WORDS[format]}, but {scale} is missing. "
                    f"Quantise the model again."
                )
            per_row = (*info.shape[:1], 1)
            if stored[scale].shape not in [per_row, (1,), ()]:
                self.close()
                raise FolderError(
                    f"{scale} has shape {list(stored[scale].shape)}, but {name} of shape "
                    f"{list(info.shape)} needs {list(per_row)} or [1]."
                )
            self._scales[name] = scale
            self.entries[name] = TensorInfo(dtype=torch.float32, shape=info.shape)
            del self.entries[scale]
            # Fixed activation scales have no meaning once weights are wide.
            self.entries.pop(f"{name.removesuffix('weight')}input_scale", None)
