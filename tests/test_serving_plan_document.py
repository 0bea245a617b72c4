"""docs/serving-plan.md: its commands print what it shows; its rule of spans is the planner's."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from fractions import Fraction
from pathlib import Path

import pytest

from moesaic.cli.app import run
from moesaic.config import build
from moesaic.planning.config import PlanServeConfig
from moesaic.planning.serving.layout import fit
from moesaic.planning.serving.plan import ServePlan
from moesaic.planning.serving.serve import plan_serve
from moesaic.spec import PRESETS

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "serving-plan.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^```console\n\$ moesaic (.*?)\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE
)
SKYWORK = PRESETS["skywork-moe-146b"]


@pytest.mark.parametrize(("typed", "shown"), COMMANDS)
def test_its_commands_print_what_it_shows(typed, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(shlex.split(typed)) == 0
    # All of it is arithmetic, so figures are the same to the last digit.
    assert capsys.readouterr().out == shown


def test_its_table_of_conditions_is_what_its_options_give():
    rows = re.findall(
        r"^\| ([^|]*) \| ((?:`--[^|]*`)?) ?\| (\d+) \| ([\d,]+) \| ([\d,]+) \|", DOCUMENT, re.M
    )
    assert len(rows) == 7
    given: dict[str, object] = {}
    for condition, options, batch, speed, context in rows:
        words = shlex.split(options.strip("`"))
        if "rotated" in condition or "CUDA graphs" in condition:
            given = {}
        while words:
            name = words.pop(0).removeprefix("--").replace("-", "_")
            text = words.pop(0) if words and not words[0].startswith("--") else True
            numbers = ("host_us", "hop_us", "sum_bytes")
            given[name] = float(text) if name in numbers else text
        config = build(
            PlanServeConfig,
            {
                "model": "skywork-moe-146b",
                "cluster": "8x4090",
                "weights": "float8",
                "max_step_tokens": 2048,
                "target": 2200.0,
                **given,
            },
            where="the table",
        )
        done = plan_serve(config)
        chosen = next(one for one in done["arrangements"] if one["is_chosen"])
        reached = next(one for one in done["by_target"] if one["name"] == done["choice"])
        assert chosen["batch"] == int(batch), condition
        assert f"{chosen['tokens_per_second']:,.0f}" == speed, condition
        assert f"{reached['context']:,}" == context, condition


def by_the_documents_rule(total, shares, layers):
    """Units of each rank in each layer, as the last paragraph says it."""
    counts = [0] * len(shares)
    for _ in range(total * layers):
        rank = min(
            (rank for rank in range(len(shares)) if shares[rank]),
            key=lambda rank: (Fraction(counts[rank] + 1) / Fraction(shares[rank]), -rank),
        )
        counts[rank] += 1
    golden = round((math.sqrt(5) - 1) / 2 * layers)
    stride = next(
        step
        for far in itertools.count()
        for step in (golden + far, golden - far)
        if step > 0 and math.gcd(step, layers) == 1
    )
    found = []
    for layer in range(layers):
        wanted, begin, sizes = layer * stride % layers, 0, []
        for count in counts:
            end = begin + count % layers
            more = any(number % layers == wanted for number in range(begin, end))
            sizes.append(count // layers + more)
            begin = end
        found.append(tuple(sizes))
    return found


@pytest.mark.parametrize("shares", [None, (1, 2, 2, 0.5), (3, 0, 1, 1, 1)])
@pytest.mark.parametrize("ranks", [1, 3, 5, 7, 8])
def test_a_stranger_finds_the_same_spans(ranks, shares):
    shares = shares or (1,) * ranks
    plan = ServePlan(ranks=len(shares), shares=shares)
    spec = SKYWORK.replace(num_layers=13, moe_layers=tuple(range(0, 13, 3)))
    layout = fit(plan, spec)
    expected = by_the_documents_rule(36, shares, 13)
    assert [splits.kv_heads.sizes for splits in layout.layers] == expected
    units = by_the_documents_rule(96, shares, 5)
    found = [layout.layers[layer].expert_columns.sizes for layer in spec.moe_layers]
    assert found == [tuple(128 * size for size in sizes) for sizes in units]


def test_its_links_lead_somewhere():
    paths = re.findall(r"`(moesaic/planning/[^`]*)`", DOCUMENT)
    assert paths
    assert all((ROOT / path).exists() for path in paths)
