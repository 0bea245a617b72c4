"""Every exception that Moesaic raises on purpose.

    MoesaicError
    ├── ConfigError     a flag or a recipe asks for what cannot be
    ├── SpecError       a model's description is unknown or contradicts itself
    ├── PlanError       a plan that cannot be carried out, or not with this model
    ├── FolderError     a folder or file on disk is missing, damaged, taken, or cannot be written
    ├── DataError       text that cannot become training data
    ├── TrainingError   a run that must not go on, such as a loss that is not finite
    ├── ServingError    a server that must not go on, such as one that has lost a rank
    └── Unavailable     a request that is not taken now: too many wait, or the server is ending

The message is one line: what is wrong, the numbers, what to do. The command line prints
it without a traceback and exits with the class's `exit_status`.
"""

from __future__ import annotations


class MoesaicError(Exception):
    """Something a user or a file can cause."""

    exit_status = 2


class ConfigError(MoesaicError):
    """A flag or a recipe asks for what cannot be."""


class SpecError(MoesaicError):
    """A model's description is unknown or contradicts itself."""


class PlanError(MoesaicError):
    """A plan that cannot be carried out, or not with this model."""


class FolderError(MoesaicError):
    """A folder or file on disk is missing, damaged, taken, or cannot be written."""


class DataError(MoesaicError):
    """Text that cannot become training data."""


class TrainingError(MoesaicError):
    """A run that must not go on. Its last good state is on disk."""

    exit_status = 3


class ServingError(MoesaicError):
    """A server or executor that must not go on, because it could answer wrongly."""

    exit_status = 3


class Unavailable(MoesaicError):
    """A request that is not taken now, though later or elsewhere it might be."""
