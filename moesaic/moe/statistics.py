"""How one MoE layer routed, as sums that can be added up.

Sums, never means: statistics of micro-batches (and later of ranks) are added with `+`, and
divided once, in `summary`. Everything is detached and small, and stays on its device until
somebody reads it.

Shapes.
    T tokens     E experts
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingStatistics:
    """Sums over the tokens seen by one layer."""

    batches: int
    """Micro-batches summed."""

    tokens: int
    """Tokens routed."""

    copies: int
    """Tokens times experts per token."""

    counts_E: Tensor
    """Copies each expert was sent, before any drop, int64."""

    dropped: Tensor
    """Copies that overflowed and were not computed, (), int64; 0 when dropless."""

    would_drop: Tensor
    """Copies beyond the capacity, or when dropless beyond the stated one, (), int64."""

    gates_E: Tensor
    """Sum over tokens of each expert's probability, chosen or not, float64."""

    entropy: Tensor
    """Sum over tokens of the entropy of their probabilities in nats, (), float64."""

    ratios_2: Tensor
    """Sums over tokens of Max1/Max2 and Max2/Max3, where Max_i is the i-th largest probability."""

    ratio_tokens_2: Tensor
    """Tokens in each of those sums: a ratio with a zero or a missing denominator is left out."""

    balance_loss: Tensor
    """Sum over micro-batches of the balance loss before its coefficient, (), float64."""

    z_loss: Tensor
    """Sum over micro-batches of the router z-loss before its weight, (), float64."""

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return RoutingStatistics(**sums)

    def to_tensor(self) -> Tensor:
        """All sums one after the other, float64, to be added over ranks."""
        parts = (getattr(self, f.name) for f in fields(self))
        device = self.counts_E.device
        return torch.cat(
            [
                torch.as_tensor(part, dtype=torch.float64, device=device).reshape(-1)
                for part in parts
            ]
        )

    @classmethod
    def from_tensor(cls, sums: Tensor, *, num_experts: int) -> RoutingStatistics:
        """What `to_tensor` gave, or a sum of such."""
        sizes = {"counts_E": num_experts, "gates_E": num_experts}
        sizes |= {"ratios_2": 2, "ratio_tokens_2": 2}
        parts = sums.split([sizes.get(f.name, 1) for f in fields(cls)])
        found: dict[str, Any] = {}
        for field, part in zip(fields(cls), parts, strict=True):
            if field.name in ("batches", "tokens", "copies"):
                found[field.name] = int(part)
            elif field.name in ("counts_E", "dropped", "would_drop", "ratio_tokens_2"):
                found[field.name] = part.long().squeeze(0) if len(part) == 1 else part.long()
            else:
                found[field.name] = part.squeeze(0) if len(part) == 1 else part
        return cls(**found)

    @staticmethod
    def width(num_experts: int) -> int:
        """Length of `to_tensor`."""
        return 2 * num_experts + 12

    @property
    def drop_rate(self) -> float:
        """Share of copies that were dropped."""
        return float(self.dropped) / max(self.copies, 1)

    @property
    def would_drop_rate(self) -> float:
        """Share of copies beyond the capacity: the drop rate that drives the coefficient."""
        return float(self.would_drop) / max(self.copies, 1)

    def summary(self) -> dict[str, Any]:
        """Means and shares as plain numbers; None where there is nothing to divide by."""
        ratios = [
            total / count if count else None
            for total, count in zip(
                self.ratios_2.tolist(), self.ratio_tokens_2.tolist(), strict=True
            )
        ]
        tokens, batches = max(self.tokens, 1), max(self.batches, 1)
        return {
            "tokens": self.tokens,
            "load": (self.counts_E.double() / max(self.copies, 1)).tolist(),
            "mean_gates": (self.gates_E / tokens).tolist(),
            "drop_rate": self.drop_rate,
            "would_drop_rate": self.would_drop_rate,
            "entropy": float(self.entropy) / tokens,
            "max1_over_max2": ratios[0],
            "max2_over_max3": ratios[1],
            "balance_loss": float(self.balance_loss) / batches,
            "z_loss": float(self.z_loss) / batches,
        }


@torch.no_grad()
def measure_routing(
    probs_TE: Tensor,
    *,
    copies: int,
    counts_E: Tensor,
    dropped: Tensor,
    would_drop: Tensor,
    balance_loss: Tensor,
    z_loss: Tensor,
) -> RoutingStatistics:
    """Statistics of one micro-batch, from its probabilities and what was counted on the way."""
    probs_TE = probs_TE.detach()
    tokens, num_experts = probs_TE.shape
    best_T3 = probs_TE.topk(min(3, num_experts), dim=-1).values
    above, below = best_T3[:, :-1], best_T3[:, 1:]
    defined = below > 0
    ratios = (above / below).where(defined, 0.0).sum(dim=0, dtype=torch.float64)
    missing = 2 - ratios.numel()
    return RoutingStatistics(
        batches=1,
        tokens=tokens,
        copies=copies,
        counts_E=counts_E,
        dropped=dropped,
        would_drop=would_drop,
        gates_E=probs_TE.sum(dim=0, dtype=torch.float64),
        entropy=torch.special.entr(probs_TE).sum(dtype=torch.float64),
        ratios_2=torch.nn.functional.pad(ratios, (0, missing)),
        ratio_tokens_2=torch.nn.functional.pad(defined.sum(dim=0), (0, missing)),
        balance_loss=balance_loss.detach().double(),
        z_loss=z_loss.detach().double(),
    )
