"""The run folder: who may write it, where things lie, and lines that are never doubled.

`docs/run-folder.md` specifies the format. Lines of the .jsonl files come in the order of their
steps. A resumed run first cuts them back to the step it resumes from, which also drops a line
that a kill left half written.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from moesaic.errors import FolderError, MoesaicError


class RunFolder:
    """A run's folder, locked while it is used as a context manager.

    Args:
        path: Where it is, or shall be.
        resume: `never` refuses a folder that holds anything.

    Raises:
        FolderError: On entry, if the folder is taken, is no run folder, or cannot be made.
    """

    def __init__(self, path: Path, *, resume: Literal["auto", "never"]) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.plan = path / "plan.json"
        self.hardware = path / "hardware.json"
        self.machine = path / "machine.json"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.jsonl"
        self.ranks = path / "ranks.jsonl"
        self.routing = path / "routing" / "routing.jsonl"
        self.similarity = path / "routing" / "similarity.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.model = path / "model"
        self._resume = resume
        self._lock: BinaryIO | None = None
        self._is_new = False

    def __enter__(self) -> Self:
        try:
            self._is_new = not self.path.exists()
            if not self._is_new:
                self._refuse_foreign()
            for folder in (self.path, self.routing.parent, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            # Held until the process ends, however it ends.
            self._lock = (self.path / ".lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise FolderError(f"Another process is training in {self.path}. Wait for it.") from None
        except OSError as error:
            self._unlock()
            raise FolderError(f"The run folder {self.path} cannot be used: {error}.") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What was refused before it began leaves nothing behind.
        if self._is_new and isinstance(error, MoesaicError) and not self.metrics.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _refuse_foreign(self) -> None:
        if not self.path.is_dir():
            raise FolderError(f"The run folder {self.path} is a file. Choose another name.")
        names = {entry.name for entry in self.path.iterdir()}
        if names and self._resume == "never":
            raise FolderError(
                f"The run folder {self.path} is not empty, and resume is never. "
                f"Choose another folder, or say resume auto to go on with it."
            )
        # A run that was killed while it began may have left less than a config.toml.
        if not names <= {".lock", ".config.toml.partial", "routing", "checkpoints", "logs"} and (
            "config.toml" not in names
        ):
            raise FolderError(
                f"{self.path} is not empty and not a run folder: it has no config.toml. "
                f"Choose another folder."
            )


class JsonLines:
    """A file of one JSON object a line, each with a `step`, that lines are added to.

    Args:
        path: The file; made if missing.
        last_step: Lines of later steps, and whatever follows them, are removed first.

    Raises:
        FolderError: It cannot be read or written, here and in the methods.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        self.path = path
        try:
            self._file = path.open("ab+", buffering=0)
            self._file.truncate(_end_of(self._file, last_step))
        except OSError as error:
            raise self._failed(error) from error

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one line. It survives the end of the process, but not yet a power cut."""
        try:
            text = json.dumps(dict(line), allow_nan=False).encode() + b"\n"
            while text:  # an unbuffered write may take only a part
                text = text[self._file.write(text) :]
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> None:
        """Make all lines survive a power cut too."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def _failed(self, error: OSError) -> FolderError:
        return FolderError(f"{self.path} cannot be written: {error.strerror or error}.")


def _end_of(file: Any, last_step: int) -> int:
    """Where the last whole line ends whose step is at most `last_step`."""
    file.seek(0)
    end = 0
    for line in file.read().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError):
            break
        end += len(line)
    return end
