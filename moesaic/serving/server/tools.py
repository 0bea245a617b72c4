"""Functions that a model may call: shown to it by its chat template, found again in its answer.

With `auto` the model answers as it was trained to. Most templates ask for JSON between
`<tool_call>` and `</tool_call>`; others for JSON alone. What is no call is text. With `required`
or a named function a grammar leaves the model no choice: its answer is a JSON list of calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from moesaic.serving.server.protocol import Function, NamedTool, Tool

BEGIN, END = "<tool_call>", "</tool_call>"

NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


class Call(NamedTuple):
    """A function that the model calls."""

    name: str
    arguments: str
    """JSON."""


Piece = str | Call
"""A part of an answer, in order."""


class Parser(Protocol):
    """Finds calls in a text that grows."""

    def feed(self, text: str) -> Iterator[Piece]:
        """Take more text; give what is certain now."""

    def finish(self) -> Iterator[Piece]:
        """Give the rest, once no more text comes."""


class PlainText:
    """An answer in which nothing is looked for."""

    def feed(self, text: str) -> Iterator[Piece]:
        if text:
            yield text

    def finish(self) -> Iterator[Piece]:
        return iter(())


class TaggedCalls:
    """Calls between tags, and text around them. Blank text beside a call is left out."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._held = ""

    def feed(self, text: str) -> Iterator[Piece]:
        self._held += text
        while True:
            before, begin, rest = self._held.partition(BEGIN)
            if not begin:
                keep = _possible_beginning(before)
                certain, self._held = before[: len(before) - keep], before[len(before) - keep :]
                if certain:
                    yield certain
                return
            inside, end, after = rest.partition(END)
            if before.rstrip():
                yield before.rstrip()
            if not end:
                self._held = begin + rest
                return
            calls = _calls_in(inside, self._names)
            yield from calls or [begin + inside + end]
            self._held = after

    def finish(self) -> Iterator[Piece]:
        held, self._held = self._held, ""
        if held.startswith(BEGIN):
            yield from _calls_in(held.removeprefix(BEGIN), self._names) or [held]
        elif held.strip():
            yield held


def _possible_beginning(text: str) -> int:
    """Length of the end of `text` that may turn out to stand before a tag or to begin one."""
    for length in range(min(len(text), len(BEGIN) - 1), -1, -1):
        if text.endswith(BEGIN[:length]):
            blank = len(text) - length - len(text[: len(text) - length].rstrip())
            return length + blank
    return 0


class BareCalls:
    """An answer that is a call, or a list of them, from its first character on; else text."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._held = ""
        self._is_text = False

    def feed(self, text: str) -> Iterator[Piece]:
        self._held += text
        begins = self._held.lstrip()
        if begins and begins[0] not in "{[":
            self._is_text = True
        if self._is_text and self._held:
            yield self._held
            self._held = ""

    def finish(self) -> Iterator[Piece]:
        held, self._held = self._held, ""
        if held:
            yield from _calls_in(held, self._names) or [held]


class RequiredCalls:
    """A JSON list of calls, as `required_schema` has it. Each is given when it is whole."""

    def __init__(self) -> None:
        self._held = ""
        self._decoder = json.JSONDecoder()

    def feed(self, text: str) -> Iterator[Piece]:
        self._held += text
        while True:
            item = self._held.lstrip("[, \t\r\n")
            try:
                call, end = self._decoder.raw_decode(item)
            except ValueError:
                return
            yield _call(call)
            self._held = item[end:]

    def finish(self) -> Iterator[Piece]:
        # An answer that was cut short must not look like a call that is whole.
        rest = self._held.lstrip("[, \t\r\n").removesuffix("]").rstrip()
        self._held = ""
        if rest:
            yield rest


def parser_of(template: str, tools: Sequence[Tool], choice: object) -> Parser:
    """What finds calls in an answer.

    Args:
        template: The model's chat template.
        tools: What may be called; empty if nothing is to be looked for.
        choice: The request's `tool_choice`.
    """
    if not tools or choice == "none":
        return PlainText()
    if choice == "required" or isinstance(choice, NamedTool):
        return RequiredCalls()
    names = [tool.function.name for tool in tools]
    return TaggedCalls(names) if BEGIN in template else BareCalls(names)


def shows_tools(template: str) -> bool:
    """Whether a chat template does anything with `tools`."""
    return re.search(r"\btools\b", template) is not None


def required_schema(tools: Sequence[Tool], choice: object, *, parallel: bool) -> dict[str, Any]:
    """JSON schema of an answer that calls one of the tools, or several."""
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        parallel = False
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(i, tool.function) for i, tool in enumerate(tools)]},
    }
    return schema if parallel else {**schema, "maxItems": 1}


def _call_schema(number: int, function: Function) -> dict[str, Any]:
    place = f"#/items/anyOf/{number}/properties/arguments"
    arguments = NO_ARGUMENTS if function.parameters is None else function.parameters
    return {
        "type": "object",
        "properties": {
            "name": {"const": function.name},
            "arguments": _moved_references(arguments, place),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved_references(schema: Any, place: str) -> Any:
    """The schema as part of another one: what it refers to lies below `place` now."""
    if isinstance(schema, dict):
        return {
            key: place + value.removeprefix("#")
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved_references(value, place)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_moved_references(item, place) for item in schema]
    return schema


def _calls_in(text: str, names: Sequence[str]) -> list[Piece]:
    """The calls that a JSON text stands for; none if it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    items = value if isinstance(value, list) else [value]
    is_of_calls = all(isinstance(item, dict) and item.get("name") in names for item in items)
    return [_call(item) for item in items] if is_of_calls else []


def _call(item: dict[str, Any]) -> Call:
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(item["name"], arguments)
    return Call(item["name"], json.dumps(arguments, ensure_ascii=False))
