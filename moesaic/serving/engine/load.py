"""From an `EngineConfig` to what it asks for: the plan, the size of the cache, the model.

Every rank calls these alike, and what one rank measures of its memory the others are told, so all
come to the same plan.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from moesaic.checkpoint.folder import read_config, read_spec
from moesaic.errors import ConfigError
from moesaic.parallel.group import ALONE, Group
from moesaic.parallel.watch import Watch
from moesaic.planning.serving.layout import fit
from moesaic.planning.serving.ledger import ledger
from moesaic.planning.serving.plan import ServePlan
from moesaic.quantization.compressed import quantization_of
from moesaic.serving.config import EngineConfig
from moesaic.serving.execution.runner import (
    ModelExecutor,
    free_bytes,
    load_executor,
    takes_packed,
)

GIB = 2**30
BLOCK_TOKENS = 16

SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Of the memory that weights and work leave free, what the cache may take unless told. Ours."""


def load_rank(
    config: EngineConfig, *, group: Group = ALONE, watch: Watch | None = None
) -> ModelExecutor:
    """Load this rank's part of the model and the cache.

    Raises:
        MoesaicError: The folder, the plan, the device or the memory does not allow it.
    """
    device = device_of(config.device)
    plan = complete_plan(config, device, group=group)
    return load_executor(
        config.model,
        plan,
        dtype=config.dtype,
        device=device,
        implementation=config.implementation,
        group=group,
        max_step_tokens=config.max_step_tokens,
        least_tokens=_least_tokens(config),
        watch=watch,
    )


def complete_plan(config: EngineConfig, device: torch.device, *, group: Group = ALONE) -> ServePlan:
    """The plan that the config names or describes, with the size of the cache filled in.

    Raises:
        ConfigError: Config and plan contradict each other.
        PlanError: The plan cannot be read, is for another model, or the memory is too little.
    """
    plan = plan_of(config)
    if plan.kv_blocks is not None:
        return plan
    spec = read_spec(config.model)
    context = min(config.max_context or spec.max_positions, spec.max_positions)
    wanted = -(-(config.kv_tokens or config.max_sequences * context) // plan.block_tokens)
    if plan.memory_bytes is not None or config.memory_gib is not None:
        budgets = plan.memory_bytes or (int((config.memory_gib or 0) * GIB),) * plan.ranks
        plan = replace(plan, memory_bytes=budgets)
        return replace(plan, kv_blocks=min(wanted, _room(config, plan, device)))
    if config.kv_tokens is not None:
        return replace(plan, kv_blocks=wanted)
    free = replace(plan, memory_bytes=_free(device, plan, group))
    room = max(1, int(_room(config, free, device) * SHARE[device.type]))
    return replace(plan, kv_blocks=min(wanted, room))


def _room(config: EngineConfig, plan: ServePlan, device: torch.device) -> int:
    """Blocks that the plan's budgets leave room for."""
    return ledger(
        fit(plan, read_spec(config.model)),
        dtype=config.dtype,
        packed=takes_packed(config.implementation, plan, dtype=config.dtype, device=device),
        max_step_tokens=config.max_step_tokens,
        least_tokens=_least_tokens(config),
    )[0].kv_blocks


def plan_of(config: EngineConfig) -> ServePlan:
    """The plan as the config has it, before anything is measured.

    Raises:
        ConfigError: Config and plan contradict each other.
        PlanError: The plan cannot be read.
    """
    if config.plan is None:
        return ServePlan(
            weights=_weights(config),
            kv_cache=config.dtype if config.kv_cache == "auto" else config.kv_cache,
            block_tokens=config.block_tokens or BLOCK_TOKENS,
        )
    plan = ServePlan.load(config.plan)
    for name, given in (
        ("weights", None if config.weights == "auto" else config.weights),
        ("kv_cache", None if config.kv_cache == "auto" else config.kv_cache),
        ("block_tokens", config.block_tokens),
    ):
        planned = getattr(plan, name)
        if given is not None and given != planned:
            raise ConfigError(
                f"{name} is {given}, but the plan {config.plan} has {planned}. Leave {name} out, "
                f"or change the plan."
            )
    for name, planned, key in (
        ("kv_tokens", plan.kv_blocks, "kv_blocks"),
        ("memory_gib", plan.memory_bytes, "memory_bytes"),
    ):
        if getattr(config, name) is not None and planned is not None:
            raise ConfigError(
                f"{name} is {getattr(config, name)}, but the plan {config.plan} has {key} of its "
                f"own. Leave {name} out, or take {key} out of the plan."
            )
    return plan


def _weights(config: EngineConfig) -> Any:
    if config.weights != "auto":
        return config.weights
    stored = quantization_of(read_config(config.model))
    return config.dtype if stored is None else stored.format


def _least_tokens(config: EngineConfig) -> int:
    """Positions without which loading is not worth its while."""
    return config.kv_tokens or config.max_context or 1


def _free(device: torch.device, plan: ServePlan, group: Group) -> tuple[int, ...]:
    """Memory that each rank could take."""
    free = free_bytes(device)
    if free is None:
        raise ConfigError("This system does not say how much memory is free. Give memory_gib.")
    # Processes of one machine share its memory; each GPU has its own.
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    found = cast(list[int], group.objects(free // neighbours))
    # With the wrong number of ranks loading says so.
    return tuple(found) if len(found) == plan.ranks else (min(found),) * plan.ranks


def device_of(name: str) -> torch.device:
    """The device that a config names.

    Raises:
        ConfigError: There is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("The device is cuda, but no GPU is usable here. Use cpu or auto.")
    return torch.device("cuda", torch.cuda.current_device())


def eos_token_ids(folder: Path) -> set[int]:
    """Tokens that end an answer: those of `config.json` and of `generation_config.json`."""
    ends = set(read_spec(folder).eos_token_ids)
    path = folder / "generation_config.json"
    if path.is_file():
        stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ends.update([stated] if isinstance(stated, int) else stated or ())
    return ends
