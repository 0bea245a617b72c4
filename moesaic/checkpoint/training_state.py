"""Training states on disk: complete, checked, and never the only copy while a new one is written.

A state is a folder `step-00000010` in torch's distributed checkpoint format (DCP), written by any
number of ranks and read by any other (`blocks`), with `state.json` and `config.toml` beside it:

    .metadata, __R_0.distcp    the tensors, by name; a file from each rank R
    state.json                 what is not a tensor, such as the step
    config.toml                the configuration that ran, every default filled in
    manifest.json              size and SHA-256 of all of these, written last

It is written under a hidden name, flushed and renamed, so that a state either is there as a
whole or not at all. Every rank writes and hashes its own file; rank 0 makes the folder, writes
the rest and renames. No step begins before all ranks have done the one before, and what fails on
one fails on all. A rank that is lost is no fault of the folder: then the group's own error goes
through, by which whoever watches the ranks knows to start them again.

`newest` reads every byte against the manifest before it believes one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.storage import WriteResult

from moesaic.checkpoint.blocks import BlockReader, Share
from moesaic.checkpoint.pieces import Held
from moesaic.console import note
from moesaic.errors import FolderError, MoesaicError
from moesaic.files import NewFolder, not_written
from moesaic.parallel.agreement import all_do, first_does
from moesaic.parallel.group import ALONE, Group

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

    def load(self, tensors: Mapping[str, Held]) -> None:
        """Fill pieces in place. Every rank reads its own, and waits for no other.

        Raises:
            FolderError: A tensor is not in the state, or has another shape there.
        """
        BlockReader(self.folder).read(tensors)


def save_state(
    checkpoints: Path,
    step: int,
    tensors: Mapping[str, Held],
    *,
    facts: Mapping[str, Any],
    config_toml: str,
    writers: Group = ALONE,
) -> Path:
    """Write the state after `step` optimizer steps. No tensor on the CPU is copied.

    Args:
        checkpoints: Folder that holds the states of a run, and that all ranks see.
        step: Optimizer steps done.
        tensors: Everything that training changes, by name: the pieces that this rank holds.
            All of a tensor must be on some rank; what several hold is written once.
        facts: What is not a tensor, fit for JSON. Those of rank 0 are kept.
        config_toml: The configuration, every default filled in. That of rank 0 is kept.
        writers: All ranks; each calls this.

    Returns:
        The state's folder.

    Raises:
        FolderError: It could not be written, on whichever rank; every rank raises it. Earlier
            states are as they were.
    """
    share = Share.of(tensors, writers)
    return write_share(
        checkpoints, step, share, facts=facts, config_toml=config_toml, writers=writers
    )


def write_share(
    checkpoints: Path,
    step: int,
    share: Share,
    *,
    facts: Mapping[str, Any],
    config_toml: str,
    writers: Group,
) -> Path:
    """The second half of `save_state`, once it is clear what each rank writes."""
    folder = checkpoints / f"step-{step:08d}"
    with _hidden(folder, writers) as path:
        mine = all_do(writers, lambda: _write_blocks(folder, path, share, writers))
        theirs = writers.objects(mine)
        first_does(writers, lambda: _write_rest(folder, path, share, theirs, facts, config_toml))
    return folder


@contextmanager
def _hidden(folder: Path, writers: Group) -> Iterator[Path]:
    """A `NewFolder` for all ranks: rank 0 makes it and renames it, the others know of both."""
    new = NewFolder(folder, overwrite=True)
    with ExitStack() as stack:

        def make() -> None:
            stack.enter_context(new)

        first_does(writers, make)
        yield new.path
        first_does(writers, stack.close)


@dataclass(frozen=True)
class _Written:
    """What one rank did."""

    results: list[WriteResult]
    files: dict[str, Any]
    """For the manifest."""


def _write_blocks(folder: Path, path: Path, share: Share, writers: Group) -> _Written:
    with _failing(folder):
        if not path.is_dir():
            raise FolderError(
                f"Rank {writers.rank} does not see {path}, which rank 0 has made. "
                f"Put the run folder where every rank sees it."
            )
        results = share.write(path)
        # The ranks of one machine hash at the same time.
        threads = max(1, (os.cpu_count() or 1) // writers.size)
        return _Written(results, _files(path, f"__{writers.rank}_*.distcp", threads=threads))


def _write_rest(
    folder: Path,
    path: Path,
    share: Share,
    written: list[_Written],
    facts: Mapping[str, Any],
    config_toml: str,
) -> None:
    with _failing(folder):
        files = {name: file for of_rank in written for name, file in of_rank.files.items()}
        for name, file in files.items():
            if not (path / name).exists() or (path / name).stat().st_size != file["bytes"]:
                raise FolderError(
                    f"Rank 0 does not see all of {path / name}, which another rank has written. "
                    f"Put the run folder where every rank sees it."
                )
        share.finish(path, [of_rank.results for of_rank in written])
        (path / "state.json").write_text(json.dumps(dict(facts), indent=1))
        (path / "config.toml").write_text(config_toml, encoding="utf-8")
        for name in (".metadata", "state.json", "config.toml"):
            files |= _files(path, name)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "piece_bytes": PIECE_BYTES,
            "files": dict(sorted(files.items())),
        }
        (path / "manifest.json").write_text(json.dumps(manifest, indent=1))


@contextmanager
def _failing(folder: Path) -> Iterator[None]:
    """Make what goes wrong while `folder` is written an error that the other ranks can share."""
    try:
        yield
    except MoesaicError:
        raise
    except Exception as error:
        behind = _os_error_behind(error)
        if behind is not None:
            raise not_written(folder, behind) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FolderError(f"{folder} was not written: {reason}.") from error


def _os_error_behind(error: BaseException | None) -> OSError | None:
    # On its way out of a failed write, torch's zip writer fails once more in words of its own.
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def newest(checkpoints: Path, group: Group = ALONE) -> TrainingState | None:
    """The newest state that is complete and undamaged; None if there is none at all.

    Each damaged one that is passed over is named on stderr.

    Args:
        checkpoints: Folder that holds the states of a run.
        group: Ranks that all call this. Rank 0 looks, and tells the others.

    Raises:
        FolderError: There are states, but every one is damaged.
    """
    return first_does(group, lambda: _newest(checkpoints))


def _newest(checkpoints: Path) -> TrainingState | None:
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


def _files(folder: Path, pattern: str, *, threads: int | None = None) -> dict[str, Any]:
    """What a manifest says of some files."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _hash_pieces(path, threads=threads)}
        for path in folder.glob(pattern)
    }


def _hash_pieces(path: Path, *, threads: int | None = None) -> list[str]:
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
    with ThreadPoolExecutor(max_workers=threads or os.cpu_count()) as pool:
        return list(pool.map(digest, starts))
