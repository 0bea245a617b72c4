"""Tensors that lie on many ranks, as one set of files in torch's distributed checkpoint format.

Each rank holds a piece of a tensor, and several may hold the same. The pieces are cut into blocks,
and every block is written by one rank that holds it, so that what all hold is written once and by
all together. Blocks are small, and an expert never shares one with another: whoever wants a part
of a tensor reads little more than that, whatever pieces there were when it was written.

What is on disk is torch's own format (DCP): `.metadata`, which says where each block lies, and a
file of blocks from each rank. Names and shapes are those of the whole tensors.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from moesaic.checkpoint.pieces import Held, Piece
from moesaic.errors import FolderError, MoesaicError
from moesaic.parallel.group import Group
from moesaic.planning.split import Span

BLOCK_BYTES = 16 * 2**20
"""A block is no larger, if it can be helped: torch reads all of one, whatever is wanted of it."""

Spans = tuple[Span, ...]
"""One of each dim."""


class Block(NamedTuple):
    """A part of a named tensor that is written and read as one."""

    name: str
    spans: Spans

    @property
    def key(self) -> MetadataIndex:
        """What DCP calls it."""
        return MetadataIndex(self.name, [start for start, _ in self.spans])

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where it lies in the whole tensor."""
        return _chunk(self.spans)


class Whole(NamedTuple):
    """A tensor of which every rank holds a part, or nothing."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Part(NamedTuple):
    """What one rank tells the others about what it holds of a tensor."""

    piece: Piece
    dtype: torch.dtype


def deal(parts: Sequence[Mapping[str, Part]]) -> list[list[Block]]:
    """Cut tensors into blocks, and give each to a rank that holds it.

    Args:
        parts: What each rank holds, by name. Together they must hold all of every tensor.

    Returns:
        The blocks that each rank writes, about equally many bytes each. It depends on `parts`
        alone, so that every rank finds the same.
    """
    holders: dict[str, list[tuple[int, Part]]] = {}
    for rank, held in enumerate(parts):
        for name, part in held.items():
            holders.setdefault(name, []).append((rank, part))
    cells = [
        (name, cell, ranks)
        for name, held_by in holders.items()
        for cell, ranks in _cells(name, held_by).items()
    ]
    cells.sort(key=lambda cell: len(cell[2]))  # first those where there is no choice
    num_bytes = [0] * len(parts)
    dealt: list[list[Block]] = [[] for _ in parts]
    for name, cell, ranks in cells:
        itemsize = parts[ranks[0]][name].dtype.itemsize
        for spans in _cut(cell, BLOCK_BYTES // itemsize):
            rank = min(ranks, key=num_bytes.__getitem__)
            num_bytes[rank] += _numel(spans) * itemsize
            dealt[rank].append(Block(name, spans))
    return dealt


def _cells(name: str, held_by: Sequence[tuple[int, Part]]) -> dict[Spans, list[int]]:
    """The coarsest grid of which every piece is made, and who holds each cell of it.

    A plain set of pieces would do if they never overlapped in part; but then two of them could
    begin at one place, which is all that DCP knows a block by.
    """
    _, (first, dtype) = held_by[0]
    edges = [{0, size} for size in first.shape]
    if first.is_expert:
        edges[0].update(range(first.shape[0]))
    for _, (piece, other) in held_by:
        assert (piece.shape, other) == (first.shape, dtype), f"{name}: {piece=} {first=} {other=}"
        for dim, span in enumerate(piece.spans if piece.numel else ()):
            edges[dim].update(span)
    grid = [sorted(of_dim) for of_dim in edges]
    cells: dict[Spans, list[int]] = {}
    for rank, (piece, _) in held_by:
        rows = [
            itertools.pairwise(of_dim[bisect_left(of_dim, start) : bisect_left(of_dim, end) + 1])
            for of_dim, (start, end) in zip(grid, piece.spans, strict=True)
        ]
        for cell in itertools.product(*rows):
            cells.setdefault(cell, []).append(rank)
    expected = math.prod(len(of_dim) - 1 for of_dim in grid)
    assert len(cells) == expected, f"{name}: ranks hold {len(cells)} of {expected} parts"
    return cells


def _cut(spans: Spans, limit: int) -> Iterator[Spans]:
    """Cut along the first dims, so that blocks stay contiguous, to at most `limit` values."""
    if not spans or _numel(spans) <= limit:
        yield spans
        return
    (start, end), rest = spans[0], spans[1:]
    rows = max(1, limit // _numel(rest))
    for begin in range(start, end, rows):
        for below in _cut(rest, limit) if rows == 1 else (rest,):
            yield ((begin, min(begin + rows, end)), *below)


def _numel(spans: Spans) -> int:
    return math.prod(end - start for start, end in spans)


def _chunk(spans: Spans) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(
        offsets=torch.Size(start for start, _ in spans),
        sizes=torch.Size(end - start for start, end in spans),
    )


@dataclass(frozen=True)
class Share:
    """What one rank writes of a set of tensors, and what all of them together are."""

    blocks: Mapping[Block, Tensor]
    """Views of what the rank holds; or a snapshot of it."""
    dealt: Sequence[Sequence[Block]]
    """The blocks of every rank."""
    wholes: Mapping[str, Whole]
    rank: int

    @classmethod
    def of(cls, tensors: Mapping[str, Held], writers: Group) -> Share:
        """Agree with all other ranks on who writes what. Nothing is copied."""
        mine = {name: Part(piece, tensor.dtype) for name, (tensor, piece) in tensors.items()}
        parts: list[dict[str, Part]] = writers.objects(mine)
        dealt = deal(parts)
        return cls(
            blocks={block: _view(tensors[block.name], block) for block in dealt[writers.rank]},
            dealt=dealt,
            wholes={
                name: Whole(part.piece.shape, part.dtype)
                for held in parts
                for name, part in held.items()
            },
            rank=writers.rank,
        )

    def snapshot(self) -> Share:
        """The same with a copy of this rank's blocks, in the CPU's memory."""
        return replace(
            self,
            blocks={
                block: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
                for block, tensor in self.blocks.items()
            },
        )

    def write(self, folder: Path) -> list[WriteResult]:
        """Write this rank's file of blocks, if it has any, and flush it to the disk."""
        items = [_write_item(block, self.wholes[block.name]) for block in self.blocks]
        if not items:
            return []
        writer = _writer(folder)
        plans = [SavePlan(items if rank == self.rank else []) for rank in range(len(self.dealt))]
        plan = writer.prepare_global_plan(plans)[self.rank]
        return writer.write_data(plan, _SavePlanner(self.blocks)).wait()

    def finish(self, folder: Path, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`, from what every rank's `write` returned."""
        chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in self.wholes}
        for block in itertools.chain.from_iterable(self.dealt):
            chunks[block.name].append(block.chunk)
        tensors: dict[str, STORAGE_TYPES] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=whole.dtype), torch.Size(whole.shape), chunks[name]
            )
            for name, whole in self.wholes.items()
        }
        names = {name: (name,) for name in self.wholes}
        _writer(folder).finish(Metadata(tensors, planner_data=names), results)


def _view(held: Held, block: Block) -> Tensor:
    tensor, piece = held
    assert tuple(tensor.shape) == piece.local_shape, f"{block.name}: {tensor.shape=}, {piece=}"
    return tensor.detach()[_slices(block.spans, piece.offsets)]


def _slices(spans: Spans, origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(
        slice(start - zero, end - zero) for (start, end), zero in zip(spans, origin, strict=True)
    )


def _writer(folder: Path) -> FileSystemWriter:
    # One writing thread: with more, torch loses the errors of all but the first. Nothing copied
    # ahead: for that torch asks the current GPU, which in a thread of ours is every rank's first.
    return FileSystemWriter(folder, thread_count=1, sync_files=True, per_thread_copy_ahead=0)


def _write_item(block: Block, whole: Whole) -> WriteItem:
    properties = TensorProperties(dtype=whole.dtype)
    data = TensorWriteData(block.chunk, properties, torch.Size(whole.shape))
    return WriteItem(block.key, WriteItemType.SHARD, tensor_data=data)


class _SavePlanner(DefaultSavePlanner):
    """Tells torch's writer what a block holds."""

    def __init__(self, blocks: Mapping[Block, Tensor]) -> None:
        super().__init__()
        self._tensors = {block.key: tensor for block, tensor in blocks.items()}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The block, such that its storage holds nothing else, or torch would copy it."""
        tensor = self._tensors[write_item.index]
        if not tensor.is_cpu:
            return tensor
        # Not view(-1): a tensor of one element is contiguous whatever its stride is.
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
        alone = torch.from_numpy(flat.view(torch.uint8).numpy())
        return alone.view(tensor.dtype).view(tensor.shape)


class BlockReader:
    """What `Share` wrote, or any other checkpoint of tensors in torch's format.

    Args:
        folder: That of the checkpoint.

    Raises:
        FolderError: It is none, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = FileSystemReader(folder)
        with _readable(folder):
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._saved = metadata.state_dict_metadata

    def read(self, tensors: Mapping[str, Held]) -> None:
        """Fill pieces in place, each from the blocks that it is made of.

        Raises:
            FolderError: A tensor is not there, or not in this shape; or cannot be read.
        """
        items: list[ReadItem] = []
        for name, (tensor, piece) in tensors.items():
            assert tuple(tensor.shape) == piece.local_shape, f"{name}: {tensor.shape=}, {piece=}"
            saved = self._saved_as(name, piece.shape)
            if piece.numel:
                found = create_read_items_for_chunk_list(name, saved, [_chunk(piece.spans)])
                if sum(math.prod(item.lengths) for item in found) != piece.numel:
                    raise FolderError(f"{self.folder} lacks a part of {name}.")
                items += found
        with _readable(self.folder):
            self._reader.read_data(LoadPlan(items), _LoadPlanner(tensors)).wait()

    def dtype(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        """Of a tensor as it was saved.

        Raises:
            FolderError: It is not there, or not in this shape.
        """
        return self._saved_as(name, shape).properties.dtype

    def _saved_as(self, name: str, shape: tuple[int, ...]) -> TensorStorageMetadata:
        saved = self._saved.get(name)
        size = getattr(saved, "size", None)
        if not isinstance(saved, TensorStorageMetadata) or saved.size != shape:
            there = "no such tensor" if size is None else f"shape {tuple(size)}"
            raise FolderError(
                f"{self.folder} has {there} for {name}, which needs shape {shape}. "
                f"It belongs to another model; use a new run folder."
            )
        return saved


class _LoadPlanner(DefaultLoadPlanner):
    """Tells torch's reader where a part of a block belongs."""

    def __init__(self, tensors: Mapping[str, Held]) -> None:
        super().__init__()
        self._tensors = tensors

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a piece that is filled next."""
        where = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        tensor = self._tensors[read_item.dest_index.fqn].tensor.detach()
        return tensor[tuple(slice(start, start + length) for start, length in where)]


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except MoesaicError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FolderError(f"{folder} cannot be read: {reason}.") from error
