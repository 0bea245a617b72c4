"""Who may import whom. The order is the design's; every import is read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesaic

PACKAGE = Path(moesaic.__file__).parent

JOBS = ("upcycling", "training", "quantizing", "serving", "measuring", "reporting")
"""They stand side by side: between two jobs there is a folder on disk."""

ORDER = (
    ("version", "errors"),
    ("files", "console", "memory", "native"),
    *(
        (name,)
        for name in ["spec", "config", "planning", "data", "parallel", "checkpoint", "quantization"]
    ),
    *((name,) for name in ["moe", "model", "evaluation"]),
    JOBS,
    ("studies",),
    ("cli",),
    ("__main__",),
)
"""Each rank may import those before it, and itself; names in one rank never import each other."""

RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

OWNERS = {
    "torch.distributed.checkpoint": {"checkpoint"},
    "torch.distributed": {"parallel"},
}
"""The only packages that may import these; the longest name that fits an import counts."""

TORCH_FREE = (
    "moesaic",
    "moesaic.files",
    "moesaic.console",
    "moesaic.spec",
    "moesaic.config",
    "moesaic.planning.split",
    "moesaic.planning.plan",
    "moesaic.planning.layout",
    "moesaic.planning.schedules",
    "moesaic.planning.actions",
    "moesaic.planning.simulate",
    "moesaic.planning.config",
    "moesaic.planning.train",
    "moesaic.planning.check",
    "moesaic.planning.serving.serve",
    "moesaic.cli.app",
    "moesaic.cli.upcycle",
    "moesaic.cli.prepare",
    "moesaic.cli.train",
    "moesaic.cli.plan",
    "moesaic.cli.measure",
    "moesaic.cli.evaluate",
    "moesaic.cli.quantize",
    "moesaic.cli.generate",
    "moesaic.cli.serve",
    "moesaic.cli.chat",
    "moesaic.cli.bench",
    "moesaic.serving.config",
    "moesaic.serving.bench",
    "moesaic.cli.inspect",
    "moesaic.cli.report",
    "moesaic.cli.demo",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The package or top-level module a file belongs to; empty for moesaic/__init__.py."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} has a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def faults(part: str, source: str) -> list[str]:
    """Imports that a file in `part` may not have."""
    wrong = []
    for line, name in imports_of(source):
        head, _, rest = name.partition(".")
        if head == "moesaic" and part:
            other = rest.split(".")[0]
            if other in RANK and other != part and RANK[other] >= RANK[part]:
                wrong.append(f"{line}: {part} imports {other}, which does not stand before it")
        for guarded in sorted(OWNERS, key=len, reverse=True):
            if name == guarded or name.startswith(guarded + "."):
                if part not in OWNERS[guarded]:
                    wrong.append(f"{line}: {part} imports {guarded}")
                break
    return wrong


def test_every_part_of_the_package_has_a_place_in_the_order() -> None:
    assert {part_of(path) for path in modules()} - {""} <= set(RANK)


@pytest.mark.parametrize(
    "path", modules(), ids=lambda path: str(path.relative_to(PACKAGE).with_suffix(""))
)
def test_a_module_imports_only_what_stands_before_it(path: Path) -> None:
    assert faults(part_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("moe", "import moesaic.model.build"),
        ("moe", "def f():\n    from moesaic import evaluation"),
        ("training", "from moesaic.upcycling.upcycle import upcycle"),
        ("files", "from moesaic.console import note"),
        ("model", "import torch.distributed as dist"),
        ("checkpoint", "from torch import distributed"),
        ("parallel", "from torch.distributed.checkpoint import save"),
    ],
)
def test_a_wrong_import_is_found(part: str, source: str) -> None:
    assert len(faults(part, source)) == 1


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_loads_no_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    code = f"import sys, {module}; print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path",
    [path for name in ("moe", "model") for path in sorted((PACKAGE / name).glob("*.py"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_no_layer_asks_for_its_rank(path):
    asked = {"rank", "local_rank", "get_rank", "get_local_rank", "get_world_size"}
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        assert name not in asked, f"line {node.lineno} asks for {name}"
