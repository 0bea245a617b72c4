"""Memory and time of `copy` upcycling at Skywork-13B's width, against `cp` of the same bytes.

Two layers of Skywork-13B (D 4608, F 12288, 36 heads, V 65536; random bfloat16) become 16
experts each. Measured, each in a process of its own:
    upcycling     wall time, from the start of the job to its fsync and rename
    cp            wall time to copy what upcycling wrote, then fsync of every file
    the proof     wall time, apart
    all           the largest anonymous memory (RssAnon, read from /proc every 2 ms)
Upcycling and `cp` alternate. Each is measured with a cold page cache (nothing of what is
read is cached) and a warm one (what is read was read just before).

    python benchmarks/upcycle_speed.py [--rounds 3] [--folder SCRATCH]

Needs Linux and 29 GB of disk in SCRATCH, all of it given back at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measuring_machine import machine, save

EXPERTS = 16
LAYERS = 2
MEMORY_LIMIT = 1_500_000_000
TIME_LIMIT = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the 29 GB go; a temporary folder")
    parser.add_argument(
        "--cache", nargs="+", choices=("cold", "warm"), default=("cold", "warm"), help="states"
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child[0], *map(Path, arguments.child[1:]))
        return
    # So that a scratch folder of this size is given back on a polite kill too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    scratch = Path(tempfile.mkdtemp(prefix="upcycle-speed-", dir=arguments.folder))
    try:
        result = measure(scratch, arguments.rounds, arguments.cache)
    finally:
        shutil.rmtree(scratch)
    report(result)
    save("upcycle_speed", result)


def measure(scratch: Path, rounds: int, caches: Sequence[str]) -> dict[str, object]:
    """Build the dense folder, alternate upcycling and `cp`, then prove."""
    dense, reference, new = scratch / "dense", scratch / "reference", scratch / "new"
    print(f"building {LAYERS} dense layers in {scratch}", flush=True)
    before = machine()
    child("build", dense)
    child("upcycle", dense, reference)
    written = folder_bytes(reference)
    runs = []
    for index in range(rounds):
        for cache in caches:
            run: dict[str, object] = {"cache": cache}
            order = ("upcycle", "cp") if index % 2 == 0 else ("cp", "upcycle")
            for what in order:
                settle(cache, read=dense if what == "upcycle" else reference, others=scratch)
                if what == "upcycle":
                    outcome = child("upcycle", dense, new)
                    run["upcycle_seconds"] = outcome["seconds"]
                    run["upcycle_anonymous_bytes"] = outcome["anonymous_bytes"]
                else:
                    run["cp_seconds"] = copy_seconds(reference, new)
                assert folder_bytes(new) == written, f"{what=}, {folder_bytes(new)=}, {written=}"
                shutil.rmtree(new)
            run["ratio"] = run["upcycle_seconds"] / run["cp_seconds"]  # type: ignore[operator]
            runs.append(run)
            print(json.dumps(run), flush=True)
    proof = child("prove", dense, reference)
    summary = {
        cache: {
            key: statistics.median(run[key] for run in runs if run["cache"] == cache)
            for key in ("upcycle_seconds", "cp_seconds", "ratio")
        }
        for cache in caches
    }
    return {
        "machine": before,
        "layers": LAYERS,
        "experts": EXPERTS,
        "dense_bytes": folder_bytes(dense),
        "written_bytes": written,
        "median": summary,
        "upcycle_anonymous_bytes": max(run["upcycle_anonymous_bytes"] for run in runs),
        "proof_seconds": proof["seconds"],
        "proof_anonymous_bytes": proof["anonymous_bytes"],
        "proof": proof["result"],
        "memory_limit_bytes": MEMORY_LIMIT,
        "time_limit_ratio": TIME_LIMIT,
        "runs": runs,
    }


def report(result: dict[str, object]) -> None:
    """One table for people."""
    memory = result["upcycle_anonymous_bytes"] / 1e9
    print(
        f"\nwrote {result['written_bytes'] / 1e9:.2f} GB from {result['dense_bytes'] / 1e9:.2f} GB"
    )
    for cache, median in result["median"].items():
        print(
            f"{cache} cache: upcycle {median['upcycle_seconds']:.1f} s, "
            f"cp {median['cp_seconds']:.1f} s, ratio {median['ratio']:.2f} (limit {TIME_LIMIT})"
        )
    print(f"upcycling: {memory:.2f} GB anonymous (limit {MEMORY_LIMIT / 1e9} GB)")
    print(
        f"proof: {result['proof_seconds']:.1f} s, "
        f"{result['proof_anonymous_bytes'] / 1e9:.2f} GB anonymous; "
        f"largest logit difference {result['proof']['logits']['largest_difference']:.2e} "
        f"over {result['proof']['text']['tokens']} tokens"
    )


def child(what: str, *folders: Path) -> dict[str, object]:
    """Run one job in a process of its own and watch its anonymous memory from outside."""
    command = [sys.executable, __file__, "--child", what, *map(str, folders)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                time.sleep(0.002)
        finally:
            process.terminate()
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{what} failed with status {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "anonymous_bytes": peak}


def anonymous_bytes(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def run_child(what: str, dense: Path, out: Path | None = None) -> None:
    """One job; its last line on stdout is a JSON object with `seconds`."""
    if what == "build":
        seconds, result = timed(lambda: build_dense(dense))
    elif what == "upcycle":
        from moesaic.upcycling.config import UpcycleConfig
        from moesaic.upcycling.upcycle import upcycle

        config = UpcycleConfig(dense=dense, out=out, experts=EXPERTS, top_k=2, prove=False)
        seconds, result = timed(lambda: upcycle(config))
    else:
        from moesaic.upcycling.proof import prove

        seconds, result = timed(lambda: prove(dense, out))
    print(json.dumps({"seconds": seconds, "result": result}))


def timed(job) -> tuple[float, object]:  # noqa: ANN001
    start = time.perf_counter()
    result = job()
    return time.perf_counter() - start, result


def build_dense(folder: Path) -> None:
    """Two layers of Skywork-13B with random bfloat16 weights."""
    import torch

    from moesaic.checkpoint.folder import WeightWriter, write_config
    from moesaic.checkpoint.names import disk_entries
    from moesaic.files import NewFolder
    from moesaic.spec import PRESETS

    spec = PRESETS["skywork-13b"].replace(num_layers=LAYERS)
    generator = torch.Generator().manual_seed(0)
    entries = disk_entries(spec)
    with NewFolder(folder) as new:
        plan = [(entry.name, torch.bfloat16, entry.shape) for entry in entries]
        with WeightWriter(new.path, plan) as writer:
            for entry in entries:
                weight = torch.ones(entry.shape, dtype=torch.bfloat16)
                if len(entry.shape) > 1:
                    weight.normal_(std=0.02, generator=generator)
                writer.write(entry.name, weight)
        write_config(new.path, spec, dtype="bfloat16", extra=None)


def copy_seconds(source: Path, out: Path) -> float:
    """Wall time of `cp -r`, ending, as upcycling does, with every file on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(out)], check=True)
    for path in [*out.iterdir(), out]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def settle(cache: str, *, read: Path, others: Path) -> None:
    """Finish all writing, empty the page cache of our files, and read `read` again if warm."""
    os.sync()
    for path in others.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    if cache == "warm":
        for path in read.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.read(16 << 20):
                    pass


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")


if __name__ == "__main__":
    main()
