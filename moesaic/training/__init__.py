"""Train a dense or MoE model folder on a token folder, and survive being stopped.

Start at `loop.train`. `docs/run-folder.md` describes what a run leaves on disk.
"""
