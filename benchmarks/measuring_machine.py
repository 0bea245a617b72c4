"""What the figures were measured on, kept beside them in results/NAME.json."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """The machine, and how busy it is with other work."""
    import torch

    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    memory = Path("/proc/meminfo").read_text().splitlines()[0].split()[1]
    return {
        "cpu": cpus[0].partition(":")[2].strip() if cpus else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gb": round(int(memory) * 1024 / 1e9, 1),
        "system": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def save(name: str, result: dict[str, object]) -> None:
    """Keep `result` as the last one of this benchmark."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    dated = {"when": datetime.now(UTC).isoformat(timespec="seconds"), **result}
    path.write_text(json.dumps(dated, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
