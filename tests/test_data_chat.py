from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.data.chat import ChatRenderer, inside
from moesaic.data.tokenizer import load_tokenizer
from moesaic.errors import DataError
from tests.tiny import tiny_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|system|>Be kind.</s>\n{% endif %}"
    "<|{{ message.role }}|>\n{{ message.content }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""As SmolLM2's: a default system message, an end mark and a line break."""

MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' %}{%- generation -%}{{ message.content }}</s>\n"
    "{%- endgeneration -%}{% else %}{{ message.content }}</s>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""The same with generation marks, and without the system message."""

BARE = "{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}"
"""No end mark and no generation prompt: a turn is header and all."""

FORGETFUL = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Drops the reasoning of all turns but the last, as reasoning models' templates do."""

HELPFUL = CHATML.replace("<|assistant|>\n{% endif %}", "<|assistant|>\nSure!{% endif %}")
"""Its generation prompt is not how an assistant's turn begins."""

TALK = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And </s> <|assistant|> twice that?"},
    {"role": "assistant", "content": "Four, I\nthink </s> so."},
]


def renderer(path: Path, template: str) -> ChatRenderer:
    tiny_tokenizer(path)
    (path / "chat_template.jinja").write_text(template)
    return ChatRenderer(load_tokenizer(path))


def learned(render: ChatRenderer, messages: list[dict[str, Any]], **row: Any) -> list[str]:
    text, spans = render({"messages": messages, **row}, "messages", "here")
    return [text[first:end] for first, end in spans]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_exactly_the_assistants_turns_and_their_ends_are_learned(tmp_path, template):
    render = renderer(tmp_path, template)
    turns = [turn.rstrip("\n") for turn in learned(render, TALK)]
    assert turns == ["Two.</s>", "Four, I\nthink </s> so.</s>"]


def test_what_is_not_learned_is_what_a_user_would_have_to_send(tmp_path):
    render = renderer(tmp_path, CHATML)
    text, ((first, _), (second, _)) = render({"messages": TALK}, "messages", "here")
    tokenizer = load_tokenizer(tmp_path)
    for turn, start in ((1, first), (3, second)):
        prompt = tokenizer.apply_chat_template(
            TALK[:turn], tokenize=False, add_generation_prompt=True
        )
        assert text[:start] == prompt


def test_a_template_without_generation_prompt_gives_the_whole_turn(tmp_path):
    render = renderer(tmp_path, BARE)
    assert learned(render, TALK[:2]) == ["[assistant] Two. "]


def test_an_assistant_may_speak_first(tmp_path):
    render = renderer(tmp_path, BARE)
    assert learned(render, [{"role": "assistant", "content": "Hi."}, TALK[0]]) == [
        "[assistant] Hi. "
    ]


def test_a_default_system_message_is_never_learned(tmp_path):
    with pytest.raises(DataError, match="not prefix-stable at message 0"):
        learned(renderer(tmp_path, CHATML), [{"role": "assistant", "content": "Hi."}])


def test_a_template_that_rewrites_earlier_turns_is_refused_when_it_does(tmp_path):
    render = renderer(tmp_path, FORGETFUL)
    assert learned(render, TALK) == ["Two.</s>", "Four, I\nthink </s> so.</s>"]
    thought = [TALK[0], {"role": "assistant", "content": "<think>1, 2</think>Two."}]
    assert learned(render, thought) == ["<think>1, 2</think>Two.</s>"]
    with pytest.raises(DataError, match=r"here: .*not prefix-stable at message 1") as error:
        learned(render, thought + TALK[2:])
    assert "\n" not in str(error.value)


def test_a_generation_prompt_that_no_turn_begins_with_is_refused(tmp_path):
    with pytest.raises(DataError, match="not prefix-stable"):
        learned(renderer(tmp_path, HELPFUL), TALK)


def test_tools_reach_the_template(tmp_path):
    template = "{% for tool in tools or [] %}<{{ tool.name }}>{% endfor %}" + BARE
    text, _ = renderer(tmp_path, template)(
        {"messages": TALK[:2], "tools": [{"name": "add"}]}, "messages", "here"
    )
    assert text.startswith("<add>[user]")


def test_keys_that_parquet_filled_with_null_are_not_there_for_the_template(tmp_path):
    template = BARE + "{% if messages[0].calls is defined %}!{% endif %}"
    messages = [{**message, "calls": None} for message in TALK[:2]]
    assert learned(renderer(tmp_path, template), messages) == ["[assistant] Two. "]


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"text": "x"}, "no list of messages"),
    "no list": ({"messages": "x"}, "no list of messages"),
    "an empty list": ({"messages": []}, "no list of messages"),
    "a message that is text": ({"messages": ["x"]}, "not an object with a role"),
    "a message without a role": ({"messages": [{"content": "x"}]}, "not an object with a role"),
    "no assistant": ({"messages": TALK[:1]}, "has the role assistant"),
    "tools that are text": ({"messages": TALK, "tools": "x"}, "not a list"),
    "half a character": (
        {"messages": [TALK[0], {"role": "assistant", "content": "\ud83d"}]},
        "half a surrogate pair",
    ),
}


@pytest.mark.parametrize(("row", "says"), ROWS.values(), ids=ROWS.keys())
def test_a_row_that_is_no_conversation_is_one_line_with_its_place(tmp_path, row, says):
    with pytest.raises(DataError) as error:
        renderer(tmp_path, CHATML)(row, "messages", "talk.jsonl line 7")
    assert says in str(error.value)
    assert "talk.jsonl line 7" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only\ntwo turns') }}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ],
)
@pytest.mark.parametrize("mark", ["", "{% generation %}x{% endgeneration %}"])
def test_a_template_that_fails_is_one_line(tmp_path, template, mark):
    with pytest.raises(DataError, match="does not take this conversation") as error:
        learned(renderer(tmp_path, mark + template), TALK)
    assert "\n" not in str(error.value)


def test_a_template_that_shows_no_assistant_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing of the assistant"):
        learned(renderer(tmp_path, "{% if messages %}x{% endif %}"), TALK)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        ChatRenderer(load_tokenizer(tmp_path))


def test_only_tokens_wholly_within_a_span_are_learned():
    # Of "ab cd ef": a token that begins before the span, one inside, one that runs out of it.
    offsets = np.array([[0, 4], [4, 5], [5, 8]])
    assert inside(offsets, ((3, 6),)).tolist() == [False, True, False]
    assert inside(offsets, ((0, 5),)).tolist() == [True, True, False]
    assert inside(offsets, ((0, 4), (5, 8))).tolist() == [True, False, True]
    assert inside(offsets, ()).tolist() == [False] * 3


def test_a_token_trimmed_to_nothing_belongs_to_what_it_follows():
    # A space at character 3, trimmed to (4, 4): learned with the span that holds it.
    offsets = np.array([[0, 3], [4, 4], [4, 8]])
    assert inside(offsets, ((0, 4),)).tolist() == [True, True, False]
    assert inside(offsets, ((4, 8),)).tolist() == [False, False, True]


def test_learned_tokens_spell_the_assistants_words_whatever_they_are(tmp_path):
    render = renderer(tmp_path, CHATML)
    tokenizer = load_tokenizer(tmp_path)
    for words in ("Two.", " led by a space", "ends in one ", "ünïcödé 🎉 漢字", "\n\n", "a\tb"):
        messages = [TALK[0], {"role": "assistant", "content": words}]
        text, spans = render({"messages": messages}, "messages", "here")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        kept = inside(np.asarray(encoded["offset_mapping"]), spans)
        spelled = tokenizer.decode(np.asarray(encoded["input_ids"])[kept].tolist())
        assert spelled == f"{words}</s>\n"
