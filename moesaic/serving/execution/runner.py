"""Load a model as a plan says, and run steps of it: this rank's part, in step with the others.

    executor = load_executor(folder, plan, group=group)
    if group.rank > 0:
        executor.follow()          # until rank 0 closes its own
    else:
        result = executor.step(batch)
        executor.close()

Every rank computes every step. Rank 0 tells the others what it is (`ranks`), and it alone gathers
the scores: whoever samples does so once. After each half of a layer the ranks' results are added
up in the order of ranks, so all of them go on with the same numbers, bit for bit, and route alike.

Shapes.  T tokens of the step    D model width    N rows of scores asked for    V vocabulary
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moesaic.checkpoint.folder import read_spec
from moesaic.errors import ConfigError, PlanError, ServingError
from moesaic.parallel.agreement import all_do
from moesaic.parallel.group import ALONE, Group
from moesaic.parallel.watch import Watch, is_of_a_connection
from moesaic.planning.serving.layout import ServeLayout, fit
from moesaic.planning.serving.ledger import GIB, Dtype, RankLedger, ledger
from moesaic.planning.serving.plan import ServePlan
from moesaic.serving.execution.batch import Batch, RankMemory, StepResult
from moesaic.serving.execution.layers import (
    Layers,
    Pools,
    Step,
    TorchLayers,
    allocate_cache,
    frequencies_of,
)
from moesaic.serving.execution.ranks import Announcer, listen
from moesaic.serving.execution.weights import RankReader

Implementation = Literal["auto", "torch", "native"]
"""Whose kernels compute; auto: our own where they can be used."""

MAX_STEP_TOKENS = 512
"""New tokens of a step at the most, unless the caller says otherwise. Ours."""


def load_executor(
    folder: Path | str,
    plan: ServePlan,
    *,
    dtype: Dtype = "bfloat16",
    device: torch.device | str = "cpu",
    implementation: Implementation = "auto",
    group: Group = ALONE,
    max_step_tokens: int = MAX_STEP_TOKENS,
    least_tokens: int = 1,
    watch: Watch | None = None,
) -> ModelExecutor:
    """Load this rank's part of a model, and its part of the cache.

    Every rank of the group calls this alike. What cannot be is refused before anything is read
    but headers.

    Args:
        folder: A model folder.
        plan: Who holds what, in which form, and how large the cache is.
        dtype: Of activations, embedding and head.
        device: Where to compute.
        implementation: Whose kernels.
        group: The ranks.
        max_step_tokens: New tokens of a step, at the most.
        least_tokens: Positions that the cache must have room for.
        watch: Is told of every step, so that it knows an idle rank from one that hangs.

    Raises:
        ConfigError: The kernels asked for cannot be used here.
        PlanError: The plan is for another model or number of ranks, or the memory is too little.
        FolderError: The folder is incomplete or damaged.
        SpecError: The model is of a kind that is not known.
    """
    folder = Path(folder)

    def prepare() -> tuple[ServeLayout, bool, RankLedger]:
        layout = fit(plan, read_spec(folder))
        _check_ranks(plan, group)
        _check_kinds(plan, dtype)
        packed = takes_packed(implementation, plan, dtype=dtype, device=torch.device(device))
        ledgers = ledger(
            layout,
            dtype=dtype,
            packed=packed,
            max_step_tokens=max_step_tokens,
            least_tokens=least_tokens,
        )
        _check_memory(ledgers, group.rank, torch.device(device))
        return layout, packed, ledgers[group.rank]

    def load() -> tuple[Layers, list[Pools]]:
        with RankReader(folder, layout, rank=group.rank, dtype=dtype) as reader:
            layers: Layers
            if packed:
                from moesaic.serving.execution.packed import NativeLayers

                layers = NativeLayers(reader)
            elif takes_cuda(implementation, dtype=dtype, device=torch.device(device)):
                from moesaic.serving.cuda.layers import CudaLayers

                layers = CudaLayers(reader, device)
            else:
                layers = TorchLayers(reader, device)
        return layers, allocate_cache(layout, group.rank, planned.kv_blocks, device)

    layout, packed, planned = all_do(group, prepare)
    layers, pools = all_do(group, load)
    executor = ModelExecutor(
        layout, layers, pools, group=group, max_step_tokens=max_step_tokens, watch=watch
    )
    if takes_cuda(implementation, dtype=dtype, device=torch.device(device)):
        from moesaic.serving.cuda.graphs import DecodeGraphs

        longest = -(-layout.spec.max_positions // plan.block_tokens)
        executor.forward = DecodeGraphs(executor.through_layers, table_blocks=longest)
    return executor


class ModelExecutor:
    """One rank's part of a loaded model; `load_executor` makes it. Rank 0's is an `Executor`."""

    def __init__(
        self,
        layout: ServeLayout,
        layers: Layers,
        pools: list[Pools],
        *,
        group: Group = ALONE,
        max_step_tokens: int = MAX_STEP_TOKENS,
        watch: Watch | None = None,
    ) -> None:
        self.spec, self.layout = layout.spec, layout
        self.layers, self.pools, self.group = layers, pools, group
        self.block_tokens = layout.plan.block_tokens
        self.num_blocks = pools[0].k.shape[0]
        self.max_step_tokens = max_step_tokens
        kv_cache = sum(pool.nbytes for pair in pools for pool in pair)
        self.memory: Sequence[RankMemory] = group.objects(RankMemory(layers.nbytes, kv_cache))
        self._through_all = getattr(layers, "through_all", None)
        """Where the layers have it: all of them in one call, for a rank that is alone."""
        self._pool_lists = [pair.k for pair in pools], [pair.v for pair in pools]
        self._watch = watch
        self._frequencies = frequencies_of(self.spec, layers.device)
        self._fault: ServingError | None = None
        self._announcer = Announcer(group, watch) if group.size > 1 and group.rank == 0 else None
        self.forward: Callable[[Step], tuple[Tensor, list[Tensor]]] = self.through_layers
        """Computes all layers of a step; on CUDA there are graphs before it."""

    def step(self, batch: Batch) -> StepResult:
        """Do one step, on all ranks; called on rank 0.

        Raises:
            ServingError: Another rank is lost. No later step will succeed either.
        """
        assert self.group.rank == 0, "steps are asked of rank 0"
        if self._fault is not None:
            raise self._fault
        batch.check(
            self.spec,
            block_tokens=self.block_tokens,
            num_blocks=self.num_blocks,
            max_tokens=self.max_step_tokens,
        )
        if self._announcer is None:
            return self._compute(batch)
        try:
            with self._announcer.step(batch):
                return self._compute(batch)
        except Exception as error:
            # The others may have gone on without this rank, so nothing fits together any more.
            if not is_of_a_connection(error):
                self._fault = ServingError("A step failed on one of several ranks; none can go on.")
                raise
            self._fault = ServingError(
                f"The connection to another rank is lost ({_first_line(error)}), so nothing more "
                f"can be computed. Start the server again."
            )
            raise self._fault from error

    def follow(self) -> None:
        """Compute what rank 0 asks for, until it closes; called on every other rank."""
        for batch in listen(self.group, self._watch):
            self._compute(batch)

    def close(self) -> None:
        """Let go of the memory, and of the other ranks. Calling it twice does no harm."""
        if self._announcer is not None:
            self._announcer.close()
        self.pools, self._pool_lists = [], ([], [])
        self.forward = self.through_layers
        self._fault = self._fault or ServingError("The executor is closed.")

    @torch.no_grad()
    def _compute(self, batch: Batch) -> StepResult:
        layers, group = self.layers, self.group
        step = Step.of(
            batch,
            frequencies=self._frequencies,
            block_tokens=self.block_tokens,
            device=layers.device,
        )
        x_TD, chosen = self.forward(step)
        logits_NV, hidden_ND = None, None
        if batch.hidden:
            hidden_ND = layers.hidden(x_TD[step.wanted_N]).cpu()
        elif batch.num_rows:
            logits_Nv = layers.logits(x_TD[step.wanted_N])
            sizes = self.layout.vocab.sizes
            joined = group.gather_on_first(logits_Nv, sizes, dim=1)
            logits_NV = None if joined is None else joined.cpu()
        else:
            logits_NV = torch.zeros(0, self.spec.vocab_size)
        return StepResult(
            logits_NV=logits_NV,
            hidden_ND=hidden_ND,
            experts_LTK=torch.stack(chosen).cpu() if batch.experts and chosen else None,
        )

    def through_layers(self, step: Step) -> tuple[Tensor, list[Tensor]]:
        """What all layers make of the tokens, (T, D), and the experts of each MoE layer, (T, K)."""
        layers, group = self.layers, self.group
        # One rank alone has anything but zero, so this sum rounds nothing.
        x_TD = group.sum_(layers.embed(step))
        if group.size == 1 and self._through_all is not None:
            return x_TD, self._through_all(x_TD, step, *self._pool_lists)
        chosen: list[Tensor] = []
        for layer, pools in enumerate(self.pools):
            x_TD.add_(group.sum_(layers.attend(layer, x_TD, step, pools)))
            y_TD, experts_TK = layers.feed_forward(layer, x_TD)
            x_TD.add_(group.sum_(y_TD))
            if experts_TK is not None:
                chosen.append(experts_TK)
        return x_TD, chosen


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _check_ranks(plan: ServePlan, group: Group) -> None:
    if plan.ranks != group.size:
        raise PlanError(
            f"The plan is for {plan.ranks} rank{'s' if plan.ranks > 1 else ''}, but "
            f"{group.size} {'were' if group.size > 1 else 'was'} started. Start {plan.ranks}, or "
            f"take another plan."
        )


def _check_kinds(plan: ServePlan, dtype: Dtype) -> None:
    for name, kind in (("weights", plan.weights), ("kv_cache", plan.kv_cache)):
        if dtype == "bfloat16" and kind == "float32":
            raise PlanError(
                f"The plan's {name} is float32, but activations are bfloat16, which cannot use "
                f"that. Choose dtype float32, or {name} bfloat16."
            )


def takes_packed(
    implementation: Implementation, plan: ServePlan, *, dtype: Dtype, device: torch.device
) -> bool:
    """Whether to compute with our own kernels, whose matrices are packed.

    Raises:
        ConfigError: They are asked for, and cannot be used.
    """
    if implementation == "torch":
        return False
    reasons = [
        reason
        for is_so, reason in (
            (device.type != "cpu", f"the device is {device.type}"),
            (dtype != "bfloat16", f"dtype is {dtype}"),
        )
        if is_so
    ]
    if not reasons:
        from moesaic.serving.native import build

        if build.available():
            return True
        reasons = ["they cannot be built or run here"]
    if implementation == "native":
        raise ConfigError(
            f"The native kernels need a CPU with AVX512-BF16, a C++ compiler and dtype bfloat16, "
            f"but {reasons[0]}. Use implementation torch or auto."
        )
    return False


def takes_cuda(implementation: Implementation, *, dtype: Dtype, device: torch.device) -> bool:
    """Whether to compute with our kernels for CUDA; float32 is better served by torch's."""
    return (
        implementation == "auto"
        and device.type == "cuda"
        and dtype == "bfloat16"
        and importlib.util.find_spec("triton") is not None
    )


def _check_memory(ledgers: tuple[RankLedger, ...], rank: int, device: torch.device) -> None:
    """Refuse what does not fit into what is free now; on a CPU ranks of a machine share it."""
    free = free_bytes(device)
    if free is None:
        return
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    alike = ledgers if neighbours == len(ledgers) else (ledgers[rank],)
    needed = sum(one.total_bytes for one in alike)
    if needed > free:
        weights, cache, room = (
            sum(getattr(one, name) for one in alike) / GIB
            for name in ("weight_bytes", "kv_bytes", "workspace_bytes")
        )
        who = f"Rank {rank} needs" if len(alike) < len(ledgers) else "This needs"
        raise PlanError(
            f"{who} {needed / GIB:.2f} GiB: {weights:.2f} of weights, {cache:.2f} of cache and "
            f"{room:.2f} to work in, but {free / GIB:.2f} GiB are free. Use a smaller cache, "
            f"8-bit weights or more ranks."
        )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None
