"""One world of ranks, and the two views of it: for dense weights and for experts.

    dense     (pp, dp, tp)             tp fastest
    experts   (pp, edp, ep, etp)       over the same ranks, etp fastest

Each view is built once, with every group it has. What FSDP shares weights over is a slice of a
view: `replicas` x `shards` of the data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moesaic.parallel.group import ALONE, Group, Groups
from moesaic.parallel.mailbox import Mailbox
from moesaic.planning.layout import Layout, Place


@dataclass(frozen=True)
class World:
    """Where this process stands, and the groups it belongs to."""

    layout: Layout
    rank: int
    device: torch.device
    groups: Groups
    """Those that layers work with."""
    everyone: Group
    pipeline: Group
    """Ranks that hold the other stages of this rank's part."""
    data: Group
    """Ranks that hold the same part of dense weights."""
    expert_data: Group
    """Ranks that hold the same part of the experts."""
    tied: Group
    """Ranks that hold a copy each of a tied embedding: of the first stage and of the last."""
    writers: Group
    """Everyone, on the CPU: for checkpoints, which are written beside the training."""
    dense_mesh: DeviceMesh | None
    """Ranks over which FSDP shares dense weights; None where there is nobody to share with."""
    expert_mesh: DeviceMesh | None
    dense_shards: Group = ALONE
    """Ranks of `dense_mesh` that hold different parts of a weight."""
    expert_shards: Group = ALONE

    @property
    def place(self) -> Place:
        """Coordinates of this rank."""
        return self.layout.place(self.rank)

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages that this rank runs."""
        return self.layout.stages_of(self.place.pp)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all: it writes what is written once."""
        return self.rank == 0

    @classmethod
    def join(cls, layout: Layout, device: torch.device) -> Self:
        """Take this process's place. With more than one rank, torch's process group must be there.

        Every rank must come here with an equal layout.
        """
        plan = layout.plan
        if plan.world_size == 1:
            return cls(
                layout, 0, device, Groups(), ALONE, ALONE, ALONE, ALONE, ALONE, ALONE, None, None
            )
        assert dist.get_world_size() == plan.world_size, f"{dist.get_world_size()=}"
        rank = dist.get_rank()
        shards, expert_shards = plan.dense_shards, plan.expert_shards
        dense = init_device_mesh(
            device.type,
            (plan.pp, plan.dp // shards, shards, plan.tp),
            mesh_dim_names=("pp", "replicas", "shards", "tp"),
        )
        experts = init_device_mesh(
            device.type,
            (
                plan.pp,
                plan.expert_data_ranks // expert_shards,
                expert_shards,
                plan.expert_ranks,
                plan.expert_tensor_ranks,
            ),
            mesh_dim_names=("pp", "replicas", "shards", "ep", "etp"),
        )
        size = plan.world_size
        tp = _of_mesh(dense, "tp")
        is_shared = plan.dp > 1
        experts_are_shared = (
            is_shared and plan.expert_data_ranks > 1 and layout.spec.moe is not None
        )
        return cls(
            layout=layout,
            rank=rank,
            device=device,
            groups=Groups(
                tp=tp,
                ep=tp if plan.experts_over == "edp" else _of_mesh(experts, "ep"),
                etp=_of_mesh(experts, "etp"),
            ),
            everyone=Group(size, rank, dist.group.WORLD),
            pipeline=_of_mesh(dense, "pp"),
            data=_alike(layout, rank, lambda p: (p.pp, p.tp)),
            expert_data=_alike(layout, rank, lambda p: (p.pp, p.ep, p.etp)),
            tied=_tied_group(layout, rank),
            writers=Group(size, rank, dist.new_group(backend="gloo")),
            dense_mesh=_shared(dense, plan.dp) if is_shared else None,
            expert_mesh=_shared(experts, plan.expert_data_ranks) if experts_are_shared else None,
            dense_shards=_of_mesh(dense, "shards"),
            expert_shards=_of_mesh(experts, "shards"),
        )


def _of_mesh(mesh: DeviceMesh, name: str) -> Group:
    part = mesh[name]
    if part.size() == 1:
        return ALONE
    size, rank, group = part.size(), part.get_local_rank(), part.get_group()
    mailbox = Mailbox.open(size, rank, group) if mesh.device_type == "cpu" else None
    return Group(size, rank, group, mailbox)


def _shared(mesh: DeviceMesh, ranks: int) -> DeviceMesh:
    shards = mesh["shards"]
    return shards if shards.size() == ranks else mesh["replicas", "shards"]


def _new_group(members: list[list[int]], rank: int) -> Group:
    """The one of these disjoint groups that this rank is in. Every rank must list them alike."""
    mine = ALONE
    for ranks in members:
        if len(ranks) == 1:
            continue
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = Group(len(ranks), ranks.index(rank), group)
    return mine


def _alike(layout: Layout, rank: int, part: Callable[[Place], tuple[int, ...]]) -> Group:
    """The ranks whose places have the same part."""
    members: dict[tuple[int, ...], list[int]] = {}
    for other in range(layout.plan.world_size):
        members.setdefault(part(layout.place(other)), []).append(other)
    return _new_group(list(members.values()), rank)


def _tied_group(layout: Layout, rank: int) -> Group:
    """Ranks of the first and of the last stage, where a tied embedding lies on both."""
    plan = layout.plan
    last = next(pp for pp in range(plan.pp) if len(layout.stages) - 1 in layout.stages_of(pp))
    if not layout.spec.tied_embeddings or last == 0:
        return ALONE
    a_stage = plan.dp * plan.tp
    return _new_group([[r, last * a_stage + r] for r in range(a_stage)], rank)
