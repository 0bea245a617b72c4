"""Time a model's layers and the links between ranks, for the planner. See docs/measure.md."""
