"""What `moesaic demo` may be asked. Nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole path on a small real model."""

    out: Path = Path("demo")
    """Folder for everything the demo makes: some 5 GB, and 8 GB more if training is interrupted."""

    quick: bool = False
    """Take a tiny model with random weights in place of SmolLM2: seconds, and no sense in its
    answers. Shows that every stage works."""

    experts: int = 8
    """Experts in each layer."""

    top_k: int = 2
    """Experts each token is sent to."""

    steps: int = 20
    """Training steps, of the MoE model and of the dense control alike."""

    lr: float = 2e-4
    """Peak learning rate of both."""

    seed: int = 0
    """Of the routers, of the choice of held-out files and of the order of the data."""

    question: str = "What is the capital of France?"
    """What every model is asked."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ConfigError(f"steps is {self.steps}. Train for at least 2.")
        if not self.question:
            raise ConfigError("The question is empty. Ask something.")
