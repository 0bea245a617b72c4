"""Answer `moesaic plan train`: search, or evaluate what is given, and say why."""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.config import load_toml
from moesaic.errors import PlanError
from moesaic.planning.cluster import read_cluster
from moesaic.planning.config import PlanTrainConfig
from moesaic.planning.cost import default_stages
from moesaic.planning.explain import as_json, bounds, gains, uniform
from moesaic.planning.fitting import check_fit
from moesaic.planning.job import Job, job_of
from moesaic.planning.measured import MeasuredTable
from moesaic.planning.plan import Recompute, TrainPlan
from moesaic.planning.search import (
    RECOMPUTE,
    Answer,
    Found,
    Question,
    evaluate,
    search,
)
from moesaic.planning.shape import read_shape, unit_names
from moesaic.planning.split import Span

GB = 1e9

Fixed = dict[str, Any]


def plan_train(config: PlanTrainConfig) -> dict[str, Any]:
    """Find the fastest plan, or evaluate the given one.

    Returns:
        `plan` (what the plan's file holds, or None if Moesaic's training cannot run it), `answer`,
        `bounds`, `others` (the next best), `uniform`, `compared`, `curve`, `searched`.

    Raises:
        PlanError: The question contradicts itself, or nothing fits.
        FolderError: A file cannot be written.
    """
    question, layers = _question(config)
    found = _find(question, layers, config.count)
    best = found.answers[0]
    plain = uniform(best)
    summary = {
        "model": question.shape.name,
        "parameters": question.shape.parameters(),
        "active_parameters": question.shape.active_parameters(),
        "cluster": question.cluster.name,
        "ranks": question.cluster.ranks,
        "plan": _plan(best),
        "answer": as_json(best),
        "bounds": [bound._asdict() for bound in bounds(best)],
        "others": [as_json(answer) for answer in found.answers[1:]],
        "uniform": None if plain is None else as_json(plain),
        "compared": [
            {"file": str(path), **as_json(_of_file(question, path))} for path in config.compare
        ],
        "curve": [gain._asdict() for gain in gains(best, [g * GB for g in config.curve])]
        if config.curve
        else [],
        "searched": {
            "combinations": found.combinations,
            "tried": found.tried,
            "refused": len(found.refusals),
        },
    }
    if config.out is not None:
        best.plan().save(config.out)
    if config.draw is not None:
        from moesaic.planning.draw import draw

        draw(best, plain, config.draw)
    return summary


def _plan(answer: Answer) -> dict[str, Any] | None:
    try:
        return answer.plan().to_json()
    except PlanError:
        return None


def _question(config: PlanTrainConfig) -> tuple[Question, list[float] | None]:
    model, sequence, global_batch = config.model, config.sequence, config.global_batch
    if model.endswith(".toml"):
        model, of_tokens, rows = _recipe(Path(model))
        sequence, global_batch = sequence or of_tokens, global_batch or rows
    if sequence is None or global_batch is None:
        missing = [
            name
            for name, value in (("--sequence", sequence), ("--global-batch", global_batch))
            if value is None
        ]
        raise PlanError(
            f"{' and '.join(missing)} must be given where the model is no training recipe."
        )
    fixed, recompute, layers = read_fix(config.fix)
    for name in ("dtype", "framework", "load_mean", "load_tail"):
        fixed.setdefault(name, getattr(config, name))
    question = Question(
        shape=read_shape(model),
        cluster=read_cluster(config.cluster),
        sequence=sequence,
        global_batch=global_batch,
        fixed=fixed,
        recompute=RECOMPUTE if recompute is None else (recompute,),
        half_layers=config.half_layers,
        usable=config.usable,
        table=None if config.measured is None else MeasuredTable.load(config.measured),
    )
    return question, layers


def _recipe(path: Path) -> tuple[str, int, int]:
    """Model, tokens of a sequence and sequences of a step of a training recipe."""
    raw = load_toml(path)
    data = raw.get("data", {})
    try:
        model, tokens = Path(raw["model"]), Path(data["tokens"])
        header = json.loads((tokens / "header.json").read_text(encoding="utf-8"))
        length = int(header["sequence_length"])
    except KeyError as error:
        raise PlanError(f"{path} does not say {error}, which a plan depends on.") from None
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(f"The token folder of {path} cannot be read: {error}.") from None
    return str(model), length, int(data.get("micro_batch", 4)) * int(data.get("accumulation", 1))


_SHORT = {"microbatch": "micro_batch", "mbs": "micro_batch", "vpp": "interleave", "gbs": ""}


def read_fix(text: str) -> tuple[Fixed, Recompute | None, list[float] | None]:
    """Fields of a job, what every layer recomputes, and layers of each stage, from `--fix`.

    Raises:
        PlanError: It names what no job has, twice, or with a value that cannot be.
    """
    hints = typing.get_type_hints(Job)
    fixed: Fixed = {}
    recompute: Recompute | None = None
    layers: list[float] | None = None
    seen: set[str] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        name = key.strip().replace("-", "_").lower()
        name = _SHORT.get(name, name)
        if not equals or not value:
            raise PlanError(f"--fix has {part!r}. Write name=value, separated by commas.")
        if name in seen:
            raise PlanError(f"--fix has {key} twice.")
        seen.add(name)
        if name == "recompute":
            if value not in RECOMPUTE:
                raise PlanError(
                    f"--fix has recompute={value}. It must be one of {', '.join(RECOMPUTE)}."
                )
            recompute = value
        elif name == "layers":
            try:
                layers = [float(size) for size in value.split("+")]
            except ValueError:
                raise PlanError(f"--fix has layers={value}. Write them as 4+4.5+4.") from None
        elif name in hints and name not in ("sequence", "global_batch"):
            fixed[name] = _value(key, value, hints[name])
        else:
            known = sorted({*hints, "recompute", "layers"} - {"sequence", "global_batch"})
            raise PlanError(f"--fix has {key!r}, which is none of {', '.join(known)}.")
    return fixed, recompute, layers


def _value(key: str, text: str, hint: Any) -> Any:
    """A value as a field's type has it."""
    kinds = {arg for arg in (typing.get_args(hint) or (hint,)) if arg is not type(None)}
    words = {kind for kind in kinds if isinstance(kind, str)}
    if words:
        return text
    try:
        if bool in kinds:
            return {"true": True, "false": False}[text.lower()]
        if float in kinds:
            return float(text)
        return int(text)
    except (KeyError, ValueError):
        raise PlanError(f"--fix has {key}={text}, which is no value of {key}.") from None


def _find(question: Question, layers: list[float] | None, count: int) -> Found:
    """Search; or where the stages are given too, evaluate them."""
    if layers is None:
        return search(question, count=count)
    fixed = question.fixed
    pp = fixed.get("pp", len(layers) // fixed.get("interleave", 1))
    job = _given_job(question, {**fixed, "pp": pp})
    stages = stages_from(layers, question)
    if len(stages) != job.stages:
        raise PlanError(
            f"layers gives {len(stages)} stages, but pp {job.pp} with {job.interleave} a rank are "
            f"{job.stages}."
        )
    recompute: dict[int | str, Recompute] = {}
    if len(question.recompute) == 1 and question.recompute[0] != "none":
        recompute = dict.fromkeys(range(len(question.shape.layers)), question.recompute[0])
    check_fit(question.shape, job, stages, recompute, question.budgets(job), question.means)
    return Found((evaluate(question, job, stages, recompute),), 1, 1, ())


def _given_job(question: Question, fixed: Mapping[str, Any]) -> Job:
    values = dict(fixed)
    ranks = question.cluster.ranks
    others = values.get("tp", 1) * values.get("pp", 1) * values.get("cp", 1)
    values.setdefault("dp", max(1, ranks // others))
    measured = () if question.table is None else question.table.micro_batches
    if len(measured) == 1:
        values.setdefault("micro_batch", measured[0])
    job = Job(sequence=question.sequence, global_batch=question.global_batch, **values)
    if job.world_size > ranks:
        raise PlanError(f"The layout has {job.world_size} ranks, but the cluster {ranks} devices.")
    return job


def stages_from(layers: list[float], question: Question) -> tuple[Span, ...]:
    """Units of each stage, from its number of layers.

    Raises:
        PlanError: The numbers are no halves, or do not add up to the model's layers.
    """
    total = len(question.shape.layers)
    if any(size < 0 or size * 2 != int(size * 2) for size in layers) or sum(layers) != total:
        raise PlanError(
            f"layers adds up to {sum(layers):g}, but the model has {total} layers. Give whole or "
            f"half layers for each stage."
        )
    edges, done = [0], 0
    for size in layers[:-1]:
        done += int(size * 2)
        edges.append(1 + done)
    edges.append(2 * total + 2)
    return tuple(itertools.pairwise(edges))


def _of_file(question: Question, path: Path) -> Answer:
    """A plan's file, evaluated under the same question."""
    plan = TrainPlan.load(path)
    more = {
        name: question.fixed[name]
        for name in ("dtype", "framework", "load_mean", "load_tail")
        if name in question.fixed
    }
    job = job_of(plan, sequence=question.sequence, global_batch=question.global_batch, **more)
    if question.table is not None:
        question.table.check(
            question.shape,
            sequence=job.sequence,
            dtype=job.dtype,
            micro_batch=job.micro_batch,
            ranks=job.world_size,
        )
    if plan.stages is None:
        stages = default_stages(question.shape, job.stages)
    else:
        names = {name: n for n, name in enumerate(unit_names(question.shape))}
        try:
            stages = tuple((names[s.first], names[s.last] + 1) for s in plan.stages)
        except KeyError as error:
            raise PlanError(f"{path} names the unit {error}, which the model lacks.") from None
    return evaluate(question, job, stages, plan.recompute)
