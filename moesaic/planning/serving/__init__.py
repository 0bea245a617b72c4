"""How a model is served: who holds what, how much memory it takes, and how fast it is."""
