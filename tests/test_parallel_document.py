"""What docs/parallel.md says is typed as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.planning.layout import fit
from moesaic.planning.plan import TrainPlan
from tests.test_readme import matches
from tests.tiny import TINY, tiny_folder
from tests.tiny_run import tiny_tokens

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
PLANS = re.findall(r"^```json\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(
    r"^```console\n\$ moesaic (.*?)\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize("text", PLANS)
def test_its_plans_fit(text: str) -> None:
    assert fit(TrainPlan.from_json(json.loads(text)), TINY["mixtral"]).plan.world_size > 1


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", DOCUMENT)
    assert links
    assert all((ROOT / "docs" / link).is_file() for link in links)
    assert all(
        (ROOT / path).exists() for path in re.findall(r"`((?:tests|recipes)/[^`]*)`", DOCUMENT)
    )


@pytest.mark.slow
def test_its_commands_print_what_it_shows(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "moe", TINY["mixtral"])
    tiny_tokens(tmp_path / "tokens")
    for name, text in zip(("plan.json", "other.json"), PLANS, strict=True):
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert len(COMMANDS) == 2
    for typed, printed in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "moesaic", *shlex.split(typed)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert matches(done.stdout.splitlines(), printed.splitlines()), done.stdout
