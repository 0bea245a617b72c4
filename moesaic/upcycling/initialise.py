"""The first weights of routers and experts, one tensor at a time.

Every function is pure: random numbers depend on the seed and the tensor's name, so tensors
may be made in any order, on any number of machines.

Shapes.  E experts    D model width    F inner width of the dense MLP
         G granularity: parts an MLP is cut into
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.model.build import tensor_generator

INNER_DIM = {"w1": 0, "w3": 0, "w2": 1}
"""Which dim of an expert's matrix is its inner width: w1 and w3 are (F, D), w2 is (D, F)."""


def normal(
    shape: tuple[int, ...], *, std: float, mean: float = 0.0, seed: int, name: str
) -> Tensor:
    """Normal random numbers that belong to the tensor `name`, float32."""
    values = torch.empty(shape, dtype=torch.float32)
    return values.normal_(mean, std, generator=tensor_generator(seed, name))


def router_weight(
    num_experts: int, hidden_dim: int, *, std: float, granularity: int, seed: int, name: str
) -> Tensor:
    """First weight of a router, (E, D) float32: normal around 0.

    With G above 1, each row is repeated G times: experts gG to gG + G - 1 are the parts of one
    MLP, a virtual group (arXiv 2410.07524). Equal rows give equal logits, so top-k takes or
    leaves a group as a whole.
    """
    rows = normal((num_experts // granularity, hidden_dim), std=std, seed=seed, name=name)
    return rows.repeat_interleave(granularity, dim=0)


def with_noise(weight: Tensor, relative_std: float, *, seed: int, name: str) -> Tensor:
    """`weight` plus normal noise of `relative_std` times the weight's own standard deviation."""
    wide = _widen(weight)
    std = relative_std * float(wide.std(correction=0))
    noise = normal(tuple(weight.shape), std=std, seed=seed, name=name)
    return wide.add_(noise).to(weight.dtype)


def dropped_positions(ffn_dim: int, ratio: float, *, seed: int, name: str) -> Tensor:
    """Which inner positions of one expert are drawn anew: round(ratio F) of F, sorted int64.

    The three matrices of an expert must be given the same positions (arXiv 2502.19261), so
    `name` is the expert's, not a matrix's.
    """
    shuffled = torch.randperm(ffn_dim, generator=tensor_generator(seed, name))
    return shuffled[: round(ratio * ffn_dim)].sort().values


def with_positions_redrawn(
    weight: Tensor, positions: Tensor, *, dim: int, seed: int, name: str
) -> Tensor:
    """`weight` with the rows (dim 0) or columns (dim 1) at `positions` drawn anew.

    New entries are normal with the mean and standard deviation of the entries they replace
    (Drop-Upcycling, arXiv 2502.19261). The standard deviation is the population's.
    """
    if not len(positions):
        return weight
    old = _widen(weight.index_select(dim, positions))
    std, mean = torch.std_mean(old, correction=0)
    new = normal(tuple(old.shape), std=float(std), mean=float(mean), seed=seed, name=name)
    return weight.index_copy(dim, positions, new.to(weight.dtype))


def part_of_mlp(weight: Tensor, part: int, *, matrix: str, granularity: int) -> Tensor:
    """Part `part` of G of a dense MLP's matrix, as an expert of its own.

    The MLP is the sum of its parts. Top-k picks m = k / G whole groups; the G gates of group g
    are equal and all chosen gates sum to 1, so each is p_g / G with p_g summing to 1, and the
    layer gives sum_g p_g MLP(x) / G = MLP(x) / G. Hence w2, in which the output is linear, is
    multiplied by G, which restores MLP(x) exactly; for a power of two even to the last bit.
    (arXiv 2410.07524 spreads its factor over the three matrices as a cube root each. SiLU is
    not linear, so that keeps the output's size but not the function.)
    """
    dim = INNER_DIM[matrix]
    width = weight.shape[dim] // granularity
    cut = weight.narrow(dim, part * width, width)
    return cut * granularity if matrix == "w2" else cut


def _widen(weight: Tensor) -> Tensor:
    """A copy in at least float32."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
