"""docs/engine.md: its snippet runs, and its order of scores is the config's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from moesaic.serving.config import RequestConfig
from tests.tiny import MIXTRAL, tiny_folder

DOCUMENT = (Path(__file__).parent.parent / "docs" / "engine.md").read_text(encoding="utf-8")


def test_its_snippet_runs(tmp_path, monkeypatch, capsys):
    tiny_folder(tmp_path / "moe", MIXTRAL)
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
    exec(compile(snippet, "engine.md", "exec"), {})
    *answers, last = capsys.readouterr().out.splitlines()
    assert len(answers) == 4
    assert all(re.fullmatch("(length 8|stop [1-8])", line) for line in answers)
    assert last in ("cancelled 0", "length 0", "stop 0")


def test_its_order_is_that_of_the_fields():
    (order,) = re.findall(r"In this order: (.*?)\. At", DOCUMENT, re.DOTALL)
    named = [name for name in re.findall("`([a-z_]+)`", order) if name != "logit_bias"]
    fields = [field.name for field in dataclasses.fields(RequestConfig)]
    assert named == sorted(named, key=fields.index)


def test_every_option_it_names_is_one():
    fields = {field.name for field in dataclasses.fields(RequestConfig)}
    for name in ("prompt_logprobs", "embedding", "experts", "json_schema", "regex", "logprobs"):
        assert f"`{name}`" in DOCUMENT
        assert name in fields
