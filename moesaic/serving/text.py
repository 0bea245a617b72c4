"""Turn tokens into text while they arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextStream:
    """Text of a growing answer, given out as soon as it cannot change any more.

    Half a character waits for its other half, and what may be the beginning of a stop text
    waits until it is clear that it is not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        # Decoding starts a little before the new tokens: a token's text can depend on the last.
        self._context = 0
        self._decoded = 0
        self._held = ""
        self.is_stopped = False
        """Whether a stop text has appeared."""

    def add(self, token: int) -> str:
        """Take one more token; return the text that is now certain."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._advance()
        return self._release(text)

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        if self.is_stopped:
            return ""
        text = self._release(self._new_text())
        self._advance()
        rest, self._held = self._held, ""
        return text if self.is_stopped else text + rest

    def _new_text(self) -> str:
        known = self._decode(self._tokens[self._context : self._decoded])
        return self._decode(self._tokens[self._context :])[len(known) :]

    def _advance(self) -> None:
        self._context, self._decoded = self._decoded, len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str), f"{text=}"
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [text.find(stop) for stop in self._stop if stop in text]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
