"""A disk that is full after so many writes, for whatever this process writes under one folder."""

from __future__ import annotations

import builtins
import errno
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

WRITING = frozenset("wax+")


class FullDisk:
    """While this is entered, write number `after` (from 0) and all later ones find no space.

    Opening a file to write, `write`, `truncate`, making a folder, fsync and rename each count
    as one write.

    Args:
        folder: Writes elsewhere are left alone.
        after: Writes that still work; None for all, to count them.
    """

    def __init__(self, folder: Path, *, after: int | None) -> None:
        self.folder = folder.resolve()
        self.after = after
        self.writes = 0
        self._patches: list[Any] = []

    def __enter__(self) -> FullDisk:
        real_open, real_mkdir, real_fsync = io.open, os.mkdir, os.fsync
        real_rename, real_replace = os.rename, os.replace

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not (WRITING & set(mode)) or not self._is_inside(file):
                return real_open(file, mode, *args, **kwargs)
            self._write()
            return _File(real_open(file, mode, *args, **kwargs), self._write)

        def inside(real: Any) -> Any:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                if self._is_inside(path):
                    self._write()
                return real(path, *args, **kwargs)

            return call

        def fsync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            if self._is_inside(Path(f"/proc/self/fd/{number}").readlink()):
                self._write()
            real_fsync(descriptor)

        self._patches = [
            mock.patch.object(builtins, "open", open_),
            mock.patch.object(io, "open", open_),
            mock.patch.object(os, "mkdir", inside(real_mkdir)),
            mock.patch.object(os, "rename", inside(real_rename)),
            mock.patch.object(os, "replace", inside(real_replace)),
            mock.patch.object(os, "fsync", fsync),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for patch in self._patches:
            patch.stop()

    def _is_inside(self, path: Any) -> bool:
        return not isinstance(path, int) and Path(path).absolute().is_relative_to(self.folder)

    def _write(self) -> None:
        self.writes += 1
        if self.after is not None and self.writes > self.after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _File:
    """A file whose writes are counted."""

    def __init__(self, file: Any, on_write: Any) -> None:
        self._file, self._on_write = file, on_write

    def write(self, content: Any) -> int:
        self._on_write()
        count: int = self._file.write(content)
        return count

    def truncate(self, size: int | None = None) -> int:
        self._on_write()
        count: int = self._file.truncate(size)
        return count

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
