"""The decoder: norm, rope, attention, mlp, block, transformer; `build` makes and loads it."""
