from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.data.tokenfolder import TokenFolder, token_dtype
from moesaic.errors import FolderError
from tests.token_folders import write_token_folder

DOCUMENTS = [[11, 12, 13, 0], [21, 22, 0], [31, 32, 33, 34, 35, 0]]
DOCS = Path(__file__).parent.parent / "docs" / "token-folder.md"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_token_folder(tmp_path / "tokens", {"a": DOCUMENTS}, sequence_length=5)


def damage(path: Path, **changes: Any) -> None:
    """Change the header; `a__0__b` is entry b of item 0 of entry a."""
    header = json.loads((path / "header.json").read_text())
    for place, value in changes.items():
        entry = header
        *above, last = place.split("__")
        for key in above:
            entry = entry[int(key) if key.isdigit() else key]
        entry[last] = value
    (path / "header.json").write_text(json.dumps(header))


def test_rows_are_windows_whose_targets_stay_in_their_document(path):
    folder = TokenFolder(path)
    assert folder.num_sequences("train") == 2
    first, second = folder.row("train", "a", 0), folder.row("train", "a", 1)
    assert first.input_S.tolist() == [11, 12, 13, 0, 21]
    assert first.target_S.tolist() == [12, 13, 0, -100, 22]
    assert first.documents_S.tolist() == [0, 0, 0, 0, 1]
    assert second.input_S.tolist() == [22, 0, 31, 32, 33]
    assert second.target_S.tolist() == [0, -100, 32, 33, 34]
    assert second.documents_S.tolist() == [0, 0, 1, 1, 1]
    assert {part.dtype for part in first} == {np.dtype(np.int64)}


def test_a_mask_hides_tokens_from_the_targets_alone(tmp_path):
    masks = {"a": [[1, 0, 1, 1], [1, 1, 0], [1] * 6]}
    write_token_folder(tmp_path, {"a": DOCUMENTS}, masks=masks, sequence_length=5)
    row = TokenFolder(tmp_path).row("train", "a", 0)
    assert row.input_S.tolist() == [11, 12, 13, 0, 21]
    assert row.target_S.tolist() == [-100, 13, 0, -100, 22]


@pytest.mark.parametrize("seed", range(20))
def test_rows_agree_with_a_plain_loop(tmp_path, seed):
    draw = random.Random(seed)
    vocab_size = draw.choice([1000, 70_000])
    documents = [
        [draw.randrange(1, vocab_size) for _ in range(draw.randrange(9))] + [0]
        for _ in range(draw.randrange(20, 40))
    ]
    masks = [[draw.randrange(2) for _ in document] for document in documents]
    length = draw.randrange(2, 20)
    write_token_folder(
        tmp_path,
        {"a": documents},
        masks={"a": masks},
        sequence_length=length,
        vocab_size=vocab_size,
    )
    folder = TokenFolder(tmp_path)
    folder.verify()
    flat = [
        (token, number, learned)
        for number, document in enumerate(documents)
        for token, learned in zip(document, masks[number], strict=True)
    ]
    rows = 0
    while (rows + 1) * length + 1 <= len(flat):
        row = folder.row("train", "a", rows)
        for place in range(length):
            token, number, _ = flat[rows * length + place]
            following, following_number, learned = flat[rows * length + place + 1]
            wanted = following if following_number == number and learned else -100
            assert row.input_S[place] == token
            assert row.target_S[place] == wanted
            assert row.documents_S[place] == number - flat[rows * length][1]
        rows += 1
    assert folder.num_sequences("train", "a") == rows


def test_every_target_is_read_exactly_once_over_all_rows(tmp_path):
    documents = [list(range(1, 102))]
    write_token_folder(tmp_path, {"a": documents}, sequence_length=10)
    folder = TokenFolder(tmp_path)
    targets = [t for i in range(10) for t in folder.row("train", "a", i).target_S.tolist()]
    assert targets == list(range(2, 102))


def test_the_header_can_be_asked(path):
    folder = TokenFolder(path)
    assert folder.sources == ("a",)
    assert folder.weights == {"a": 1}
    assert folder.sequence_length == 5
    assert folder.vocab_size == 1000
    assert folder.eos_token_id == 0
    assert folder.tokenizer_hash == "0" * 64
    assert folder.num_tokens("train", "a") == folder.num_tokens("heldout") == 13


@pytest.mark.parametrize("stream", ["a.train.tokens", "a.heldout.documents"])
def test_a_file_that_is_cut_short_is_refused_when_opened(path, stream):
    content = (path / stream).read_bytes()
    (path / stream).write_bytes(content[:-1])
    with pytest.raises(FolderError, match=re.escape(stream)) as error:
        TokenFolder(path)
    assert str(len(content)) in str(error.value)


def test_a_file_that_is_gone_is_refused_when_opened(path):
    (path / "a.train.tokens").unlink()
    with pytest.raises(FolderError, match=r"a\.train\.tokens cannot be read"):
        TokenFolder(path)


@pytest.mark.parametrize("stream", ["tokens", "documents", "mask"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_verify_finds_one_changed_bit_in_any_file(tmp_path, split, stream):
    masks = {"a": [[1] * len(document) for document in DOCUMENTS]}
    write_token_folder(tmp_path, {"a": DOCUMENTS}, masks=masks, sequence_length=5)
    TokenFolder(tmp_path).verify()
    changed = tmp_path / f"a.{split}.{stream}"
    content = bytearray(changed.read_bytes())
    content[-8 if stream == "documents" else -2] ^= 1
    changed.write_bytes(content)
    with pytest.raises(FolderError, match="is not what was written") as error:
        TokenFolder(tmp_path).verify()
    assert changed.name in str(error.value)
    assert "\n" not in str(error.value)


def test_verify_finds_a_token_beyond_the_vocabulary(tmp_path):
    write_token_folder(tmp_path, {"a": [[5, 99, 0]]}, sequence_length=2, vocab_size=99)
    with pytest.raises(FolderError, match="token 99"):
        TokenFolder(tmp_path).verify()


@pytest.mark.parametrize("starts", [[1, 4, 7], [0, 4, 4], [0, 7, 4], [0, 4, 13]])
def test_verify_finds_document_offsets_that_do_not_rise(path, starts):
    content = np.asarray(starts, dtype="<i8").tobytes()
    (path / "a.train.documents").write_bytes(content)
    damage(path, sources__0__splits__train__sha256__documents=hashlib.sha256(content).hexdigest())
    with pytest.raises(FolderError, match="offsets do not rise"):
        TokenFolder(path).verify()


HEADERS: dict[str, dict[str, Any]] = {
    "another format": {"format": "gguf"},
    "a later version": {"version": 2},
    "no such dtype": {"dtype": "float32"},
    "a dtype too narrow": {"vocab_size": 70_000},
    "a vocabulary too large": {"vocab_size": (1 << 32) + 1},
    "a row of one token": {"sequence_length": 1},
    "a length that is text": {"sequence_length": "5"},
    "an eos outside the vocabulary": {"eos_token_id": 1000},
    "no sources": {"sources": []},
    "a tokenizer that is text": {"tokenizer": "x"},
    "a name that leads elsewhere": {"sources__0__name": "../a"},
    "a weight of nothing": {"sources__0__weight": 0},
    "a negative count": {"sources__0__splits__train__tokens": -1},
    "a count that is a fraction": {"sources__0__splits__train__documents": 2.5},
    "the wrong number of rows": {"sources__0__splits__train__sequences": 3},
    "splits missing": {"sources__0__splits": {}},
    "an unknown stream": {"sources__0__splits__train__sha256": {"tokens": "", "words": ""}},
}


@pytest.mark.parametrize("changes", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_cannot_be_is_one_line(path, changes):
    damage(path, **changes)
    with pytest.raises(FolderError) as error:
        TokenFolder(path)
    assert str(path / "header.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_a_header_that_is_no_json_object_is_one_line(path, content):
    (path / "header.json").write_bytes(content)
    with pytest.raises(FolderError) as error:
        TokenFolder(path)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_missing_or_something_else_is_refused(tmp_path):
    with pytest.raises(FolderError, match="does not exist"):
        TokenFolder(tmp_path / "none")
    with pytest.raises(FolderError, match="not a token folder"):
        TokenFolder(tmp_path)


def test_what_the_folder_has_not_is_refused(path):
    folder = TokenFolder(path)
    with pytest.raises(FolderError, match="rows 0 to 1"):
        folder.row("train", "a", 2)
    with pytest.raises(FolderError, match="not 'b'"):
        folder.num_sequences("train", "b")
    with pytest.raises(FolderError, match="not 'test'"):
        folder.num_tokens("test")


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(65_536, "uint16"), (65_537, "uint32"), (1 << 32, "uint32")]
)
def test_tokens_are_stored_as_narrow_as_the_vocabulary_allows(vocab_size, name):
    assert token_dtype(vocab_size).name == name


def test_a_vocabulary_beyond_uint32_is_refused():
    with pytest.raises(FolderError, match="4,294,967,297"):
        token_dtype((1 << 32) + 1)


def test_the_reader_in_the_document_reads_the_same_rows(path):
    (reader,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(reader, names)
    folder = TokenFolder(path)
    for i in range(folder.num_sequences("train", "a")):
        for theirs, ours in zip(
            names["read_row"](path, "a", "train", i), folder.row("train", "a", i), strict=True
        ):
            assert theirs.tolist() == ours.tolist()
