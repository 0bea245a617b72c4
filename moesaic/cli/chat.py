"""`moesaic chat MODEL`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.serving.config import ChatConfig


def show(summary: Summary) -> Iterator[str]:
    """The conversation stands there already."""
    yield from ()


@verb(ChatConfig, positional=("model",), show=show, streams=True)
def chat(config: ChatConfig, *, on_text: Callable[[str], None] | None) -> Summary:
    """Talk to a model or a server at the terminal."""
    summary: Summary = moesaic.chat(config, on_text=on_text)
    return summary
