"""Who holds which layer, head, column and expert. Pure Python: starts without torch."""
