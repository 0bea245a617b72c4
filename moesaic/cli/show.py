"""Summaries of jobs as lines for people: sentences, tables, or every value by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from moesaic.config import NONE

Show = Callable[[dict[str, Any]], Iterable[str]]


def lines(summary: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every value of a summary as `name: value`; nested names are joined by a dot."""
    for key, value in summary.items():
        if isinstance(value, Mapping):
            yield from lines(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for index, item in enumerate(value):
                yield from lines(item, f"{prefix}{key}.{index}.")
        else:
            yield f"{prefix}{key}: {format_value(value)}"


def format_value(value: Any) -> str:
    """A number with its thousands apart or four digits, a list by its items, text as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NONE}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return " ".join(format_value(item) for item in value) or NONE
    return str(value)


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
