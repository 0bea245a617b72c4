"""How several ranks start, watch each other and start again. Nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How long ranks wait for each other, and how often they may start again."""

    max_restarts: int = 3
    """Times that all ranks start again after one was killed or hangs. Under torchrun its own
    --max-restarts counts instead. Ours."""

    hang_seconds: float = 20.0
    """A rank that gives no sign of life for so long is named, and all ranks end. Ours: torchrun
    kills what is left 30 s after it has lost a rank, and it should be named before."""

    wait_seconds: float = 600.0
    """Longest that ranks wait for another one that lives, in a collective operation or when they
    start. Then it is named, and all ranks end. Ours."""

    grace_seconds: float = 300.0
    """Time to finish a step and write a checkpoint when the run is asked to stop, before ranks are
    killed. Under torchrun TORCH_ELASTIC_SHUTDOWN_TIMEOUT counts instead. Ours."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_restarts", 0),
            ("hang_seconds", 5),  # a busy machine delays a sign of life by seconds
            ("wait_seconds", 1),
            ("grace_seconds", 0),
        ):
            if not getattr(self, name) >= least:
                raise ConfigError(
                    f"launch.{name} is {getattr(self, name)}. It must be at least {least}."
                )
