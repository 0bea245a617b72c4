"""The dense feed-forward network: SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.model.linear import Linear


class MLP(nn.Module):
    """down(SiLU(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden_dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_dim, ffn_dim)
        self.up_proj = Linear(hidden_dim, ffn_dim)
        self.down_proj = Linear(ffn_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]
