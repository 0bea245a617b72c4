"""The README's commands are typed and its snippet is run, in order, in one folder."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from moesaic.cli.app import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]\d+)?%?( ± [\d.]+)?( (KiB|MiB|GiB|bytes))?")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[list[str], list[str]]]:
    """What is typed after `moesaic`, and the lines that shall follow."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            typed, *printed = part.strip().splitlines()
            program, *words = shlex.split(typed)
            if program == "moesaic":
                found.append((words, printed))
    return found


def shape(line: str) -> str:
    """A line without its numbers and widths, which differ from machine to machine."""
    return " ".join(NUMBER.sub("#", line).split())


def matches(printed: list[str], expected: list[str]) -> bool:
    """Whether lines are as expected; `...` stands for any lines at all."""
    pattern = "".join(
        r"(?:.*\n)*" if line == "..." else re.escape(shape(line)) + r"\n" for line in expected
    )
    return bool(re.fullmatch(pattern, "".join(shape(line) + "\n" for line in printed)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like a fresh clone, where the commands are typed."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("moesaic", "recipes"):
        (root / name).symlink_to(ROOT / name)
    return root


def test_every_command_prints_what_the_readme_shows(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert len(commands()) >= 10
    for words, expected in commands():
        assert run(words) == 0
        printed = capfd.readouterr().out.splitlines()
        assert matches(printed, expected), "\n".join([" ".join(words), *printed])


def test_the_snippet_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0


def test_a_line_that_differs_is_seen():
    assert matches(["wrote 3 files, 1.5 KiB"], ["wrote 12 files,  1,024 bytes"])
    assert matches(["a", "b", "c"], ["...", "c"])
    assert not matches(["wrote moe"], ["wrote fp8"])
    assert not matches(["a", "b"], ["a"])


def test_the_table_of_measurements_is_what_the_benchmarks_kept(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = importlib.import_module("table").table()
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
