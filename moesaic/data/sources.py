"""Read documents from files, one after another, without ever holding a whole source.

A file of text is one document, and so is a row of JSON Lines, Parquet or a Hugging Face
dataset. A document longer than `PIECE_CHARS` comes in pieces, because a tokenizer needs far more
memory than the text it is given.

Parquet and dataset folders are read by Hugging Face's datasets. JSON Lines are not: it
guesses types (the text "2024-01-01" becomes a date), fills the fields that a row lacks
with null, and cannot say which line is at fault. They are read with `json`, line by line.

Nothing here loads torch.
"""

from __future__ import annotations

import bz2
import codecs
import fnmatch
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moesaic.data.chat import Spans
from moesaic.data.config import SourceConfig
from moesaic.errors import DataError

PIECE_CHARS = 1 << 20
"""The most characters of a document that are tokenised together."""

Container = Literal["text", "code", "jsonl", "parquet", "dataset"]

_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def _endings(names: str) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names.split())


ENDINGS: dict[Container, tuple[str, ...]] = {
    "text": _endings("txt text md markdown rst tex adoc org"),
    "code": _endings(
        "py pyi c h cc cpp cxx hpp cu cuh rs go java kt scala cs swift js jsx ts tsx rb php pl lua "
        "r jl hs ml sh bash sql html css"
    ),
    "jsonl": _endings("jsonl jsonl.gz jsonl.bz2 jsonl.xz ndjson ndjson.gz ndjson.bz2 ndjson.xz"),
    "parquet": _endings("parquet"),
}
"""Which files of a folder each kind reads."""


class Piece(NamedTuple):
    """A document, or, of a long one, a part."""

    text: str
    is_first: bool = True
    is_last: bool = True
    learned: Spans | None = None
    """Spans of characters to learn, for a conversation; None is all."""


Render = Callable[[dict[str, Any], str, str], tuple[str, Spans]]
"""Turns a row, the name of its field and where it stands into text and the spans to learn."""


@dataclass(kw_only=True)
class Source:
    """Where documents come from, found out but not yet read."""

    config: SourceConfig
    container: Container
    is_chat: bool
    files: list[Path]
    """What is read, in order; a dataset folder is one entry."""

    skipped_files: int = 0
    """Files that were left out because they are not UTF-8, in the latest reading."""

    empty_documents: int = 0
    """Documents without a character, in the latest reading."""

    @property
    def field(self) -> str:
        """The field of a row that counts."""
        return self.config.field or ("messages" if self.is_chat else "text")

    def pieces(self, render: Render | None) -> Iterator[Piece]:
        """Read every document.

        Args:
            render: Turns a conversation into text; needed for chat alone.

        Raises:
            DataError: For what cannot be read; file and line or row are named.
        """
        self.skipped_files = self.empty_documents = 0
        if self.container in ("text", "code"):
            documents: Iterator[Iterable[str]] = self._text_files()
        elif render is not None and self.is_chat:
            yield from self._conversations(render)
            return
        else:
            documents = ([_text_of(row, self.field, where)] for row, where in self._rows())
        for document in documents:
            parts = cut(document)
            part = next(parts, "")
            if not part:
                self.empty_documents += 1
                continue
            is_first = True
            for later in parts:
                yield Piece(part, is_first=is_first, is_last=False)
                part, is_first = later, False
            yield Piece(part, is_first=is_first)

    def _conversations(self, render: Render) -> Iterator[Piece]:
        for row, where in self._rows():
            text, learned = render(row, self.field, where)
            yield Piece(text, learned=learned)

    def _text_files(self) -> Iterator[Iterable[str]]:
        for path in self.files:
            place = undecodable_at(path)
            if place is None:
                yield _chunks(path)
            elif self.config.undecodable == "skip":
                self.skipped_files += 1
            else:
                raise DataError(
                    f"{path} is not UTF-8: byte {place:,}. Convert it, exclude it, or set "
                    f"undecodable to skip."
                )

    def _rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        read = {"jsonl": _jsonl_rows, "parquet": _parquet_rows}.get(self.container)
        for path in self.files:
            yield from read(path) if read else _dataset_rows(path, self.config.split)


def find_source(config: SourceConfig, *, leave_out: Path) -> Source:
    """Look at what lies at a source's path and say how it is read.

    Args:
        config: What was asked for.
        leave_out: A folder whose files are not read: the output.

    Raises:
        DataError: If there is nothing to read, or it is not clear how.
    """
    if not config.path.exists():
        raise DataError(f"The source {config.name} does not exist: {config.path}.")
    container = _container(config, leave_out)
    files = [config.path] if container == "dataset" else _files(config, container, leave_out)
    if not files:
        wanted = ", ".join(config.glob or ENDINGS[container])
        raise DataError(
            f"{config.path} holds no file for source {config.name}: looked for {wanted}."
        )
    source = Source(config=config, container=container, is_chat=config.kind == "chat", files=files)
    if config.kind == "auto" and container not in ("text", "code"):
        row = next((row for row, _ in source._rows()), {})
        source.is_chat = config.field in ("", "messages") and isinstance(row.get("messages"), list)
        source.is_chat &= config.field == "messages" or "text" not in row
    return source


def cut(parts: Iterable[str]) -> Iterator[str]:
    """Join text and cut it again into pieces of at most `PIECE_CHARS` characters.

    A cut is made before the last line break or space that follows a letter or digit, where
    tokenizers that split into words first, as byte-level ones do, would divide it anyway. Only if
    there is none, is a piece cut where it is full.
    """
    rest = ""
    for part in parts:
        rest += part
        while len(rest) > PIECE_CHARS:
            place = _last_cut(rest, "\n") or _last_cut(rest, " ") or PIECE_CHARS
            yield rest[:place]
            rest = rest[place:]
    if rest:
        yield rest


def _last_cut(text: str, separator: str) -> int:
    place = text.rfind(separator, 0, PIECE_CHARS)
    while place > 0 and not text[place - 1].isalnum():
        place = text.rfind(separator, 0, place)
    return max(place, 0)


def undecodable_at(path: Path) -> int | None:
    """The first byte of a file that is not UTF-8; None if all of it is.

    Raises:
        DataError: If it cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        with path.open("rb") as file:
            while True:
                chunk = file.read(PIECE_CHARS)
                waiting = len(decoder.getstate()[0])
                try:
                    decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    return done - waiting + error.start
                if not chunk:
                    return None
                done += len(chunk)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _chunks(path: Path) -> Iterator[str]:
    # newline="" leaves line ends as they are; -sig drops a byte order mark.
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while chunk := file.read(PIECE_CHARS):
                yield chunk
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where} has no field {field!r}, only {', '.join(row) or 'none'}. Name another field."
        )
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {type(text).__name__}, not text.")
    return encodable(text, where)


def encodable(text: str, where: str) -> str:
    """Return `text` if it can be written as UTF-8.

    Raises:
        DataError: If it holds half of a surrogate pair, as JSON's escapes can.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair at character {error.start}."
        ) from error
    return text


def _jsonl_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path} line {number}"
                    yield _json_row(line, where), where
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {_one_line(error)}") from error


def _json_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: byte {error.start} of the line.") from error
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {_one_line(error)}") from error
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is {type(row).__name__}, not an object with fields.")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    return _hub_rows(path, lambda datasets: _load_parquet(datasets, path))


def _dataset_rows(path: Path, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    return _hub_rows(path, lambda datasets: _load_dataset(datasets, path, split))


def _hub_rows(path: Path, load: Callable[[Any], Any]) -> Iterator[tuple[dict[str, Any], str]]:
    import datasets

    # It would say on stderr what is raised, and said, here.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        for number, row in enumerate(load(datasets)):
            yield row, f"{path} row {number}"
    except (DataError, MemoryError):
        raise
    except Exception as error:  # whatever datasets, Arrow and fsspec raise for a bad file
        raise DataError(f"{path} cannot be read: {_one_line(error)}") from error


def _load_parquet(datasets: Any, path: Path) -> Any:
    return datasets.load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)


def _load_dataset(datasets: Any, path: Path, split: str) -> Any:
    if _is_saved_dataset(path):
        loaded = datasets.load_from_disk(str(path))
    else:
        loaded = datasets.load_dataset(str(path), streaming=True)
    if not isinstance(loaded, dict):
        if split:
            raise DataError(f"{path} has no splits, so there is no {split!r}. Leave split empty.")
        return loaded
    wanted = split or ("train" if len(loaded) > 1 else next(iter(loaded)))
    if wanted not in loaded:
        raise DataError(f"{path} has no split {wanted!r}; it has {', '.join(loaded)}. Name one.")
    return loaded[wanted]


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _container(config: SourceConfig, leave_out: Path) -> Container:
    if config.kind == "dataset":
        if not config.path.is_dir():
            raise DataError(
                f"{config.path} is a file, but source {config.name} is a dataset folder."
            )
        return "dataset"
    if config.kind != "auto" and config.kind != "chat":
        return config.kind
    if config.path.suffix == ".json":
        raise DataError(f"{config.path} may be anything. Write it as JSON Lines, or set a kind.")
    if config.path.is_dir() and _is_saved_dataset(config.path):
        return "dataset"
    found = Counter(
        container
        for path in _visible(config, leave_out)
        if (container := _container_of(path)) and _is_allowed(container, config.kind)
    )
    if len(found) == 1:
        return next(iter(found))
    if config.path.is_file() and config.kind == "auto":
        return "text"
    held = " and ".join(f"{count} {container}" for container, count in sorted(found.items()))
    raise DataError(
        f"What to read at {config.path} is not clear: it holds {held or 'no known'} files. "
        f"Give source {config.name} a kind."
    )


def _is_allowed(container: Container, kind: str) -> bool:
    return kind == "auto" or container not in ("text", "code")


def _container_of(path: Path) -> Container | None:
    for container, endings in ENDINGS.items():
        if path.name.lower().endswith(endings):
            return container
    return None


def _files(config: SourceConfig, container: Container, leave_out: Path) -> list[Path]:
    if config.path.is_file():
        return [config.path]
    endings = ENDINGS[container]
    return [
        path
        for path in _visible(config, leave_out)
        if config.glob or path.name.lower().endswith(endings)
    ]


def _visible(config: SourceConfig, leave_out: Path) -> list[Path]:
    if config.path.is_file():
        return [config.path]
    leave_out = leave_out.resolve()
    found: dict[str, Path] = {}
    for pattern in config.glob or ("**/*",):
        for path in config.path.glob(pattern):
            below = path.relative_to(config.path)
            if (
                path.is_file()
                and not any(part.startswith(".") for part in below.parts)
                and not any(fnmatch.fnmatchcase(below.as_posix(), out) for out in config.exclude)
                and not path.resolve().is_relative_to(leave_out)
            ):
                found[below.as_posix()] = path
    # By name, so that the folder does not depend on how a file system lists its entries.
    return [found[name] for name in sorted(found)]


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
