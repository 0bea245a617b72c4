"""The measuring job: time layers and exchanges on all ranks at once, and write the table."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.folder import read_spec
from moesaic.console import progress
from moesaic.data.batches import Batch, BatchOrder
from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import ConfigError
from moesaic.files import refuse_impossible_file
from moesaic.measuring.config import MeasureConfig
from moesaic.measuring.links import Exchange, exchanges, measured_links
from moesaic.measuring.rounds import (
    Case,
    Clock,
    ProcessorTime,
    Samples,
    pooled,
    slowest,
    time_rounds,
)
from moesaic.measuring.units import Rows, Timed, distinct_units
from moesaic.memory import reused_memory
from moesaic.parallel.agreement import first_does
from moesaic.parallel.join import Needs, joined
from moesaic.parallel.launch import environment_world
from moesaic.parallel.stopwatch import Stopwatch
from moesaic.parallel.watch import Watch
from moesaic.parallel.world import World
from moesaic.planning.layout import fit
from moesaic.planning.measured import MeasuredTable
from moesaic.planning.plan import TrainPlan
from moesaic.spec import PRESETS, ModelSpec
from moesaic.version import __version__

LOOKED_AT = 256
"""Micro-batches that tell how many have rows of several documents."""


def measure(config: MeasureConfig) -> dict[str, Any]:
    """Time every kind of layer, and every kind of exchange where there are several ranks.

    Every rank calls this alike. The table is written at the end, whole or not at all.

    Returns:
        What the table's file holds, and under `out` where it lies.

    Raises:
        ConfigError: The config contradicts itself, the model, the tokens, or the machine.
        PlanError: The model cannot be split so.
        FolderError: The model or the tokens cannot be read, or the table cannot be written.
    """
    member = environment_world()
    size = config.ranks or (1 if member is None else member.size)

    def needs() -> Needs:
        refuse_impossible_file(config.out)
        return Needs(size, _device(config).type)

    with joined(needs, config=config.launch) as watch, reused_memory():
        try:
            return _measure_joined(config, size, watch)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"The layers of {config.model} with gradients and moments do not fit the device: "
                f"{str(error).partition('.')[0]}. Raise tp, or lower micro_batch or sequence."
            ) from None


def _measure_joined(config: MeasureConfig, size: int, watch: Watch) -> dict[str, Any]:
    world = World.join(fit(_plan(config, size), _spec(config)), _device(config))
    _check_clock(config, world)
    timed = timed_units(config, world)
    links = exchanges(world, config.largest_message)
    busy = _load()
    of_units, of_links = _time(config, world, timed, links, watch)
    table = MeasuredTable(
        device=_device_name(world.device),
        # Ranks on processors share them; each GPU is its rank's own.
        ranks=size if world.device.type == "cpu" else None,
        units=tuple(one.measured(of_units) for one in timed),
        links=measured_links(links, of_links),
        about={
            **_about(config, size, world.device),
            "load_average": {"before": busy, "after": _load()},
        },
    )
    first_does(world.everyone, lambda: table.save(config.out))
    return {**table.to_json(), "out": str(config.out)}


def timed_units(config: MeasureConfig, world: World) -> list[Timed]:
    """This rank's share of every kind of unit, ready to be timed.

    Raises:
        ConfigError: The tokens are not of this model or not of this length.
        FolderError: They cannot be read.
    """
    sorts = sorts_of_rows(config, world.layout.spec, world.device)
    dtype = getattr(torch, config.compute_dtype)
    return [
        Timed.of(unit, world, sorts, dtype=dtype, routing=config.routing)
        for unit in distinct_units(world.layout.spec)
    ]


def _time(
    config: MeasureConfig, world: World, timed: list[Timed], links: list[Exchange], watch: Watch
) -> tuple[Samples, Samples]:
    """Of units all ranks' samples, of exchanges each round's slowest rank."""
    cases: list[Case] = [case for one in timed for case in one.cases]
    names = {one.name for one in links}

    def clock(case: Case) -> Clock:
        if config.clock == "processor" and case.name not in names:
            return ProcessorTime()
        return Stopwatch(world.device)

    with progress() as display:
        total = config.warmup_rounds + config.rounds
        task = display.add_task("measuring", total=total)

        def tell(done: int) -> None:
            watch.progress(done, "the next round")
            display.update(task, completed=done)

        found = time_rounds(
            [*cases, *links],
            rounds=config.rounds,
            warmup_rounds=config.warmup_rounds,
            clock=clock,
            meet=world.everyone.wait_for_all,
            tell=tell,
        )
    of_ranks = world.everyone.objects(found)
    units = [{k: v for k, v in samples.items() if k[0] not in names} for samples in of_ranks]
    messages = [{k: v for k, v in samples.items() if k[0] in names} for samples in of_ranks]
    return pooled(units), slowest(messages)


def _check_clock(config: MeasureConfig, world: World) -> None:
    threads = torch.get_num_threads()
    if config.clock == "processor" and (world.device.type != "cpu" or threads > 1):
        raise ConfigError(
            f"clock is processor, but a rank has {threads} threads on {world.device.type}. Set "
            f"OMP_NUM_THREADS=1 and use device cpu, or the wall's clock."
        )


def _spec(config: MeasureConfig) -> ModelSpec:
    return PRESETS[config.model] if config.model in PRESETS else read_spec(Path(config.model))


def _plan(config: MeasureConfig, size: int) -> TrainPlan:
    if size % config.tp:
        raise ConfigError(
            f"{size} ranks cannot form tensor-parallel groups of {config.tp}. "
            f"Start a multiple of tp."
        )
    return TrainPlan(
        dp=size // config.tp, tp=config.tp, experts_over=config.experts_over, ep=config.ep
    )


def sorts_of_rows(config: MeasureConfig, spec: ModelSpec, device: torch.device) -> list[Rows]:
    """A micro-batch whose rows are of one document each, one whose are not, or either."""
    if config.tokens is None:
        assert config.sequence is not None, "the config refuses both to be left out"
        generator = torch.Generator().manual_seed(0)
        shape = (config.micro_batch, config.sequence)
        ids, targets = (
            torch.randint(0, spec.vocab_size, shape, generator=generator).to(device)
            for _ in range(2)
        )
        return [Rows(ids, targets, None)]
    folder = TokenFolder(config.tokens)
    _check_tokens(config, spec, folder)
    order = BatchOrder(folder, batch_size=config.micro_batch, seed=0)
    rows = max(1, folder.num_sequences("train") // config.micro_batch)
    batches = [order.batch(step) for step in range(min(LOOKED_AT, rows))]
    found: list[Rows] = []
    for is_mixed in (False, True):
        alike = [batch for batch in batches if _is_mixed(batch) is is_mixed]
        if alike:
            ids, targets, documents = (column.to(device) for column in alike[0])
            found.append(Rows(ids, targets, documents, len(alike) / len(batches)))
    return found


def _check_tokens(config: MeasureConfig, spec: ModelSpec, folder: TokenFolder) -> None:
    if folder.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"{folder.path} holds tokens up to {folder.vocab_size - 1}, but {config.model} has "
            f"{spec.vocab_size} embeddings. Take the tokens of its own training."
        )
    if config.sequence not in (None, folder.sequence_length):
        raise ConfigError(
            f"sequence is {config.sequence}, but rows of {folder.path} have "
            f"{folder.sequence_length} tokens. Leave one of them out."
        )


def _is_mixed(batch: Batch) -> bool:
    """Whether a row has tokens of several documents."""
    return bool((batch.documents_BS != batch.documents_BS[:, :1]).any())


def _device(config: MeasureConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no GPU. Use device auto or cpu.")
    wants_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if wants_gpu else torch.device("cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _about(config: MeasureConfig, size: int, device: torch.device) -> dict[str, Any]:
    return {
        "model": config.model,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "moesaic": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device_type": device.type,
        "processors": os.cpu_count(),
        "ranks": size,
        "threads_a_rank": torch.get_num_threads(),
        "rounds": config.rounds,
        "clock": config.clock,
        "tokens": None if config.tokens is None else str(config.tokens),
        "routing": asdict(config.routing),
    }


def _load() -> list[float]:
    return [round(load, 2) for load in os.getloadavg()]
