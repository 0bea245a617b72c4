"""The dense feed-forward network: SwiGLU (arXiv 2002.05202).

Shapes.  B sequences    S positions, s of them this rank's    D model width
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.model.linear import Linear, SummedLinear
from moesaic.parallel.collectives import gather
from moesaic.parallel.group import ALONE, Group
from moesaic.planning.split import Split


class MLP(nn.Module):
    """down(SiLU(gate(x)) * up(x)), without biases.

    Args:
        hidden_dim: Model width.
        ffn_dim: Columns that this rank holds.
        group: Ranks that hold the others.
    """

    def __init__(self, hidden_dim: int, ffn_dim: int, group: Group = ALONE) -> None:
        super().__init__()
        self.group = group
        self.gate_proj = Linear(hidden_dim, ffn_dim)
        self.up_proj = Linear(hidden_dim, ffn_dim)
        self.down_proj = SummedLinear(ffn_dim, hidden_dim)

    def forward(self, x_BsD: Tensor, parts: Split, *, recompute: bool = False) -> Tensor:
        """Returns (B, s, D); with `recompute` the columns are computed again in the backward."""
        x_BSD = gather(x_BsD, parts, self.group, dim=1)
        if recompute:
            h_BSF = checkpoint(self._columns, x_BSD, use_reentrant=False)
        else:
            h_BSF = self._columns(x_BSD)
        return self.down_proj(h_BSF, parts, self.group)  # type: ignore[no-any-return]

    def _columns(self, x_BSD: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD)  # type: ignore[no-any-return]
