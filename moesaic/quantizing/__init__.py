"""Shrink a model folder to 8-bit weights and say what that cost."""
