"""The mixture of experts: router, capacity, dispatch, experts, losses, statistics, layer.

Importing this package loads no torch, so that `moesaic.moe.config` can be read by whatever
only needs to know the choices.
"""
