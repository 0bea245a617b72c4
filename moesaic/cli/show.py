"""What summaries of jobs are shown with: tables, losses, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

Show = Callable[[dict[str, Any]], Iterable[str]]
"""Turns a summary into lines for people."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Rows under their heads; the first column is text, the others are numbers."""
    cells = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    for first, *others in cells:
        numbers = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *numbers]).rstrip()


def losses(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Held-out losses of models, each beside the first."""

    def row(model: Mapping[str, Any]) -> list[str]:
        difference = ""
        if model["difference"] is not None:
            error = model["difference_standard_error"]
            difference = f"{model['difference']:+.4f}" + (f" ± {error:.4f}" if error else "")
        return [model["label"], f"{model['loss']:.4f}", f"{model['perplexity']:.2f}", difference]

    return table(["model", "nats a token", "perplexity", "to the first"], map(row, models))


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} GiB"
