from __future__ import annotations

import errno
import itertools
import json
import math
import pickle
import shutil
import sys
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from moesaic.checkpoint import blocks
from moesaic.checkpoint.blocks import Part, Share, deal
from moesaic.checkpoint.export import export_state
from moesaic.checkpoint.pieces import Held, Piece, pieces, whole_piece
from moesaic.checkpoint.state_writer import StateWriter
from moesaic.checkpoint.training_state import (
    damage,
    newest,
    prune,
    remove_leftovers,
    save_state,
    step_of,
)
from moesaic.errors import FolderError
from moesaic.model.build import save_model
from moesaic.parallel.group import Group
from moesaic.planning.layout import fit
from moesaic.planning.plan import TrainPlan
from moesaic.planning.split import Split
from tests.faults import failure_of, fault, faults_in_turn, killed
from tests.ranks import run_ranks
from tests.tiny import TINY, tiny_folder, tiny_model


def whole(tensor: torch.Tensor) -> Held:
    return Held(tensor, whole_piece(tuple(tensor.shape)))


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights.a": torch.randn(5, 7, generator=generator),
        "weights.b": torch.randn(3, 2, 2, generator=generator).to(torch.bfloat16),
        "updates.a": torch.tensor(float(seed)),
        "routing.coefficient": torch.rand(4, generator=generator, dtype=torch.float64),
    }


def save(checkpoints, step: int):
    tensors = {name: whole(tensor) for name, tensor in some_tensors(step).items()}
    return save_state(
        checkpoints, step, tensors, facts={"step": step}, config_toml=f"steps = {step}\n"
    )


def assert_holds(checkpoints, step: int) -> None:
    state = newest(checkpoints)
    assert state is not None
    assert (state.step, state.facts) == (step, {"step": step})
    expected = some_tensors(step)
    found = {name: torch.full_like(tensor, 9) for name, tensor in expected.items()}
    state.load({name: whole(tensor) for name, tensor in found.items()})
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_newest_state_comes_back_bit_for_bit(tmp_path):
    for step in (9, 10, 2):
        save(tmp_path, step)
    assert_holds(tmp_path, 10)


def test_no_states_are_no_error(tmp_path):
    assert newest(tmp_path / "missing") is None


def test_a_state_keeps_the_configuration_that_ran(tmp_path):
    assert (save(tmp_path, 3) / "config.toml").read_text() == "steps = 3\n"


def flip_a_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = (".metadata", "__0_0.distcp", "state.json", "config.toml", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_state_is_named_and_the_one_before_is_taken(tmp_path, capsys, name, how):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip_a_byte(path)
    assert_holds(tmp_path, 1)
    said = capsys.readouterr().err
    assert "step-00000002 is damaged" in said
    assert len(said.strip().splitlines()) == 1


def test_states_that_are_all_damaged_are_refused(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").unlink()
    with pytest.raises(FolderError, match="Every checkpoint"):
        newest(tmp_path)


def test_a_format_of_another_version_is_not_read(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    assert "version 2" in str(damage(folder))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weights.other", torch.zeros(1)),
        ("weights.a", torch.zeros(7, 5)),
        ("weights.a", torch.zeros(())),
    ],
    ids=["missing", "another shape", "a scalar"],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path, name, tensor):
    save(tmp_path, 1)
    with pytest.raises(FolderError, match=name):
        newest(tmp_path).load({name: whole(tensor)})


def test_only_the_newest_states_are_kept(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step)
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_what_a_kill_left_is_removed_and_never_read(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.partial").mkdir()
    (tmp_path / ".step-00000000.deleted").mkdir()
    assert_holds(tmp_path, 1)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_at_any_write_leaves_the_last_good_state(tmp_path):
    save(tmp_path, 1)

    def check(failed: bool) -> None:
        # After the last write, the flush that follows the rename, the new state is complete.
        complete = tmp_path / "step-00000002"
        assert failed or complete.exists()
        assert_holds(tmp_path, 2 if complete.exists() else 1)
        shutil.rmtree(complete, ignore_errors=True)

    assert faults_in_turn(lambda: save(tmp_path, 2), check) > 10


def test_a_kernel_that_refuses_to_write_is_reported(tmp_path, monkeypatch):
    # The error comes from inside torch's writer.
    save(tmp_path, 1)

    def refuse(*_args, **_kwargs):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(FolderError, match="Disk quota exceeded"):
        save(tmp_path, 2)
    assert_holds(tmp_path, 1)


# Torch's own format.


ALONE_IS_FINE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@ALONE_IS_FINE
def test_torch_alone_reads_a_state(tmp_path):
    folder = save(tmp_path, 4)
    found = {name: torch.zeros_like(tensor) for name, tensor in some_tensors(4).items()}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in some_tensors(4).items())


@ALONE_IS_FINE
def test_a_state_that_torch_alone_wrote_is_read(tmp_path):
    # As every state was before several ranks could write one.
    folder = save(tmp_path, 4)
    (folder / "__0_0.distcp").unlink()
    (folder / ".metadata").unlink()
    dcp.save(some_tensors(5), checkpoint_id=folder, no_dist=True)
    found = {name: torch.zeros_like(tensor) for name, tensor in some_tensors(5).items()}
    found["weights.a"] = torch.zeros(2, 3)
    held = {name: whole(tensor) for name, tensor in found.items()}
    held["weights.a"] = Held(found["weights.a"], Piece((5, 7), ((1, 3), (4, 7)), True, False))
    blocks.BlockReader(folder).read(held)
    expected = some_tensors(5)
    expected["weights.a"] = expected["weights.a"][1:3, 4:7]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tensors_that_lack_a_part_are_refused(tmp_path):
    path = save(tmp_path, 4) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["weights.a"].chunks.clear()
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(FolderError, match=r"lacks a part of weights\.a"):
        blocks.BlockReader(path.parent).read({"weights.a": whole(torch.zeros(5, 7))})


def test_metadata_that_is_none_is_refused_in_one_line(tmp_path):
    path = save(tmp_path, 4) / ".metadata"
    path.write_bytes(b"not\na pickle")
    error = failure_of(lambda: blocks.BlockReader(path.parent))
    assert "step-00000004 cannot be read" in str(error)


def test_no_tensor_on_the_cpu_is_copied(tmp_path, monkeypatch):
    # Cut in many, some of which torch would copy as it writes them.
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2**20)
    tensor = torch.randn(1024, 4096)
    written = []
    real = torch.save
    monkeypatch.setattr(
        torch, "save", lambda data, file: (written.append(data.data_ptr()), real(data, file))
    )
    save_state(tmp_path, 1, {"weights.a": whole(tensor)}, facts={}, config_toml="")
    assert written == [tensor.data_ptr() + start * 2**20 for start in range(16)]


def test_a_tensor_of_any_strides_and_type_comes_back(tmp_path):
    tensors = {
        "transposed": torch.randn(6, 4).T,
        "column": torch.arange(8.0).view(4, 2)[:, 1:],
        "one": torch.randn(3, 3)[1:2, ::3].T,
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "counts": torch.arange(3),
        "nothing": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    save_state(tmp_path, 1, {n: whole(t) for n, t in tensors.items()}, facts={}, config_toml="")
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    newest(tmp_path).load({name: whole(tensor) for name, tensor in found.items()})
    for name, tensor in tensors.items():
        assert torch.equal(found[name].float(), tensor.float()), name


# Who writes what.


def piece(shape, spans, *, is_expert=False) -> Piece:
    return Piece(tuple(shape), tuple(spans), is_cut=True, is_expert=is_expert)


SHAPES = {
    "rows": (9, 4),
    "grid": (6, 8),
    "shared": (8,),
    "overlapping": (10, 3),
    "experts": (6, 5, 3),
    "everywhere": (7,),
    "once": (3, 3),
    "updates": (),
    "nothing": (0, 4),
}


def pieces_of(size: int, rank: int) -> dict[str, Piece]:
    """Another split for every size, with ranks that hold nothing and pieces that several hold."""
    columns = 1 if size % 2 else 2
    row, column = divmod(rank, columns)
    tall, wide = Split.balanced(6, size // columns), Split.from_counts([8] if size % 2 else [5, 3])
    counts = [5, 0, 4, *[0] * size] if size != 4 else [3, 2, 2, 2]
    rows = Split.from_counts(counts[:size]) if size >= 3 else Split.balanced(9, size)
    half = Split.balanced(8, max(1, size // 2)).spans[min(rank // 2, max(1, size // 2) - 1)]
    least = Split.balanced(10, size).spans[rank]
    found = {
        "rows": piece(SHAPES["rows"], (rows.spans[rank], (0, 4))),
        "grid": piece(SHAPES["grid"], (tall.spans[row], wide.spans[column])),
        "shared": piece(SHAPES["shared"], (half,)),
        "overlapping": piece(
            SHAPES["overlapping"], ((max(0, least[0] - rank), min(10, least[1] + 2)), (0, 3))
        ),
        "experts": piece(
            SHAPES["experts"],
            (Split.balanced(6, size).spans[rank], (0, 5), (0, 3)),
            is_expert=True,
        ),
        "everywhere": whole_piece(SHAPES["everywhere"]),
        "updates": whole_piece(()),
        "nothing": whole_piece(SHAPES["nothing"]),
    }
    if rank == size - 1:
        found["once"] = whole_piece(SHAPES["once"])
    return found


SIZES = (1, 2, 3, 4, 8)


def parts_of(size: int) -> list[dict[str, Part]]:
    return [
        {name: Part(of_name, torch.float32) for name, of_name in pieces_of(size, rank).items()}
        for rank in range(size)
    ]


@pytest.mark.parametrize("block_bytes", [4, 40, 2**20])
@pytest.mark.parametrize("size", SIZES)
def test_every_value_is_written_once_by_a_rank_that_holds_it(size, block_bytes, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    times = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for rank, dealt in enumerate(deal(parts_of(size))):
        held = pieces_of(size, rank)
        for name, spans in dealt:
            inside = zip(spans, held[name].spans, strict=True)
            assert all(first <= start < end <= last for (start, end), (first, last) in inside)
            times[name][tuple(slice(*span) for span in spans)] += 1
    assert all(bool((count == 1).all()) for count in times.values())


@pytest.mark.parametrize("block_bytes", [12, 40, 2**20])
def test_a_block_is_small_and_holds_one_expert_at_most(block_bytes, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    for name, spans in itertools.chain(*deal(parts_of(4))):
        sizes = [end - start for start, end in spans]
        assert 4 * math.prod(sizes) <= block_bytes
        assert name != "experts" or sizes[0] == 1


def test_what_all_hold_is_written_by_all_alike(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 16)
    held = {"weights.a": Part(whole_piece((64, 4)), torch.float32)}
    alone = {"weights.b": Part(whole_piece((16, 4)), torch.float32)}
    dealt = deal([held | alone, held, held, held])
    assert [len(of_rank) for of_rank in dealt] == [20, 20, 20, 20]


def test_a_tensor_of_which_no_rank_holds_a_part_is_refused():
    half = {"weights.a": Part(piece((4,), ((0, 2),)), torch.float32)}
    with pytest.raises(AssertionError, match=r"weights\.a"):
        deal([half, half])


# Several ranks.


def of_all() -> Group:
    return Group(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)


def values(name: str, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def held_of(size: int, rank: int, step: int, names: Collection[str] = SHAPES) -> dict[str, Held]:
    return {
        name: Held(values(name, step)[of_name.slices].clone(), of_name)
        for name, of_name in pieces_of(size, rank).items()
        if name in names
    }


def save_together(checkpoints: Path, step: int, names: Collection[str] = SHAPES) -> Path:
    group = of_all()
    return save_state(
        checkpoints,
        step,
        held_of(group.size, group.rank, step, names),
        facts={"step": step},
        config_toml="",
        writers=group,
    )


def load_together(checkpoints: Path, step: int) -> None:
    group = of_all()
    state = newest(checkpoints, group)
    assert state is not None
    assert (state.step, state.facts) == (step, {"step": step})
    expected = held_of(group.size, group.rank, step)
    found = {name: Held(torch.full_like(t, 9), p) for name, (t, p) in expected.items()}
    state.load(found)
    for name, (tensor, _) in found.items():
        assert torch.equal(tensor, expected[name].tensor), name


def assert_step(checkpoints: Path, step: int, names: Collection[str] = SHAPES) -> None:
    """The newest state is that of `step`, whole and bit for bit."""
    state = newest(checkpoints)
    assert state is not None
    found = {name: torch.full(SHAPES[name], 9.0) for name in names}
    state.load({name: whole(tensor) for name, tensor in found.items()})
    assert state.step == step
    assert all(torch.equal(found[name], values(name, step)) for name in names)


@pytest.fixture(scope="module")
def of_four_ranks(tmp_path_factory) -> Path:
    checkpoints = tmp_path_factory.mktemp("four")
    folders = run_ranks(4, save_together, checkpoints, 3)
    assert folders == [checkpoints / "step-00000003"] * 4
    return checkpoints


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_state_of_four_ranks_is_read_by_any_other_number(of_four_ranks, size):
    run_ranks(size, load_together, of_four_ranks, 3)


def test_a_state_of_four_ranks_is_read_by_one(of_four_ranks):
    assert_step(of_four_ranks, 3)


def test_a_state_of_one_rank_is_read_by_three(tmp_path):
    save_state(tmp_path, 5, held_of(1, 0, 5), facts={"step": 5}, config_toml="")
    run_ranks(3, load_together, tmp_path, 5)


@ALONE_IS_FINE
def test_torch_alone_reads_a_state_of_four_ranks(of_four_ranks):
    found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    dcp.load(found, checkpoint_id=of_four_ranks / "step-00000003", no_dist=True)
    assert all(torch.equal(found[name], values(name, 3)) for name in SHAPES)


@pytest.mark.parametrize("rank", range(4))
def test_a_flipped_byte_of_any_rank_is_found_and_the_one_before_is_used(
    of_four_ranks, tmp_path, rank, capsys
):
    for step in (3, 4):
        shutil.copytree(of_four_ranks / "step-00000003", tmp_path / f"step-{step:08d}")
    flip_a_byte(tmp_path / "step-00000004" / f"__{rank}_0.distcp")
    assert_step(tmp_path, 3)
    assert f"__{rank}_0.distcp does not match" in capsys.readouterr().err.replace("\n", " ")


def newest_or_words(checkpoints: Path) -> str:
    try:
        state = newest(checkpoints, of_all())
    except FolderError as error:
        return str(error)
    return state.folder.name if state else "none"


def test_all_ranks_go_by_what_one_finds(tmp_path):
    assert run_ranks(3, newest_or_words, tmp_path) == ["none"] * 3
    for step in (1, 2):
        save(tmp_path, step)
    flip_a_byte(tmp_path / "step-00000002" / ".metadata")
    assert run_ranks(3, newest_or_words, tmp_path) == ["step-00000001"] * 3
    flip_a_byte(tmp_path / "step-00000001" / ".metadata")
    said = run_ranks(3, newest_or_words, tmp_path)
    assert "Every checkpoint" in said[0]
    assert len(set(said)) == 1


FEW = ("rows", "updates")
"""Enough for each of three ranks to write something."""


def fill_every_disk_in_turn(checkpoints: Path) -> list[int]:
    """Fail each write of each rank; how many writes every rank makes."""
    group = of_all()
    save_together(checkpoints, 1, FEW)
    writes = []
    for victim in range(group.size):
        for number in itertools.count(1):
            with fault(number if group.rank == victim else sys.maxsize) as faults:
                error = failure_of(lambda: save_together(checkpoints, 2, FEW))
            struck = any(group.objects(faults.has_struck))
            said = set(group.objects(None if error is None else str(error)))
            complete = checkpoints / "step-00000002"
            assert len(said) == 1, said  # every rank raises the same, or none does
            if group.rank == 0:
                assert not list(checkpoints.glob(".*"))
                assert error is None or (struck and "No space left" in str(error))
                assert error is not None or complete.exists()
                assert_step(checkpoints, 2 if complete.exists() else 1, FEW)
                shutil.rmtree(complete, ignore_errors=True)
            group.wait_for_all()
            if not struck:
                writes.append(number - 1)
                break
    return writes


def test_a_full_disk_at_any_write_of_any_rank_leaves_the_last_good_state(tmp_path):
    (writes, *others) = run_ranks(3, fill_every_disk_in_turn, tmp_path)
    assert all(other == writes for other in others)
    assert min(writes) > 10
    assert_step(tmp_path, 1, FEW)


def save_where_i_am(checkpoints: Path, is_left_over: bool) -> str:
    """Save where every rank means a folder of its own by the same words."""
    group = of_all()
    mine = checkpoints / str(group.rank)
    if is_left_over:
        (mine / ".step-00000001.partial").mkdir(parents=True)
    group.wait_for_all()
    held = held_of(group.size, group.rank, 1)
    return str(
        failure_of(lambda: save_state(mine, 1, held, facts={}, config_toml="", writers=group))
    )


@pytest.mark.parametrize("is_left_over", [False, True])
def test_ranks_that_do_not_see_one_folder_are_told(tmp_path, is_left_over):
    said = run_ranks(2, save_where_i_am, tmp_path, is_left_over)
    assert said[0] == said[1]
    assert f"Rank {0 if is_left_over else 1} does not see" in said[0]
    assert not list((tmp_path / "0").iterdir())


def die_while_saving(checkpoints: Path, victim: int, part: float, in_background: bool) -> None:
    """Save a state, and another during which one rank is killed."""
    group = of_all()
    with fault(sys.maxsize) as faults:
        save_together(checkpoints, 1)
    number = 1 + int(part * (faults.count - 1))
    writer = StateWriter(checkpoints, keep=2, in_background=in_background, writers=group)
    with fault(number if group.rank == victim else sys.maxsize, killed), writer:
        held = held_of(group.size, group.rank, 2)
        writer.save(2, held, facts={"step": 2}, config_toml="")


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("victim", "in_background"), [(0, True), (2, False), (2, True)])
def test_a_rank_killed_while_saving_leaves_the_last_good_state(
    tmp_path, victim, part, in_background
):
    with pytest.raises(AssertionError, match=r"died without a word|by peer"):
        run_ranks(3, die_while_saving, tmp_path, victim, part, in_background)
    is_renamed = victim == 0 and part == 1.0  # killed by the very last flush
    assert_step(tmp_path, 2 if is_renamed else 1)
    run_ranks(2, load_together, tmp_path, 2 if is_renamed else 1)


class LosesARank(Group):
    """A group of one whose peers are gone from the `number`-th exchange on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def objects(self, mine):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("Connection closed by peer")
        return super().objects(mine)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_rank_that_is_gone_is_an_error_and_leaves_the_last_good_state(tmp_path, number):
    save(tmp_path, 1)
    writer = StateWriter(tmp_path, keep=2, in_background=True, writers=LosesARank(number))
    tensors = {name: whole(tensor) for name, tensor in some_tensors(2).items()}
    writer.save(2, tensors, facts={"step": 2}, config_toml="")
    # As the group says it: whoever watches the ranks knows by that what to do.
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        writer.wait()
    assert not list(tmp_path.glob(".*"))
    # The last two exchanges say that the folder has its name, and that older ones are gone.
    assert_holds(tmp_path, 2 if number >= 5 else 1)


# Beside the training.


@pytest.fixture
def gate(monkeypatch):
    """Holds every write of tensors up until it is set."""
    gate = threading.Event()
    real = Share.write

    def write(share: Share, folder: Path):
        assert gate.wait(30)
        return real(share, folder)

    monkeypatch.setattr(Share, "write", write)
    yield gate
    gate.set()


def test_a_snapshot_does_not_see_what_changes_after_it(tmp_path, gate):
    tensors = some_tensors(2)
    with StateWriter(tmp_path, keep=2, in_background=True) as writer:
        held = {name: whole(tensor) for name, tensor in tensors.items()}
        writer.save(2, held, facts={"step": 2}, config_toml="")
        for tensor in tensors.values():
            tensor.zero_()
        assert writer.saved is None
        gate.set()
    assert writer.saved == 2
    assert_holds(tmp_path, 2)


def test_one_state_is_under_way_at_a_time(tmp_path, gate):
    writer = StateWriter(tmp_path, keep=2, in_background=True)
    begun = threading.active_count()
    for step in (1, 2):
        threading.Timer(0.1, gate.set).start()
        tensors = {name: whole(tensor) for name, tensor in some_tensors(step).items()}
        writer.save(step, tensors, facts={"step": step}, config_toml="")
        gate.clear()
        assert writer.saved == (1 if step == 2 else None)
    gate.set()
    writer.wait()
    assert threading.active_count() == begun
    assert_holds(tmp_path, 2)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_writer_keeps_the_newest_states(tmp_path, in_background):
    with StateWriter(tmp_path, keep=2, in_background=in_background) as writer:
        for step in (1, 2, 3):
            tensors = {name: whole(tensor) for name, tensor in some_tensors(step).items()}
            writer.save(step, tensors, facts={"step": step}, config_toml="")
    assert [step_of(path) for path in sorted(tmp_path.iterdir())] == [2, 3]
    assert_holds(tmp_path, 3)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_full_disk_is_told_at_the_next_call(tmp_path, in_background):
    save(tmp_path, 1)
    writer = StateWriter(tmp_path, keep=2, in_background=in_background)
    tensors = {name: whole(tensor) for name, tensor in some_tensors(2).items()}

    def save_and_wait() -> None:
        writer.save(2, tensors, facts={"step": 2}, config_toml="")
        writer.wait()

    def check(failed: bool) -> None:
        writer.wait()  # told once
        complete = tmp_path / "step-00000002"
        assert_holds(tmp_path, 2 if complete.exists() else 1)
        shutil.rmtree(complete, ignore_errors=True)

    assert faults_in_turn(save_and_wait, check) > 10


def save_and_raise(checkpoints, error: BaseException, gate=None) -> None:
    tensors = {name: whole(tensor) for name, tensor in some_tensors(2).items()}
    with StateWriter(checkpoints, keep=2, in_background=True) as writer:
        writer.save(2, tensors, facts={"step": 2}, config_toml="")
        if gate:
            threading.Timer(0.1, gate.set).start()
        raise error


def test_a_failing_run_still_ends_its_last_state(tmp_path, gate):
    with pytest.raises(ZeroDivisionError):
        save_and_raise(tmp_path, ZeroDivisionError(), gate)
    assert_holds(tmp_path, 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("Connection closed by peer")])
def test_an_interrupted_run_waits_for_nothing_nor_one_that_lost_a_rank(tmp_path, gate, error):
    with pytest.raises(type(error)):
        save_and_raise(tmp_path, error)
    assert not gate.is_set()
    assert newest(tmp_path) is None


def save_in_background(checkpoints: Path) -> list[int | None]:
    group, saved = of_all(), []
    with StateWriter(checkpoints, keep=2, in_background=True, writers=group) as writer:
        for step in (1, 2, 3):
            held = held_of(group.size, group.rank, step)
            writer.save(step, held, facts={"step": step}, config_toml="")
            for tensor, _ in held.values():
                tensor.zero_()
            saved.append(writer.saved)
    return [*saved, writer.saved]


def test_ranks_save_beside_the_training(tmp_path):
    saved = run_ranks(3, save_in_background, tmp_path)
    assert all(of_rank[-1] == 3 for of_rank in saved)
    assert_step(tmp_path, 3)
    assert [step_of(path) for path in sorted(tmp_path.iterdir())] == [2, 3]


def fail_in_background(checkpoints: Path) -> list[str]:
    group, said = of_all(), []
    save_together(checkpoints, 1)
    writer = StateWriter(checkpoints, keep=2, in_background=True, writers=group)
    with fault(3 if group.rank == 1 else sys.maxsize):
        writer.save(2, held_of(group.size, group.rank, 2), facts={"step": 2}, config_toml="")
        for _ in range(2):
            try:
                writer.save(
                    3, held_of(group.size, group.rank, 3), facts={"step": 3}, config_toml=""
                )
                writer.wait()
                said.append("saved")
            except FolderError as error:
                said.append(str(error))
    return said


def test_all_ranks_are_told_of_a_full_disk_of_one_at_the_next_save(tmp_path):
    said = run_ranks(3, fail_in_background, tmp_path)
    assert all(words == said[0] for words in said)
    assert "step-00000002 was not written: No space left" in said[0][0]
    assert said[0][1] == "saved"
    assert_step(tmp_path, 3)


# Into a plain model folder.


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", ["qwen2_moe", "skywork moe", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_folder_of_a_state_is_that_of_its_model(tmp_path, family, dtype):
    spec = spec_of(family)
    like = tiny_folder(tmp_path / "like", spec)
    model = tiny_model(spec, seed=7)
    held = {f"weights.{name}": whole(tensor) for name, tensor in model.state_dict().items()}
    state = save_state(tmp_path, 1, held, facts={}, config_toml="")
    save_model(model, tmp_path / "expected", like=like, dtype=dtype)
    export_state(state, spec, tmp_path / "found", like=like, dtype=dtype)
    assert folder_bytes(tmp_path / "found") == folder_bytes(tmp_path / "expected")


def spec_of(family: str):
    spec = TINY[family]
    if family != "skywork moe":
        return spec
    return spec.replace(moe=replace(spec.moe, selection_bias=True))


def save_model_pieces(checkpoints: Path, family: str, plan: TrainPlan) -> Path:
    group, spec = of_all(), spec_of(family)
    layout = fit(plan, spec)
    state = tiny_model(spec, seed=7).state_dict()
    held = {
        f"weights.{name}": Held(state[name][of_name.slices].clone(), of_name)
        for stage in layout.stages_of(layout.place(group.rank).pp)
        for name, of_name in pieces(spec, layout.shard(group.rank), layout.stages[stage]).items()
    }
    return save_state(checkpoints, 1, held, facts={}, config_toml="", writers=group)


@pytest.mark.parametrize(
    "plan", [TrainPlan(tp=2), TrainPlan(pp=2, dp=2)], ids=["uneven tp", "stages"]
)
def test_the_model_folder_does_not_depend_on_the_ranks_that_saved(tmp_path, plan):
    spec = spec_of("skywork moe")
    (state, *_) = run_ranks(plan.world_size, save_model_pieces, tmp_path, "skywork moe", plan)
    save_model(tiny_model(spec, seed=7), tmp_path / "expected")
    export_state(state, spec, tmp_path / "found")
    assert folder_bytes(tmp_path / "found") == folder_bytes(tmp_path / "expected")


def test_a_state_of_another_model_makes_no_folder(tmp_path):
    held = {f"weights.{n}": whole(t) for n, t in tiny_model(TINY["llama"]).state_dict().items()}
    state = save_state(tmp_path, 1, held, facts={}, config_toml="")
    with pytest.raises(FolderError, match=r"no such tensor for weights\..*sparse_moe"):
        export_state(state, TINY["mixtral"], tmp_path / "found")
    assert not list(tmp_path.glob("*found*"))
