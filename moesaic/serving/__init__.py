"""Answer prompts with a model folder."""
