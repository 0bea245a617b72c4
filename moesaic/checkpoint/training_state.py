"""Training states on disk: complete, checked, and never the only copy while a new one is written.

A state is a folder `step-00000010` in torch's distributed checkpoint format (DCP), which can
be read again with another number of ranks, with `state.json` and `config.toml` beside it:

    .metadata, __0_0.distcp    the tensors, by name
    state.json                 what is not a tensor, such as the step
    config.toml                the configuration that ran, every default filled in
    manifest.json              size and SHA-256 of all of these, written last

It is written under a hidden name, flushed and renamed, so that a state either is there as a
whole or not at all. `newest` reads every byte against the manifest before it believes one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from moesaic.console import note
from moesaic.errors import FolderError
from moesaic.files import NewFolder

FORMAT = "moesaic-training-state"
VERSION = 1

PIECE_BYTES = 64 * 2**20
"""Files are hashed in pieces of this size, several at a time: one core hashes some 1.5 GB/s."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A state on disk that has been checked."""

    folder: Path
    facts: Mapping[str, Any]
    """What `state.json` holds."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return step_of(self.folder)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors` in place, one after the other.

        Raises:
            FolderError: A tensor is not in the state, or has another shape there.
        """
        saved = FileSystemReader(self.folder).read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            size = getattr(saved.get(name), "size", None)
            if size is None or tuple(size) != tuple(tensor.shape):
                there = "no such tensor" if size is None else f"shape {tuple(size)}"
                raise FolderError(
                    f"{self.folder} has {there} for {name}, which needs shape "
                    f"{tuple(tensor.shape)}. It belongs to another model; use a new run folder."
                )
        try:
            reader = FileSystemReader(self.folder)
            with _one_process():
                state_dict_loader.load(dict(tensors), storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise FolderError(f"{self.folder} cannot be read: {_cause(error)}.") from error


def save_state(
    checkpoints: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    *,
    facts: Mapping[str, Any],
    config_toml: str,
) -> Path:
    """Write the state after `step` optimizer steps. No tensor on the CPU is copied.

    Args:
        checkpoints: Folder that holds the states of a run.
        step: Optimizer steps done.
        tensors: Everything that training changes, by name.
        facts: What is not a tensor, fit for JSON.
        config_toml: The configuration, every default filled in.

    Returns:
        The state's folder.

    Raises:
        FolderError: It could not be written. Earlier states are as they were.
    """
    folder = checkpoints / f"step-{step:08d}"
    with NewFolder(folder, overwrite=True) as new:
        # One writing thread: with more, torch loses the errors of all but the first.
        writer = FileSystemWriter(new.path, thread_count=1, sync_files=True)
        try:
            with _one_process():
                state_dict_saver.save(dict(tensors), storage_writer=writer, no_dist=True)
        except CheckpointException as error:
            raise _cause(error) from error
        (new.path / "state.json").write_text(json.dumps(dict(facts), indent=1))
        (new.path / "config.toml").write_text(config_toml, encoding="utf-8")
        (new.path / "manifest.json").write_text(json.dumps(_manifest(new.path), indent=1))
    return folder


def newest(checkpoints: Path) -> TrainingState | None:
    """The newest state that is complete and undamaged; None if there is none at all.

    Each damaged one that is passed over is named on stderr.

    Raises:
        FolderError: There are states, but every one is damaged.
    """
    folders = _folders(checkpoints)
    for folder in reversed(folders):
        fault = damage(folder)
        if fault is None:
            facts = json.loads((folder / "state.json").read_text())
            return TrainingState(folder=folder, facts=facts)
        note(f"{folder} is damaged ({fault}); trying the one before.")
    if folders:
        raise FolderError(
            f"Every checkpoint in {checkpoints} is damaged. "
            f"Restore one, or delete them all to begin again at step 0."
        )
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with the state in `folder`, in a few words; None if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            return f"format {manifest['format']} version {manifest['version']} is unknown here"
        files = manifest["files"]
        for name, expected in files.items():
            if (folder / name).stat().st_size != expected["bytes"]:
                return f"{name} has {(folder / name).stat().st_size} bytes, not {expected['bytes']}"
        for name, expected in files.items():
            if _hash_pieces(folder / name) != expected["sha256"]:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{Path(error.filename).name if error.filename else folder.name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is not readable"
    return None


def prune(checkpoints: Path, *, keep: int) -> None:
    """Delete all but the `keep` newest states, oldest first.

    Raises:
        FolderError: One cannot be deleted.
    """
    for folder in _folders(checkpoints)[:-keep]:
        # Renamed first: a kill in the middle of deleting must not leave half a state
        # under a state's name.
        dying = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(dying, ignore_errors=True)
        try:
            folder.rename(dying)
        except OSError as error:
            raise FolderError(f"{folder} cannot be deleted: {error.strerror}.") from error
        shutil.rmtree(dying, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for leftover in checkpoints.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def step_of(folder: Path) -> int:
    """Optimizer steps done in a state's folder, from its name."""
    return int(folder.name.removeprefix("step-"))


def _folders(checkpoints: Path) -> list[Path]:
    found = (path for path in checkpoints.glob("step-*") if path.name[5:].isdigit())
    return sorted((path for path in found if path.is_dir()), key=step_of)


def _manifest(folder: Path) -> dict[str, Any]:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _hash_pieces(path)}
        for path in sorted(folder.iterdir())
    }
    return {"format": FORMAT, "version": VERSION, "piece_bytes": PIECE_BYTES, "files": files}


def _hash_pieces(path: Path) -> list[str]:
    def digest(start: int) -> str:
        with path.open("rb") as file:
            file.seek(start)
            piece = hashlib.sha256()
            left = PIECE_BYTES
            while left and (block := file.read(min(left, 2**20))):
                piece.update(block)
                left -= len(block)
            return piece.hexdigest()

    starts = range(0, path.stat().st_size, PIECE_BYTES)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(digest, starts))


@contextmanager
def _one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch remarks on `no_dist=True` that it was right to ask for it.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong inside torch, whose own exception would pass by every `except`."""
    first = next((cause for cause, _ in error.failures.values()), error)
    # On its way out of a failed write, torch's zip writer fails once more in words of its own.
    behind: BaseException | None = first
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind or first
