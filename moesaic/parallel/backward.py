"""Which gradients a backward pass is for: zero-bubble schedules run it in two parts.

The first finds the gradient of a stage's input, for which another rank waits; the second, later,
those of the weights. Autograd runs only the nodes that a part needs, but a node with both kinds of
input belongs to both parts, and torch's `ctx.needs_input_grad` says the same in either. An
autograd function that computes both kinds asks here, so that none is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Wanted(NamedTuple):
    """Kinds of gradients."""

    activations: bool = True
    weights: bool = True


# Not one for each thread: autograd runs the nodes of a GPU in threads of its own.
_wanted = Wanted()


def wanted() -> Wanted:
    """What the backward pass that runs now is for."""
    return _wanted


@contextmanager
def only(*, activations: bool = False, weights: bool = False) -> Iterator[None]:
    """Let the backward passes inside be for these kinds."""
    global _wanted
    before, _wanted = _wanted, Wanted(activations, weights)
    try:
        yield
    finally:
        _wanted = before
