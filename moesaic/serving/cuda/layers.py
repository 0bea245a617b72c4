"""The layers of a model on a GPU: weights as `TorchLayers` holds them, computed by our kernels.

Nothing here waits for the device or copies to it while a step of single tokens runs, so a CUDA
graph can hold such a step. Weights in e4m3 meet rows in bfloat16 (W8A16) unless rows are to be
rounded too: that is faster where multiplying bounds, for long prompts, and less exact.

Shapes.  T tokens of the step    D model width    N rows of scores asked for    V vocabulary,
         v of it this rank's    E experts, K a token    F inner width
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.model.norm import RMSNorm
from moesaic.serving.cuda.attention import Tiles, attend, tiles_of, tiles_of_singles
from moesaic.serving.cuda.cache import HeadNorms, Places, rms_norm, rotate_and_store
from moesaic.serving.cuda.experts import experts
from moesaic.serving.cuda.linear import linear
from moesaic.serving.cuda.tiles import Activations, Weight
from moesaic.serving.execution.layers import Pools, Step, TorchLayers, _Dense
from moesaic.serving.execution.weights import Matrix, Network, RankReader


class CudaLayers(TorchLayers):
    """`Layers` in Triton and cuBLAS.

    Args:
        reader: The weights of this rank.
        device: Where they go.
        activations: Whether rows are rounded to e4m3 before weights in e4m3.
    """

    def __init__(
        self,
        reader: RankReader,
        device: torch.device | str = "cuda",
        *,
        activations: Activations = "wide",
    ) -> None:
        super().__init__(reader, device)
        self.activations: Activations = activations
        self._tiles: dict[int, list[Tiles]] = {}
        """Of the step under way, by queries of a key-value head."""
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # where triton launches, wherever its tensors are

    def embed(self, step: Step) -> Tensor:
        """As `Layers.embed`; a step begins here."""
        # Also when it is the same step: a graph holds the kernels that read its positions anew.
        self._tiles = {}
        return super().embed(step)

    def attend(self, layer: int, x_TD: Tensor, step: Step, pools: Pools) -> Tensor:
        """As `Layers.attend`."""
        half = self._attention[layer]
        if half.qkv is None or half.out is None:
            return super().attend(layer, x_TD, step, pools)
        norms = None
        if half.q_norm is not None and half.k_norm is not None:
            norms = HeadNorms(half.q_norm.weight, half.k_norm.weight, half.q_norm.eps)
        qkv_TO = self._linear(_normed(x_TD, half.norm), half.qkv, half.qkv_bias_O)
        places = Places(step.cos_TC, step.sin_TC, step.blocks_T, step.rows_T)
        q_THC = rotate_and_store(qkv_TO, places, *pools, norms)
        tiles = self._tiles_of(step, half.group_heads)
        y_THC = attend(q_THC, *pools, step.tables_SB, tiles, window=half.window)
        return self._linear(y_THC.flatten(1), half.out, half.out_bias_D)

    def feed_forward(self, layer: int, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `Layers.feed_forward`."""
        half = self._feed_forward[layer]
        normed_TD = _normed(x_TD, half.norm)
        if isinstance(half, _Dense):
            if half.network is None:
                return torch.zeros_like(x_TD), None
            return self._swiglu(normed_TD, half.network), None
        routed = half.router(normed_TD)
        if half.w1 is None or half.w3 is None or half.w2 is None:
            y_TD = torch.zeros_like(x_TD)
        else:
            y_TD = experts(
                normed_TD,
                routed.experts_TK,
                routed.gates_TK,
                *(_weight(stack) for stack in (half.w1, half.w3, half.w2)),
                first_expert=half.held.start,
                activations=self.activations,
            )
        if half.shared is not None and half.shared_gate_D is not None:
            gate_weight_1D = half.shared_gate_D[None].to(x_TD.dtype)
            gate_T1 = functional.linear(normed_TD, gate_weight_1D).sigmoid()
            y_TD = y_TD + gate_T1 * self._swiglu(normed_TD, half.shared)
        return y_TD, routed.experts_TK

    def logits(self, x_ND: Tensor) -> Tensor:
        """As `Layers.logits`."""
        normed_ND = _normed(x_ND, self._norm)
        return linear(normed_ND, Weight(self._head), out_dtype=torch.float32)

    def hidden(self, x_ND: Tensor) -> Tensor:
        """As `Layers.hidden`."""
        return _normed(x_ND, self._norm).float()

    def _linear(self, x_TI: Tensor, matrix: Matrix, bias_O: Tensor | None = None) -> Tensor:
        return linear(x_TI, _weight(matrix), bias_O, activations=self.activations)

    def _swiglu(self, x_TD: Tensor, network: Network) -> Tensor:
        h_TF = functional.silu(self._linear(x_TD, network.w1)) * self._linear(x_TD, network.w3)
        return self._linear(h_TF, network.w2)

    def _tiles_of(self, step: Step, group: int) -> list[Tiles]:
        if group not in self._tiles:
            counts = [len(chunk.tokens) for chunk in step.chunks]
            if max(counts) == 1:
                self._tiles[group] = [tiles_of_singles(step.positions_T)]
            else:
                starts = [chunk.start for chunk in step.chunks]
                self._tiles[group] = tiles_of(counts, starts, group=group, device=self.device)
        return self._tiles[group]


def _normed(x_TD: Tensor, norm: RMSNorm) -> Tensor:
    return rms_norm(x_TD, norm.weight, norm.eps)


def _weight(matrix: Matrix) -> Weight:
    return Weight(matrix.data, None if matrix.scale_O is None else matrix.scale_O[..., None])
