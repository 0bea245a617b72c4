"""Read what a training run wrote, whether it has ended or not.

A run that is going on may have written half of its last line; that line is left out. Long
runs are read into at most `MAX_POINTS` intervals of steps, each holding means, so that
memory and the page stay small however long a run was. A step may be there twice, because
training went back to a checkpoint: what was written last counts, and routing takes the mean.

Shapes.  P points in time    L MoE layers    E experts    R ranks
"""

from __future__ import annotations

import json
import tomllib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.checkpoint.folder import read_spec
from moesaic.console import track
from moesaic.errors import FolderError, MoesaicError
from moesaic.spec import ModelSpec

Array = npt.NDArray[np.float64]

MAX_POINTS = 400
"""Intervals that the steps of a run are gathered into."""

LAYER_NUMBERS = (
    "drop_rate",
    "coefficient",
    "entropy",
    "max1_over_max2",
    "max2_over_max3",
)
"""Numbers a layer has in routing.jsonl; one that a run did not write is left out."""

_RANK_NUMBERS = ("peak_memory_bytes", "compute_seconds", "wait_seconds", "tokens_received")


@dataclass(frozen=True)
class Routing:
    """How every MoE layer routed, over time."""

    layers: tuple[int, ...]
    """Which layers of the model, (L,)."""

    steps_P: Array
    """Mean step of each interval."""

    load_PLE: Array
    """Share of the layer's copies that each expert was sent; a row sums to 1."""

    numbers: dict[str, Array]
    """(P, L) each, by name; NaN where there was nothing to measure."""

    width: int
    """Steps gathered into one point."""


@dataclass(frozen=True)
class Similarity:
    """Expert similarity over time."""

    layers: tuple[int, ...]
    steps_P: Array
    values_PL: Array


@dataclass(frozen=True)
class RankPlace:
    """Where a rank stands."""

    pp: int
    dp: int
    tp: int
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Ranks:
    """What every rank did, in the last steps that were written down under one layout."""

    places: tuple[RankPlace, ...]
    """Of each rank, (R,)."""

    steps_P: Array
    seconds_P: Array
    """Of the whole step."""

    peak_memory_R: Array
    """Most bytes held up to the last of these steps."""

    compute_PR: Array
    """Seconds inside forward and backward passes."""

    wait_PR: Array
    """The other seconds of the step."""

    tokens_PR: Array
    """Rows that reached the rank's experts."""

    @property
    def by_pipeline(self) -> list[list[int]]:
        """Ranks that run the same stages, from the first place in the pipeline to the last."""
        members: dict[int, list[int]] = {}
        for rank, place in enumerate(self.places):
            members.setdefault(place.pp, []).append(rank)
        return [members[pp] for pp in sorted(members)]

    @property
    def seconds(self) -> float:
        """Of a typical step: the median, which the first step's set-up does not move."""
        return float(np.median(self.seconds_P))

    @property
    def compute_R(self) -> Array:
        """Seconds of a typical step inside forward and backward passes."""
        median_R: Array = np.median(self.compute_PR, axis=0)
        return median_R

    @property
    def wait_R(self) -> Array:
        """The other seconds of a typical step."""
        median_R: Array = np.median(self.wait_PR, axis=0)
        return median_R

    @property
    def tokens_R(self) -> Array:
        """Mean rows a step that reached the rank's experts."""
        mean_R: Array = self.tokens_PR.mean(axis=0)
        return mean_R


@dataclass(frozen=True)
class Sample:
    """What one model answered to one prompt."""

    prompt: str
    model: str
    text: str


@dataclass(frozen=True)
class Run:
    """Everything the page is made of."""

    path: Path
    metrics: dict[str, Array]
    """One array over the steps for each number of metrics.jsonl; `step` rises."""
    config: dict[str, Any]
    config_text: str | None
    routing: Routing | None
    similarity: Similarity | None
    ranks: Ranks | None
    """None where there was one rank."""
    samples: tuple[Sample, ...]
    evaluation: dict[str, Any] | None
    machine: dict[str, Any]
    spec: ModelSpec | None
    notes: tuple[str, ...]
    """What is missing or was left out, a sentence each."""

    @property
    def planned_steps(self) -> int | None:
        """Steps that the configuration asks for, if it is there."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def is_dropless(self) -> bool:
        """Whether nothing was dropped, so that a drop rate is what a capacity would have caused."""
        routing = self.config.get("routing")
        return isinstance(routing, dict) and routing.get("capacity_factor") == "none"

    @property
    def last_step(self) -> int:
        return int(self.metrics["step"][-1])

    @property
    def is_finished(self) -> bool:
        """Whether the last step asked for has run."""
        return self.planned_steps is not None and self.last_step >= self.planned_steps


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        FolderError: If there is no run, it has no finished step yet, or a file is damaged.
    """
    if not path.is_dir():
        raise FolderError(f"There is no run folder {path}. Name the folder `moesaic train` wrote.")
    notes: list[str] = []
    metrics = _read_metrics(path / "metrics.jsonl", notes)
    config_text = _text(path / "config.toml")
    samples = _read_samples(path / "samples.json")
    evaluation = _read_object(path / "evaluation.json")
    machine = _read_object(path / "machine.json")
    hardware = _read_object(path / "hardware.json")
    routing = _read_routing(path / "routing" / "routing.jsonl", notes)
    similarity = _read_similarity(path / "routing" / "similarity.jsonl", notes)
    ranks = _read_ranks(path / "ranks.jsonl", notes)
    config = _parsed(config_text, path / "config.toml")
    spec = _read_model(path, config)
    is_moe = routing is not None or (spec is not None and spec.moe is not None)
    absent = {
        "config.toml, so the configuration is not shown": config_text is None,
        "machine.json, so the machine and its versions are not shown": machine is None,
        "evaluation.json, so there is no held-out loss": evaluation is None,
        "samples.json, so there are no texts to compare": not samples,
        "routing/routing.jsonl, so nothing is known of the routing": is_moe and routing is None,
        "routing/similarity.jsonl, so the experts' similarity is not shown": is_moe
        and similarity is None,
    }
    notes += [f"The run folder has no {what}." for what, is_absent in absent.items() if is_absent]
    return Run(
        path=path,
        metrics=metrics,
        config=config,
        config_text=config_text,
        routing=routing,
        similarity=similarity,
        ranks=ranks,
        samples=samples,
        evaluation=evaluation,
        machine={**(machine or {}), **(hardware or {})},
        spec=spec,
        notes=tuple(notes),
    )


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Each line of a JSONL file as an object; a torn last line is left out and noted."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    item = json.loads(line)
                    if not isinstance(item, dict) or not isinstance(item.get("step"), int):
                        raise ValueError("no step")
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        notes.append(f"The last line of {path.name} was half written; left out.")
                        return
                    raise FolderError(
                        f"Line {number} of {path} is damaged. Remove that line to go without it."
                    ) from error
                yield item
    except FileNotFoundError:
        return
    except OSError as error:
        raise FolderError(f"Cannot read {path}: {error.strerror}.") from error


def _read_metrics(path: Path, notes: list[str]) -> dict[str, Array]:
    rows = {line["step"]: line for line in _lines(path, notes)}
    if not rows:
        raise FolderError(
            f"{path.parent} holds no finished training step: metrics.jsonl is missing or empty. "
            f"Name the folder of a run that has made at least one step."
        )
    ordered = [rows[step] for step in sorted(rows)]
    names = dict.fromkeys(name for row in ordered for name in row)
    return {name: np.array([_number(row.get(name)) for row in ordered]) for name in names}


def _read_routing(path: Path, notes: list[str]) -> Routing | None:
    steps: dict[int, list[int]] = {}
    sums: dict[str, dict[int, Array]] = {}
    counts: dict[str, dict[int, Array]] = {}
    width = max(1, -(-_last_step(path) // MAX_POINTS))
    layers: tuple[int, ...] = ()
    try:
        for line in track(_lines(path, notes), label="reading routing"):
            layers = tuple(line["layers"])
            interval = (line["step"] - 1) // width
            steps.setdefault(interval, []).append(line["step"])
            for name in ("load", *LAYER_NUMBERS):
                if line.get(name) is None:
                    continue
                values = np.array(line[name], dtype=np.float64)  # None becomes NaN
                if values.shape[0] != len(layers):
                    raise ValueError(f"{name} has {values.shape[0]} layers")
                known = np.isfinite(values)
                zero = np.zeros_like(values)
                total = sums.setdefault(name, {}).setdefault(interval, zero.copy())
                count = counts.setdefault(name, {}).setdefault(interval, zero.copy())
                total += np.where(known, values, 0)
                count += known
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FolderError(
            f"{path} is damaged: {error}. Its format is that of another run."
        ) from error
    if not steps or "load" not in sums:
        return None
    order = sorted(steps)
    means: dict[str, Array] = {}
    for name, by_interval in sums.items():
        empty = np.zeros_like(next(iter(by_interval.values())))
        total_P = np.stack([by_interval.get(i, empty) for i in order])
        count_P = np.stack([counts[name].get(i, empty) for i in order])
        means[name] = np.divide(
            total_P, count_P, out=np.full_like(total_P, np.nan), where=count_P > 0
        )
    return Routing(
        layers=layers,
        steps_P=np.array([np.mean(steps[i]) for i in order]),
        load_PLE=means.pop("load"),
        numbers=means,
        width=width,
    )


def _read_similarity(path: Path, notes: list[str]) -> Similarity | None:
    rows = {line["step"]: line for line in _lines(path, notes)}
    if not rows:
        return None
    order = sorted(rows)
    try:
        values_PL = np.array([rows[step]["similarity"] for step in order], dtype=np.float64)
        layers = tuple(rows[order[-1]]["layers"])
        if values_PL.shape[1:] != (len(layers),):
            raise ValueError(f"{values_PL.shape[1:]} values for {len(layers)} layers")
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{path} is damaged: {error}.") from error
    return Similarity(layers=layers, steps_P=np.array(order, dtype=np.float64), values_PL=values_PL)


def _read_ranks(path: Path, notes: list[str]) -> Ranks | None:
    lines: deque[tuple[int, float, Array]] = deque(maxlen=MAX_POINTS)
    places: tuple[RankPlace, ...] = ()
    layouts = 0
    try:
        for line in _lines(path, notes):
            found = sorted(line["ranks"], key=lambda item: int(item["rank"]))
            if [item["rank"] for item in found] != list(range(len(found))) or not found:
                raise ValueError("ranks are not numbered from 0")
            now = tuple(_place(item) for item in found)
            if now != places:  # the run was resumed under another plan
                places, layouts = now, layouts + 1
                lines.clear()
            while lines and lines[-1][0] >= line["step"]:
                lines.pop()
            values = [[float(item[name]) for item in found] for name in _RANK_NUMBERS]
            lines.append((line["step"], float(line["seconds"]), np.array(values)))
    except (KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{path} is damaged: {error}.") from error
    if len(places) < 2:
        return None
    if layouts > 1:
        notes.append(
            f"The run was resumed under another layout; its ranks are shown from step "
            f"{lines[0][0]:,} on."
        )
    memory_PR, compute_PR, wait_PR, tokens_PR = np.stack([values for _, _, values in lines], axis=1)
    return Ranks(
        places=places,
        steps_P=np.array([step for step, _, _ in lines], dtype=np.float64),
        seconds_P=np.array([seconds for _, seconds, _ in lines]),
        peak_memory_R=memory_PR.max(axis=0),
        compute_PR=compute_PR,
        wait_PR=wait_PR,
        tokens_PR=tokens_PR,
    )


def _place(item: dict[str, Any]) -> RankPlace:
    stages = tuple(int(stage) for stage in item["stages"])
    if not stages:
        raise ValueError(f"rank {item['rank']} has no stage")
    return RankPlace(pp=int(item["pp"]), dp=int(item["dp"]), tp=int(item["tp"]), stages=stages)


def _last_step(path: Path) -> int:
    """The step of the last whole line, read from the end of the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            for reach in (1 << 20, 1 << 24, size):
                file.seek(max(0, size - reach))
                lines = file.read().split(b"\n")[:-1]
                if len(lines) > 1 or (lines and reach >= size):
                    return int(json.loads(lines[-1])["step"])
    except FileNotFoundError:
        return 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"The last line of {path} is damaged: {error}.") from error
    return 1


def _read_samples(path: Path) -> tuple[Sample, ...]:
    items = _json(path)
    if items is None:
        return ()
    try:
        return tuple(Sample(item["prompt"], item["model"], item["text"]) for item in items)
    except (KeyError, TypeError) as error:
        raise FolderError(
            f"{path} is not a list of objects with prompt, model and text."
        ) from error


def _read_object(path: Path) -> dict[str, Any] | None:
    value = _json(path)
    if value is not None and not isinstance(value, dict):
        raise FolderError(f"{path} holds a {type(value).__name__}, not an object.")
    return value


def _json(path: Path) -> Any:
    text = _text(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise FolderError(f"{path} is damaged: {error}.") from error


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"Cannot read {path}: {error}.") from error


def _parsed(config_text: str | None, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config_text or "")
    except tomllib.TOMLDecodeError as error:
        raise FolderError(f"{path} is damaged: {error}.") from error


def _read_model(path: Path, config: dict[str, Any]) -> ModelSpec | None:
    """The spec of the final model, or of the one training began with, which is the same."""
    for folder in (path / "model", Path(str(config.get("model", path / "model")))):
        try:
            return read_spec(folder)
        except MoesaicError:
            continue
    return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
