"""Read and write model folders in Hugging Face's format, never more than one tensor at a time.

    config.json            what the model is (`moesaic.spec`)
    model.safetensors      the weights; when they are many bytes, model-00001-of-00003.safetensors
                           and so on, with model.safetensors.index.json to say what is where
    tokenizer.json, ...    copied along

A tensor that is read is mapped from the file: its bytes are page cache, which the kernel may
drop, and not memory of this process. A tensor that is written goes from where it lies straight
to the file. So copying a model of any size takes next to no memory.

A safetensors file is 8 bytes of little-endian header length, the header in JSON (for each
tensor dtype, shape and where its bytes begin and end), and the bytes
(https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.checkpoint.names import Entry, disk_entries
from moesaic.errors import FolderError
from moesaic.files import NewFolder
from moesaic.spec import ModelSpec, spec_from_hf, spec_to_hf

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

GIB = 2**30

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class TensorInfo:
    """What a file says about one tensor before its bytes are read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_config(folder: Path | str) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        FolderError: There is no folder, no `config.json`, or it is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FolderError(f"{folder} {what}; the folder of a model is needed.")
    path = folder / "config.json"
    if not path.is_file():
        raise FolderError(f"{folder} has no config.json; the folder of a model is needed.")
    return _read_json(path)


def read_spec(folder: Path | str) -> ModelSpec:
    """What the model in `folder` is, from its `config.json` alone.

    Raises:
        FolderError: As `read_config`.
        SpecError: The config describes what Moesaic does not know.
    """
    return spec_from_hf(read_config(folder))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise FolderError(f"{path} is not text in UTF-8.") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "too deep or too long"
        raise FolderError(f"{path} is not valid JSON: {reason}.") from None
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(value, dict):
        raise FolderError(f"{path} holds a JSON {type(value).__name__}; an object is needed.")
    return value


class WeightReader:
    """The tensors of a model folder, read one at a time and mapped from the file.

    Opening reads the headers only and holds them against the files' sizes.

    Args:
        folder: The model folder.

    Raises:
        FolderError: Weights are missing, cut short, damaged, or there twice.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, TensorInfo] = {}
        """Name to dtype and shape, in the order of the files."""
        self._shards: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in _shard_paths(self.folder):
            for name, info in _read_header(path).items():
                if name in self._shards:
                    raise FolderError(f"{name} is both in {self._shards[name]} and in {path}.")
                self.entries[name] = info
                self._shards[name] = path
        _check_index(self.folder, self._shards)

    def read(self, name: str) -> Tensor:
        """One tensor as it is on disk. It stays valid after `close`; do not write to it.

        Raises:
            FolderError: There is no such tensor, or its file has become unreadable.
        """
        if name not in self._shards:
            raise FolderError(f"{self.folder} has no tensor {name}.")
        path = self._shards[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            tensor = self._open[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise FolderError(f"{path} cannot be read: {_one_line(error)}.") from error
        assert isinstance(tensor, Tensor), f"{type(tensor)=}"
        return tensor

    def close(self) -> None:
        """Let go of the files."""
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _shard_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FolderError(f"{folder} {what}; the folder of a model is needed.")
    # The order of transformers: one whole file wins over an index.
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        old = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = f" {old[0]} is a pickle, which Moesaic does not open: convert it." if old else ""
        raise FolderError(f"{folder} has neither {WEIGHTS} nor {INDEX}.{hint}")
    names = _weight_map(folder).values()
    paths = []
    for name in sorted(set(names)):
        if Path(name).name != name:
            raise FolderError(f"{folder / INDEX} names {name}, which is not a file of its folder.")
        if not (folder / name).is_file():
            raise FolderError(f"{folder / INDEX} names {name}, which is missing.")
        paths.append(folder / name)
    return paths


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise FolderError(f"{folder / INDEX} has no weight_map from tensors to files.")
    return weight_map


def _check_index(folder: Path, shards: Mapping[str, Path]) -> None:
    if (folder / WEIGHTS).is_file():
        return
    for name, shard in _weight_map(folder).items():
        if name not in shards or shards[name].name != shard:
            raise FolderError(f"{folder / INDEX} puts {name} in {shard}, which does not hold it.")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds, once its header and its size agree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise FolderError(
                    f"{path} is cut short or is no safetensors file: it has {size:,} bytes."
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError):
        raise FolderError(f"{path} is damaged: its header is not JSON.") from None
    if not isinstance(header, dict):
        raise FolderError(f"{path} is damaged: its header is not a JSON object.")
    entries: dict[str, TensorInfo] = {}
    end = 0
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            code, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
            if code not in _DTYPES:
                raise FolderError(f"{path}: {name} has dtype {code}, which Moesaic does not know.")
            info = TensorInfo(_DTYPES[code], tuple(map(int, shape)))
            if min(info.shape, default=0) < 0 or start < 0 or stop - start != info.num_bytes:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise FolderError(f"{path} is damaged: {name} has a header of no sense.") from None
        entries[name] = info
        end = max(end, stop)
    if size != 8 + length + end:
        raise FolderError(
            f"{path} is cut short or damaged: it has {size:,} bytes, but its header speaks of "
            f"{8 + length + end:,}. Copy it again."
        )
    return entries


_SCALES = ("weight_scale", "input_scale")
"""What stands beside a weight of 8 bits (compressed-tensors)."""


def check_complete(reader: WeightReader, spec: ModelSpec) -> None:
    """See that the folder holds every tensor of `spec`, in its shape, and no other.

    Passed over: scales beside weights of 8 bits, `lm_head.weight` of a tied model, stored rope
    frequencies, and what an expert of width 0 leaves.

    Raises:
        FolderError: Names the tensors that are missing, extra, or of another shape.
    """
    expected = {entry.name: entry.shape for entry in disk_entries(spec)}
    missing = [name for name in expected if name not in reader.entries]
    if missing:
        fused = [name for name in reader.entries if name.endswith("experts.gate_up_proj")]
        hint = " Its experts are stacked; save it with save_original_format=True." if fused else ""
        raise FolderError(f"{reader.folder} lacks {_some(missing)} of its config.json.{hint}")
    for name, shape in expected.items():
        info = reader.entries[name]
        if info.shape != shape:
            raise FolderError(
                f"{reader.folder}: {name} has shape {list(info.shape)}, but config.json makes it "
                f"{list(shape)}."
            )
        if not info.dtype.is_floating_point and info.dtype != torch.int8:
            raise FolderError(f"{reader.folder}: {name} is {info.dtype}, not floating point.")
        if info.dtype.itemsize == 1 and _scale_of(name) not in reader.entries:
            kind = "int8" if info.dtype == torch.int8 else "FP8"
            raise FolderError(
                f"{reader.folder}: {name} is {kind}, but {_scale_of(name)} is missing."
            )
    extra = [name for name in reader.entries if name not in expected]
    extra = [name for name in extra if not _is_passed_over(name, reader, spec)]
    if extra:
        raise FolderError(f"{reader.folder} holds {_some(extra)} that its config.json leaves out.")


def _is_passed_over(name: str, reader: WeightReader, spec: ModelSpec) -> bool:
    owner, _, kind = name.rpartition(".")
    if kind in _SCALES:
        weight = reader.entries.get(f"{owner}.weight")
        return weight is not None and weight.dtype.itemsize == 1
    if name == "lm_head.weight":
        return spec.tied_embeddings
    if "shared_expert" in name:
        return spec.family == "qwen2_moe" and not (spec.moe and spec.moe.shared_expert_dim)
    return name.endswith("rotary_emb.inv_freq")


def _scale_of(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.weight_scale"


def _some(names: Sequence[str]) -> str:
    first = ", ".join(names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more tensors"


def read_finite(reader: WeightReader, name: str) -> Tensor:
    """Read one tensor and refuse NaN and infinity in it.

    Raises:
        FolderError: As `WeightReader.read`, or the tensor is not finite.
    """
    tensor = reader.read(name)
    refuse_infinite(reader, name, tensor)
    return tensor


def refuse_infinite(reader: WeightReader, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity in what was read of a tensor.

    Raises:
        FolderError: There is one.
    """
    if not _is_finite(tensor):
        raise FolderError(f"{reader.folder}: {name} holds NaN or infinity. Its file is damaged.")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:
        bits = tensor.view(torch.uint8)
        # e4m3fn has no infinity, and NaN is all ones; e5m2 follows IEEE.
        mask = 0x7F if tensor.dtype == torch.float8_e4m3fn else 0x7C
        return not bool(((bits & mask) == mask).any())
    # Both propagate NaN, read the memory once, and make no copy of it, unlike isfinite.
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


class WeightWriter:
    """Write safetensors files tensor by tensor, holding none of them.

    What will be written is said beforehand, so that the headers can be; then each tensor of
    the plan is written once, in any order.

        with WeightWriter(path, plan) as writer:
            for name, dtype, shape in plan:
                writer.write(name, tensor)

    Args:
        path: An existing folder, normally that of a `NewFolder`.
        plan: Name, dtype and shape of every tensor. They are dealt to files in this order.
        shard_bytes: A file is closed before a tensor that would make it larger. One file is
            called `model.safetensors`; several are numbered and get an index.
        metadata: Strings for the headers beside `{"format": "pt"}`, which transformers asks for.

    Raises:
        FolderError: The disk has too little room, or a file cannot be written.
    """

    def __init__(
        self,
        path: Path | str,
        plan: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        *,
        shard_bytes: int = 5 * GIB,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._infos = {name: TensorInfo(dtype, tuple(shape)) for name, dtype, shape in plan}
        assert len(self._infos) == len(plan), "a name stands twice in the plan"
        self._places: dict[str, tuple[Path, int]] = {}
        self._missing = set(self._infos)
        self._total_bytes = sum(info.num_bytes for info in self._infos.values())
        self._refuse_small_disk()
        shards = _deal(self._infos, shard_bytes)
        self._files = [self.path / _shard_name(i, len(shards)) for i in range(len(shards))]
        for file, names in zip(self._files, shards, strict=True):
            self._write_header(file, names, {"format": "pt", **(metadata or {})})

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor of the plan.

        Args:
            name: As in the plan; each is written once.
            tensor: Of the planned dtype and shape. Bytes go from its memory to the file; only
                one that is not contiguous, or not on the CPU, is copied first.

        Raises:
            FolderError: The file cannot be written; names it, and the bytes.
        """
        info = self._infos[name]
        assert name in self._missing, f"{name} is written twice"
        assert tensor.dtype == info.dtype, f"{name}: {tensor.dtype=}, {info.dtype=}"
        assert tuple(tensor.shape) == info.shape, f"{name}: {tensor.shape=}, {info.shape=}"
        whole = tensor.detach().to("cpu").contiguous()
        # Not reshape: a tensor of one element is contiguous whatever its stride is.
        flat = whole.as_strided((whole.numel(),), (1,))
        file, offset = self._places[name]
        if info.num_bytes:
            _write_at(file, offset, flat.view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def close(self) -> None:
        """Write the index and flush every file to the disk. Every tensor must be written."""
        assert not self._missing, f"{len(self._missing)} tensors of the plan were not written"
        if len(self._files) > 1:
            weight_map = {name: file.name for name, (file, _) in self._places.items()}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2) + "\n"
            self._files.append(self.path / INDEX)
            _write_at(self._files[-1], 0, memoryview(text.encode()))
        for file in self._files:
            _flush(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()

    def _refuse_small_disk(self) -> None:
        try:
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise FolderError(f"{self.path} cannot be written to: {error.strerror}.") from error
        if self._total_bytes > free:
            raise FolderError(
                f"{self.path.parent} has {free:,} bytes free, but the weights take "
                f"{self._total_bytes:,}. Free some space, or write elsewhere."
            )

    def _write_header(self, file: Path, names: list[str], metadata: dict[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": metadata}
        offset = 0
        # Wide types first, as the library lays them out: every tensor then starts at a
        # multiple of its item size, without which it could not be mapped.
        for name in sorted(names, key=lambda name: -self._infos[name].dtype.itemsize):
            info = self._infos[name]
            header[name] = {
                "dtype": _CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.num_bytes],
            }
            offset += info.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in names:
            self._places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])
        _write_at(file, 0, memoryview(len(text).to_bytes(8, "little") + text))


def _deal(infos: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.num_bytes
    return shards


def _shard_name(shard: int, shards: int) -> str:
    return WEIGHTS if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"


def _write_at(file: Path, offset: int, view: memoryview) -> None:
    # Opened for each write: a writer that is dropped half-way then leaves nothing open.
    try:
        # What begins a file also ends what was in it before.
        flags = os.O_WRONLY | os.O_CREAT | (0 if offset else os.O_TRUNC)
        descriptor = os.open(file, flags, 0o666)
        try:
            done = 0
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], offset + done)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _not_written(file, len(view), error) from error


def _flush(file: Path) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _not_written(file, file.stat().st_size, error) from error


def _not_written(file: Path, num_bytes: int, error: OSError) -> FolderError:
    advice = " Make room, or choose another disk." if error.errno == errno.ENOSPC else ""
    reason = error.strerror or type(error).__name__
    return FolderError(f"{num_bytes:,} bytes of {file} were not written: {reason}.{advice}")


def write_config(
    path: Path | str,
    spec: ModelSpec,
    *,
    dtype: str = "bfloat16",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json` into the folder `path`.

    Args:
        path: An existing folder, normally that of a `NewFolder`.
        spec: The model.
        dtype: Name of the type the weights are stored in.
        extra: Further keys, such as `quantization_config`.

    Raises:
        FolderError: It cannot be written.
        SpecError: As `spec_to_hf`.
    """
    config = spec_to_hf(spec, dtype=dtype) | dict(extra or {})
    text = json.dumps(config, indent=2) + "\n"
    file = Path(path) / "config.json"
    _write_at(file, 0, memoryview(text.encode()))
    _flush(file)


def copy_tokenizer(source: Path | str, path: Path | str) -> None:
    """Copy the tokenizer, its chat template and `generation_config.json`, those that are there.

    Raises:
        FolderError: A file cannot be read or written.
    """
    source, path = Path(source), Path(path)
    names = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    names += sorted(file.name for file in source.glob("tokenization_*.py"))
    for name in names:
        try:
            shutil.copyfile(source / name, path / name)
        except OSError as error:
            raise _not_written(path / name, (source / name).stat().st_size, error) from error
        _flush(path / name)


def write_model(
    out: Path,
    spec: ModelSpec,
    tensor_of: Callable[[Entry], Tensor],
    *,
    dtype: torch.dtype,
    buffers: Mapping[str, torch.dtype],
    like: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model folder that appears whole or not at all, one tensor at a time.

    Args:
        out: The folder to make.
        spec: The model.
        tensor_of: Gives a tensor of the folder, of any type, on any device.
        dtype: Of the weights on disk.
        buffers: Those that keep their own type, such as the selection bias, with that type.
        like: Folder whose tokenizer files come along; None for none.
        overwrite: Replace a folder that is there.

    Returns:
        `out`.

    Raises:
        FolderError: `out` is taken, or cannot be written.
    """
    entries = disk_entries(spec)
    dtypes = [buffers.get(entry.param, dtype) for entry in entries]
    plan = [(e.name, kind, e.shape) for e, kind in zip(entries, dtypes, strict=True)]
    with NewFolder(out, overwrite=overwrite) as new:
        writer = WeightWriter(new.path, plan)
        for entry, kind in zip(entries, dtypes, strict=True):
            writer.write(entry.name, tensor_of(entry).detach().to("cpu", kind))
        writer.close()
        write_config(new.path, spec, dtype=str(dtype).removeprefix("torch."))
        if like is not None:
            copy_tokenizer(like, new.path)
    return out


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
