"""Whatever fits the server's own OpenAPI document, and whatever does not, is answered in order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moesaic.serving.config import EngineConfig
from moesaic.serving.engine.engine import Engine
from tests.http_server import Running, running
from tests.test_server import TOOLS_TEMPLATE, log_of, wait_for
from tests.tiny import TINY, tiny_folder

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    """A model that has everything, and whose answers are short."""
    folder = tiny_folder(tmp_path / "moe", TINY["mixtral"].replace(max_positions=512))
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    config = EngineConfig(model=folder, dtype="float32", implementation="torch", kv_tokens=4096)
    with Engine.load(config) as engine, running(engine, max_new_tokens=6) as server:
        yield server
        wait_for(lambda: engine.statistics().running == 0, seconds=60)
        engine.check()


def run(server: Running, *options: str, seconds: float) -> None:
    """Have schemathesis do its worst; nothing may be answered 5xx, and blocks must balance."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--checks", ",".join(CHECKS), "--continue-on-failure", "--warnings", "off"]
    done = subprocess.run(
        [*command, "--request-timeout", "60", *options],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=Path(server.engine.config.model).parent,  # it keeps a database where it is
        env={**os.environ, "NO_COLOR": "1"},
    )
    slow = [line for line in log_of(server) if line.get("seconds", 0) > 10]
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}{slow=}"
    statuses = {line["status"] for line in log_of(server) if line["event"] == "request"}
    assert {200, 400} <= statuses
    assert not [status for status in statuses if status >= 500]


def test_no_request_that_schemathesis_thinks_of_meets_a_fault(server: Running) -> None:
    run(server, "--phases", "fuzzing", "--max-examples", "4", "--seed", "1", seconds=200)


@pytest.mark.slow
def test_no_request_of_many_meets_a_fault(server: Running) -> None:
    run(server, "--phases", "coverage,fuzzing", "--max-examples", "150", seconds=3000)


def test_the_document_names_the_model_and_no_status_that_is_not_sent(server: Running) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["properties"]["model"]["enum"] == ["tiny"]
    assert chat["additionalProperties"] is False
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(answers) == {"200", "400", "401", "404", "408", "413", "500", "503"}
