"""What a run must not change half way: the model it began with, its data and their order.

Everything else, such as the learning rate, may be changed when a run is resumed, and is then
said on stderr and recorded beside the next checkpoint.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic.errors import ConfigError, FolderError
from moesaic.training.config import TrainConfig

EDGE_BYTES = 2**20
"""Of each weight file this much is read at its start and at its end: hashing all of a large model
would take minutes."""


def identity(config: TrainConfig) -> dict[str, Any]:
    """What two configs must share for one to go on where the other stopped, fit for JSON.

    Raises:
        FolderError: The model or token folder cannot be read.
    """
    return {
        "model": fingerprint(config.model),
        "data.tokens": fingerprint(config.data.tokens),
        "data.weights": None if config.data.weights is None else dict(config.data.weights),
        "data.micro_batch": config.data.micro_batch,
        "data.accumulation": config.data.accumulation,
        "data.attend_across_documents": config.data.attend_across_documents,
        "seed": config.seed,
        "freeze": sorted(config.freeze),
    }


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], *, run: Path) -> None:
    """Raises ConfigError naming the first field in which a run would not go on as it began."""
    for field, value in now.items():
        if before.get(field) != value:
            was = "" if field in ("model", "data.tokens") else f" It was {before.get(field)!r}."
            raise ConfigError(
                f"{run} began with another {field} than this.{was} "
                f"Set it back, or begin a new run folder."
            )


def changes(before: str, now: str) -> list[str]:
    """Values that differ between two configurations in TOML, in words."""
    old, new = _flat(tomllib.loads(before)), _flat(tomllib.loads(now))
    keys = sorted(old.keys() | new.keys())
    return [
        f"{key} = {new.get(key)!r} (was {old.get(key)!r})"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def fingerprint(folder: Path) -> str:
    """A hash that changes with what a model or token folder holds, not with where it lies.

    A token folder's header holds the checksums of its streams. Of a model folder it is config.json,
    and of each weight file the size and both ends, where one end holds every tensor's place.
    """
    digest = hashlib.sha256()
    try:
        header = folder / "header.json"
        files = [header] if header.exists() else [folder / "config.json"]
        files += sorted(folder.glob("*.safetensors"))
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(EDGE_BYTES))
                file.seek(max(EDGE_BYTES, size - EDGE_BYTES))
                digest.update(file.read())
    except OSError as error:
        raise FolderError(f"{folder} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        flat.update(inner or {prefix + key: value})
    return flat
