"""Controllers outside autograd that keep the experts loaded alike.

`AdaptiveCoefficient` sets how hard each layer's balance loss pulls, from how many copies that
layer drops. `update_selection_bias` balances with no loss at all. Both act once per optimiser step,
on counts summed over all of its micro-batches.

Shapes.
    L MoE layers     E experts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.moe.config import BiasForm


class AdaptiveCoefficient:
    """One balance-loss coefficient per layer, following that layer's drop rate.

        target = min(slope * drop_rate, maximum)                 Skywork-MoE Eq. 7 and 9
        value  = decay * value + (1 - decay) * target            Eq. 8

    The value used at a step comes from the drop rates before it. All layers start at the
    maximum: the report does not say, but its Fig. 4 begins there.
    """

    def __init__(
        self,
        num_layers: int,
        *,
        maximum: float = 0.01,
        slope: float = 0.2,
        decay: float = 0.99,
    ) -> None:
        self.maximum, self.slope, self.decay = maximum, slope, decay
        self.values_L = torch.full((num_layers,), maximum, dtype=torch.float64)

    def update(self, drop_rates: Sequence[float] | Tensor) -> None:
        """Move every layer's coefficient, given its share of dropped copies, 0 to 1.

        Once per optimiser step, from counts summed before dividing. In dropless training give
        `RoutingStatistics.would_drop_rate`.
        """
        drop_rates_L = torch.as_tensor(drop_rates, dtype=torch.float64).cpu()
        assert drop_rates_L.shape == self.values_L.shape, f"{drop_rates_L.shape=}"
        targets_L = (self.slope * drop_rates_L).clamp_max(self.maximum)
        # A tensor of its own, so that a value handed out earlier stays what it was.
        self.values_L = self.decay * self.values_L + (1 - self.decay) * targets_L

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit."""
        return {"values": self.values_L.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises ConfigError when the layers do not match."""
        values_L = torch.as_tensor(state["values"], dtype=torch.float64).cpu().clone()
        if values_L.shape != self.values_L.shape:
            raise ConfigError(
                f"The checkpoint has balance coefficients for {values_L.numel()} layers, but the "
                f"model has {self.values_L.numel()} MoE layers. Resume with the same model."
            )
        self.values_L = values_L


@torch.no_grad()
def update_selection_bias(
    bias_E: Tensor, counts_E: Tensor, *, rate: float, form: BiasForm = "error"
) -> None:
    """Raise the bias of underloaded experts and lower that of overloaded ones, in place.

    Loss-free balancing (arXiv 2408.15664): b += rate * (mean load - load), or its sign. The
    paper found the error itself better for softmax gates, the sign for sigmoid ones. A load is
    an expert's share of the step's copies, so the mean load is 1/E.
    """
    counts_E = counts_E.to(torch.float64)
    error_E = 1.0 / counts_E.numel() - counts_E / counts_E.sum().clamp_min(1)
    bias_E += (rate * (error_E.sign() if form == "sign" else error_E)).to(bias_E)
