"""`moesaic quantize MODEL OUT`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.show import size, table
from moesaic.cli.verb import Summary, verb
from moesaic.quantization.compressed import IN_WORDS
from moesaic.quantizing.config import QuantizeConfig


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """The error of each kind of weight, the size, and the loss if it was measured."""
    rows = [
        [kind, f"{of['tensors']:,}", f"{of['relative_rms']:.2%}", f"{of['worst_relative_rms']:.2%}"]
        for kind, of in done["kinds"].items()
    ]
    yield from table(
        [f"weights in {IN_WORDS[done['format']]}", "tensors", "relative error", "worst"], rows
    )
    before, after = done["bytes_before"], done["bytes_after"]
    yield f"weights: {size(before)} -> {size(after)}"
    if heldout := done.get("heldout"):
        yield (
            f"held-out loss: {heldout['before']:.4f} -> {heldout['after']:.4f} nats a token "
            f"({heldout['difference']:+.4f})"
        )
    yield f"wrote {done['out']}"


@verb(QuantizeConfig, positional=("model", "out"), show=show)
def quantize(config: QuantizeConfig) -> Summary:
    """Shrink a model to 8-bit weights, FP8 or int8, and say what that cost."""
    summary: Summary = moesaic.quantize(config)
    return summary
