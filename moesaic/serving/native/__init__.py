"""Kernels of a serving step on CPUs: packed weights, and whole half layers in one call each.

build       compiles the C++ at first use, and says whether it can be used
matrices    weights packed for products with few rows and with many: bfloat16, FP8, int8
halves      norm + attention, norm + experts, norm + dense network, norm + head
plain       the same in torch's own operations, taken where the C++ cannot be
"""
