"""Write a token folder from lists of numbers, by docs/token-folder.md and none of the package."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Documents = list[list[int]]


def write_token_folder(
    path: Path,
    train: Mapping[str, Documents],
    *,
    heldout: Mapping[str, Documents] | None = None,
    masks: Mapping[str, Documents] | None = None,
    weights: Mapping[str, float] | None = None,
    sequence_length: int,
    vocab_size: int = 1000,
) -> Path:
    """Write documents by source; held-out ones are the same unless given; masks are of both."""
    path.mkdir(parents=True, exist_ok=True)
    letter = "H" if vocab_size <= 65536 else "I"
    sources: list[dict[str, Any]] = []
    for name, documents in train.items():
        splits = {}
        for split, chosen in (("train", documents), ("heldout", (heldout or train)[name])):
            tokens = [token for document in chosen for token in document]
            starts = [sum(map(len, chosen[:i])) for i in range(len(chosen))]
            streams = {
                "tokens": struct.pack(f"<{len(tokens)}{letter}", *tokens),
                "documents": struct.pack(f"<{len(starts)}q", *starts),
            }
            if masks and name in masks:
                streams["mask"] = bytes(value for mask in masks[name] for value in mask)
            for stream, content in streams.items():
                (path / f"{name}.{split}.{stream}").write_bytes(content)
            splits[split] = {
                "tokens": len(tokens),
                "documents": len(starts),
                "sequences": max(0, (len(tokens) - 1) // sequence_length),
                "sha256": {
                    stream: hashlib.sha256(content).hexdigest()
                    for stream, content in streams.items()
                },
            }
        weight = (weights or {}).get(name, 1)
        sources.append({"name": name, "weight": weight, "licence": "", "splits": splits})
    header = {
        "format": "moesaic-tokens",
        "version": 1,
        "created_by": "a test",
        "tokenizer": {"name": "numbers", "hash": "0" * 64},
        "vocab_size": vocab_size,
        "eos_token_id": 0,
        "dtype": "uint16" if letter == "H" else "uint32",
        "sequence_length": sequence_length,
        "sources": sources,
    }
    (path / "header.json").write_text(json.dumps(header), encoding="utf-8")
    return path
