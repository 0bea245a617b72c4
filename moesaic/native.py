"""Compile C++ operations for torch, once per machine, where compiler and processor allow it.

A library is compiled when it is first asked for (some twenty seconds to a minute) into the user's
cache folder, under a name that holds a hash of the sources, the flags and torch's version. Where
anything is missing `Library.load` says no, and its caller computes with torch's own operations.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp")


@dataclass(frozen=True)
class Library:
    """C++ sources that register operations through `torch/library.h`."""

    name: str
    """Of the compiled file, and in the log."""

    sources: tuple[Path, ...]

    headers: tuple[Path, ...] = ()
    """What the sources include; a change in one builds anew."""

    features: tuple[str, ...] = ()
    """What the compiler may use of the processor, as in `-mavx512f` without the `-m`."""

    needs: tuple[str, ...] = ()
    """What the processor must have before the library is even loaded, as /proc/cpuinfo spells it:
    any function compiled with `features` might be an illegal instruction, its own check too."""

    def load(self) -> bool:
        """Build the library if need be and load it; whether its operations are there."""
        return _load(self)

    @property
    def flags(self) -> list[str]:
        """What the compiler is told."""
        return [*FLAGS, *(f"-m{feature}" for feature in self.features)]


@functools.cache
def _load(library: Library) -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _processor_has(library.needs):
        return False
    try:
        torch.ops.load_library(_build(library))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = error.stderr[-2000:] if isinstance(error, subprocess.CalledProcessError) else error
        logger.info(
            "%s runs on torch's operations; the C++ ones cannot be built: %s", library.name, reason
        )
        return False
    return True


def _processor_has(features: Sequence[str]) -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    found = next((line.split() for line in lines if line.startswith("flags")), [])
    return set(features) <= set(found)


def _build(library: Library) -> str:
    """Path of the compiled library."""
    text = b"".join(path.read_bytes() for path in (*library.sources, *library.headers))
    key = hashlib.sha256(text + repr((library.flags, torch.__version__)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"
    compiled = cache / f"{library.name}-{key}.so"
    if compiled.exists():
        return str(compiled)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler found")
    cache.mkdir(parents=True, exist_ok=True)
    # The lock goes away with the process that holds it, even with one that is killed.
    with (cache / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not compiled.exists():
            _compile(compiler, library, compiled)
    return str(compiled)


def _compile(compiler: str, library: Library, compiled: Path) -> None:
    root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    with tempfile.TemporaryDirectory(dir=compiled.parent) as folder:
        result = Path(folder) / compiled.name
        command = [compiler, *library.flags, f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        command += ["-isystem", str(root / "include")]
        command += ["-isystem", str(root / "include/torch/csrc/api/include")]
        command += [*map(str, library.sources), "-o", str(result)]
        command += [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        result.replace(compiled)
