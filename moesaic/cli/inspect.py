"""`moesaic inspect MODEL`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.show import lines, size
from moesaic.cli.verb import Summary, verb
from moesaic.reporting.config import InspectConfig


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """Counts first, then the similarity of experts, then every fact of the spec."""
    yield (
        f"{done['folder']}: {done['family']}, {done['parameters']:,} parameters, "
        f"{done['active_parameters']:,} of them active for a token"
    )
    types = ", ".join(f"{name} {size(count)}" for name, count in done["bytes_by_dtype"].items())
    yield f"weights: {size(done['weight_bytes'])} ({types})"
    yield (
        f"a token at position {done['context']:,}: {done['flops_per_token']:,.0f} floating-point "
        f"operations, {size(done['cache_bytes_per_token'])} of cache in 16 bit"
    )
    if done["similarity"]:
        values = " ".join(f"{value:.4f}" for value in done["similarity"].values())
        yield f"expert similarity by layer (mean cosine of weights): {values}"
    yield from lines({"quantization": done["quantization"], **done["spec"]})


@verb(InspectConfig, positional=("model",), show=show)
def inspect(config: InspectConfig) -> Summary:
    """Show what a model folder holds: sizes, parameters, operations, how alike its experts are."""
    summary: Summary = moesaic.inspect(config)
    return summary
