"""Render a conversation with a tokenizer's chat template, and find the assistant's turns in it.

A template that marks them with `{% generation %}` is asked. Any other is rendered up to each
of the assistant's turns, once without it and once with it: what is added is that turn, its
end mark included. That holds only if every rendering is a beginning of the whole, which is
checked; a template that rewrites earlier turns (to drop their reasoning, say) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Spans = tuple[tuple[int, int], ...]
"""Stretches of characters: (first, one past the last)."""

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatRenderer:
    """Turns rows into text and the spans that are the assistant's.

    Raises:
        DataError: If the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer in {tokenizer.name_or_path} has no chat template. Use that of an "
                f"instruction-tuned model, or add chat_template.jinja."
            )
        self._tokenizer = tokenizer

    def __call__(self, row: dict[str, Any], field: str, where: str) -> tuple[str, Spans]:
        """Render one row.

        Args:
            row: Has the conversation in `field`, a list of {"role", "content", ...}, and may
                have a list of `tools`.
            field: The conversation's field.
            where: File and line, for messages.

        Returns:
            text: The whole conversation.
            learned: The assistant's turns in it, in order.

        Raises:
            DataError: If the row is no conversation with an assistant's turn, or the
                template fails on it or is not prefix-stable.
        """
        messages = _messages(row, field, where)
        tools = row.get("tools") or None
        if tools is not None and not isinstance(tools, list):
            raise DataError(f"{where}: tools is {type(tools).__name__}, not a list.")
        render = self._render(tools, where)
        if _MARK.search(self._tokenizer.get_chat_template(tools=tools)):
            text, learned = render(messages, return_assistant_tokens_mask=True)
        else:
            text, learned = _by_prefixes(render, messages, where)
        if not any(first < end for first, end in learned):
            raise DataError(f"{where}: the chat template shows nothing of the assistant's turns.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where} holds half a surrogate pair.") from error
        return text, learned

    def _render(self, tools: list[Any] | None, where: str) -> Callable[..., tuple[str, Spans]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        def render(messages: list[dict[str, Any]], **options: bool) -> tuple[str, Spans]:
            given: dict[str, Any] = {**self._tokenizer.special_tokens_map, **options}
            try:
                rendered: Any = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=self._tokenizer.get_chat_template(tools=tools),
                    **given,
                )
            except Exception as error:  # a template may raise anything, its own messages included
                reason = " ".join(str(error).split())[:200]
                raise DataError(
                    f"{where}: the chat template does not take this conversation: {reason}"
                ) from error
            (text,), marked = rendered
            return text, tuple((first, end) for spans in marked for first, end in spans)

        return render


def _by_prefixes(
    render: Callable[..., tuple[str, Spans]], messages: list[dict[str, Any]], where: str
) -> tuple[str, Spans]:
    whole, _ = render(messages)
    learned = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, _ = render(messages[:turn], add_generation_prompt=True)
        after, _ = render(messages[: turn + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"{where}: the chat template is not prefix-stable at message {turn}, so the "
                f"assistant's turns cannot be found. Mark them with {{% generation %}} in it."
            )
        learned.append((len(before), len(after)))
    return whole, tuple(learned)


def inside(offsets_N2: NDArray[np.int64], spans: Spans) -> NDArray[np.bool_]:
    """Which of N tokens lie wholly within a span, given each token's first and end character.

    Tokenizers that trim give a space no width and place it after itself, so one of no
    width counts where it ends.
    """
    starts, ends = offsets_N2[:, 0], offsets_N2[:, 1]
    kept = np.zeros(len(offsets_N2), dtype=bool)
    for first, end in spans:
        kept |= (starts >= first) & (ends <= end) & ((ends > starts) | (starts > first))
    return kept


def _messages(row: dict[str, Any], field: str, where: str) -> list[dict[str, Any]]:
    messages = row.get(field)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where} has no list of messages in field {field!r}.")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: a message in {field!r} is not an object with a role.")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message in {field!r} has the role assistant.")
    # Parquet gives every message the keys that any of them has; templates take null for present.
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]
