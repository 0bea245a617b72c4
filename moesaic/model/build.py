"""Build a model from its spec; read it from a folder; write it to one.

Experts are stacked in memory, one tensor for a layer, and lie one by one on disk;
`checkpoint.names` holds the table between the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.folder import (
    check_complete,
    read_finite,
    read_spec,
    write_model,
)
from moesaic.checkpoint.names import Entry, disk_entries
from moesaic.checkpoint.pieces import Held, pieces
from moesaic.model.transformer import Transformer
from moesaic.quantization.reader import WideReader
from moesaic.spec import ModelSpec


def build_model(
    spec: ModelSpec, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """A model of this spec whose weights are allocated but not set."""
    with torch.device("meta"):
        model = Transformer(spec)
    return allocate(model, dtype=dtype, device=device)


def allocate(model: Transformer, *, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """Give a model or stage that was made on the meta device memory of its own, not yet set."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(empty))
        for name, buffer in module.named_buffers(recurse=False):
            # Buffers keep their own dtype: the selection bias is float32 whatever the weights are.
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    return model


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on the seed and the tensor's name, not on any order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def init_weights(model: Transformer, *, seed: int, std: float = 0.02) -> None:
    """Start from scratch: matrices normal with `std`, norms 1, biases 0. The std is ours."""
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        elif tensor.ndim < 2:
            tensor.zero_()
        else:
            values = torch.empty(tensor.shape, dtype=torch.float32)
            values.normal_(std=std, generator=tensor_generator(seed, name))
            tensor.copy_(values)


@torch.no_grad()
def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """Read a model folder, one tensor at a time. FP8 weights are widened.

    Args:
        folder: An HF folder of any family Moesaic reads.
        dtype: Of the weights in memory; activations follow unless `compute_dtype` is set.
        device: Where they go.

    Returns:
        The model in eval mode.

    Raises:
        FolderError: A file is missing or damaged, or a tensor is missing, extra, of another
            shape, or not finite.
        SpecError: `config.json` describes what Moesaic does not know.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    with WideReader(folder) as reader:
        check_complete(reader, spec)
        model = build_model(spec, dtype=dtype, device=device)
        state = model.state_dict()
        all_of_it = pieces(spec, model.shard, model.units)
        read_pieces({k: Held(v, all_of_it[k]) for k, v in state.items()}, reader, spec)
    return model.eval()


@torch.no_grad()
def read_pieces(held: Mapping[str, Held], reader: WideReader, spec: ModelSpec) -> None:
    """Fill tensors, or a rank's pieces of them, from a folder that `check_complete` passed.

    Raises:
        FolderError: A tensor cannot be read, or is not finite.
    """
    for entry in disk_entries(spec):
        if entry.param not in held:
            continue
        tensor, piece = held[entry.param]
        if entry.expert is None:
            place, slices = tensor, piece.slices
        else:
            number = piece.part_of(0, entry.expert)
            if number is None:
                continue
            place, slices = tensor[number], piece.slices[1:]
        if place.numel():
            place.copy_(read_finite(reader, entry.name)[slices])


def save_model(
    model: Transformer,
    out: Path | str,
    *,
    like: Path | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
) -> Path:
    """Write a model folder that appears whole or not at all.

    Args:
        model: What to write.
        out: The folder to make.
        like: Folder whose tokenizer files come along; None for none.
        dtype: Of the weights on disk. Buffers such as the selection bias keep their own.
        overwrite: Replace a folder that is there.

    Returns:
        `out`.

    Raises:
        FolderError: `out` is taken, or cannot be written.
    """
    state = model.state_dict()
    return write_model(
        Path(out),
        model.spec,
        lambda entry: _place(state, entry),
        dtype=dtype,
        buffers={name: buffer.dtype for name, buffer in model.named_buffers()},
        like=None if like is None else Path(like),
        overwrite=overwrite,
    )


def _place(state: dict[str, Tensor], entry: Entry) -> Tensor:
    """The tensor, or the expert's slice of a stack, that a tensor on disk belongs to."""
    tensor = state[entry.param]
    return tensor if entry.expert is None else tensor[entry.expert]
