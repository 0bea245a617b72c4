"""What a run tells: metrics.jsonl, routing/, TensorBoard, and a line for whoever watches.

    MFU = 3 x (forward FLOPs a token) x (tokens a second) / (peak FLOP/s of the device)

A backward pass costs two forward passes. Forward FLOPs a token are `ModelSpec.flops_per_token`
at the mean context of a causal sequence, (S + 1) / 2: two for each multiply-add of the weights
that are active for a token, and of attention. What recompute does twice counts once. The peak
is a stated one, or what a large square matrix product reaches on this device in the compute
dtype.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics as stats
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.console import is_quiet, note, progress
from moesaic.errors import FolderError
from moesaic.files import write_text_atomic
from moesaic.moe.statistics import RoutingStatistics
from moesaic.spec import ModelSpec
from moesaic.training.config import MetricsConfig, TrainConfig
from moesaic.training.run_folder import JsonLines, RunFolder
from moesaic.version import __version__


class Metrics:
    """Writes everything that a run tells about its steps.

    Args:
        run: The run's folder.
        config: What is wanted.
        layers: Indices of the MoE layers.
        last_step: The step that the run resumes from, -1 if it begins; what was told of later
            steps is removed.
        steps: Steps of the whole run.
    """

    def __init__(
        self,
        run: RunFolder,
        config: MetricsConfig,
        *,
        layers: Sequence[int],
        last_step: int,
        steps: int,
    ) -> None:
        self._config, self._layers, self._steps = config, list(layers), steps
        self._metrics = JsonLines(run.metrics, last_step=last_step)
        self._routing = JsonLines(run.routing, last_step=last_step)
        self._similarity = JsonLines(run.similarity, last_step=last_step)
        # Made only where there is something to tell, or something to cut back.
        self._ranks_path, self._last_step = run.ranks, last_step
        self._ranks = self._open_ranks() if run.ranks.exists() else None
        self._events = Events(run.tensorboard, last_step) if config.tensorboard else None
        self._display = progress()
        self._display.start()
        self._task = self._display.add_task("training", total=steps, completed=max(last_step, 0))

    def add(self, line: Mapping[str, Any]) -> None:
        """Tell of one step: a line of metrics.jsonl, as docs/run-folder.md lists it."""
        self._metrics.add(line)
        self._event(line["step"], {k: v for k, v in line.items() if k != "step"})
        self._display.update(self._task, advance=1, description=describe(line))
        step = line["step"]
        if is_quiet() and (step % self._config.log_every == 0 or step in (1, self._steps)):
            note(f"step {step}/{self._steps}  {describe(line)}")

    def add_routing(
        self,
        step: int,
        statistics: Sequence[RoutingStatistics],
        coefficients: Sequence[float],
    ) -> None:
        """Tell how each MoE layer routed the step, and with which coefficients."""
        layers = [layer.summary() for layer in statistics]
        line = {
            "load": [layer["load"] for layer in layers],
            "drop_rate": [layer["would_drop_rate"] for layer in layers],
            "coefficient": list(coefficients),
            **{
                key: [layer[key] for layer in layers]
                for key in ("entropy", "max1_over_max2", "max2_over_max3")
            },
        }
        self._routing.add({"step": step, "layers": self._layers, **line})
        self._event_by_layer(step, {key: line[key] for key in line if key != "load"})

    def add_similarity(self, step: int, similarity: Sequence[float]) -> None:
        """Tell how alike the experts of each MoE layer are after `step` steps."""
        line = {"step": step, "layers": self._layers, "similarity": list(similarity)}
        self._similarity.add(line)
        self._event_by_layer(step, {"similarity": similarity})

    def add_ranks(self, line: Mapping[str, Any]) -> None:
        """Tell what each rank did in a step."""
        if self._ranks is None:
            self._ranks = self._open_ranks()
        self._ranks.add(line)

    def _open_ranks(self) -> JsonLines:
        return JsonLines(self._ranks_path, last_step=self._last_step)

    def sync(self) -> None:
        """Make everything told so far survive a power cut."""
        for lines in self._lines():
            lines.sync()

    def close(self) -> None:
        """Nothing more to tell."""
        self._display.stop()
        for lines in self._lines():
            lines.close()
        if self._events is not None:
            self._events.close()

    def _lines(self) -> list[JsonLines]:
        found = [self._metrics, self._routing, self._similarity, self._ranks]
        return [lines for lines in found if lines is not None]

    def _event(self, step: int, scalars: Mapping[str, float | None]) -> None:
        if self._events is not None:
            self._events.add(step, {k: v for k, v in scalars.items() if v is not None})

    def _event_by_layer(self, step: int, values: Mapping[str, Sequence[float | None]]) -> None:
        self._event(
            step,
            {
                f"{key}/layer_{layer:02d}": value
                for key, of_layers in values.items()
                for layer, value in zip(self._layers, of_layers, strict=True)
            },
        )


def wants_similarity(config: TrainConfig, spec: ModelSpec, step: int) -> bool:
    """Whether expert similarity is measured after this step: at intervals and at the end."""
    every = config.metrics.similarity_every
    return bool(spec.moe_layers) and every > 0 and (step % every == 0 or step == config.steps)


class Events:
    """A TensorBoard event file, written as it is told: an error shows where it happens.

    TensorBoard forgets what earlier files say about steps after `last_step`.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        # These alone load in a tenth of a second; torch.utils.tensorboard takes ten times that.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._path = folder / f"events.out.tfevents.{time.time_ns():020d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb", buffering=0)
            self._records = RecordWriter(self._file)
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=last_step + 1, session_log=start))
        except OSError as error:
            raise self._failed(error) from error

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write values by tag, as one record."""
        values = [self._summary.Value(tag=tag, simple_value=v) for tag, v in scalars.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        try:
            self._write(event)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """No more records."""
        self._file.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def _failed(self, error: OSError) -> FolderError:
        return FolderError(f"{self._path} cannot be written: {error.strerror or error}.")


def describe(line: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl in words, for the progress line."""
    words = [
        f"loss {line['loss']:.4f}",
        f"{line['tokens_per_second']:,.0f} tokens/s",
        f"MFU {line['mfu']:.1%}",
        f"lr {line['learning_rate']:.2e}",
    ]
    if line["drop_rate"] is not None:
        words.append(f"drop {line['drop_rate']:.2%}")
        words.append(f"coefficient {line['coefficient']:.2e}")
    return "  ".join(words)


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing, as in a dense model."""
    return stats.fmean(values) if values else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory the process held so far: on a GPU its allocations, on a CPU resident pages."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_machine(run: RunFolder, device: torch.device) -> None:
    """Record what the run computes on, for whoever reads its report."""
    machine = {
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moesaic": __version__,
    }
    write_text_atomic(run.machine, json.dumps(machine, indent=1) + "\n")


def _processor() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = [line.split(":", 1)[1] for line in facts.splitlines() if "model name" in line]
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def peak_flops(run: RunFolder, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, measured once for each kind of device.

    Kept in the run folder, so that the MFU of a resumed run has the same denominator.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    key = f"{name}, {torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}"
    known: dict[str, float] = {}
    if run.hardware.exists():
        try:
            known = json.loads(run.hardware.read_text())["peak_flops"]
        except (ValueError, KeyError, TypeError):
            known = {}  # only a cache
    if key not in known:
        known[key] = measure_flops(device, dtype)
        write_text_atomic(run.hardware, json.dumps({"peak_flops": known}, indent=1) + "\n")
    return known[key]


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Best of the square matrix products that fit in half a second, and of three at least."""
    size = 8192 if device.type == "cuda" else 2048
    x = torch.ones(size, size, dtype=dtype, device=device)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - begin < 0.5:
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])  # the first one builds the kernel
