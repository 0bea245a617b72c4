"""Read a token folder: rows of tokens that know where documents begin.

The format is specified in docs/token-folder.md. A source's split is one flat stream of
tokens; a row is a window of it, so nothing is padded and reading costs one page of a file.

Shapes.
    S tokens in a row (`sequence_length`)

Nothing here loads torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesaic.data.config import SOURCE_NAME
from moesaic.errors import FolderError

SPLITS = ("train", "heldout")

FORMAT = "moesaic-tokens"
VERSION = 1
IGNORED = -100
"""Stands in a target where nothing is to be predicted."""

STREAMS = {"tokens": None, "documents": np.dtype("<i8"), "mask": np.dtype("u1")}
"""The files of a source's split and what they hold; tokens as the header's `dtype` says."""


class Row(NamedTuple):
    """One training sequence. Each is (S,), int64."""

    input_S: NDArray[np.int64]
    """The tokens that are read."""
    target_S: NDArray[np.int64]
    """The token to predict at each place, or -100: the next token begins another document,
    or is not to be learned (a user's turn)."""
    documents_S: NDArray[np.int64]
    """Which document an input token belongs to; counts from 0 in each row."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrower of uint16 and uint32 that holds every token of a vocabulary.

    Raises:
        FolderError: If neither does.
    """
    if vocab_size > 1 << 32:
        raise FolderError(
            f"The tokenizer has {vocab_size:,} tokens; a token folder holds at most {1 << 32:,}."
        )
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def stream_path(folder: Path, source: str, split: str, stream: str) -> Path:
    """Where one stream of a source's split lies."""
    return folder / f"{source}.{split}.{stream}"


class TokenFolder:
    """A token folder, memory-mapped.

    Opening checks the header and the size of every file; `verify` reads everything.

    Raises:
        FolderError: If it is missing, damaged, or of a format this version does not know.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = _read_header(self.path)
        """What `header.json` says, as it stands there."""
        self._dtype = np.dtype(f"<u{4 if self.header['dtype'] == 'uint32' else 2}")
        self._splits = {
            (split, source["name"]): source["splits"][split]
            for source in self.header["sources"]
            for split in SPLITS
        }
        self._streams = {
            (split, source, stream): self._open(split, source, stream)
            for split, source in self._splits
            for stream in self._stream_names(split, source)
        }

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return int(self.header["sequence_length"])

    @property
    def vocab_size(self) -> int:
        """One more than the largest token that may occur."""
        return int(self.header["vocab_size"])

    @property
    def eos_token_id(self) -> int:
        """The token that ends every document."""
        return int(self.header["eos_token_id"])

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer's files."""
        return self.path / "tokenizer"

    @property
    def tokenizer_hash(self) -> str:
        """See `moesaic.data.tokenizer.tokenizer_hash`."""
        return str(self.header["tokenizer"]["hash"])

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources, in the header's order."""
        return tuple(source["name"] for source in self.header["sources"])

    @property
    def weights(self) -> dict[str, float]:
        """The share of each source, not normalised."""
        return {source["name"]: source["weight"] for source in self.header["sources"]}

    def num_sequences(self, split: str, source: str | None = None) -> int:
        """Rows in a split, of one source or of all."""
        return self._total(split, source, "sequences")

    def num_tokens(self, split: str, source: str | None = None) -> int:
        """Tokens in a split, of one source or of all."""
        return self._total(split, source, "tokens")

    def document_of(self, split: str, source: str, i: int) -> int:
        """The document that holds the middle of row `i`; documents count from 0."""
        middle = i * self.sequence_length + self.sequence_length // 2
        starts = self._streams[split, source, "documents"]
        return int(np.searchsorted(starts, middle, side="right")) - 1

    def row(self, split: str, source: str, i: int) -> Row:
        """Row `i` of a source's split.

        Raises:
            FolderError: If there is no such row.
        """
        rows = self.num_sequences(split, source)
        if not 0 <= i < rows:
            raise FolderError(f"{self.path} has rows 0 to {rows - 1} of {source} {split}, not {i}.")
        first = i * self.sequence_length
        places = slice(first, first + self.sequence_length + 1)
        tokens = self._streams[split, source, "tokens"][places].astype(np.int64)
        starts = self._streams[split, source, "documents"]
        # A document that begins at place p is the last one whose start is <= p.
        owner = np.searchsorted(starts, np.arange(places.start, places.stop), side="right")
        keep = owner[1:] == owner[:-1]
        if (split, source, "mask") in self._streams:
            keep &= self._streams[split, source, "mask"][places][1:] != 0
        target_S = np.where(keep, tokens[1:], IGNORED)
        return Row(tokens[:-1], target_S, (owner[:-1] - owner[0]).astype(np.int64))

    def verify(self) -> None:
        """Read every file and compare it with the header.

        Raises:
            FolderError: For the first one that is not what was written.
        """
        for (split, source, stream), values in self._streams.items():
            path = stream_path(self.path, source, split, stream)
            digest = hashlib.sha256()
            for chunk in _chunks(values):
                digest.update(chunk.tobytes())
                if stream == "tokens" and chunk.max() >= self.vocab_size:
                    raise FolderError(
                        f"{path} holds token {chunk.max()}, but the vocabulary has "
                        f"{self.vocab_size}. Prepare the folder again."
                    )
            if digest.hexdigest() != self._splits[split, source]["sha256"][stream]:
                raise FolderError(
                    f"{path} is not what was written: its SHA-256 differs from the header's. "
                    f"Prepare the folder again."
                )
        for split, source in self._splits:
            self._verify_documents(split, source)

    def _verify_documents(self, split: str, source: str) -> None:
        starts = self._streams[split, source, "documents"]
        tokens = self.num_tokens(split, source)
        in_order = not len(starts) or (
            starts[0] == 0 and starts[-1] < tokens and bool((np.diff(starts) > 0).all())
        )
        if not in_order or (tokens > 0 and not len(starts)):
            path = stream_path(self.path, source, split, "documents")
            raise FolderError(f"{path} is damaged: its offsets do not rise from 0 to {tokens}.")

    def _total(self, split: str, source: str | None, key: str) -> int:
        if split not in SPLITS:
            raise FolderError(f"A token folder has the splits train and heldout, not {split!r}.")
        if source is not None and source not in self.sources:
            raise FolderError(
                f"{self.path} has the sources {', '.join(self.sources)}; not {source!r}."
            )
        return sum(
            int(self._splits[split, name][key]) for name in self.sources if source in (None, name)
        )

    def _stream_names(self, split: str, source: str) -> Iterator[str]:
        return (name for name in STREAMS if name in self._splits[split, source]["sha256"])

    def _open(self, split: str, source: str, stream: str) -> NDArray[Any]:
        path = stream_path(self.path, source, split, stream)
        info = self._splits[split, source]
        dtype = STREAMS[stream] or self._dtype
        length = info["documents"] if stream == "documents" else info["tokens"]
        try:
            found_bytes = path.stat().st_size
            if found_bytes != length * dtype.itemsize:
                raise FolderError(
                    f"{path} has {found_bytes:,} bytes, but the header says "
                    f"{length * dtype.itemsize:,}. Prepare the folder again."
                )
            # An empty file cannot be mapped.
            return np.memmap(path, dtype, "r") if length else np.empty(0, dtype)
        except OSError as error:
            raise FolderError(f"{path} cannot be read: {error.strerror}.") from error


def _chunks(values: NDArray[Any], *, size: int = 1 << 22) -> Iterator[NDArray[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / "header.json"
    if not folder.is_dir():
        raise FolderError(f"The token folder {folder} does not exist. Make one: moesaic prepare.")
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FolderError(f"{folder} is not a token folder: it has no header.json.") from None
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise FolderError(
            f"{path} is not the header of a token folder: its format is not {FORMAT}."
        )
    if header.get("version") != VERSION:
        raise FolderError(
            f"{path} has version {header.get('version')}, but this program reads {VERSION}."
        )
    problem = _problem(header)
    if problem:
        raise FolderError(f"{path} is damaged: {problem}. Prepare the folder again.")
    return header


def _problem(header: dict[str, Any]) -> str | None:
    """What is wrong with a header of the right format and version; None if nothing is."""
    try:
        dtype = token_dtype(header["vocab_size"])
        sources = header["sources"]
        names = [source["name"] for source in sources]
        if header["dtype"] not in ("uint16", "uint32"):
            return f"dtype is {header['dtype']!r}"
        if np.dtype(header["dtype"]).itemsize < dtype.itemsize:
            return f"{header['vocab_size']} tokens do not fit in {header['dtype']}"
        if header["sequence_length"] < 2:
            return f"sequence_length is {header['sequence_length']}"
        if not 0 <= header["eos_token_id"] < header["vocab_size"]:
            return f"eos_token_id is {header['eos_token_id']}"
        if not isinstance(header["tokenizer"]["hash"], str):
            return "the tokenizer's hash is not text"
        if not names or len(set(names)) < len(names):
            return "sources are missing or named twice"
        # A name is part of a file's path, so it must not be able to lead elsewhere.
        if not all(SOURCE_NAME.fullmatch(name) for name in names):
            return f"a source has an unusable name among {names}"
        if not all(source["weight"] > 0 for source in sources):
            return "a weight is not positive"
        for source in sources:
            for split in SPLITS:
                _check_split(source["splits"][split], header["sequence_length"])
    except FolderError as error:
        return str(error).rstrip(".")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"a value is missing or of the wrong kind ({type(error).__name__}: {error})"
    return None


def _check_split(info: dict[str, Any], sequence_length: int) -> None:
    for key in ("tokens", "documents", "sequences"):
        if not isinstance(info[key], int) or info[key] < 0:
            raise ValueError(f"{key} is {info[key]!r}")
    if info["sequences"] != num_rows(info["tokens"], sequence_length):
        raise ValueError(f"{info['tokens']} tokens do not make {info['sequences']} sequences")
    if not {"tokens", "documents"} <= set(info["sha256"]) <= set(STREAMS):
        raise ValueError("sha256 names the wrong streams")


def num_rows(tokens: int, sequence_length: int) -> int:
    """Whole rows in a stream. A row's last target is the first token of the next row."""
    return max(tokens - 1, 0) // sequence_length
