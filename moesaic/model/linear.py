"""Linear layers whose weight may be wider than the activations, and cut over ranks.

Training keeps float32 weights and bfloat16 activations. The weight is rounded where it is
used and its gradient comes back in its own dtype, so no autocast and no second copy of the
model is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.parallel.collectives import scatter_sum
from moesaic.parallel.group import Group
from moesaic.planning.split import Split


class Linear(nn.Module):
    """y = x W^T + b with weight (out, in), computed in x's dtype."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class SummedLinear(Linear):
    """The same where ranks hold columns of W: their products are added up, then comes b."""

    def forward(self, x_BSI: Tensor, parts: Split, group: Group) -> Tensor:  # type: ignore[override]
        """Returns this rank's part of the positions, (B, s, out)."""
        product_BSO = F.linear(x_BSI, self.weight.to(x_BSI.dtype))
        y_BsO = scatter_sum(product_BSO, parts, group, dim=1)
        return y_BsO if self.bias is None else y_BsO + self.bias.to(y_BsO.dtype)
