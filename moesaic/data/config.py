"""What `prepare` is asked for. Nothing here loads torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError

Kind = Literal["auto", "text", "code", "jsonl", "chat", "parquet", "dataset"]

SOURCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What a source may be called: its name becomes part of file names."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents, and its share of the mixture."""

    name: str
    """Letters, digits, `_`, `.` and `-`; the name of its files in the token folder."""

    path: Path
    """A file or a folder."""

    kind: Kind = "auto"
    """`text`, `code`: each file is a document. `jsonl`, `parquet`, `dataset` (a Hugging Face
    dataset folder): each row is. `chat`: each row of one of the three is a conversation. `auto`: by
    what is found at `path`; rows with `messages` and no `text` are conversations."""

    field: str = ""
    """The field of a row that holds the text or the conversation. Empty: `text`, or `messages`."""

    weight: float = 1.0
    """Share of the rows of a run, against the other sources' weights."""

    licence: str = ""
    """Kept in the token folder's header; not interpreted."""

    glob: tuple[str, ...] = ()
    """Which files of a folder to read, such as `**/*.tex`. Empty: those whose ending fits the
    kind. Hidden files and folders are never read."""

    exclude: tuple[str, ...] = ()
    """Which of them to leave out, such as `test/*`; matched against the path below the
    folder, where `*` matches `/` too."""

    split: str = ""
    """`dataset`: which of its splits to read. Empty: `train`, or the only one."""

    undecodable: Literal["refuse", "skip"] = "refuse"
    """What to do with a text file that is not UTF-8: stop, or leave it out and count it."""

    def __post_init__(self) -> None:
        if not SOURCE_NAME.fullmatch(self.name):
            raise ConfigError(
                f"The source name {self.name!r} cannot be part of a file name. "
                f"Use letters, digits, '_', '.' and '-'."
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"The weight of source {self.name} is {self.weight}. Use a number above 0."
            )


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How text becomes a token folder."""

    tokenizer: Path
    """Hugging Face model folder whose tokenizer and chat template are used."""

    out: Path
    """Token folder to write."""

    sources: tuple[SourceConfig, ...]
    """Where the documents come from."""

    sequence_length: int = 1024
    """Tokens in a training row."""

    heldout_fraction: float = 0.01
    """Part of the documents, chosen by a hash of their content, that training never sees."""

    heldout_documents: int | None = None
    """How many distinct documents of each source to hold out, in place of a fraction."""

    seed: int = 0
    """Another seed holds out other documents."""

    overwrite: bool = False
    """Replace `out` if it is there, once the new folder is complete."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length is {self.sequence_length}. Use at least 2 tokens.")
        if not 0 <= self.heldout_fraction < 1:
            raise ConfigError(
                f"heldout_fraction is {self.heldout_fraction}. Use 0 or more, and less than 1."
            )
        if self.heldout_documents is not None and self.heldout_documents < 0:
            raise ConfigError(f"heldout_documents is {self.heldout_documents}. Use 0 or more.")
        if not self.sources:
            raise ConfigError("There is no source. Name at least one file or folder to prepare.")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{names.count(name)} sources are called {name}. Rename one.")
