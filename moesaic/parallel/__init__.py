"""torch.distributed lives here and nowhere else: groups, collectives, mesh views, shards, pipeline.

Layers are handed sizes and a `Group`. A group of one never communicates, so no caller asks how
many ranks there are.
"""
