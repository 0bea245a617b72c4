"""What we write means the same to transformers 4.57 and to 5.x.

`make test-all` makes an environment with transformers 4 and names its Python in
MOESAIC_PYTHON_TRANSFORMERS_4. Without it these tests skip themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moesaic.checkpoint.folder import write_config
from tests.test_parity import LENGTH, SPECS, TOLERANCE, stock_family
from tests.tiny import tiny_folder, token_ids

ROOT = Path(__file__).resolve().parent.parent
OTHER_PYTHON = os.environ.get("MOESAIC_PYTHON_TRANSFORMERS_4")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OTHER_PYTHON is None, reason="needs MOESAIC_PYTHON_TRANSFORMERS_4"),
]


def run(python: str, *arguments: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [python, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def logits(tmp_path_factory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of every family's folders: by transformers 4.57, and by this environment's."""
    top = tmp_path_factory.mktemp("two")
    for name, spec in SPECS.items():
        folder = tiny_folder(top / "models" / name, spec, tokenizer=False)
        write_config(folder, spec.replace(family=stock_family(spec)), dtype="float32")
    save_file({"ids": token_ids(2, LENGTH)}, top / "ids.safetensors")
    found = {}
    for version, python in (("4.57", str(OTHER_PYTHON)), ("5", sys.executable)):
        out = top / f"{version}.safetensors"
        script = str(ROOT / "tests" / "transformers_logits.py")
        run(python, script, str(top / "models"), str(top / "ids.safetensors"), str(out))
        with safe_open(out, framework="pt") as file:
            assert file.metadata()["transformers"].startswith(f"{version}.")
        found[version] = load_file(out)
    assert set(found["4.57"]) == set(found["5"]) == set(SPECS)
    return found["4.57"], found["5"]


@pytest.mark.parametrize("name", SPECS)
def test_both_versions_compute_the_same_logits(logits, name):
    older, newer = (versions[name] for versions in logits)
    assert older.abs().max() > 1
    # Version 5 multiplies an expert's gate and up matrices as one, which rounds differently.
    tolerance = 0.0 if SPECS[name].moe is None else TOLERANCE
    torch.testing.assert_close(older, newer, rtol=0, atol=tolerance)


def test_parity_holds_in_the_older_version_both_ways():
    """Folders of ours read by it, and folders it saved read by us: `test_parity.py` under it."""
    report = run(
        str(OTHER_PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_parity.py"
    )
    assert " passed" in report
