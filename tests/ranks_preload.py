"""What every rank of a test needs, imported once before the ranks are forked."""

import torch
import torch.distributed
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor

import moesaic.parallel.world

torch.set_num_threads(1)

__all__ = ["moesaic", "torch"]
