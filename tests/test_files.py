from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moesaic import files
from moesaic.errors import FolderError
from moesaic.files import NewFolder, write_text_atomic
from tests.faults import faults_in_turn

OLD = {"a": "old a", "b": "old b"}
NEW = {"a": "new a", "below/c": "new c"}


def write(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def replace(out: Path, content: dict[str, str]) -> None:
    with NewFolder(out, overwrite=True) as new:
        write(new.path, content)


def one_line(error: pytest.ExceptionInfo[FolderError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "above" / "out"
    with NewFolder(out) as new:
        write(new.path, NEW)
        assert not out.exists()
    assert read(out) == NEW
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path):
    with NewFolder(tmp_path) as new:
        write(new.path, NEW)
    assert read(tmp_path) == NEW


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_behind(tmp_path, error):
    def fail() -> None:
        with NewFolder(tmp_path / "out") as new:
            write(new.path, NEW)
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_refused_and_kept(tmp_path):
    write(tmp_path / "out", OLD)
    with pytest.raises(FolderError) as error, NewFolder(tmp_path / "out"):
        pass
    assert "not empty" in one_line(error)
    assert read(tmp_path / "out") == OLD


def test_overwriting_leaves_only_the_new_folder(tmp_path):
    write(tmp_path / "out", OLD)
    replace(tmp_path / "out", NEW)
    assert read(tmp_path / "out") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_full_disk_at_any_write_leaves_the_old_folder_or_the_whole_new_one(
    tmp_path, monkeypatch, exchange
):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    write(tmp_path / "out", OLD)

    def check(failed: bool) -> None:
        assert read(tmp_path / "out") in (OLD, NEW)
        assert not (tmp_path / ".out.partial").exists()
        if failed:
            replace(tmp_path / "out", OLD)
            assert [path.name for path in tmp_path.iterdir()] == ["out"]

    assert faults_in_turn(lambda: replace(tmp_path / "out", NEW), check) > 8
    assert read(tmp_path / "out") == NEW


KILL = """
import sys
from pathlib import Path
from tests.faults import fault, killed
from tests.test_files import NEW, replace
with fault(int(sys.argv[2]), killed):
    replace(Path(sys.argv[1]), NEW)
"""


def test_a_killed_writer_leaves_the_old_folder_and_does_not_block_the_next(tmp_path):
    write(tmp_path / "out", OLD)
    root = Path(__file__).parent.parent
    for number in (1, 3, 5, 8):
        died = subprocess.run(
            [sys.executable, "-c", KILL, str(tmp_path / "out"), str(number)], cwd=root, check=False
        )
        assert died.returncode == -9
        assert read(tmp_path / "out") == OLD
    assert (tmp_path / ".out.partial").exists()
    replace(tmp_path / "out", NEW)
    assert read(tmp_path / "out") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_writer_killed_between_two_renames_is_undone_by_the_next(tmp_path):
    write(tmp_path / ".out.replaced", OLD)
    with pytest.raises(FolderError, match="not empty"), NewFolder(tmp_path / "out"):
        pass
    assert read(tmp_path / "out") == OLD


def test_two_writers_of_one_folder_do_not_mix(tmp_path):
    with NewFolder(tmp_path / "out") as new:
        write(new.path, NEW)
        with pytest.raises(FolderError, match="Another process"), NewFolder(tmp_path / "out"):
            pass
    assert read(tmp_path / "out") == NEW


def test_an_output_that_holds_an_input_is_refused(tmp_path):
    write(tmp_path / "out", OLD)
    with (
        pytest.raises(FolderError, match="input"),
        NewFolder(tmp_path / "out", overwrite=True, inputs=[tmp_path / "out" / "a"]),
    ):
        pass
    assert read(tmp_path / "out") == OLD


def test_an_output_that_holds_the_current_folder_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "out", OLD)
    monkeypatch.chdir(tmp_path / "out")
    for out in (".", tmp_path, tmp_path / "out"):
        with pytest.raises(FolderError, match="current folder"), NewFolder(out, overwrite=True):
            pass
    assert read(tmp_path / "out") == OLD


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    with (
        pytest.raises(FolderError, match="is a file"),
        NewFolder(tmp_path / "out", overwrite=True),
    ):
        pass


def test_an_output_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError) as error, NewFolder(tmp_path / "file" / "out"):
        pass
    assert "was not written" in one_line(error)


def test_a_text_written_to_a_link_goes_where_it_points(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "plan.json")
    write_text_atomic(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "plan.json").read_text() == "new"


def test_a_full_disk_at_any_write_leaves_a_text_as_it_was_or_new(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def check(failed: bool) -> None:
        assert path.read_text() in ("old", "new")
        assert list(tmp_path.iterdir()) == [path]
        if failed:
            path.write_text("old")

    assert faults_in_turn(lambda: write_text_atomic(path, "new"), check) > 3
    assert path.read_text() == "new"
