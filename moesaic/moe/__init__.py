"""The mixture of experts: router, capacity, dispatch, experts, losses, statistics, layer."""

from moesaic.moe.balance import AdaptiveCoefficient, update_selection_bias
from moesaic.moe.experts import Experts, grouped_swiglu
from moesaic.moe.layer import MoELayer, RoutingConfig, RoutingStep
from moesaic.moe.router import Router, RouterOutput, normalise_logits
from moesaic.moe.statistics import RoutingStatistics

__all__ = [
    "AdaptiveCoefficient",
    "Experts",
    "MoELayer",
    "Router",
    "RouterOutput",
    "RoutingConfig",
    "RoutingStatistics",
    "RoutingStep",
    "grouped_swiglu",
    "normalise_logits",
    "update_selection_bias",
]
