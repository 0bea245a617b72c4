"""Bad inputs through the real command line: one clear line, exit status 2, nothing half-written.

Each case starts from a folder of good things (a dense model, its MoE, a token folder, a run,
texts), spoils one of them, and types a command. Afterwards everything on disk must be as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.cli.app import run
from tests.tiny import TINY, tiny_folder

WEIGHTS = "model.safetensors"
RECIPE = 'model = "moe"\nrun = "new"\nsteps = 2\n[data]\ntokens = "tokens"\nmicro_batch = 1\n'
Spoil = Callable[[Path], object]


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Every kind of folder, as the command line itself makes it."""
    root = tmp_path_factory.mktemp("good")
    tiny_folder(root / "dense", TINY["llama"])
    (root / "texts").mkdir()
    for number in range(6):
        text = "\n".join(f"def f{number}_{line}(): return {line * number}" for line in range(40))
        (root / "texts" / f"{number}.txt").write_text(text)
    rows = "\n".join(json.dumps({"text": "line " * 20}) for _ in range(30))
    (root / "rows.jsonl").write_text(rows)
    (root / "train.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(["upcycle", "dense", "moe", "--experts", "4", "--top-k", "2", "--no-prove"]) == 0
        assert run([*PREPARE, "--sources", "name=a,path=texts", "--out", "tokens"]) == 0
        assert run(["train", "train.toml", "--run", "run", "--no-metrics.tensorboard"]) == 0
        assert run(["quantize", "moe", "fp8"]) == 0
    return root


PREPARE = ["prepare", "--tokenizer", "dense", "--sequence-length", "16", "--heldout-documents", "1"]


@dataclass(frozen=True)
class Bad:
    """One mistake."""

    tokens: str | list[str]
    """What is typed after `moesaic`."""

    message: str
    """Part of the line it must give."""

    spoil: Spoil = lambda root: None
    """What is done to the good folder first."""

    @property
    def words(self) -> list[str]:
        return self.tokens.split() if isinstance(self.tokens, str) else self.tokens


def config(**changes: object) -> Spoil:
    """Change keys of the dense model's config.json; None removes one."""

    def spoil(root: Path) -> None:
        path = root / "dense" / "config.json"
        values = json.loads(path.read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        path.write_text(json.dumps(kept))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """Change the tensors of the dense model."""

    def spoil(root: Path) -> None:
        path = root / "dense" / WEIGHTS
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def cut(name: str, *, keep: float) -> Spoil:
    """Leave only the first part of a file."""

    def spoil(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(len(content) * keep)])

    return spoil


def put(name: str, content: str | bytes) -> Spoil:
    """Write a file, in place of what was there."""

    def spoil(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def remove(name: str) -> Spoil:
    """Delete a file or a folder."""

    def spoil(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def header(**changes: object) -> Spoil:
    """Change keys of the token folder's header."""

    def spoil(root: Path) -> None:
        path = root / "tokens" / "header.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def narrow_copy(root: Path) -> None:
    """A dense model of another width."""
    tiny_folder(root / "narrow", TINY["llama"].replace(hidden_dim=16))


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def flip(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = tensors[name].T.contiguous()


UPCYCLE = "upcycle dense new --experts 4"
MODELS = {
    "no such folder": Bad("upcycle nowhere new --experts 4", "nowhere does not exist"),
    "a file for a folder": Bad("inspect train.toml", "train.toml"),
    "no config.json": Bad(UPCYCLE, "config.json", remove("dense/config.json")),
    "config.json is not JSON": Bad(UPCYCLE, "config.json", cut("dense/config.json", keep=0.5)),
    "config.json is a list": Bad(UPCYCLE, "config.json", put("dense/config.json", "[]")),
    "unknown family": Bad(UPCYCLE, "gpt2", config(model_type="gpt2")),
    "unknown activation": Bad(UPCYCLE, "gelu", config(hidden_act="gelu")),
    "a missing key": Bad(UPCYCLE, "hidden_size", config(hidden_size=None)),
    "text for a size": Bad(UPCYCLE, "hidden_size", config(hidden_size="wide")),
    "heads that do not divide": Bad(UPCYCLE, "3", config(num_key_value_heads=3)),
    "unknown rope scaling": Bad(UPCYCLE, "warp", config(rope_scaling={"rope_type": "warp"})),
    "no weights": Bad(UPCYCLE, "dense", remove(f"dense/{WEIGHTS}")),
    "truncated weights": Bad(UPCYCLE, WEIGHTS, cut(f"dense/{WEIGHTS}", keep=0.7)),
    "weights cut in their header": Bad(UPCYCLE, WEIGHTS, cut(f"dense/{WEIGHTS}", keep=0.001)),
    "empty weights": Bad(UPCYCLE, WEIGHTS, put(f"dense/{WEIGHTS}", "")),
    "weights that are text": Bad(UPCYCLE, WEIGHTS, put(f"dense/{WEIGHTS}", "hello " * 99)),
    "a missing tensor": Bad(
        UPCYCLE, "model.norm.weight", weights(lambda tensors: tensors.pop("model.norm.weight"))
    ),
    "a tensor too many": Bad(
        UPCYCLE, "extra", weights(lambda tensors: tensors.update(extra=torch.ones(1)))
    ),
    "a wrong shape": Bad(UPCYCLE, "model.layers.2.mlp.down_proj.weight", weights(flip)),
    "a weight that is NaN": Bad(UPCYCLE, "model.layers.1.mlp.up_proj.weight", weights(poison)),
    "a missing shard": Bad(
        UPCYCLE,
        "model-00002-of-00002.safetensors",
        lambda root: (
            put(
                "dense/model.safetensors.index.json",
                '{"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}',
            )(root),
            remove(f"dense/{WEIGHTS}")(root),
        ),
    ),
}

JOBS = {
    "fewer experts than top-k": Bad("upcycle dense new --experts 2 --top-k 3", "from 1 to 2"),
    "output taken": Bad("upcycle dense tokens --experts 4", "tokens exists and is not empty"),
    "output is the input": Bad("upcycle dense dense --experts 4 --overwrite", "input"),
    "output below a file": Bad("upcycle dense train.toml/new --experts 4", "train.toml"),
    "the root as output": Bad("upcycle dense / --experts 4", "current folder"),
    "an MoE already": Bad("upcycle moe new --experts 4", "4 experts already"),
    "a granularity that does not divide": Bad(
        "upcycle dense new --experts 14 --top-k 7 --init granular --granularity 7", "48"
    ),
    "mixing another width": Bad(
        "upcycle dense new --experts 4 --init mix --mix narrow=2", "narrow", narrow_copy
    ),
    "a negative deviation": Bad(f"{UPCYCLE} --gate-std -1", "gate_std is -1"),
    "one budget of two": Bad(f"{UPCYCLE} --dense-tokens 1e9", "moe_tokens"),
    "no proof text": Bad(f"{UPCYCLE} --proof-text nowhere.txt", "nowhere.txt"),
    "a layer that is not there": Bad(f"{UPCYCLE} --layers 7", "layer 7"),
    "FP8 of FP8": Bad("quantize fp8 new", "FP8 already"),
    "FP8 output taken": Bad("quantize moe tokens", "tokens exists and is not empty"),
    "a prompt that is empty": Bad(["generate", "moe", ""], "prompt"),
    "a prompt that is too long": Bad(["generate", "moe", "word " * 99], "64"),
    "an impossible top-p": Bad("generate moe hi --temperature 1 --top-p 2", "top_p is 2"),
    "a seed beyond 64 bits": Bad(f"generate moe hi --temperature 1 --seed {2**70}", "64 bits"),
    "top-k of a greedy choice": Bad("generate moe hi --top-k 3", "temperature 0"),
    "no tokenizer": Bad("generate moe hi", "tokenizer", remove("moe/tokenizer.json")),
    "a broken tokenizer": Bad("generate moe hi", "tokenizer", cut("moe/tokenizer.json", keep=0.5)),
    "a report of no run": Bad("report texts", "texts"),
    "a report of damaged metrics": Bad(
        "report run", "metrics.jsonl", put("run/metrics.jsonl", "{broken\n{}\n")
    ),
    "a report into nowhere": Bad("report run --out train.toml/page.html", "train.toml"),
    "a report into the current folder": Bad("report run --out .", ". cannot be written"),
    "a report into a pipe": Bad(
        "report run --out pipe", "pipe cannot be written", lambda root: os.mkfifo(root / "pipe")
    ),
    "a result where a folder is": Bad(
        "evaluate nowhere --data tokens --out texts", "texts cannot be written"
    ),
    "labels for other models": Bad("evaluate moe --data tokens --labels a --labels b", "2 labels"),
    "no rows at a time": Bad("evaluate moe --data tokens --batch-size 0", "batch_size is 0"),
    "a device that is none": Bad("evaluate moe --data tokens --device tpu", "tpu"),
    "a demo among other things": Bad(
        "demo --quick --out new", "new/dense is there", put("new/dense/notes.txt", "mine")
    ),
}

SOURCES = [*PREPARE, "--out", "new", "--sources"]
TEXT = {
    "no such text": Bad([*SOURCES, "name=a,path=nowhere"], "nowhere"),
    "empty text": Bad([*SOURCES, "name=a,path=empty.txt"], "no t", put("empty.txt", "")),
    "too little text": Bad([*SOURCES, "name=a,path=little.txt"], "17", put("little.txt", "Hi.")),
    "text that is not UTF-8": Bad(
        [*SOURCES, "name=a,path=latin.txt"], "latin.txt", put("latin.txt", b"caf\xe9 " * 99)
    ),
    "an empty folder": Bad(
        [*SOURCES, "name=a,path=void"], "void", lambda root: (root / "void").mkdir()
    ),
    "a broken line of JSONL": Bad(
        [*SOURCES, "name=a,path=b.jsonl"], "line 2", put("b.jsonl", '{"text": "a"}\n{"text": \n')
    ),
    "a field that is not there": Bad([*SOURCES, "name=a,path=rows.jsonl,field=body"], "body"),
    "a conversation without turns": Bad(
        [*SOURCES, "name=a,path=c.jsonl,kind=chat"], "c.jsonl", put("c.jsonl", '{"messages": 3}\n')
    ),
    "a broken Parquet file": Bad(
        [*SOURCES, "name=a,path=b.parquet"], "b.parquet", put("b.parquet", "PAR1 no")
    ),
    "two sources of one name": Bad(
        [*SOURCES, "name=a,path=texts", "--sources", "name=a,path=rows.jsonl"], "2 sources"
    ),
    "a name that is no file name": Bad([*SOURCES, "name=a/b,path=texts"], "a/b"),
    "a weight of nothing": Bad([*SOURCES, "name=a,path=texts,weight=0"], "weight"),
    "a source without its path": Bad([*SOURCES, "name=a"], "sources[0].path is missing"),
    "a source that is a word": Bad([*SOURCES, "texts"], "name=..."),
    "an unknown kind": Bad([*SOURCES, "name=a,path=texts,kind=poem"], "poem"),
    "all held out": Bad(
        [*SOURCES, "name=a,path=texts", "--heldout-fraction", "1.5"], "heldout_fraction is 1.5"
    ),
    "no folder with a tokenizer": Bad(
        ["prepare", "--tokenizer", "texts", "--out", "new", "--sources", "name=a,path=texts"],
        "texts",
    ),
}

TRAIN = "train train.toml"
TRAINING = {
    "no such recipe": Bad("train nowhere.toml", "nowhere.toml: No such file"),
    "a recipe that is not TOML": Bad(TRAIN, "line 1", put("train.toml", "model = \n")),
    "a recipe with a typo": Bad(
        TRAIN, "unknown key stepps. Did you mean steps?", put("train.toml", "stepps = 3\n")
    ),
    "a recipe with a wrong type": Bad(
        TRAIN,
        'steps is "many", but must be a whole number',
        put("train.toml", RECIPE.replace("2", '"many"')),
    ),
    "a recipe without a model": Bad(TRAIN, "model is missing", put("train.toml", "steps = 3\n")),
    "no tokens": Bad(f"{TRAIN} --data.tokens nowhere", "nowhere"),
    "tokens cut short": Bad(TRAIN, "a.train.tokens", cut("tokens/a.train.tokens", keep=0.5)),
    "tokens of another version": Bad(TRAIN, "99", header(version=99)),
    "a header that is not JSON": Bad(TRAIN, "header.json", cut("tokens/header.json", keep=0.5)),
    "a vocabulary too large": Bad(TRAIN, "300", header(vocab_size=999)),
    "no steps": Bad(f"{TRAIN} --steps 0", "steps is 0"),
    "a negative learning rate": Bad(f"{TRAIN} --optimizer.lr -1", "lr is -1"),
    "a negative capacity": Bad(f"{TRAIN} --routing.capacity-factor 0", "capacity_factor is 0"),
    "a warmup beyond the end": Bad(f"{TRAIN} --schedule.warmup-steps 9", "9"),
    "a freeze that fits nothing": Bad(f"{TRAIN} --freeze no.such.*", "no.such.*"),
    "everything frozen": Bad([*TRAIN.split(), "--freeze", "*"], "freeze"),
    "an unknown source": Bad([*TRAIN.split(), "--data.weights", "{b = 1.0}"], "b"),
    "a layer to recompute that is not there": Bad(f"{TRAIN} --recompute [9]", "9"),
    "a run of another model": Bad(f"{TRAIN} --run run --seed 7 --steps 4", "seed"),
    "a run folder of something else": Bad(f"{TRAIN} --run texts", "texts"),
    "a run that must be new": Bad(f"{TRAIN} --run run --resume never", "run"),
    "a run folder that holds its model": Bad(f"{TRAIN} --run moe", "moe"),
}

EVERYTHING = {**MODELS, **JOBS, **TEXT, **TRAINING}


def snapshot(root: Path) -> dict[str, str]:
    """Everything below a folder, hidden or not, with its content."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("bad", EVERYTHING.values(), ids=EVERYTHING.keys())
def test_a_bad_input_is_one_line_and_leaves_nothing(bad, good, tmp_path, monkeypatch, capsys):
    root = tmp_path / "root"
    shutil.copytree(good, root)
    bad.spoil(root)
    before = snapshot(root)
    monkeypatch.chdir(root)
    assert run(bad.words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("moesaic: ")
    assert bad.message in err
    assert len(err) < 600
    assert snapshot(root) == before


@pytest.mark.parametrize("name", ["a weight that is NaN", "a recipe with a typo", "empty text"])
def test_as_a_process_of_its_own_too(name, good, tmp_path):
    bad = EVERYTHING[name]
    root = tmp_path / "root"
    shutil.copytree(good, root)
    bad.spoil(root)
    before = snapshot(root)
    command = [sys.executable, "-m", "moesaic", *bad.words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert bad.message in done.stderr
    assert snapshot(root) == before


def test_there_are_at_least_thirty():
    assert len(EVERYTHING) >= 30
