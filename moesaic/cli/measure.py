"""`moesaic measure --model MODEL --out TABLE`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import moesaic
from moesaic.cli.show import size, table
from moesaic.cli.verb import Summary, verb
from moesaic.config import to_toml
from moesaic.measuring.config import MeasureConfig
from moesaic.parallel.launch import environment_world, start_ranks


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """Milliseconds of each unit, and the speed of each kind of exchange."""
    about = done["about"]
    ranks = about["ranks"]
    yield (
        f"{about['model']} on {done['device']}: {ranks} rank{'s' * (ranks > 1)} of "
        f"{about['threads_a_rank']} thread{'s' * (about['threads_a_rank'] > 1)}, "
        f"{about['rounds']} rounds, medians of ms"
    )
    heads = ["unit", "forward", "backward", "in two", "spread", "update", "recomputed, more"]
    yield from table(heads, map(_unit, done["units"]))
    if done["links"]:
        yield ""
        heads = ["exchange", "ranks", "latency, us", "GB/s", "off the line", "largest"]
        yield from table(heads, map(_link, done["links"]))
    yield f"wrote {done['out']}"


def _unit(unit: Mapping[str, Any]) -> list[str]:
    again = ", ".join(f"{name} {1e3 * more:.2f}" for name, more in unit["recompute"].items())
    whole = unit["forward"] + unit["backward"]
    spread = (unit["spread"]["forward"] + unit["spread"]["backward"]) / whole if whole else 0.0
    return [
        unit["kind"],
        f"{1e3 * unit['forward']:.2f}",
        f"{1e3 * unit['backward']:.2f}",
        f"{1e3 * unit['input_gradient']:.2f} + {1e3 * unit['weight_gradient']:.2f}",
        f"{spread:.0%}",
        f"{1e3 * unit['update']:.2f}",
        again,
    ]


def _link(link: Mapping[str, Any]) -> list[str]:
    largest = max(moved for moved, _, _ in link["points"])
    return [
        link["kind"].replace("_", " "),
        str(link["ranks"]),
        f"{1e6 * link['latency']:.0f}",
        f"{link['bandwidth'] / 1e9:.2f}",
        f"{link['residual']:.0%} to {link['largest_residual']:.0%}",
        size(largest),
    ]


def start(config: MeasureConfig, as_json: bool) -> int | None:
    """Start the ranks on this machine, unless this process is one of them or all."""
    if config.ranks in (None, 1) or environment_world() is not None:
        return None
    with tempfile.TemporaryDirectory(prefix="moesaic-measure-") as folder:
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "moesaic", "measure", str(recipe)]
        return start_ranks(
            [*command, "--json"] if as_json else command,
            size=config.ranks or 1,
            config=config.launch,
        )


@verb(MeasureConfig, recipe=True, show=show, elsewhere=start)
def measure(config: MeasureConfig) -> Summary:
    """Time a model's layers and the links between ranks, for the planner."""
    summary: Summary = moesaic.measure(config)
    return summary
