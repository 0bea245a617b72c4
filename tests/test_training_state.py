from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch

from moesaic.checkpoint.training_state import damage, newest, prune, remove_leftovers, save_state
from moesaic.errors import FolderError
from tests.faults import faults_in_turn


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights.a": torch.randn(5, 7, generator=generator),
        "weights.b": torch.randn(3, 2, 2, generator=generator).to(torch.bfloat16),
        "updates.a": torch.tensor(float(seed)),
        "routing.coefficient": torch.rand(4, generator=generator, dtype=torch.float64),
    }


def save(checkpoints, step: int):
    return save_state(
        checkpoints, step, some_tensors(step), facts={"step": step}, config_toml=f"steps = {step}\n"
    )


def loaded(state) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full_like(tensor, 9) for name, tensor in some_tensors(0).items()}
    state.load(tensors)
    return tensors


def assert_holds(checkpoints, step: int) -> None:
    state = newest(checkpoints)
    assert state is not None
    assert (state.step, state.facts) == (step, {"step": step})
    expected = some_tensors(step)
    found = loaded(state)
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
    [("weights.other", torch.zeros(1)), ("weights.a", torch.zeros(7, 5))],
    ids=["missing", "another shape"],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path, name, tensor):
    save(tmp_path, 1)
    with pytest.raises(FolderError, match=name):
        newest(tmp_path).load({name: tensor})


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
        whole = tmp_path / "step-00000002"
        assert failed or whole.exists()
        assert_holds(tmp_path, 2 if whole.exists() else 1)
        shutil.rmtree(whole, ignore_errors=True)

    assert faults_in_turn(lambda: save(tmp_path, 2), check) > 10


def test_a_kernel_that_refuses_to_write_is_reported(tmp_path, monkeypatch):
    # The error comes from inside torch's writer, which wraps it in a BaseException of its own.
    save(tmp_path, 1)

    def refuse(*_args, **_kwargs):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(FolderError, match="Disk quota exceeded"):
        save(tmp_path, 2)
    assert_holds(tmp_path, 1)
