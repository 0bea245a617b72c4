"""`moesaic inspect MODEL`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.reporting.config import InspectConfig


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """A table of the facts; --json has every one."""
    # Loads torch, which `--help` must not.
    from moesaic.reporting.inspect import render

    yield from render(done).splitlines()


@verb(InspectConfig, positional=("model",), show=show)
def inspect(config: InspectConfig) -> Summary:
    """Show what a model folder holds: sizes, parameters, operations, how alike its experts are."""
    summary: Summary = moesaic.inspect(config)
    return summary
