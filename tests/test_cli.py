"""The command line: flags, help, JSON, exit statuses."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import moesaic
from moesaic.cli.app import VERBS, run
from moesaic.cli.show import size, table
from moesaic.config import build, load_toml, merge
from moesaic.errors import FolderError, MoesaicError, TrainingError
from moesaic.training.config import TrainConfig

RECIPES = Path(__file__).parent.parent / "recipes"

HELP_WITHOUT_TORCH = """
import sys
from moesaic.cli.app import run
status = run(sys.argv[1:])
heavy = {"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)
sys.exit(f"help loaded {heavy}" if heavy else status)
"""


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_is_printed_and_loads_no_torch(verb):
    command = [sys.executable, "-c", HELP_WITHOUT_TORCH, *verb.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: moesaic {verb or 'COMMAND'}" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_offers_json_and_explains_every_flag(verb, capsys):
    assert run([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "not given" not in text


def test_the_module_and_the_script_are_the_same_program():
    script = Path(sys.executable).parent / "moesaic"
    for command in ([str(script)], [sys.executable, "-m", "moesaic"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == moesaic.__version__


def test_a_recipe_is_overridden_by_flags_and_printed_in_full(capsys):
    recipe = str(RECIPES / "continue.toml")
    flags = ["--optimizer.lr", "3e-5", "--no-metrics.tensorboard", "--recompute", "[0, 2]"]
    flags += ["--freeze", "a.*", "--freeze", "b", "--routing.capacity-factor", "none"]
    assert run(["train", recipe, *flags, "--data.weights", "{code = 7}", "--dry-run"]) == 0
    printed = build(TrainConfig, tomllib.loads(capsys.readouterr().out), where="stdout")
    override = {
        "optimizer": {"lr": 3e-5},
        "metrics": {"tensorboard": False},
        "recompute": [0, 2],
        "freeze": ["a.*", "b"],
        "data": {"weights": {"code": 7}},
    }
    assert printed == build(TrainConfig, merge(load_toml(recipe), override), where="the test")
    assert printed.steps == load_toml(recipe)["steps"]


@pytest.mark.parametrize(
    ("verb", "recipe"), [("train", "continue.toml"), ("prepare", "tokens.toml")]
)
def test_the_recipes_of_the_repository_are_legal(verb, recipe, capsys):
    assert run([verb, str(RECIPES / recipe), "--dry-run"]) == 0
    once = capsys.readouterr().out
    assert tomllib.loads(once)


def test_a_list_of_sections_can_be_given_as_flags(capsys):
    sources = ["--sources", "name=7,path=texts,weight=2", "--sources", "name=b,path=src,kind=code"]
    assert run(["prepare", "--tokenizer", "t", "--out", "o", *sources, "--dry-run"]) == 0
    first, second = tomllib.loads(capsys.readouterr().out)["sources"]
    assert (first["name"], first["path"], first["weight"]) == ("7", "texts", 2.0)
    assert (second["name"], second["kind"], second["weight"]) == ("b", "code", 1.0)


MISTYPED = {
    "no such verb": (["upcylce"], 'Unknown command "upcylce"'),
    "no such flag": (["inspect", "m", "--contxt", "3"], "Did you mean --context?"),
    "an abbreviated flag": (["inspect", "m", "--cont", "3"], "Unknown option: --cont"),
    "an underscore in a flag": (["upcycle", "a", "b", "--top_k", "2"], "Unknown option: --top_k"),
    "a wrong type": (["inspect", "m", "--context", "many"], 'unable to convert "many" into int'),
    "no such choice": (["quantize", "m", "o", "--scheme", "row"], 'Choose from: "channel"'),
    "a missing argument": (["inspect"], "MODEL requires an argument"),
    "a missing flag": (["upcycle", "a", "b"], "--experts requires an argument"),
    "too many arguments": (["inspect", "a", "b"], "Unused Tokens: ['b']"),
    "a flag twice": (["inspect", "a", "--context", "1", "--context", "2"], "multiple times"),
    "a switch with a value": (["inspect", "a", "--json=maybe"], 'unable to convert "maybe"'),
}


@pytest.mark.parametrize(("tokens", "message"), MISTYPED.values(), ids=MISTYPED.keys())
def test_a_mistyped_command_is_one_line_and_status_2(tokens, message, capsys):
    assert run(tokens) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moesaic: ")
    assert err.count("\n") == 1
    assert message in err


ENDINGS = {
    "a mistake": (FolderError("no such\nfolder"), 2, "moesaic: no such folder\n"),
    "a stopped training": (TrainingError("loss is nan"), 3, "moesaic: loss is nan\n"),
    "a tree of errors": (MoesaicError("bad"), 2, "moesaic: bad\n"),
    "the keyboard": (KeyboardInterrupt(), 130, "moesaic: interrupted\n"),
    "the system": (
        PermissionError(13, "Permission denied", "x"),
        2,
        "moesaic: Permission denied: x\n",
    ),
}


@pytest.mark.parametrize(("error", "status", "line"), ENDINGS.values(), ids=ENDINGS.keys())
def test_what_ends_a_verb_is_one_line_and_a_status(error, status, line, monkeypatch, capsys):
    monkeypatch.setitem(vars(moesaic), "inspect", raiser(error))
    assert run(["inspect", "m"]) == status
    assert capsys.readouterr() == ("", line)


def test_a_fault_of_our_own_shows_where_it_is(monkeypatch, capsys):
    monkeypatch.setitem(vars(moesaic), "inspect", raiser(ZeroDivisionError("oops")))
    assert run(["inspect", "m"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: oops" in err
    assert err.endswith("Please report it with the lines above.\n")


def test_json_alone_reaches_stdout_whatever_a_job_prints(monkeypatch, capsys):
    def noisy(config):
        print("a library speaks")
        return {"loss": float("inf"), "path": config.model, "list": [1, float("nan")]}

    monkeypatch.setitem(vars(moesaic), "inspect", noisy)
    assert run(["inspect", "m", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": None, "path": "m", "list": [1, None]}
    assert err == "a library speaks\n"


def test_a_run_that_was_asked_to_stop_ends_with_130(monkeypatch, capsys):
    done = {"run": "r", "model": None, "step": 2, "steps": 9, "loss": 1.5, "seconds": 1.0}
    done |= {"resumed_from": 1, "stopped_by": "SIGINT", "peak_memory_bytes": 2**20}
    monkeypatch.setitem(vars(moesaic), "train", lambda config: done)
    assert run(["train", str(RECIPES / "continue.toml")]) == 130
    assert capsys.readouterr().out.splitlines() == [
        "went on from step 1",
        "step 2 of 9, loss 1.5000, 1.0 s, peak memory 1 MiB",
        "stopped by SIGINT; the same command goes on from here",
        "its result: r",
    ]


def test_text_is_printed_as_it_comes_and_not_where_json_is_wanted(monkeypatch, capsys):
    def answer(config, *, on_text):
        for piece in ("Pa", "ris") if on_text else ():
            on_text(piece)
        return {"text": "Paris"}

    monkeypatch.setitem(vars(moesaic), "generate", answer)
    assert run(["generate", "m", "capital of France?"]) == 0
    assert capsys.readouterr().out == "Paris\n"
    assert run(["generate", "m", "capital of France?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "Paris"}


def test_a_closed_pipe_ends_without_a_traceback():
    command = f"{sys.executable} -m moesaic train --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_a_table_lines_up_its_numbers():
    rows = [["dense", "6.2", ""], ["dense, trained", "5.95", "-0.28"]]
    assert list(table(["model", "loss", "to the first"], rows)) == [
        "model           loss  to the first",
        "dense            6.2",
        "dense, trained  5.95         -0.28",
    ]


def test_a_size_is_in_the_largest_unit_that_fits():
    sizes = [size(count) for count in (0, 1023, 1536, 3 * 2**20, 5000 * 2**30)]
    assert sizes == ["0 bytes", "1023 bytes", "1.5 KiB", "3 MiB", "5,000.00 GiB"]


def raiser(error):
    def job(config):
        raise error

    return job


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_caller_closed_is_no_fault(closed):
    command = f"'{sys.executable}' -m moesaic --version {closed}"
    assert subprocess.run(command, shell=True, capture_output=True).returncode == 0


def test_flags_that_were_not_typed_pass_where_pydantic_is_loaded(capsys):
    importlib.import_module("pydantic")  # cyclopts then checks every value it knows of
    assert run(["train", str(RECIPES / "continue.toml"), "--dry-run"]) == 0
    assert "steps = 200" in capsys.readouterr().out
