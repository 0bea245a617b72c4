"""Show what a model folder is and what a training run did."""
