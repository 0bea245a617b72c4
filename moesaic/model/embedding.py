"""The table of token vectors, its rows cut over ranks.

Shapes.  B sequences    S positions, s of them this rank's    D model width
         V vocabulary, v of it this rank's
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.parallel.collectives import scatter_sum
from moesaic.parallel.group import ALONE, Group
from moesaic.planning.split import Span, Split


class Embedding(nn.Module):
    """Looks tokens up.

    Args:
        vocab: Rows that this rank holds.
        hidden_dim: Model width.
        group: Ranks that hold the others.
    """

    def __init__(self, vocab: Span, hidden_dim: int, group: Group = ALONE) -> None:
        super().__init__()
        self.vocab, self.group = vocab, group
        self.weight = nn.Parameter(torch.empty(vocab[1] - vocab[0], hidden_dim))

    def forward(
        self, input_ids_BS: Tensor, parts: Split, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Vectors of this rank's positions, (B, s, D), in `dtype` or the weight's own."""
        dtype = dtype or self.weight.dtype
        if self.group.size == 1:
            return F.embedding(input_ids_BS, self.weight).to(dtype)
        start, end = self.vocab
        is_ours_BS = (input_ids_BS >= start) & (input_ids_BS < end)
        if start == end:  # no row to look up, but the weight stays part of the graph
            x_BSD = self.weight.sum() + self.weight.new_zeros(
                *input_ids_BS.shape, self.weight.shape[1]
            )
        else:
            ids_BS = (input_ids_BS - start).where(is_ours_BS, 0)
            x_BSD = F.embedding(ids_BS, self.weight).masked_fill(~is_ours_BS[..., None], 0)
        # One rank alone has anything but zero, so the sum rounds nothing.
        return scatter_sum(x_BSD.to(dtype), parts, self.group, dim=1)
