"""`moesaic serve MODEL`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import moesaic
from moesaic.cli.verb import Summary, verb
from moesaic.config import leaves
from moesaic.parallel.launch import environment_world, start_ranks
from moesaic.serving.config import ServeConfig


def show(done: Mapping[str, Any]) -> Iterator[str]:
    """What was answered."""
    if not done:  # a rank that answers nobody
        return
    how = ", ".join(f"{count} {reason}" for reason, count in sorted(done["answers"].items()))
    ending = "" if done["drained"] else "; what was not answered yet was cut short"
    yield f"served {done['seconds']:,.0f} s, answers: {how or 'none'}{ending}"


def status(done: Mapping[str, Any]) -> int:
    """A server that had to cut answers short was interrupted."""
    return 0 if done.get("drained", True) else 130


def start(config: ServeConfig, as_json: bool) -> int | None:
    """Start the plan's ranks on this machine, unless this process is one of them or all."""
    if environment_world() is not None or (config.plan is None and config.ranks in (None, 1)):
        return None
    from moesaic.serving.serve import check, shared_plan

    size = check(config)
    if size == 1:
        return None
    with tempfile.TemporaryDirectory(prefix="moesaic-serve-") as folder:
        plan = Path(folder) / "plan.json"
        shared_plan(config).save(plan)
        flags = flags_of(replace(config, plan=plan))
        command = [sys.executable, "-m", "moesaic", "serve", *flags]
        # The first rank prints the result here; the others print into their logs.
        return start_ranks(
            [*command, "--json"] if as_json else command,
            size=size,
            config=config.launch,
            again="serves again",
        )


def flags_of(config: ServeConfig) -> list[str]:
    """The command line that gives this config."""
    words = [str(config.model)]
    for leaf in leaves(ServeConfig):
        value: Any = config
        for name in leaf.name.split("."):
            value = getattr(value, name)
        flag = leaf.name.replace("_", "-")
        if leaf.name == "model" or value == leaf.default:
            continue
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return words


@verb(ServeConfig, positional=("model",), show=show, status=status, elsewhere=start)
def serve(config: ServeConfig) -> Summary:
    """Answer requests over HTTP as OpenAI's API does."""
    summary: Summary = moesaic.serve(config)
    return summary
