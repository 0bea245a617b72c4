"""What `moesaic evaluate` may be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out loss of one model, or of several on the same text."""

    models: tuple[Path, ...]
    """Model folders. The first is the one the others are compared with."""

    data: Path
    """Token folder, made with the models' tokenizer."""

    labels: tuple[str, ...] = ()
    """What to call each model; none means the folders' names."""

    split: Literal["heldout", "train"] = "heldout"
    """Part of the token folder to read."""

    max_sequences: int | None = None
    """Sequences to read, spread evenly over the split; None reads all."""

    batch_size: int = 4
    """Sequences in one forward pass; changes speed and memory only."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of weights and activations; norms, routers and the loss stay in float32."""

    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: a GPU if there is one."""

    out: Path | None = None
    """File to write the result to, as JSON."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("No model to evaluate. Name at least one model folder.")
        if self.labels and len(self.labels) != len(self.models):
            raise ConfigError(
                f"{len(self.labels)} labels for {len(self.models)} models. "
                f"Give one label a model, or none."
            )
        if self.max_sequences is not None and self.max_sequences < 1:
            raise ConfigError(f"max_sequences is {self.max_sequences}. Read at least 1 sequence.")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}. Use at least 1 sequence.")
