"""What `moesaic inspect` and `moesaic report` may be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to tell about one model folder."""

    model: Path
    """Model folder, dense or MoE, 16-bit or FP8."""

    context: int = 2048
    """Position of the token whose operations are counted: it attends to this many."""

    similarity: bool = True
    """Compare the experts of each layer, which reads every expert weight once."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"context is {self.context}. Count a token at position 1 or later.")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which run to show, and where the page goes."""

    run: Path
    """Run folder of `moesaic train`, finished or still going."""

    out: Path | None = None
    """The page; none means report.html in the run folder."""
