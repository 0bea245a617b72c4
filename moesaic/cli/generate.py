"""`moesaic generate MODEL "prompt"`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.serving.config import GenerateConfig


def end_of_answer(summary: Summary) -> Iterator[str]:
    """The answer stands there already; its line is still open."""
    yield ""


@verb(GenerateConfig, positional=("model", "prompt"), show=end_of_answer, streams=True)
def generate(config: GenerateConfig, *, on_text: Callable[[str], None] | None) -> Summary:
    """Answer a prompt."""
    summary: Summary = moesaic.generate(config, on_text=on_text)
    return summary
