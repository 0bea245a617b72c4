"""Turn documents into a token folder.

Each source is read once, tokenised in batches and streamed to disk, so memory does not grow
with the amount of text. A hash of a document's content decides whether it is held out: copies
of a document, wherever they come from, all land on the same side.

Nothing here loads torch.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from moesaic.console import track
from moesaic.data.chat import ChatRenderer, inside
from moesaic.data.config import PrepareConfig
from moesaic.data.sources import Piece, Render, Source, find_source
from moesaic.data.tokenfolder import (
    FORMAT,
    SPLITS,
    VERSION,
    num_rows,
    stream_path,
    token_dtype,
)
from moesaic.data.tokenizer import copy_tokenizer, load_tokenizer, tokenizer_hash
from moesaic.errors import ConfigError, DataError
from moesaic.files import NewFolder
from moesaic.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARS = 1 << 20
BATCH_PIECES = 1024
"""Tokenise this much text, or this many pieces, at once."""

IsHeldOut = Callable[[str], bool]
"""Decides by a document's first piece."""


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the token folder `config.out`.

    Returns:
        What was written: out, vocab_size, sequence_length, tokens, documents, sequences per
        split, and for each source the same, with files skipped and empty documents.

    Raises:
        MoesaicError: If something cannot be read, used or written; `out` is then as before.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer in {config.tokenizer} has no eos token, which must end every document."
        )
    inputs = [config.tokenizer, *(source.path for source in config.sources)]
    with NewFolder(config.out, overwrite=config.overwrite, inputs=inputs) as new:
        sources = [find_source(source, leave_out=config.out) for source in config.sources]
        render = ChatRenderer(tokenizer) if any(source.is_chat for source in sources) else None
        is_held_out = _held_out_rule(config, sources, render)
        encoder = _Encoder(tokenizer)
        written = [
            _write_source(new.path, source, encoder, render, is_held_out) for source in sources
        ]
        _check_rows(config, written)
        copy_tokenizer(config.tokenizer, _made(new.path / "tokenizer"))
        header = _header(config, encoder, sources, written)
        (new.path / "header.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return _summary(config, header, sources)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def document_hash(first_piece: str, *, seed: int) -> int:
    """64 bits that decide where a document goes: BLAKE2b of its text, with the seed as key.

    Of a long document only the first piece counts, so that it can be written while it is read.
    """
    digest = hashlib.blake2b(first_piece.encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "little")


def _held_out_rule(
    config: PrepareConfig, sources: list[Source], render: Render | None
) -> IsHeldOut:
    if config.heldout_documents is None:
        limit = int(config.heldout_fraction * 2**64)
        return lambda text: document_hash(text, seed=config.seed) < limit
    chosen: set[int] = set()
    for source in sources:
        hashes = (
            document_hash(piece.text, seed=config.seed)
            for piece in _progress(source, render, label="choosing held-out")
            if piece.is_first
        )
        chosen |= smallest_distinct(hashes, config.heldout_documents)
    return lambda text: document_hash(text, seed=config.seed) in chosen


def smallest_distinct(values: Iterable[int], count: int) -> set[int]:
    """The `count` smallest different values, holding no more than that many at a time."""
    heap: list[int] = []  # negated, so that the largest kept is on top
    kept: set[int] = set()
    for value in values:
        if value in kept:
            continue
        if len(heap) < count:
            heapq.heappush(heap, -value)
            kept.add(value)
        elif heap and value < -heap[0]:
            kept.remove(-heapq.heapreplace(heap, -value))
            kept.add(value)
    return kept


def _progress(source: Source, render: Render | None, *, label: str) -> Iterator[Piece]:
    return track(source.pieces(render), label=f"{label} {source.config.name}")


class _Encoder:
    """Text to tokens: what starts a document, what is in it, and eos."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.dtype = token_dtype(self.vocab_size)
        self.eos = int(tokenizer.eos_token_id)
        self._begin = self._tokens_at_start()

    def _tokens_at_start(self) -> list[int]:
        """What the tokenizer puts before text, such as bos."""
        bare = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self._tokenizer("a")["input_ids"]
        places = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
        return list(full[: next(places, 0)])

    def encode(
        self, pieces: list[Piece], *, is_chat: bool
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.uint8]]]:
        """Tokens and which of them are learned, piece by piece."""
        encoded = self._tokenizer(
            [piece.text for piece in pieces],
            # A template writes bos itself. In text, "<|im_end|>" is only text.
            add_special_tokens=False,
            split_special_tokens=not is_chat,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=is_chat,
            verbose=False,
        )
        for number, piece in enumerate(pieces):
            ids = np.asarray(encoded["input_ids"][number], dtype=self.dtype)
            if piece.learned is None:
                begin = self._begin if piece.is_first else []
                end = [self.eos] if piece.is_last else []
                ids = np.concatenate([begin, ids, end]).astype(self.dtype)
                yield ids, np.ones(len(ids), dtype=np.uint8)
            else:
                offsets_N2 = np.asarray(encoded["offset_mapping"][number], dtype=np.int64)
                learned = inside(offsets_N2.reshape(-1, 2), piece.learned)
                yield self._with_eos(ids, learned)

    def _with_eos(
        self, ids: NDArray[Any], learned: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        if not len(ids) or ids[-1] != self.eos:
            # To stop is part of the assistant's turn, unless the template has said it with eos.
            teaches_eos = bool(len(ids)) and bool(learned[-1]) and self.eos not in ids[learned]
            ids = np.append(ids, np.asarray(self.eos, dtype=self.dtype))
            learned = np.append(learned, teaches_eos)
        return ids, learned.astype(np.uint8)


class _StreamWriter:
    """One growing file of a split, and its hash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, values: NDArray[Any]) -> None:
        content = values.tobytes()
        self._digest.update(content)
        self._file.write(content)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class _SplitWriter:
    """The streams of a source's split."""

    def __init__(self, stack: ExitStack, folder: Path, source: Source, split: str) -> None:
        names = ("tokens", "documents", "mask") if source.is_chat else ("tokens", "documents")
        self._streams = {
            name: stack.enter_context(
                _StreamWriter(stream_path(folder, source.config.name, split, name))
            )
            for name in names
        }
        self.tokens = 0
        self.documents = 0

    def add(self, ids: NDArray[Any], learned: NDArray[np.uint8], *, begins: bool) -> None:
        if begins:
            self._streams["documents"].write(np.asarray([self.tokens], dtype="<i8"))
            self.documents += 1
        self._streams["tokens"].write(ids)
        if "mask" in self._streams:
            self._streams["mask"].write(learned)
        self.tokens += len(ids)

    @property
    def sha256(self) -> dict[str, str]:
        return {name: stream.sha256 for name, stream in self._streams.items()}


def _write_source(
    folder: Path,
    source: Source,
    encoder: _Encoder,
    render: Render | None,
    is_held_out: IsHeldOut,
) -> dict[str, _SplitWriter]:
    with ExitStack() as stack:
        writers = {split: _SplitWriter(stack, folder, source, split) for split in SPLITS}
        writer = writers["train"]
        for pieces in _batches(_progress(source, render, label="tokenising")):
            encoded = encoder.encode(pieces, is_chat=source.is_chat)
            for piece, (ids, learned) in zip(pieces, encoded, strict=True):
                if piece.is_first:
                    writer = writers["heldout" if is_held_out(piece.text) else "train"]
                writer.add(ids, learned, begins=piece.is_first)
    return writers


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _check_rows(config: PrepareConfig, written: list[dict[str, _SplitWriter]]) -> None:
    need = config.sequence_length + 1
    for source, writers in zip(config.sources, written, strict=True):
        found = writers["train"].tokens
        held = writers["heldout"]
        if not found and not held.tokens:
            raise DataError(
                f"Source {source.name} at {source.path} holds no text: it has no tokens."
            )
        if found < need:
            also = f" ({held.documents:,} documents are held out)" if held.documents else ""
            raise DataError(
                f"Source {source.name} has {found:,} tokens to train on{also}, but one row takes "
                f"{need:,}. Give more text, or lower sequence_length."
            )
    wanted = (
        config.heldout_fraction if config.heldout_documents is None else config.heldout_documents
    )
    if wanted and not any(num_rows(w["heldout"].tokens, need - 1) for w in written):
        held_tokens = sum(writers["heldout"].tokens for writers in written)
        raise DataError(
            f"{held_tokens:,} tokens are held out, but one row of a source takes {need:,}. Whole "
            f"documents are held out: hold out more of them, or none (heldout_fraction 0)."
        )


def _header(
    config: PrepareConfig,
    encoder: _Encoder,
    sources: list[Source],
    written: list[dict[str, _SplitWriter]],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "created_by": f"moesaic {__version__}",
        "tokenizer": {
            "name": config.tokenizer.resolve().name,
            "hash": tokenizer_hash(config.tokenizer),
        },
        "vocab_size": encoder.vocab_size,
        "eos_token_id": encoder.eos,
        "dtype": encoder.dtype.name,
        "sequence_length": config.sequence_length,
        "seed": config.seed,
        "sources": [
            {
                "name": source.config.name,
                "weight": source.config.weight,
                "licence": source.config.licence,
                "kind": "chat" if source.is_chat else source.container,
                "splits": {
                    split: {
                        "tokens": writer.tokens,
                        "documents": writer.documents,
                        "sequences": num_rows(writer.tokens, config.sequence_length),
                        "sha256": writer.sha256,
                    }
                    for split, writer in writers.items()
                },
            }
            for source, writers in zip(sources, written, strict=True)
        ],
    }


def _summary(
    config: PrepareConfig, header: dict[str, Any], sources: list[Source]
) -> dict[str, Any]:
    parts = [source["splits"] for source in header["sources"]]
    counts = ("tokens", "documents", "sequences")
    return {
        "out": str(config.out),
        "vocab_size": header["vocab_size"],
        "sequence_length": header["sequence_length"],
        **{split: {key: sum(p[split][key] for p in parts) for key in counts} for split in SPLITS},
        "sources": [
            {
                "name": source.config.name,
                "kind": entry["kind"],
                "weight": source.config.weight,
                "licence": source.config.licence,
                **{split: {key: entry["splits"][split][key] for key in counts} for split in SPLITS},
                "skipped_files": source.skipped_files,
                "empty_documents": source.empty_documents,
            }
            for source, entry in zip(sources, header["sources"], strict=True)
        ],
    }
