"""One way of training: the sizes of a step and of its mesh, held against no model yet.

A job is what the cost model and the memory model both take beside a shape. It says everything
of a layout but the cut into stages and what each layer recomputes, which the solver chooses for
it. Ranks are numbered as in docs/plan.md, tensor ranks fastest and pipeline ranks slowest.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from moesaic.errors import PlanError
from moesaic.planning.plan import V_SHAPED, Dispatch, ExpertsOver, Schedule, TrainPlan

Dtype = Literal["bf16", "fp8", "fp32"]
"""What matrix products run in. fp8 keeps weights and activations between products in bf16."""

AttentionCore = Literal["fused", "unfused"]

Framework = Literal["moesaic", "megatron"]
"""Whose activations are kept and whose communication is hidden."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The sizes of a step and of the mesh that it runs on."""

    sequence: int
    """Positions in a sequence."""

    micro_batch: int = 1
    """Sequences that go through a stage at once."""

    global_batch: int
    """Sequences in a step, over all data-parallel ranks."""

    pp: int = 1
    """Pipeline ranks."""

    tp: int = 1
    """Tensor-parallel ranks."""

    dp: int = 1
    """Data-parallel ranks."""

    cp: int = 1
    """Context-parallel ranks: each has its share of every sequence's positions."""

    experts_over: ExpertsOver = "edp"
    """Which ranks the experts are split over, as in a plan."""

    ep: int | None = None
    """Ranks that share one set of experts; None: as many as there are."""

    etp: int | None = None
    """Ranks that share one expert's columns; None: tp for etp, 1 elsewhere."""

    zero: Literal[0, 1, 2, 3] = 1
    """What data-parallel ranks share: 0 nothing, else as in a plan."""

    shard: int | None = None
    """Data-parallel ranks over which that is shared; None: all of them."""

    schedule: Schedule = "1f1b"
    """The order of forward and backward passes."""

    interleave: int = 1
    """Stages on each pipeline rank."""

    dispatch: Dispatch = "auto"
    """How tokens reach experts."""

    deduplicate: bool = True
    """Send a token once to a rank that holds several of its experts (all-to-all only)."""

    sequence_parallel: bool = True
    """Whether tensor-parallel ranks share the positions between the layers."""

    dtype: Dtype = "bf16"
    """What matrix products run in."""

    gradient_bytes: int = 4
    """Bytes of one gradient where it is summed and sent."""

    capacity_factor: float | None = None
    """Rows that an expert takes over the mean, the others dropped; None: all rows are taken."""

    load_mean: float = 1.0
    """Rows of the fullest rank's experts over the mean rank's, averaged over steps: for time."""

    load_tail: float = 1.0
    """The same at a high percentile: for memory."""

    framework: Framework = "moesaic"
    """Which implementation runs the step."""

    attention_core: AttentionCore = "fused"
    """Whether attention's scores are kept out of memory, or written there as squares."""

    fused_loss: bool = False
    """Whether the loss reads logits as they are, or widens them and works in several passes."""

    overlap_gradients: bool = True
    """Whether gradients are summed, and weights gathered, while the step computes."""

    overlap_tensor: bool = False
    """Whether tensor-parallel gathers and sums run while the product beside them does."""

    overlap_experts: bool = False
    """Whether experts' rows travel while another micro-batch computes."""

    def __post_init__(self) -> None:
        numbers = ("sequence", "micro_batch", "global_batch", "pp", "tp", "dp", "cp", "interleave")
        for name in (*numbers, "ep", "etp", "shard"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise PlanError(f"{name} is {value!r}. It must be a whole number, at least 1.")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                options = ", ".join(map(repr, get_args(kind)))
                raise PlanError(f"{name} is {getattr(self, name)!r}. It must be one of {options}.")
        for name in ("load_mean", "load_tail"):
            if not 1 <= getattr(self, name) < math.inf:
                raise PlanError(
                    f"{name} is {getattr(self, name)}. The fullest rank has at least the mean, 1.0."
                )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise PlanError(
                f"capacity_factor is {self.capacity_factor}. It must be above 0, or left out."
            )
        if self.global_batch % (self.micro_batch * self.dp):
            raise PlanError(
                f"A step of {self.global_batch} sequences cannot be dealt to {self.dp} "
                f"data-parallel ranks in micro-batches of {self.micro_batch}. "
                f"Use a multiple of {self.micro_batch * self.dp}."
            )
        if self.shard is not None and self.dp * self.cp % self.shard:
            raise PlanError(
                f"shard is {self.shard}, but there are {self.dp * self.cp} data-parallel ranks. "
                f"It must be a divisor."
            )
        if self.stage_ranks % (self.expert_ranks * self.expert_tensor_ranks):
            raise PlanError(
                f"Experts over {self.experts_over} with ep {self.expert_ranks} and etp "
                f"{self.expert_tensor_ranks} do not fit the {self.stage_ranks} ranks of a stage. "
                f"Their product must be a divisor."
            )
        if self.schedule in V_SHAPED and self.pp > 1 and self.interleave != 2:
            raise PlanError(
                f"{self.schedule} runs 2 stages on each pipeline rank, not {self.interleave}."
            )

    def replace(self, **changes: Any) -> Job:
        """The same job with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pp * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline place."""
        return self.dp * self.cp * self.tp

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pp * self.interleave

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one data-parallel rank in a step."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch that one tensor-parallel group has."""
        return self.micro_batch * self.sequence // self.cp

    @property
    def step_tokens(self) -> int:
        """Positions in a step, over all ranks."""
        return self.global_batch * self.sequence

    @property
    def rows(self) -> float:
        """Positions of a micro-batch that one rank has between the layers."""
        return self.tokens / (self.tp if self.sequence_parallel else 1)

    @property
    def expert_ranks(self) -> int:
        """Ranks that share one set of experts, each holding some of them whole or in part."""
        if self.ep is not None:
            return self.ep
        if self.experts_over == "edp":
            return self.tp
        return self.stage_ranks // self.expert_tensor_ranks

    @property
    def expert_tensor_ranks(self) -> int:
        """Ranks over which the columns of one expert are split."""
        if self.etp is not None:
            return self.etp
        return self.tp if self.experts_over == "etp" else 1

    @property
    def expert_data_ranks(self) -> int:
        """Ranks of a stage that hold the same part of the same experts."""
        return self.stage_ranks // (self.expert_ranks * self.expert_tensor_ranks)

    @property
    def dense_data_ranks(self) -> int:
        """Ranks of a stage that hold the same part of a dense weight."""
        return self.dp * self.cp

    @property
    def dense_shards(self) -> int:
        """Ranks over which what belongs to a dense weight is shared."""
        return self.dense_data_ranks if self.shard is None else self.shard

    @property
    def expert_shards(self) -> int:
        """Ranks over which what belongs to an expert's weight is shared."""
        return math.gcd(self.dense_shards, self.expert_data_ranks)


def job_of(plan: TrainPlan, *, sequence: int, global_batch: int, **more: Any) -> Job:
    """The job that a plan runs.

    Args:
        plan: Its mesh and schedule.
        sequence: Positions in a sequence.
        global_batch: Sequences in a step.
        more: Other fields of `Job`; `micro_batch` is used where the plan leaves it to the recipe.
    """
    if plan.micro_batch is not None:
        more["micro_batch"] = plan.micro_batch
    count = plan.pp if plan.stages is None else len(plan.stages)
    doubled = plan.schedule in V_SHAPED or (plan.schedule == "interleaved" and plan.stages is None)
    return Job(
        sequence=sequence,
        global_batch=global_batch,
        pp=plan.pp,
        tp=plan.tp,
        dp=plan.dp,
        experts_over=plan.experts_over,
        ep=plan.ep,
        zero=plan.zero,
        shard=plan.shard,
        schedule=plan.schedule,
        interleave=2 if doubled and plan.pp > 1 else count // plan.pp,
        dispatch=plan.dispatch,
        deduplicate=plan.deduplicate,
        **more,
    )


_CHOICES: dict[str, Any] = {
    "experts_over": ExpertsOver,
    "zero": Literal[0, 1, 2, 3],
    "schedule": Schedule,
    "dispatch": Dispatch,
    "dtype": Dtype,
    "framework": Framework,
    "attention_core": AttentionCore,
}
