"""A plain model folder out of a training state, with never more than one tensor in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.blocks import BlockReader
from moesaic.checkpoint.folder import write_model
from moesaic.checkpoint.names import Entry
from moesaic.checkpoint.pieces import Held, Piece, model_shapes, parameter_names
from moesaic.spec import ModelSpec


def export_state(
    state: Path,
    spec: ModelSpec,
    out: Path,
    *,
    like: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Path:
    """Write the model folder that `save_model` would write for the weights of a state.

    Args:
        state: Folder of the state, from however many ranks.
        spec: The model it is of.
        out: The folder to make.
        like: Folder whose tokenizer files come along; None for none.
        dtype: Of the weights on disk. Buffers such as the selection bias keep their own.
        overwrite: Replace a folder that is there.

    Returns:
        `out`.

    Raises:
        FolderError: The state is damaged or of another model; or `out` is taken, or cannot be
            written.
    """
    reader = BlockReader(state)
    shapes = model_shapes(spec)
    buffers = shapes.keys() - parameter_names(spec)

    def dtype_of(param: str) -> torch.dtype:
        return reader.dtype(f"weights.{param}", shapes[param])

    def tensor_of(entry: Entry) -> Tensor:
        shape = shapes[entry.param]
        spans = [(0, size) for size in shape]
        if entry.expert is not None:
            spans[0] = (entry.expert, entry.expert + 1)
        piece = Piece(shape, tuple(spans), is_cut=True, is_expert=entry.expert is not None)
        tensor = torch.empty(piece.local_shape, dtype=dtype_of(entry.param))
        reader.read({f"weights.{entry.param}": Held(tensor, piece)})
        return tensor if entry.expert is None else tensor[0]

    return write_model(
        out,
        spec,
        tensor_of,
        dtype=dtype,
        buffers={name: dtype_of(name) for name in buffers},
        like=like,
        overwrite=overwrite,
    )
