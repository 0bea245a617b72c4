"""Hold an answer to a JSON schema or a regular expression, token by token.

The library llguidance knows which tokens may come next. A grammar is compiled where a request is
submitted, so what is wrong with it is that request's fault and nobody else waits for it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import ConfigError
from moesaic.serving.config import SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,16}"
"""Between the parts of JSON: enough to lay it out over lines, not so much that a model which likes
blanks never comes to the point."""


class Grammars:
    """Compiles grammars for one tokenizer. Thread-safe.

    Args:
        tokenizer: The model's.
        vocab_size: Scores in a row, which may be more than the tokenizer has tokens.
        eos_token_ids: Tokens that may end an answer which the grammar allows to end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()

    def compile(self, sampling: SamplingConfig) -> Grammar | None:
        """The grammar that a request asks for, if any.

        Raises:
            ConfigError: It cannot be understood, or needs what is not supported.
        """
        import llguidance

        if sampling.regex is not None:
            source = llguidance.LLMatcher.grammar_from_regex(sampling.regex)
            what = "regex"
        elif sampling.json_schema is not None:
            try:
                source = llguidance.LLMatcher.grammar_from_json_schema(
                    sampling.json_schema, overrides={"whitespace_pattern": WHITESPACE}
                )
            except ValueError as error:
                raise ConfigError(_refused("json_schema", str(error))) from None
            what = "json_schema"
        else:
            return None
        with self._lock:
            vocabulary = self._vocabulary
        grammar = Grammar(llguidance.LLMatcher(vocabulary, source, log_level=0), self._vocab_size)
        # The first step is the longest. Nobody waits for it here, and all would in the engine.
        grammar.forbid(np.zeros(self._vocab_size, np.float32))
        if grammar.error:
            raise ConfigError(_refused(what, grammar.error))
        return grammar

    @functools.cached_property
    def _vocabulary(self) -> Any:
        # Takes a second with a large vocabulary, so only where a grammar is asked for.
        from llguidance.hf import from_tokenizer

        ends = self._eos_token_ids or None
        return from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=ends)


class Grammar:
    """What may still come in one answer."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask = np.zeros(-(-vocab_size // 32), np.int32)

    def copy(self) -> Grammar:
        """The same grammar for another answer; only while nothing was added."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size)

    def forbid(self, logits_V: NDArray[np.float32]) -> None:
        """Set scores of tokens that may not come next to minus infinity; after an error, all."""
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():  # it would allow the end token
            self._mask[:] = 0
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")
        logits_V[bits[: self._vocab_size] == 0] = -np.inf

    def add(self, token: int) -> None:
        """Take in a chosen token. `error` says afterwards whether that went well."""
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str:
        """What went wrong, one line; empty if nothing did."""
        return _line(self._matcher.get_error()) if self._matcher.is_error() else ""


def _refused(what: str, error: str) -> str:
    return f"The {what} cannot be used: {_line(error)}."


def _line(text: str) -> str:
    # llguidance appends its state to its messages, after a marker.
    return " ".join(text.partition("<state>")[0].split())[:300].rstrip(".")
