"""Build and load `grouped_swiglu.cpp`, once per machine, where compiler and processor allow it.

The library is compiled on first use (some twenty seconds) into the user's cache folder, under a
name that holds a hash of the source, the flags and torch's version. Where anything is missing,
`available` says no and the experts run on torch's own operations.
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
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("grouped_swiglu.cpp")

FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
]


@functools.cache
def available() -> bool:
    """Whether the operations `torch.ops.moesaic.swiglu_*` can be used; builds them if need be."""
    # The compiled code is never loaded where even its guard might be an illegal instruction.
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not _has_bf16_products():
        return False
    try:
        torch.ops.load_library(_build())
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = error.stderr[-2000:] if isinstance(error, subprocess.CalledProcessError) else error
        logger.info("experts run on torch's operations; the C++ ones cannot be built: %s", reason)
        return False
    return bool(torch.ops.moesaic.swiglu_is_supported())


def _has_bf16_products() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _build() -> str:
    """Path of the compiled library."""
    source = SOURCE.read_bytes()
    key = hashlib.sha256(source + repr((FLAGS, torch.__version__)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"
    library = cache / f"grouped_swiglu-{key}.so"
    if library.exists():
        return str(library)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler found")
    cache.mkdir(parents=True, exist_ok=True)
    # The lock goes away with the process that holds it, even with one that is killed.
    with (cache / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, library)
    return str(library)


def _compile(compiler: str, library: Path) -> None:
    root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        result = Path(folder) / library.name
        command = [compiler, *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        command += ["-isystem", str(root / "include"), str(SOURCE), "-o", str(result)]
        command += [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        result.replace(library)
