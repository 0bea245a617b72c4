"""Numbers of eight bits: how weights become FP8, and how they are read back."""
