"""The model as one rank trains it: its stages, and its piece of every weight.

Layers compute with what FSDP gathers for them. Everything else (optimizer, gradient norm,
checkpoints, loading) works on local tensors, by name: the part of each weight that is left on this
rank, whose memory is that of the layer's own parameter. In a world of one rank the part is the
whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moesaic.checkpoint.folder import check_complete, read_spec
from moesaic.checkpoint.pieces import Held, Piece, pieces
from moesaic.model.attention import Attention
from moesaic.model.block import Block
from moesaic.model.build import allocate, read_pieces
from moesaic.model.mlp import MLP
from moesaic.model.transformer import Transformer
from moesaic.moe.layer import MoELayer, RoutingStep
from moesaic.moe.statistics import RoutingStatistics
from moesaic.parallel.pipeline import Pipeline
from moesaic.parallel.sharding import local_tensor, share, sum_gradients
from moesaic.parallel.world import World
from moesaic.planning.layout import fit
from moesaic.planning.plan import Recompute, TrainPlan
from moesaic.planning.split import Split
from moesaic.quantization.reader import WideReader


class Stage(nn.Module):
    """One stage as a pipeline runs it: activations in, activations or a share of the loss out.

    `begin` says what a step asks for; `found` then fills with what its routers did, one entry a
    micro-batch.
    """

    def __init__(self, model: Transformer, recompute: Mapping[int, Recompute]) -> None:
        super().__init__()
        self.model = model
        self.recompute = dict(recompute)
        self.found: list[dict[int, RoutingStatistics]] = []
        self._routing: Mapping[int, RoutingStep] = {}
        self._targets = 1

    def begin(self, routing: Mapping[int, RoutingStep], *, targets: int) -> None:
        """Take up a new step, whose losses are divided by its number of `targets`."""
        self.found = []
        self._routing, self._targets = routing, targets

    def forward(
        self, x: Tensor, *, targets_BS: Tensor, documents_BS: Tensor | None = None
    ) -> Tensor:
        """Token ids (B, S) or activations (B, s, D) in; activations or a scalar out."""
        hidden_BsD, statistics = self.model.hidden(
            x,
            length=targets_BS.shape[1],
            documents_BS=documents_BS,
            routing=self._routing,
            recompute=self.recompute,
        )
        self.found.append(statistics)
        if not self.model.has_head:
            return hidden_BsD
        return self.model.loss(hidden_BsD, targets_BS) / self._targets


class ShardedModel:
    """This rank's stages and local tensors.

    Args:
        world: This rank's.
        models: The stages, as `world.stages` numbers them, on the meta device or with weights.
        recompute: What is computed again in the backward pass, as a plan says it.
    """

    def __init__(
        self,
        world: World,
        models: Sequence[Transformer],
        *,
        recompute: Mapping[int | str, Recompute] | None = None,
    ) -> None:
        self.world = world
        self.spec = world.layout.spec
        self.stages = [
            Stage(model, world.layout.recompute(stage, recompute or {}))
            for stage, model in zip(world.stages, models, strict=True)
        ]
        self.compute_seconds = 0.0
        """Inside the stages' forward and backward passes of the last `run`."""
        self._recompute = dict(recompute or {})
        self._pipeline: tuple[tuple[object, ...], Pipeline] | None = None
        for stage in self.stages:
            _share(stage, world)
        self.weights: dict[str, Held] = {}
        """Every weight and saved buffer of this rank, by its name in the whole model."""
        self.parameters: dict[str, nn.Parameter] = {}
        """Those that gradients are for. Their memory is that of the layers'."""
        self._of_layers: dict[str, list[nn.Parameter]] = {}
        # A tied embedding is there twice if this rank runs the first stage and the last.
        self._doubles: dict[str, list[Tensor]] = {}
        for stage in self.stages:
            self._take(stage.model)

    @classmethod
    def build(
        cls,
        world: World,
        *,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.float32,
        recompute: Mapping[int | str, Recompute] | None = None,
    ) -> ShardedModel:
        """Stages of this rank with memory of their own, not yet set."""
        layout = world.layout
        shard = layout.shard(world.rank)
        with torch.device("meta"):
            models = [
                Transformer(layout.spec, shard, world.groups, layout.stages[number])
                for number in world.stages
            ]
        for model in models:
            model.compute_dtype = compute_dtype
            allocate(model, dtype=dtype, device=world.device)
        return cls(world, models, recompute=recompute)

    @classmethod
    def alone(cls, model: Transformer) -> ShardedModel:
        """A whole model in a world of one rank."""
        layout = fit(TrainPlan(), model.spec)
        return cls(World.join(layout, model.head_weight.device), [model])

    def load(self, folder: Path) -> None:
        """Read this rank's pieces from a model folder.

        Raises:
            FolderError: As `load_model`.
            SpecError: The folder is not of the model that the layout is for.
        """
        spec = read_spec(folder)
        assert spec == self.spec, f"{folder=}"
        with WideReader(folder) as reader:
            check_complete(reader, spec)
            read_pieces(self.weights, reader, spec)
        self.spread()

    def spread(self) -> None:
        """Give a second copy of a tied embedding on this rank the values of the first."""
        for name, doubles in self._doubles.items():
            for double in doubles:
                double.copy_(self.weights[name].tensor)

    def compile(self) -> None:
        """Compile attention and dense feed-forward layers."""
        for stage in self.stages:
            for part in stage.modules():
                # Not the MoE layers: their row counts differ from step to step.
                if isinstance(part, Attention | MLP):
                    part.compile()

    def moe_layers(self) -> dict[int, MoELayer]:
        """The MoE layers of which this rank holds a part, by layer."""
        modules = (module for stage in self.stages for module in stage.modules())
        blocks = [module for module in modules if isinstance(module, Block)]
        return {b.layer: b.block_sparse_moe for b in blocks if b.block_sparse_moe is not None}

    def freeze(self, names: Sequence[str]) -> None:
        """Stop the gradients of the parameters of these names, as far as they are here."""
        for name, parameters in self._of_layers.items():
            for parameter in (*parameters, self.parameters[name]):
                parameter.requires_grad_(name not in names)

    def whole_experts(self, layer: int) -> list[Tensor]:
        """All experts of a layer on every rank, w1, w3 and w2; on the CPU if there are several.

        Every rank must call this, also one that holds no part of the layer.
        """
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        return [self.whole(f"{prefix}.{name}") for name in ("w1", "w3", "w2")]

    def whole(self, name: str, tensors: Mapping[str, Held] | None = None) -> Tensor:
        """A tensor brought together from the ranks that hold its pieces, on every rank.

        For measuring and testing: it is pickled on its way.

        Args:
            name: Of the tensor; ranks that hold nothing of it must call too.
            tensors: Where it is; None: the weights.
        """
        held = (self.weights if tensors is None else tensors).get(name)
        if self.world.everyone.size == 1:
            assert held is not None, f"{name=}"
            return held.tensor
        mine = None if held is None else (held.piece, held.tensor.detach().cpu())
        found = [piece for piece in self.world.everyone.objects(mine) if piece is not None]
        whole = torch.full(found[0][0].shape, math.nan, dtype=found[0][1].dtype)
        for piece, part in found:
            whole[piece.slices] = part
        return whole

    @property
    def rows_computed(self) -> int:
        """Rows that this rank's experts computed in the last `run`, recomputed ones again."""
        return sum(layer.rows for layer in self.moe_layers().values())

    def run(self, tokens: Tensor, *, micro_batches: int, **others: Tensor) -> Tensor:
        """Forward and backward over micro-batches laid one after the other along dim 0.

        Returns:
            Sum of the losses of this rank's micro-batches, (); 0 without the last stage.
        """
        for layer in self.moe_layers().values():
            layer.rows = 0
        rows, length = tokens.shape[0] // micro_batches, tokens.shape[1]
        parts = Split.balanced(length, self.world.groups.tp.size)
        shape = (rows, parts.sizes[self.world.groups.tp.rank], self.spec.hidden_dim)
        model = self.stages[0].model
        dtype = model.compute_dtype or next(iter(self.parameters.values())).dtype
        key = (micro_batches, shape, dtype)
        if self._pipeline is None or self._pipeline[0] != key:
            pipeline = Pipeline(
                self.world,
                self.stages,
                micro_batches=micro_batches,
                activation=(shape, dtype),
                recompute=self._recompute,
            )
            self._pipeline = (key, pipeline)
        done = self._pipeline[1].step(tokens, **others)
        self.compute_seconds = sum(done.seconds)
        return done.loss

    def collect_gradients(self) -> None:
        """Put on each local parameter its part of the gradient, summed over all who have a share.

        FSDP has summed over data-parallel ranks. What is left are weights that every tensor-
        parallel rank holds whole, each with the gradient of its own tokens or heads; experts
        without FSDP; and copies of a tied embedding.
        """
        world = self.world
        for name, parameters in self._of_layers.items():
            local = self.parameters[name]
            found = [local_tensor(p.grad) for p in parameters if p.grad is not None]
            for parameter in parameters:
                parameter.grad = None
            if not local.requires_grad:
                continue
            gradient = found[0] if found else torch.zeros_like(local)
            for other in found[1:]:
                gradient = gradient + other
            local.grad = gradient
        trained = {
            name: (p.grad, self.weights[name].piece)
            for name, p in self.parameters.items()
            if p.grad is not None
        }
        whole = [g for g, piece in trained.values() if not piece.is_cut]
        sum_gradients(whole, world.groups.tp)
        if world.expert_mesh is None:
            experts = [g for g, piece in trained.values() if piece.is_expert]
            sum_gradients(experts, world.expert_data)
        sum_gradients([g for name, (g, _) in trained.items() if _is_table(name)], world.tied)

    def copies(self, name: str) -> int:
        """Ranks that hold the same piece of a weight as this one, itself included."""
        plan, world = self.world.layout.plan, self.world
        piece = self.weights[name].piece
        if piece.is_expert:
            count = plan.expert_data_ranks
            return count if world.expert_mesh is None else count // plan.expert_shards
        count = 1 if piece.is_cut else plan.tp
        if world.dense_mesh is not None:
            count *= plan.dp // plan.dense_shards
        return count * (world.tied.size if _is_table(name) else 1)

    def _take(self, model: Transformer) -> None:
        """Name the local tensors of one stage."""
        all_of_it = pieces(self.spec, model.shard, model.units)
        for name, tensor in model.state_dict(keep_vars=True).items():
            local = local_tensor(tensor.detach())
            piece = self._left(all_of_it[name])
            assert tuple(local.shape) == piece.local_shape, f"{name=}, {local.shape=}, {piece=}"
            is_parameter = isinstance(tensor, nn.Parameter)
            if is_parameter:
                self._of_layers.setdefault(name, []).append(tensor)
            if name in self.weights:
                self._doubles.setdefault(name, []).append(local)
                continue
            self.weights[name] = Held(local, piece)
            if is_parameter:
                self.parameters[name] = nn.Parameter(local)

    def _left(self, piece: Piece) -> Piece:
        """What FSDP leaves of a piece on this rank."""
        world, plan, place = self.world, self.world.layout.plan, self.world.place
        if piece.is_expert:
            if world.expert_mesh is None:
                return piece
            return piece.share(plan.expert_shards, place.edp % plan.expert_shards)
        if world.dense_mesh is None or not piece.is_parameter:
            return piece
        return piece.share(plan.dense_shards, place.dp % plan.dense_shards)


def _is_table(name: str) -> bool:
    return name == "model.embed_tokens.weight"


def _share(stage: Stage, world: World) -> None:
    blocks = [module for module in stage.modules() if isinstance(module, Block)]
    share(
        stage,
        world,
        blocks=blocks,
        experts=[b.block_sparse_moe.experts for b in blocks if b.block_sparse_moe is not None],
        zero=world.layout.plan.zero,
        compute_dtype=stage.model.compute_dtype,
    )
