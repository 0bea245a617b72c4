"""Serving on CUDA: Triton kernels for sm89 and sm90. Nothing here is loaded without a GPU."""
