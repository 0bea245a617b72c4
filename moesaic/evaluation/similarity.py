"""How alike the experts of a layer are.

The definition is ours: Skywork-MoE plots an "expert similarity" (its Fig. 1) and never says
how it is computed. Here an expert is one long vector, its w1, w3 and w2 laid end to end, and

    similarity = mean over all pairs of experts of cos(expert i, expert j).

Experts that are copies have 1, independent random ones about 0, which are the end points of
that figure. Everything is read off one E x E matrix of dot products, summed in float64 a
slice of the vectors at a time, so that layers of any size need little memory.

Shapes.  E experts    D model width    F expert width
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.folder import WeightReader, read_spec
from moesaic.checkpoint.names import disk_entries
from moesaic.errors import FolderError

SLICE_VALUES = 1 << 16
"""Values of one expert that are widened to float64 at once."""


def expert_similarity(*weights: Tensor) -> float:
    """Mean cosine between the experts of one layer, over all pairs.

    Args:
        weights: Stacked matrices, each (E, ...), of any float type: w1 (E, F, D), w3 (E, F, D)
            and w2 (E, D, F). Their order does not matter.

    Returns:
        From -1 / (E - 1) to 1; 1 for a single expert.
    """
    with torch.no_grad():
        return mean_cosine(gram(weights))


def gram(weights: Iterable[Tensor]) -> Tensor:
    """Dot products between experts, (E, E), float64, on the device of the weights."""
    return _sum_of_products(weight.flatten(1).unbind() for weight in weights)


def mean_cosine(gram_EE: Tensor) -> float:
    """Mean over pairs of distinct experts of the cosine, from all dot products, (E, E).

    An expert of zeros has no direction; its cosines count as 0.
    """
    num_experts = gram_EE.shape[0]
    if num_experts == 1:
        return 1.0
    norms_E = gram_EE.diagonal().sqrt()
    scale_E = torch.where(norms_E > 0, 1 / norms_E, 0.0)
    cosines_EE = (gram_EE * scale_E[:, None] * scale_E[None, :]).clamp(-1, 1)
    cosines_EE.fill_diagonal_(0)
    return float(cosines_EE.sum()) / (num_experts * (num_experts - 1))


def folder_similarity(folder: str | Path) -> dict[int, float]:
    """Similarity of each MoE layer of a model folder, dense layers left out.

    Weights are read a slice at a time, so a folder may be far larger than memory. FP8 experts
    are compared as what they stand for: value times scale.

    Raises:
        FolderError: If the folder cannot be read, or lacks a tensor of an expert.
    """
    spec = read_spec(folder)
    names: dict[int, dict[str, list[str]]] = {}
    for entry in disk_entries(spec):
        if entry.expert is not None:
            layer = int(entry.param.split(".")[2])
            names.setdefault(layer, {}).setdefault(entry.param, []).append(entry.name)
    with WeightReader(folder) as reader:
        return {
            layer: mean_cosine(
                _sum_of_products(
                    [_expert_weight(reader, name) for name in experts]
                    for experts in params.values()
                )
            )
            for layer, params in sorted(names.items())
        }


class _ScaledWeight:
    """A weight with a scale for all of it, or for each row, widened only where it is sliced."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self.weight = weight.flatten()
        self.scale = scale.to(torch.float64).flatten()
        self.row_values = weight.numel() // self.scale.numel()

    def numel(self) -> int:
        return self.weight.numel()

    def __getitem__(self, where: slice) -> Tensor:
        values = self.weight[where].to(torch.float64)
        rows = torch.arange(where.start, where.start + values.numel()) // self.row_values
        return values * self.scale[rows]


def _expert_weight(reader: WeightReader, name: str) -> Tensor | _ScaledWeight:
    if name not in reader.entries:
        raise FolderError(f"{reader.folder} has no tensor {name}, which its config.json asks for.")
    weight = reader.read(name)
    scale = name + "_scale"
    if scale in reader.entries:
        return _ScaledWeight(weight, reader.read(scale))
    return weight.flatten()


def _sum_of_products(matrices: Iterable[Sequence[Tensor | _ScaledWeight]]) -> Tensor:
    """Dot products between experts, (E, E); each item holds one flat matrix of every expert."""
    total_EE: Tensor | None = None
    for experts in matrices:
        for start in range(0, experts[0].numel(), SLICE_VALUES):
            # float64: a copy's cosine must read 1, and E x E sums cost little beside reading.
            slice_EN = torch.stack(
                [expert[start : start + SLICE_VALUES].to(torch.float64) for expert in experts]
            )
            product_EE = slice_EN @ slice_EN.T
            total_EE = product_EE if total_EE is None else total_EE + product_EE
    assert total_EE is not None, "a layer has at least one matrix"
    return total_EE
