"""Write folders and files so that a reader finds all of it or none of it.

Whatever happens while a folder is written (an exception, Ctrl-C, a full disk, a power cut),
its final name holds either nothing, what it held before, or everything new. A process that
is killed leaves only a hidden `.NAME.partial`, which the next attempt removes.

Nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from moesaic.errors import FolderError


class NewFolder:
    """A folder that appears under its name only when it is complete.

    Used as a context manager. Inside it, `path` is a hidden sibling to write into. Leaving
    without an exception flushes everything to the disk and renames it into place; leaving
    with one, be it KeyboardInterrupt, removes what was written and brings nothing into being.

        with NewFolder(out) as new:
            (new.path / "header.json").write_text(header)

    Args:
        out: Where the folder shall be. Missing parents are made.
        overwrite: Replace a folder that is there and not empty. It stays in place until
            the new one is complete.
        inputs: Files and folders that are read meanwhile; refused if they lie in `out`.

    Raises:
        FolderError: On entry, if `out` is taken, or cannot be made. On leaving, for any OSError
            raised in between or by the flush, such as a full disk.
    """

    def __init__(
        self, out: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()
    ) -> None:
        self.out = Path(out).absolute()
        self._target = Path(out).resolve()
        # Not with_name, which will not have the "/" that is refused on entry.
        self.path = self._target.parent / f".{self._target.name}.partial"
        self._replaced = self._target.parent / f".{self._target.name}.replaced"
        self._overwrite = overwrite
        self._inputs = [Path(path).resolve() for path in inputs]
        self._lock = -1

    def __enter__(self) -> Self:
        self._refuse_what_must_stay()
        try:
            self._put_back_replaced()
            self._refuse_taken()
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True)
            self._take_lock()
            for leftover in self.path.iterdir():  # of a process that was killed
                _remove(leftover)
        except OSError as error:
            self._unlock()
            raise not_written(self.out, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                sync_tree(self.path)
                self._rename()
            elif isinstance(error, OSError):
                raise error
        except OSError as write_error:
            raise not_written(self.out, write_error) from write_error
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
            self._unlock()

    def _refuse_what_must_stay(self) -> None:
        for place, what in ((Path.cwd(), "the current folder"), (Path.home(), "your home folder")):
            if place.resolve().is_relative_to(self._target):
                raise FolderError(f"{self.out} holds {what}. Choose a new folder for the output.")
        for source in self._inputs:
            if source.is_relative_to(self._target):
                raise FolderError(
                    f"The output {self.out} is or holds the input {source}. "
                    f"Choose another folder for the output."
                )

    def _refuse_taken(self) -> None:
        if not self._target.exists():
            return
        if not self._target.is_dir():
            raise FolderError(f"{self.out} is a file. Choose another name for the output folder.")
        if any(self._target.iterdir()) and not self._overwrite:
            raise FolderError(
                f"{self.out} exists and is not empty. Choose another folder, or say overwrite."
            )

    def _take_lock(self) -> None:
        # The kernel lets go of it when a process dies, so a held lock means a living writer.
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise FolderError(
                f"Another process is writing {self.out}. Wait for it, or stop it."
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _rename(self) -> None:
        taken = self._target.is_dir() and any(self._target.iterdir())
        if not (taken and _exchange(self.path, self._target)):
            if taken:
                self._target.rename(self._replaced)
            try:
                self.path.rename(self._target)
            except BaseException:
                self._put_back_replaced()
                raise
        _sync(self._target.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _put_back_replaced(self) -> None:
        # Only there if a writer stopped between its two renames, or could not delete it all.
        if self._replaced.is_dir() and not self._target.exists():
            self._replaced.rename(self._target)
        elif self._replaced.is_dir():
            shutil.rmtree(self._replaced, ignore_errors=True)


def refuse_impossible_file(path: str | Path) -> None:
    """Say before long work, and not after it, that its result cannot become the file `path`.

    Raises:
        FolderError: If `path` is a folder or a device, or is to lie where there is none.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise FolderError(f"{path} cannot be written: it is a folder or a device. Name a file.")
    if not path.parent.is_dir():
        raise FolderError(f"{path} cannot be written: {path.parent} is no folder. Make it first.")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace the file `path` by `text` in one step, flushed to the disk.

    Raises:
        FolderError: If it cannot be written; the file is then as it was before.
    """
    path = Path(path)
    refuse_impossible_file(path)
    target = path.resolve()  # a link stays one
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, and itself, to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, if this system can: Linux's renameat2 with RENAME_EXCHANGE."""
    at_current_folder, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    here, there = os.fsencode(one), os.fsencode(other)
    status: int = renameat2(at_current_folder, here, at_current_folder, there, rename_exchange)
    return status == 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def not_written(out: Path, error: OSError) -> FolderError:
    """What to raise when `out` could not be written because of `error`."""
    reason = error.strerror or str(error) or type(error).__name__
    reason = " ".join(reason.split())
    where = f" ({error.filename})" if error.filename else ""
    advice = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            advice = f" {shutil.disk_usage(out.parent).free:,} bytes are free there."
    return FolderError(f"{out} was not written: {reason}{where}.{advice}")
