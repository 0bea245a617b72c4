"""A token folder written straight from its documented format, and training runs of a second."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import moesaic.errors
import moesaic.spec
from moesaic.training.config import (
    CheckpointConfig,
    MetricsConfig,
    OptimizerConfig,
    TrainConfig,
    TrainDataConfig,
)

TEXT = "".join(module.__doc__ or "" for module in (moesaic.errors, moesaic.spec, json, dataclasses))
EOS = 1


def tiny_tokens(
    path: Path, *, sequence_length: int = 16, sources: tuple[str, ...] = ("text",)
) -> Path:
    """A token folder whose tokens are the bytes of some English, a paragraph a document."""
    path.mkdir(parents=True)
    documents = [
        [EOS + 1 + byte for byte in paragraph.encode()] + [EOS]
        for paragraph in TEXT.split("\n\n")
        if paragraph.strip()
    ]
    stream = np.array([token for document in documents for token in document], dtype="<u2")
    starts = np.cumsum([0, *(len(document) for document in documents)])[:-1].astype("<i8")
    splits = {}
    for split in ("train", "heldout"):
        for source in sources:
            (path / f"{source}.{split}.tokens").write_bytes(stream.tobytes())
            (path / f"{source}.{split}.documents").write_bytes(starts.tobytes())
        splits[split] = {
            "tokens": len(stream),
            "documents": len(starts),
            "sequences": (len(stream) - 1) // sequence_length,
            "sha256": {
                "tokens": hashlib.sha256(stream.tobytes()).hexdigest(),
                "documents": hashlib.sha256(starts.tobytes()).hexdigest(),
            },
        }
    header = {
        "format": "moesaic-tokens",
        "version": 1,
        "tokenizer": {"name": "bytes", "hash": "0" * 64},
        "vocab_size": 300,
        "sequence_length": sequence_length,
        "dtype": "uint16",
        "eos_token_id": EOS,
        "created_by": "tests",
        "sources": [
            {"name": source, "weight": 1.0, "licence": "Apache-2.0", "splits": splits}
            for source in sources
        ],
    }
    (path / "header.json").write_text(json.dumps(header))
    return path


def tiny_config(model: Path, tokens: Path, run: Path, **changes: Any) -> TrainConfig:
    """A run of a second, in float32 and without TensorBoard, with some fields changed."""
    fields: dict[str, Any] = {
        "model": model,
        "run": run,
        "data": TrainDataConfig(tokens=tokens, micro_batch=2, accumulation=2),
        "steps": 6,
        "optimizer": OptimizerConfig(lr=1e-2),
        "compute_dtype": "float32",
        "checkpoint": CheckpointConfig(every=2, keep=2),
        "metrics": MetricsConfig(similarity_every=3, peak_flops=1e12, tensorboard=False),
        "save_dtype": "float32",
    }
    return TrainConfig(**{**fields, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()]
