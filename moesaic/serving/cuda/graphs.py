"""CUDA graphs for steps in which every sequence has one new token.

Launching a layer's dozen kernels takes a CPU longer than the kernels take at a small batch. A
graph launches all layers at once, but always on the same memory and the same number of tokens. So
a step is copied into memory of its own, padded to the next of a few sizes by repeating its own
tokens: they write what is written there anyway and go to experts that are read anyway, and what
comes of them is cut off. Other steps, and larger ones, run as they are.

Shapes.  T tokens of the step, one a sequence    B blocks of the longest sequence
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.serving.execution.batch import Chunk
from moesaic.serving.execution.layers import Step

Outputs = tuple[Tensor, list[Tensor]]
"""Of all layers: what they make of the tokens, and the experts of each MoE layer. Rows are
tokens."""

Forward = Callable[[Step], Outputs]

Capture = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]
"""Runs a function, and returns what it returned with a way to compute it anew in place."""

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of tokens with a graph. Never a third more work than asked for beyond 16, where reading
weights no longer hides it; a graph takes seconds to make and some MiB to keep."""

_BY_TOKEN = ("tokens_T", "positions_T", "cos_TC", "sin_TC", "blocks_T", "rows_T")


class _Held(NamedTuple):
    """One size."""

    step: Step
    outputs: Outputs
    replay: Callable[[], None]


class DecodeGraphs:
    """Runs steps through graphs where it can. A graph is made when its size is first met.

    Args:
        forward: All layers of a step.
        table_blocks: Blocks of the longest sequence that can come.
        capture: Makes a graph; another one is for tests.
    """

    def __init__(
        self, forward: Forward, *, table_blocks: int, capture: Capture | None = None
    ) -> None:
        self._forward, self._table_blocks = forward, table_blocks
        self._capture = capture or _Capture()
        self._held: dict[int, _Held] = {}

    def __call__(self, step: Step) -> Outputs:
        """What `forward` returns for this step. It holds until the next call."""
        size = padded_size(step)
        if size is None:
            return self._forward(step)
        tokens = len(step.tokens_T)
        if size not in self._held:
            own = self._memory_for(step, size)
            _fill(own, step)
            outputs, replay = self._capture(lambda: self._forward(own))
            self._held[size] = _Held(own, outputs, replay)
        held = self._held[size]
        _fill(held.step, step)
        held.replay()
        x_TD, experts = held.outputs
        return x_TD[:tokens], [experts_TK[:tokens] for experts_TK in experts]

    def _memory_for(self, step: Step, size: int) -> Step:
        empty: dict[str, Any] = {name: _rows_like(getattr(step, name), size) for name in _BY_TOKEN}
        return dataclasses.replace(
            step,
            **empty,
            starts_S=empty["positions_T"],  # of single tokens the same, and not looked at
            counts_S=torch.ones_like(empty["positions_T"]),
            tables_SB=step.tables_SB.new_zeros(size, self._table_blocks),
            chunks=(Chunk(tokens=(0,), start=0, blocks=(0,)),) * size,
            _groups=[],
        )


def padded_size(step: Step) -> int | None:
    """The size of the graph for a step; None if there is none."""
    tokens = len(step.tokens_T)
    if tokens != len(step.chunks):
        return None
    return next((size for size in SIZES if size >= tokens), None)


def _rows_like(tensor: Tensor, rows: int) -> Tensor:
    return tensor.new_zeros(rows, *tensor.shape[1:])


def _fill(own: Step, step: Step) -> None:
    rows = torch.arange(len(own.tokens_T), device=own.tokens_T.device) % len(step.tokens_T)
    for name in _BY_TOKEN:
        torch.index_select(getattr(step, name), 0, rows, out=getattr(own, name))
    blocks = step.tables_SB.shape[1]
    own.tables_SB[:, :blocks] = step.tables_SB[rows]  # what is beyond is not looked at


class _Capture:
    """Makes CUDA graphs that share their working memory: only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        # Kernels are compiled and libraries set up on first use, which no graph can hold.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run()
        return outputs, graph.replay
