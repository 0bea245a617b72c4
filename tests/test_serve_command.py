"""`moesaic serve` as a person types it: mistakes, one rank and two, load, a lost rank, the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import moesaic
from moesaic.cli.app import run
from moesaic.cli.serve import flags_of
from moesaic.config import build, leaves
from moesaic.errors import ConfigError
from moesaic.parallel.config import LaunchConfig
from moesaic.planning.serving.layout import fit
from moesaic.planning.serving.ledger import ledger
from moesaic.planning.serving.plan import ServePlan, facts_of
from moesaic.serving.config import ServeConfig
from tests.tiny import LLAMA, TINY, tiny_folder

ROOT = Path(__file__).parent.parent

# Nine heads on three key-value heads, as SmolLM2 has: two ranks hold 6 + 3 of them in a layer.
TORCH = ["--dtype", "float32", "--implementation", "torch"]
NINE_HEADS = TINY["mixtral"].replace(num_heads=9, num_kv_heads=3, max_positions=512)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "nine", NINE_HEADS)


def small(model: Path) -> list[str]:
    return [str(model), *TORCH, "--kv-tokens", "4096", "--port", "0", "--log", "json", "--json"]


class Served:
    """`moesaic serve` in a process of its own."""

    def __init__(self, *words: str, folder: Path) -> None:
        self.err = folder / "stderr"
        with self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moesaic", "serve", *words],
                stdout=subprocess.PIPE,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                text=True,
            )
        self.starts = 0
        self.url = ""

    def wait(self, seconds: float = 300) -> None:
        """Until it has said once more that it is ready."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ready = [line for line in self.lines() if line["event"] == "ready"]
            if len(ready) > self.starts:
                self.starts, self.url = len(ready), ready[-1]["url"]
                return
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.05)
        raise AssertionError(self.err.read_text())

    def lines(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in self.err.read_text().splitlines() if line.startswith("{")
        ]

    def ranks(self) -> dict[int, int]:
        children = psutil.Process(self.process.pid).children()
        return {int(child.environ()["RANK"]): child.pid for child in children}

    def complete(self, **more: Any) -> str:
        body = {"model": "nine", "prompt": "the model", "max_tokens": 24, "temperature": 0, **more}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        return response.raise_for_status().json()["choices"][0]["text"]

    def stop(self) -> tuple[int, dict[str, Any]]:
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, json.loads(out)


@contextlib.contextmanager
def served(*words: str, folder: Path) -> Iterator[Served]:
    server = Served(*words, folder=folder)
    try:
        server.wait()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            server.process.communicate(timeout=60)


def test_two_ranks_with_uneven_heads_answer_as_one_does(model: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with served(*small(model), folder=tmp_path / "one") as one:
        alone = [one.complete(), one.complete(prompt=[7, 8, 9, 10], logprobs=2, echo=True)]
        assert one.stop()[0] == 0
    with served(*small(model), "--ranks", "2", folder=tmp_path / "two") as two:
        assert sorted(two.ranks()) == [0, 1]
        assert [two.complete(), two.complete(prompt=[7, 8, 9, 10], logprobs=2, echo=True)] == alone
        status, done = two.stop()
        [loaded] = [line for line in two.lines() if line["event"] == "loaded"]
    plan = ServePlan(ranks=2, weights="float32", kv_cache="float32", kv_blocks=4096 // 16)
    layout = fit(plan, NINE_HEADS)
    assert {layout.layers[layer].heads.sizes for layer in range(3)} == {(6, 3), (3, 6)}
    planned = ledger(layout, dtype="float32", packed=False, max_step_tokens=512)
    assert loaded["weight_bytes"] == [rank.weight_bytes for rank in planned]
    assert loaded["kv_bytes"] == [rank.kv_bytes for rank in planned]
    assert status == 0
    assert done["drained"] is True
    assert done["answers"] == {"length": 2}


def test_a_killed_rank_is_named_and_all_start_again(model: Path, tmp_path: Path) -> None:
    with served(*small(model), "--ranks", "2", folder=tmp_path) as server:
        right = server.complete()
        body = {"model": "nine", "prompt": "a", "max_tokens": 400, "ignore_eos": True}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.ranks()[1], signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):
                list(lines)
        server.wait()
        assert server.complete() == right
        assert server.stop()[0] == 0
    assert "Rank 1 was ended by SIGKILL" in server.err.read_text()
    assert "Starting again (1 of 3)" in server.err.read_text()


def test_sigterm_lets_answers_end(model: Path, tmp_path: Path) -> None:
    with served(*small(model), folder=tmp_path) as server:
        body = {"model": "nine", "prompt": "a", "max_tokens": 300, "ignore_eos": True}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        out, _ = server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    assert json.loads(out)["drained"] is True


def test_a_server_under_load_stays_as_it_was(model: Path, tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "serving_load.py"
    command = [sys.executable, str(script), "--model", str(model)]
    command += ["--seconds", "6", "--streams", "16", "--tokens", "16", "--context", "200", "--"]
    command += [*TORCH, "--kv-tokens", "2048"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 errors" in done.stdout
    assert "'went away'" in done.stdout
    assert "'refused with 413'" in done.stdout or "'refused with 400'" in done.stdout


def taken_port() -> socket.socket:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such model": (["nowhere"], "nowhere"),
    "a port that is none": (["MODEL", "--port", "70000"], "port is 70000"),
    "a host that is none": (["MODEL", "--host", "no.such.host.invalid"], "is not known"),
    "a host of others": (["MODEL", "--host", "192.0.2.1"], "Cannot listen on 192.0.2.1:8000"),
    "no keys": (["MODEL", "--api-keys", "nowhere.txt"], "nowhere.txt"),
    "too few tokens a step": (["MODEL", "--max-step-tokens", "1"], "max_step_tokens is 1"),
    "no time to drain": (["MODEL", "--drain-seconds", "0"], "drain_seconds is 0"),
    "too little memory": (["MODEL", *TORCH, "--memory-gib", "0.00001"], "GiB"),
    "too large a cache": (["MODEL", *TORCH, "--kv-tokens", "1000000000"], "GiB"),
    "a plan that is none": (["MODEL", "--plan", "nowhere.json"], "nowhere.json"),
    "a plan for another model": (["MODEL", "--plan", "PLAN"], "another model"),
    "a plan for other ranks": (["MODEL", "--plan", "PLAN2", "--ranks", "3"], "ranks is 3"),
    "weights that the plan has not": (["MODEL", "--plan", "PLAN2", "--weights", "int8"], "int8"),
    "kernels that are not for this": (
        ["MODEL", "--dtype", "float32", "--implementation", "native"],
        "native",
    ),
    "no GPU": (["MODEL", "--device", "cuda"], "no GPU"),
    "a flag that is none": (["MODEL", "--prot", "1"], "Did you mean --port?"),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_before_anything_is_loaded(
    words: list[str], message: str, model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    if "cuda" in words:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # Weights that cannot be read show that nobody tried.
    bare = tmp_path / "nine"
    bare.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    (bare / "model.safetensors").write_bytes(_headers_of(model / "model.safetensors"))
    ServePlan(model=facts_of(LLAMA)).save(tmp_path / "plan.json")
    ServePlan(ranks=2, weights="float32", kv_cache="float32").save(tmp_path / "plan2.json")
    places = {"MODEL": bare, "PLAN": tmp_path / "plan.json", "PLAN2": tmp_path / "plan2.json"}
    words = [str(places.get(word, word)) for word in words]
    assert run(["serve", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moesaic: ")
    assert err.count("\n") == 1, err
    assert message in err


def _headers_of(path: Path) -> bytes:
    """A file of weights of which nothing but the header is right."""
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    return raw[:length] + bytes(len(raw) - length)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_port_in_use_is_one_line_before_anything_is_loaded(
    ranks: int, model: Path, capsys: Any
) -> None:
    with taken_port() as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", str(model), "--port", port, "--ranks", str(ranks)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"moesaic: Cannot listen on 127.0.0.1:{port}: Address already in use. Choose another port, "
        f"or end what uses it.\n"
    )


def test_a_key_file_without_keys_is_refused(model: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "keys").write_text("\n  \n")
    assert run(["serve", str(model), "--api-keys", str(tmp_path / "keys")]) == 2
    assert "holds no key" in capsys.readouterr().err


def test_several_ranks_are_not_served_from_one_process(model: Path) -> None:
    with pytest.raises(ConfigError, match="give each of them the same plan"):
        moesaic.serve(ServeConfig(model=model, ranks=2))


def test_ranks_are_started_with_the_flags_that_were_given() -> None:
    config = ServeConfig(
        model=Path("m"),
        plan=Path("p.json"),
        prefix_cache=False,
        memory_gib=1.5,
        name="x",
        launch=LaunchConfig(max_restarts=0),
    )
    words = flags_of(config)
    assert words[0] == "m"
    assert "--no-prefix-cache" in words
    flags = {leaf.name.replace("_", "-"): leaf for leaf in leaves(ServeConfig)}
    values: dict[str, Any] = {"model": Path("m"), "prefix_cache": False, "launch": {}}
    rest = iter([word for word in words[1:] if word != "--no-prefix-cache"])
    for flag, text in zip(rest, rest, strict=True):
        leaf = flags[flag.removeprefix("--")]
        value: Any = Path(text) if leaf.name == "plan" else text
        if leaf.name in ("memory_gib", "launch.max_restarts"):
            value = json.loads(text)
        if leaf.name.startswith("launch."):
            values["launch"][leaf.name.removeprefix("launch.")] = value
        else:
            values[leaf.name] = value
    assert build(ServeConfig, values, where="the test") == config
