"""The decoder: norm, rope, attention, mlp, block, transformer; built, loaded and saved in `build`."""
