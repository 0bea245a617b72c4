"""Read the file of a plan, for training or for serving: JSON that leaves nothing to guess."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moesaic.errors import PlanError

Plan = TypeVar("Plan")


def read_plan_file(path: Path | str, from_json: Callable[[Any], Plan]) -> Plan:
    """What `from_json` makes of the file; the path stands before whatever it refuses.

    Raises:
        PlanError: The file cannot be read, or `from_json` refuses what it holds.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not readable JSON: {error}.") from None
    try:
        return from_json(raw)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; where a key stands twice, a reader would have to guess which one is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
