"""`moesaic prepare RECIPE`, or with flags alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import moesaic
from moesaic.cli.show import table
from moesaic.cli.verb import Summary, verb
from moesaic.data.config import PrepareConfig

UNITS = ("sequences", "tokens", "documents")


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """Rows, tokens and documents of each source and split."""
    rows = [
        [f"{source['name']}, {split}", *(f"{source[split][unit]:,}" for unit in UNITS)]
        for source in done["sources"]
        for split in ("train", "heldout")
    ]
    yield from table([f"rows of {done['sequence_length']:,}", *UNITS], rows)
    skipped = sum(source["skipped_files"] for source in done["sources"])
    if skipped:
        yield f"{skipped:,} files are not UTF-8 and were left out"
    yield f"wrote {done['out']}"


@verb(PrepareConfig, recipe=True, show=show)
def prepare(config: PrepareConfig) -> Summary:
    """Turn text into training data."""
    summary: Summary = moesaic.prepare(config)
    return summary
