"""Answer `moesaic plan serve`: compare layouts, choose one, and say what it takes and does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from moesaic.errors import PlanError
from moesaic.planning.cluster import ClusterSpec, read_cluster
from moesaic.planning.config import PlanServeConfig
from moesaic.planning.serving.choose import Arrangement, Question, arrangements, choose
from moesaic.planning.serving.layout import fit
from moesaic.planning.serving.ledger import GIB, RankLedger, binding_rank
from moesaic.planning.serving.plan import ServePlan
from moesaic.planning.serving.speed import machine_of
from moesaic.spec import PRESETS, ModelSpec, spec_from_hf

MOST_RANKS = 128
"""Ranks that are planned for. Ours: sums over more take longer than the work they share."""

GPU_USABLE, CPU_USABLE = 0.95, 0.5
"""Parts of a device's memory to fill. Ours: a GPU has nothing else to do, a machine has."""


def plan_serve(config: PlanServeConfig) -> dict[str, Any]:
    """Find the fastest layout that can be served, and what is predicted of it and of others.

    Returns:
        `plan` (what its file holds), `choice` and `reason`, `ledger` of each rank, `arrangements`,
        `by_batch`, `by_context`, `by_target`, and the `assumptions`.

    Raises:
        PlanError: The cluster or the model is not known, or nothing fits.
        SpecError: The model's config.json is not one that is read.
        FolderError: The plan cannot be written.
    """
    name, spec = read_model(config.model)
    cluster = read_cluster(config.cluster)
    cluster = cluster.first(config.ranks or cluster.ranks)
    if cluster.ranks > MOST_RANKS:
        raise PlanError(
            f"{cluster.name} has {cluster.ranks} devices, but a server's ranks share every layer, "
            f"which up to {MOST_RANKS} are planned to do. Give --ranks."
        )
    question = _question(config, spec, cluster)
    found = arrangements(question)
    best = _chosen(config, found)
    ledgers = best.ledgers()
    assert best.plan is not None, best.name
    reason = _reason(best, found, config)
    plan = replace(
        best.plan,
        kv_blocks=ledgers[0].kv_blocks,
        about={"model": name, "cluster": cluster.name, "layout": best.name, "reason": reason},
    )
    summary = {
        "model": name,
        "parameters": spec.num_params(),
        "active_parameters": spec.active_params(),
        "cluster": cluster.name,
        "ranks": cluster.ranks,
        "crosses_nodes": _crosses(config, cluster),
        "weights": config.weights,
        "kv_cache": config.kv_cache,
        "packed": question.packed,
        "context": config.context,
        "choice": best.name,
        "reason": reason,
        "bound": best.bound,
        "shapes": _shapes(plan, spec),
        "kv_tokens": ledgers[0].kv_blocks * plan.block_tokens,
        "binding_rank": binding_rank(ledgers),
        "ledger": [_ledger(one) for one in ledgers],
        "arrangements": [_arrangement(one, best) for one in found],
        "by_batch": _by_batch(found, config),
        "by_context": _by_context(found, config),
        "target": config.target,
        "by_target": []
        if config.target is None
        else [_by_target(one, config.target) for one in found],
        "fewer_ranks": _fewer(config, spec, cluster, best),
        "assumptions": _assumptions(config, question),
        "plan": plan.to_json(),
    }
    if config.out is not None:
        plan.save(config.out)
    return summary


def read_model(source: str) -> tuple[str, ModelSpec]:
    """A model's name and spec, from a preset, a `config.json` or a folder that has one.

    Raises:
        PlanError: There is none, or it is not JSON.
        SpecError: It is of a family that cannot be served.
    """
    known = source.lower()
    if known in PRESETS:
        return known, PRESETS[known]
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if path.exists():
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return name, spec_from_hf(_read_json(path))
    presets = resources.files("moesaic.planning") / "models"
    names = sorted(item.name.removesuffix(".json") for item in presets.iterdir())
    if known in names:
        text = (presets / f"{known}.json").read_text(encoding="utf-8")
        return known, spec_from_hf(json.loads(text))
    raise PlanError(
        f"There is no model {source!r}: no such file or folder, and no preset. Presets are "
        f"{', '.join(sorted([*PRESETS, *names]))}."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not readable JSON: {error}.") from None
    if not isinstance(config, dict):
        raise PlanError(f"{path} is no config.json: it does not hold an object.")
    return config


def _crosses(config: PlanServeConfig, cluster: ClusterSpec) -> bool:
    return not config.one_box and cluster.node_number(cluster.ranks - 1) > 0


def _question(config: PlanServeConfig, spec: ModelSpec, cluster: ClusterSpec) -> Question:
    if config.context > spec.max_positions:
        raise PlanError(
            f"context is {config.context}, but the model was made for {spec.max_positions} "
            f"positions. Give that many or fewer."
        )
    devices = [cluster.device(rank) for rank in range(cluster.ranks)]
    is_cpu = all(device.name == "cpu" for device in devices)
    if config.peer_access and not all(
        cluster.node(rank).peer_bandwidth for rank in range(cluster.ranks)
    ):
        raise PlanError(
            f"peer_access says that a driver lets consumer cards reach each other's memory; "
            f"{cluster.name} has other devices, or says no peer_bandwidth. Leave it out."
        )
    usable = config.usable or (CPU_USABLE if is_cpu else GPU_USABLE)
    budgets = tuple(
        int(usable * device.memory_bytes - config.reserve_gib * GIB) for device in devices
    )
    if min(budgets) <= 0:
        raise PlanError(
            f"usable {usable} of {min(d.memory_bytes for d in devices) / GIB:.2f} GiB less "
            f"reserve_gib {config.reserve_gib} leaves nothing. Raise the one or lower the other."
        )
    wanted = config.kv_tokens or config.max_batch * spec.max_positions
    return Question(
        spec=spec,
        machine=machine_of(
            cluster,
            config.weights,
            dtype=config.dtype,
            one_box=config.one_box,
            peer_access=config.peer_access,
            bus=None if config.bus_gbs is None else 1e9 * config.bus_gbs,
            hop=None if config.hop_us is None else 1e-6 * config.hop_us,
            stream=config.memory_efficiency,
            products=config.matmul_efficiency,
            sum_bytes=config.sum_bytes,
            host=1e-6 * config.host_us,
        ),
        budgets=budgets,
        weights=config.weights,
        kv_cache=config.kv_cache,
        dtype=config.dtype,
        packed={"packed": True, "plain": False}.get(
            config.kernels, is_cpu and config.dtype == "bfloat16"
        ),
        block_tokens=config.block_tokens,
        max_step_tokens=config.max_step_tokens,
        context=config.context,
        batch=config.batch,
        max_batch=config.max_batch,
        kv_tokens=-(-wanted // config.block_tokens) * config.block_tokens,
    )


def _chosen(config: PlanServeConfig, found: list[Arrangement]) -> Arrangement:
    if config.layout == "fastest":
        return choose(found)
    named = [one for one in found if one.name == config.layout]
    if not named:
        raise PlanError(
            f"layout is {config.layout!r}, which differs from no other here. There are "
            f"{', '.join(one.name for one in found if one.plan is not None)}."
        )
    return choose(named)


def _reason(best: Arrangement, found: list[Arrangement], config: PlanServeConfig) -> str:
    """Why this one, in words."""
    batch, speed = best.asked
    assert speed is not None, best.name
    if config.layout != "fastest":
        return f"{best.name} was asked for"
    parts = [
        f"{best.name} answers {batch} sequences of {config.context} positions at "
        f"{speed.tokens_per_second:,.0f} tokens/s"
    ]
    for one in found:
        if one is best:
            continue
        gain = one.tokens_per_second / best.tokens_per_second - 1
        cache = one.kv_tokens / best.kv_tokens - 1
        if one.plan is None and gain > 0.001:
            parts.append(f"{one.name} would be {gain:.0%} faster, but there is no pipeline")
        elif one.name in ("rotated", "fixed", "padded", "whole experts"):
            if one.tokens_per_second == 0:
                parts.append(f"{one.name} does not fit")
            elif abs(gain) < 0.001 and abs(cache) < 0.001:
                parts.append(f"{one.name} is as good")
            else:
                parts.append(f"{one.name}: {gain:+.1%} speed, {cache:+.1%} cache")
    return "; ".join(parts)


def _shapes(plan: ServePlan, spec: ModelSpec) -> dict[str, Any]:
    """Sizes in the first layers, and over all of them."""
    layout = fit(replace(plan, kv_blocks=None), spec)
    ranks = range(plan.ranks)

    def sums(name: str) -> list[int]:
        return [sum(getattr(s, name).sizes[rank] for s in layout.layers) for rank in ranks]

    return {
        "heads": [list(splits.heads.sizes) for splits in layout.layers[:2]],
        "heads_over_all_layers": sums("heads"),
        "kv_heads_over_all_layers": sums("kv_heads"),
        "columns": list(
            (layout.layers[-1].expert_columns if spec.moe else layout.layers[-1].ffn).sizes
        ),
        "experts": list(layout.layers[-1].experts.sizes),
        "vocabulary": list(layout.vocab.sizes),
    }


def _ledger(one: RankLedger) -> dict[str, Any]:
    return {
        "rank": one.rank,
        "weights": dict(one.weights),
        "weight_bytes": one.weight_bytes,
        "kv_block_bytes": one.kv_block_bytes,
        "kv_blocks": one.kv_blocks,
        "kv_bytes": one.kv_bytes,
        "workspace_bytes": one.workspace_bytes,
        "total_bytes": one.total_bytes,
        "budget_bytes": one.budget_bytes,
        "blocks_that_fit": one.blocks_that_fit,
    }


def _arrangement(one: Arrangement, best: Arrangement) -> dict[str, Any]:
    batch, speed = one.asked
    return {
        "name": one.name,
        "can_run": one.plan is not None,
        "is_chosen": one is best,
        "fullest_weight_bytes": max(one.fullest),
        "kv_tokens": one.kv_tokens,
        "batch": batch,
        "tokens_per_second": one.tokens_per_second,
        "to_choice": one.tokens_per_second / best.tokens_per_second - 1,
        "token_seconds": None if speed is None else speed.token_seconds,
        "step": None if speed is None else {**speed.step._asdict(), "seconds": speed.step.seconds},
        "prefill_tokens_per_second": one.prefill(one.question.max_step_tokens),
    }


def _by_batch(found: list[Arrangement], config: PlanServeConfig) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "batch": batch,
            "context": config.context,
            "tokens_per_second": one.decode(batch, config.context).tokens_per_second,
            "fits": one.has_room(batch, config.context),
        }
        for one in found
        for batch in config.batches
    ]


def _by_context(found: list[Arrangement], config: PlanServeConfig) -> list[dict[str, Any]]:
    rows = []
    for one in found:
        for context in config.contexts:
            if context > one.question.spec.max_positions:
                continue
            batch = one.batch_at(context)
            speed = one.decode(batch, context).tokens_per_second if batch else 0.0
            rows.append(
                {
                    "name": one.name,
                    "context": context,
                    "batch": batch,
                    "tokens_per_second": speed,
                }
            )
    return rows


def _by_target(one: Arrangement, target: float) -> dict[str, Any]:
    context = one.longest_context(target)
    return {
        "name": one.name,
        "context": context,
        "batch": one.batch_at(context) if context else 0,
    }


def _fewer(
    config: PlanServeConfig, spec: ModelSpec, cluster: ClusterSpec, best: Arrangement
) -> dict[str, Any] | None:
    """The fastest with fewer ranks at the same batch, if that is faster: sums cost more there."""
    batch, _ = best.asked
    found = None
    for ranks in range(1, cluster.ranks):
        if ranks > 16 and ranks & (ranks - 1):
            continue  # Of many, powers of two say enough.
        question = _question(replace(config, batch=batch), spec, cluster.first(ranks))
        plan = question.plan()
        one = Arrangement(
            "rotated", question, (question.stage(fit(plan, spec), question.machine),), plan
        )
        if one.tokens_per_second > max(best.tokens_per_second, found[1] if found else 0.0):
            found = (ranks, one.tokens_per_second)
    return None if found is None else {"ranks": found[0], "tokens_per_second": found[1]}


def _assumptions(config: PlanServeConfig, question: Question) -> Mapping[str, Any]:
    machine = question.machine
    return {
        "memory_efficiency": config.memory_efficiency,
        "matmul_efficiency": config.matmul_efficiency,
        "bus_bytes_per_second": machine.bus,
        "hop_seconds": machine.hop,
        "sum_bytes": machine.sum_bytes,
        "host_seconds_a_layer": machine.host,
        "budget_bytes": list(question.budgets),
        "max_step_tokens": config.max_step_tokens,
    }
