"""Turn tokens into text while they arrive."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HALF = "\N{REPLACEMENT CHARACTER}"
"""What the decoder writes for bytes that are no character, or not yet."""

BLANK_SIGN = "\N{LOWER ONE EIGHTH BLOCK}"
"""What other tokenizers write for a blank."""

LONGEST_HALF = 3
"""A character has at most 4 bytes; what is written for a part of one, at most so many signs."""

MOST_WAITING = 8
"""Tokens that may wait for a character's end before they are looked at more closely."""


class TextStream:
    """Text of a growing answer, given out as soon as it cannot change any more.

    Half a character waits for its other half, and what may be the beginning of a stop text
    waits until it is clear that it is not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        # The tokenizer's own decode adds several microseconds a token, and blanks it thinks fit.
        self._tokenizer = tokenizer.backend_tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        # Decoding starts a little before the new tokens: a token's text can depend on the last.
        self._context = 0
        self._decoded = 0
        self._known = ""
        self._given = 0
        self._held = ""
        self.stopped_by: str | None = None
        """The stop text that has appeared."""

    def add(self, token: int) -> str:
        """Take one more token; return the text that is now certain."""
        self._tokens.append(token)
        text = self._pending(len(self._tokens))
        half = min(len(text) - len(text.rstrip(HALF)), LONGEST_HALF)
        certain = text[self._given : len(text) - half]
        self._given += len(certain)
        if half == 0:
            self._advance(len(self._tokens), text)
        elif len(self._tokens) - self._decoded > MOST_WAITING:
            self._give_up_on_bytes(text)
        return self._release(certain)

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        if self.stopped_by is not None:
            return ""
        pending = self._pending(len(self._tokens))
        text = self._release(pending[self._given :])
        self._advance(len(self._tokens), pending)
        rest, self._held = self._held, ""
        return text if self.stopped_by is not None else text + rest

    def _pending(self, end: int) -> str:
        """The text from the tokens after `_decoded` up to `end`."""
        return self._decode(self._context, end)[len(self._known) :]

    def _advance(self, end: int, text: str) -> None:
        self._given = max(0, self._given - len(text))
        self._context, self._decoded = self._decoded, end
        self._known = self._decode(self._context, self._decoded)

    def _give_up_on_bytes(self, text: str) -> None:
        """Wait no longer for bytes that will never be a character, or each step takes longer."""
        for end in range(len(self._tokens) - 1, self._decoded, -1):
            part = self._pending(end)
            # Otherwise a character lies across this place.
            if len(part) <= self._given and text.startswith(part):
                self._advance(end, part)
                return

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)
        return text

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            place, self.stopped_by = min(found)
            self._held = ""
            return text[:place]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TokenTexts:
    """The bytes that each token alone stands for.

    Args:
        tokenizer: Whose tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def __getitem__(self, token: int) -> tuple[str, bytes]:
        """Text, with replacement characters for what is no whole character, and bytes."""
        known = self._known.get(token)
        if known is None:
            raw = self._bytes(token)
            known = self._known[token] = (raw.decode("utf-8", "replace"), raw)
        return known

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        if piece is None:  # scores may have more columns than the tokenizer has tokens
            return b""
        if token in self._added:
            return str(piece).encode()
        if _mentions(self._decoder, "ByteLevel"):
            return bytes(_BYTES[sign] for sign in piece if sign in _BYTES)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if BLANK_SIGN in json.dumps(self._decoder, ensure_ascii=False):
            piece = piece.replace(BLANK_SIGN, " ")
        return str(piece).encode()

    @functools.cached_property
    def _decoder(self) -> Any:
        return json.loads(self._tokenizer.to_str()).get("decoder") or {}

    @functools.cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())


def _mentions(decoder: Any, kind: str) -> bool:
    inner = decoder.get("decoders", ())
    return decoder.get("type") == kind or any(_mentions(part, kind) for part in inner)


def _byte_signs() -> dict[str, int]:
    """The printable sign that byte-level tokenizers write for each byte, as GPT-2's did first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_signs()
