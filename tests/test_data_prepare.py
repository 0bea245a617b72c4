from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import random
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

import moesaic.data.sources as sources_module
from moesaic.config import build, to_toml
from moesaic.data.config import PrepareConfig, SourceConfig
from moesaic.data.prepare import prepare, smallest_distinct
from moesaic.data.sources import cut
from moesaic.data.tokenfolder import TokenFolder
from moesaic.data.tokenizer import load_tokenizer, tokenizer_hash
from moesaic.errors import ConfigError, MoesaicError
from tests.faults import faults_in_turn
from tests.tiny import tiny_tokenizer

EOS = 1
POEMS = [f"poem {i}: " + "a rose is a rose, " * (i % 5 + 1) for i in range(40)]
TALKS = [
    [
        {"role": "user", "content": f"What is {i} + 1?"},
        {"role": "assistant", "content": f"It is {i + 1}."},
    ]
    for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(tmp_path: Path, tokenizer: Path) -> Callable[..., dict[str, Any]]:
    """Prepare one source, or several, into `tmp_path / "out"`."""

    def call(*sources: SourceConfig, **changes: Any) -> dict[str, Any]:
        return prepare(config_of(tmp_path, *sources, **{"tokenizer": tokenizer, **changes}))

    return call


def config_of(tmp_path: Path, *sources: SourceConfig, **changes: Any) -> PrepareConfig:
    fields = {
        "out": tmp_path / "out",
        "sources": sources,
        "sequence_length": 8,
        "heldout_fraction": 0.0,
    }
    return PrepareConfig(**{**fields, **changes})


def write_texts(folder: Path, texts: Iterable[str], ending: str = ".txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03}{ending}").write_text(text, encoding="utf-8")
    return folder


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path: Path, name: str = "s", **changes: Any) -> SourceConfig:
    return SourceConfig(name=name, path=path, **changes)


def documents(out: Path, split: str = "train", name: str = "s") -> list[list[int]]:
    """What a split holds, document by document."""
    TokenFolder(out).verify()
    tokens = stream(out, "tokens", split, name)
    starts = stream(out, "documents", split, name)
    return [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def stream(out: Path, kind: str, split: str = "train", name: str = "s") -> list[int]:
    dtype = {"tokens": "<u2", "documents": "<i8", "mask": "u1"}[kind]
    return np.fromfile(out / f"{name}.{split}.{kind}", dtype).tolist()


def encode(tokenizer: Path, text: str) -> list[int]:
    ids = load_tokenizer(tokenizer)(text, add_special_tokens=False, split_special_tokens=True)
    return [*ids["input_ids"], EOS]


def listing(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def text_folder(path: Path) -> SourceConfig:
    return source(write_texts(path / "poems", POEMS))


def code_folder(path: Path) -> SourceConfig:
    return source(write_texts(path / "poems", POEMS, ".py"))


def jsonl_file(path: Path) -> SourceConfig:
    return source(write_rows(path / "poems.jsonl", ({"text": poem} for poem in POEMS)))


def jsonl_field(path: Path) -> SourceConfig:
    rows = ({"text": 3, "poem": poem} for poem in POEMS)
    return source(write_rows(path / "poems.jsonl", rows), field="poem")


def jsonl_folder(path: Path) -> SourceConfig:
    write_rows(path / "poems" / "a.jsonl", ({"text": poem} for poem in POEMS[:9]))
    write_rows(path / "poems" / "below" / "b.ndjson", ({"text": poem} for poem in POEMS[9:]))
    return source(path / "poems")


def packed(opener: Any, ending: str) -> Callable[[Path], SourceConfig]:
    def write(path: Path) -> SourceConfig:
        content = jsonl_file(path).path.read_bytes()
        with opener(path / f"poems.jsonl{ending}", "wb") as file:
            file.write(content)
        return source(path / f"poems.jsonl{ending}")

    return write


def parquet_file(path: Path) -> SourceConfig:
    Dataset.from_dict({"text": POEMS, "n": list(range(40))}).to_parquet(str(path / "p.parquet"))
    return source(path / "p.parquet")


def saved_dataset(path: Path) -> SourceConfig:
    Dataset.from_dict({"text": POEMS}).save_to_disk(str(path / "saved"))
    return source(path / "saved")


def saved_splits(path: Path) -> SourceConfig:
    parts = {
        "train": Dataset.from_dict({"text": POEMS}),
        "test": Dataset.from_dict({"text": ["no"]}),
    }
    DatasetDict(parts).save_to_disk(str(path / "saved"))
    return source(path / "saved")


def named_split(path: Path) -> SourceConfig:
    parts = {
        "train": Dataset.from_dict({"text": ["no"]}),
        "test": Dataset.from_dict({"text": POEMS}),
    }
    DatasetDict(parts).save_to_disk(str(path / "saved"))
    return source(path / "saved", split="test")


def hub_folder(path: Path) -> SourceConfig:
    (path / "hub" / "data").mkdir(parents=True)
    table = Dataset.from_dict({"text": POEMS})
    table.to_parquet(str(path / "hub" / "data" / "train-00000-of-00001.parquet"))
    return source(path / "hub", kind="dataset")


KINDS = {
    "text folder": text_folder,
    "code folder": code_folder,
    "JSON Lines": jsonl_file,
    "another field": jsonl_field,
    "JSON Lines folder": jsonl_folder,
    "gzip": packed(gzip.open, ".gz"),
    "bzip2": packed(bz2.open, ".bz2"),
    "xz": packed(lzma.open, ".xz"),
    "Parquet": parquet_file,
    "saved dataset": saved_dataset,
    "saved splits": saved_splits,
    "named split": named_split,
    "dataset folder": hub_folder,
}


@pytest.mark.parametrize("write", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_source_gives_each_document_and_eos(tmp_path, tokenizer, make, write):
    summary = make(write(tmp_path))
    wanted = [encode(tokenizer, poem) for poem in POEMS]
    assert documents(tmp_path / "out") == wanted
    assert summary["train"]["tokens"] == sum(map(len, wanted))
    assert summary["train"]["documents"] == len(POEMS)


def test_texts_are_read_byte_for_byte_and_in_the_order_of_their_names(tmp_path, tokenizer, make):
    (tmp_path / "texts").mkdir()
    contents = {"b.txt": "two\r\nlines\rand\n", "a/z.txt": "z", "a.txt": "ünï 🎉", "c.md": "  "}
    for name, text in contents.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    make(source(tmp_path / "texts"), sequence_length=2)
    wanted = [contents[name] for name in ("a.txt", "a/z.txt", "b.txt", "c.md")]
    assert documents(tmp_path / "out") == [encode(tokenizer, text) for text in wanted]


def test_a_byte_order_mark_is_not_text(tmp_path, tokenizer, make):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa rose is a rose")
    make(source(tmp_path / "a.txt"), sequence_length=2)
    assert documents(tmp_path / "out") == [encode(tokenizer, "a rose is a rose")]


def test_text_that_looks_like_a_date_or_a_special_token_stays_text(tmp_path, tokenizer, make):
    texts = ["2024-01-01", "</s><s><|user|>", "2024-01-01T00:00:00Z"]
    make(source(write_rows(tmp_path / "a.jsonl", ({"text": text} for text in texts))))
    found = documents(tmp_path / "out")
    assert [load_tokenizer(tokenizer).decode(ids[:-1]) for ids in found] == texts
    assert all(min(ids[:-1]) > 4 for ids in found)


def test_a_document_begins_with_bos_where_the_tokenizer_says_so(tmp_path, make):
    folder = tiny_tokenizer(tmp_path / "with bos")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for number, token in enumerate(("<s>", "</s>"))
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    write_texts(tmp_path / "texts", POEMS)
    make(source(tmp_path / "texts"), tokenizer=folder)
    assert documents(tmp_path / "out") == [[0, *encode(folder, poem)] for poem in POEMS]


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def babble(draw: random.Random, words: int) -> str:
    choices = ["rose", "is", "42", "is,", "...", "{", "}", "\n", "\n\n", "  ", "\t", "漢字", "é"]
    return "".join(draw.choice(choices) + draw.choice(["", " "]) for _ in range(words))


def greedy_tokenizer(path: Path, pattern: str) -> Path:
    """One that has learned to join line breaks, spaces and marks wherever `pattern` lets it."""
    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([babble(random.Random(1), 5000)], trainer)
    tiny_tokenizer(path)
    trained.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("words", [GPT2_WORDS, LLAMA3_WORDS], ids=["GPT-2", "Llama 3"])
def test_a_long_document_in_pieces_is_tokenised_as_if_whole(tmp_path, make, monkeypatch, words):
    monkeypatch.setattr(sources_module, "PIECE_CHARS", 50)
    folder = greedy_tokenizer(tmp_path / "greedy", words)
    texts = [babble(random.Random(n), n) for n in (900, 30, 400)]
    make(source(write_texts(tmp_path / "texts", texts)), tokenizer=folder)
    assert documents(tmp_path / "out") == [encode(folder, text) for text in texts]


def test_a_long_document_in_pieces_stays_on_one_side(tmp_path, tokenizer, make, monkeypatch):
    monkeypatch.setattr(sources_module, "PIECE_CHARS", 20)
    make(text_folder(tmp_path), heldout_fraction=0.5)
    train, held = (documents(tmp_path / "out", split) for split in ("train", "heldout"))
    assert train
    assert held
    assert sorted(train + held) == sorted(encode(tokenizer, poem) for poem in POEMS)


@pytest.mark.parametrize("seed", range(5))
def test_cutting_loses_nothing_and_keeps_pieces_small(monkeypatch, seed):
    monkeypatch.setattr(sources_module, "PIECE_CHARS", 16)
    draw = random.Random(seed)
    parts = [
        "".join(draw.choices("abc \n.", k=draw.randrange(40))) for _ in range(draw.randrange(1, 9))
    ]
    pieces = list(cut(parts))
    assert "".join(pieces) == "".join(parts)
    assert all(0 < len(piece) <= 16 for piece in pieces)


def test_a_conversation_is_learned_where_the_assistant_speaks(tmp_path, tokenizer, make):
    talks = write_rows(tmp_path / "talks.jsonl", ({"messages": talk} for talk in TALKS))
    summary = make(source(talks), sequence_length=64)
    assert summary["sources"][0]["kind"] == "chat"
    decode = load_tokenizer(tokenizer).decode
    mask = iter(stream(tmp_path / "out", "mask"))
    for number, ids in enumerate(documents(tmp_path / "out")):
        learned = [token for token in ids if next(mask)]
        assert decode(ids) == (
            f"<|user|>What is {number} + 1?</s><|assistant|>It is {number + 1}.</s>"
        )
        assert decode(learned) == f"It is {number + 1}.</s>"


def test_targets_of_a_conversation_are_the_assistants_words(tmp_path, tokenizer, make):
    talks = write_rows(tmp_path / "talks.jsonl", ({"messages": talk} for talk in TALKS))
    make(source(talks), sequence_length=16)
    folder = TokenFolder(tmp_path / "out")
    rows = [folder.row("train", "s", i) for i in range(folder.num_sequences("train"))]
    targets = [token for row in rows for token in row.target_S.tolist() if token != -100]
    text = load_tokenizer(tokenizer).decode(targets)
    whole = "".join(f"It is {number + 1}.</s>" for number in range(len(TALKS)))
    assert whole.startswith(text)
    assert len(text) > 0.9 * len(whole)


def test_a_template_without_end_mark_learns_to_stop(tmp_path, make):
    folder = tiny_tokenizer(tmp_path / "bare")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    talks = write_rows(tmp_path / "talks.jsonl", ({"messages": talk} for talk in TALKS))
    make(source(talks), tokenizer=folder)
    tokens, mask = (stream(tmp_path / "out", kind) for kind in ("tokens", "mask"))
    learned = [token for token, is_learned in zip(tokens, mask, strict=True) if is_learned]
    assert learned.count(EOS) == tokens.count(EOS) == len(TALKS)


def test_eos_after_a_turn_that_has_its_end_mark_is_not_learned(tmp_path, make):
    folder = tiny_tokenizer(tmp_path / "with line breaks")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    talks = [talk + more for talk, more in itertools.product(TALKS, ([], TALKS[0][:1]))]
    make(
        source(write_rows(tmp_path / "talks.jsonl", ({"messages": talk} for talk in talks))),
        tokenizer=folder,
    )
    mask = iter(stream(tmp_path / "out", "mask"))
    for talk, ids in zip(talks, documents(tmp_path / "out"), strict=True):
        marks = [next(mask) for _ in ids]
        at = [place for place, token in enumerate(ids) if token == EOS]
        # One for each message, then that of the document.
        assert [marks[place] for place in at] == [m["role"] == "assistant" for m in talk] + [0]


@pytest.mark.parametrize("write", ["parquet", "dataset"])
def test_conversations_in_tables_are_those_of_json_lines(tmp_path, tokenizer, make, write):
    talks = write_rows(tmp_path / "talks.jsonl", ({"messages": talk} for talk in TALKS))
    make(source(talks))
    table = Dataset.from_dict({"messages": TALKS})
    if write == "parquet":
        table.to_parquet(str(tmp_path / "talks.parquet"))
    else:
        table.save_to_disk(str(tmp_path / "talks.parquet"))
    make(source(tmp_path / "talks.parquet"), out=tmp_path / "again")
    ours, theirs = listing(tmp_path / "out"), listing(tmp_path / "again")
    assert ours == theirs


def test_the_same_input_gives_the_same_folder_to_the_byte(tmp_path, make):
    config = text_folder(tmp_path)
    for out in ("one", "two"):
        make(config, out=tmp_path / out, heldout_fraction=0.2)
    assert listing(tmp_path / "one") == listing(tmp_path / "two")


def test_the_tokenizer_travels_with_the_folder(tmp_path, tokenizer, make):
    make(text_folder(tmp_path))
    folder = TokenFolder(tmp_path / "out")
    assert folder.tokenizer_hash == tokenizer_hash(tokenizer) == tokenizer_hash(folder.tokenizer)
    assert listing(folder.tokenizer) == listing(tokenizer)
    assert folder.vocab_size == 300


def test_a_tokenizers_hash_is_of_what_it_does_and_not_of_how_it_is_written(tmp_path, tokenizer):
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**content, "truncation": {"max_length": 9}}, indent=3))
    assert tokenizer_hash(tmp_path) == tokenizer_hash(tokenizer)
    content["model"]["vocab"]["Ġrose"] = 299
    path.write_text(json.dumps(content))
    assert tokenizer_hash(tmp_path) != tokenizer_hash(tokenizer)


def test_copies_of_a_document_all_land_on_one_side(tmp_path, make):
    rows = POEMS * 3
    random.Random(0).shuffle(rows)
    one = source(write_rows(tmp_path / "a.jsonl", ({"text": text} for text in rows)), name="a")
    two = source(write_texts(tmp_path / "b", POEMS), name="b")
    make(one, two, heldout_fraction=0.3)
    sides = {
        split: {
            tuple(document)
            for name in "ab"
            for document in documents(tmp_path / "out", split, name)
        }
        for split in ("train", "heldout")
    }
    assert not sides["train"] & sides["heldout"]
    assert len(sides["train"] | sides["heldout"]) == len(POEMS)
    assert len(sides["heldout"]) > 3
    assert len(documents(tmp_path / "out", "heldout", "a")) == 3 * len(sides["heldout"])


def test_a_fraction_holds_out_about_that_part_and_a_seed_chooses_which(tmp_path, make):
    texts = ({"text": f"{i} " * 4} for i in range(2000))
    config = source(write_rows(tmp_path / "a.jsonl", texts))
    held = []
    for seed in (0, 1):
        make(config, heldout_fraction=0.1, seed=seed, out=tmp_path / str(seed))
        held.append({tuple(d) for d in documents(tmp_path / str(seed), "heldout")})
        # Binomial: five standard deviations of 13.4.
        assert abs(len(held[-1]) - 200) < 68
    assert held[0] != held[1]


def test_a_count_holds_out_that_many_of_each_source_and_their_copies(tmp_path, make):
    one = source(write_rows(tmp_path / "a.jsonl", ({"text": t} for t in POEMS * 2)), name="a")
    extra = [f"another {poem}" for poem in POEMS]
    two = source(write_rows(tmp_path / "b.jsonl", ({"text": t} for t in extra)), name="b")
    make(one, two, heldout_documents=5)
    assert len(documents(tmp_path / "out", "heldout", "a")) == 10
    assert len(documents(tmp_path / "out", "heldout", "b")) == 5


def test_the_smallest_are_found_without_keeping_all(tmp_path):
    draw = random.Random(0)
    for count in (0, 1, 5, 100):
        values = [draw.randrange(60) for _ in range(200)]
        assert smallest_distinct(values, count) == set(sorted(set(values))[:count])


def test_hidden_excluded_and_foreign_files_are_left_alone(tmp_path, tokenizer, make):
    folder = write_texts(tmp_path / "texts", ["kept"])
    for name in (".hidden.txt", ".git/a.txt", "test/a.txt", "a.png", "out/tokenizer/merges.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left alone")
    make(
        source(folder, kind="text", exclude=("test/*",)),
        out=folder / "out",
        overwrite=True,
        sequence_length=2,
    )
    assert documents(folder / "out") == [encode(tokenizer, "kept")]


def test_a_glob_chooses_files_of_any_ending(tmp_path, tokenizer, make):
    folder = write_texts(tmp_path / "texts", ["kept too"], ".zig")
    write_texts(folder, ["left alone"], ".txt")
    make(source(folder, kind="code", glob=("*.zig",)), sequence_length=2)
    assert documents(tmp_path / "out") == [encode(tokenizer, "kept too")]


def test_files_that_are_no_text_can_be_skipped_and_are_counted(tmp_path, tokenizer, make):
    folder = write_texts(tmp_path / "texts", POEMS)
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    (folder / "cut.txt").write_bytes("é".encode()[:1])
    (folder / "empty.txt").write_bytes(b"")
    summary = make(source(folder, undecodable="skip"))
    assert summary["sources"][0]["skipped_files"] == 2
    assert summary["sources"][0]["empty_documents"] == 1
    assert documents(tmp_path / "out") == [encode(tokenizer, poem) for poem in POEMS]


def test_a_config_survives_toml(tmp_path, tokenizer):
    config = config_of(tmp_path, text_folder(tmp_path), tokenizer=tokenizer, heldout_documents=3)
    assert build(PrepareConfig, tomllib.loads(to_toml(config)), where="toml") == config


def bytes_file(path: Path, content: bytes, name: str) -> SourceConfig:
    (path / name).write_bytes(content)
    return source(path / name)


def lines(*rows: str) -> bytes:
    return "\n".join(rows).encode()


GOOD = '{"text": "a rose is a rose is a rose"}'
BAD_SOURCES: dict[str, tuple[Callable[[Path], SourceConfig], str]] = {
    "no such path": (lambda p: source(p / "none"), "does not exist"),
    "an empty folder": (lambda p: source(write_texts(p / "t", [])), "no known files"),
    "a folder without the kind": (
        lambda p: source(write_texts(p / "t", ["x"]), kind="parquet"),
        "holds no file",
    ),
    "empty text": (lambda p: bytes_file(p, b"", "a.txt"), "has no tokens"),
    "too little text": (lambda p: bytes_file(p, b"a", "a.txt"), "one row takes 9"),
    "text that is not UTF-8": (lambda p: bytes_file(p, b"caf\xe9 ole", "a.txt"), "byte 3"),
    "a line that is not UTF-8": (
        lambda p: bytes_file(p, GOOD.encode() + b'\n{"text": "\xe9"}', "a.jsonl"),
        "a.jsonl line 2 is not UTF-8",
    ),
    "a line that is not JSON": (
        lambda p: bytes_file(p, lines(GOOD, "", "{text}"), "a.jsonl"),
        "a.jsonl line 3 is not JSON",
    ),
    "a line that is no object": (
        lambda p: bytes_file(p, lines(GOOD, '"text"'), "a.jsonl"),
        "a.jsonl line 2 is str",
    ),
    "a line without the field": (
        lambda p: bytes_file(p, lines(GOOD, GOOD, '{"txt": "a", "id": 1}'), "a.jsonl"),
        "a.jsonl line 3 has no field 'text', only txt, id",
    ),
    "a field that is null": (
        lambda p: bytes_file(p, lines(GOOD, '{"text": null}'), "a.jsonl"),
        "a.jsonl line 2: field 'text' is NoneType",
    ),
    "a line nested too deeply": (
        lambda p: bytes_file(p, lines(GOOD, "[" * 100_000), "a.jsonl"),
        "a.jsonl line 2",
    ),
    "half a surrogate pair": (
        lambda p: bytes_file(p, lines(GOOD, '{"text": "\\ud83d"}'), "a.jsonl"),
        "a.jsonl line 2 holds half a surrogate pair",
    ),
    "a file that is not gzip": (lambda p: bytes_file(p, b"x" * 99, "a.jsonl.gz"), "cannot be read"),
    "a gzip that is cut short": (
        lambda p: bytes_file(p, gzip.compress(GOOD.encode() * 99)[:-12], "a.jsonl.gz"),
        "cannot be read",
    ),
    "a file that is not Parquet": (
        lambda p: bytes_file(p, b"PAR1 not really", "a.parquet"),
        "a.parquet cannot be read",
    ),
    "a table without the field": (
        lambda p: source(parquet_file(p).path, field="body"),
        "p.parquet row 0 has no field 'body', only text, n",
    ),
    "one JSON file": (lambda p: bytes_file(p, b"[]", "a.json"), "JSON Lines"),
    "a folder of this and that": (
        lambda p: source(jsonl_folder(p).path.parent),
        "1 text",
    ),
    "a conversation that is none": (
        lambda p: bytes_file(
            p, lines('{"messages": [{"role": "user", "content": "x"}]}'), "a.jsonl"
        ),
        "a.jsonl line 1: no message",
    ),
    "a split that is not there": (
        lambda p: source(saved_splits(p).path, split="dev"),
        "no split 'dev'; it has train, test",
    ),
    "a dataset that is a file": (
        lambda p: source(jsonl_file(p).path, kind="dataset"),
        "is a dataset folder",
    ),
    "a damaged dataset": (
        lambda p: bytes_file(saved_dataset(p).path, b"{", "state.json"),
        "cannot be read",
    ),
}


@pytest.mark.parametrize(("write", "says"), BAD_SOURCES.values(), ids=BAD_SOURCES.keys())
def test_a_bad_source_is_one_line_and_leaves_nothing(tmp_path, make, write, says):
    config = write(tmp_path)
    if says == "1 text":
        write_texts(config.path, ["x"])
    elif says == "cannot be read" and config.path.name == "state.json":
        config = source(config.path.parent)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MoesaicError) as error:
        make(config)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rows of one token": ({"sequence_length": 1}, "sequence_length is 1"),
    "all held out": ({"heldout_fraction": 1.0}, "heldout_fraction is 1.0"),
    "fewer than none held out": ({"heldout_documents": -1}, "heldout_documents is -1"),
    "no sources": ({"sources": ()}, "no source"),
    "rows longer than the text": ({"sequence_length": 10_000}, "one row takes 10,001"),
    "too few held out": ({"heldout_fraction": 1e-9}, "0 tokens are held out"),
    "too many held out": ({"heldout_documents": 99}, "40 documents are held out"),
    "no tokenizer folder": ({"tokenizer": Path("none")}, "does not exist"),
}


@pytest.mark.parametrize(("changes", "says"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_config_that_cannot_be_is_one_line_and_leaves_nothing(tmp_path, make, changes, says):
    config = text_folder(tmp_path)
    with pytest.raises(MoesaicError) as error:
        make(config, **changes)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["poems"]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_must_be_positive(tmp_path, weight):
    with pytest.raises(ConfigError, match="weight of source s"):
        source(tmp_path, weight=weight)


@pytest.mark.parametrize("name", ["", "../a", ".a", "a/b", "a b", "ä"])
def test_a_name_must_fit_in_a_file_name(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be part of a file name"):
        source(tmp_path, name=name)


def test_two_sources_of_one_name_are_refused(tmp_path, make):
    config = text_folder(tmp_path)
    with pytest.raises(ConfigError, match="2 sources are called s"):
        make(config, config)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, make):
    config = text_folder(tmp_path)
    with pytest.raises(MoesaicError, match="no tokenizer"):
        make(config, tokenizer=config.path)
    (config.path / "tokenizer.json").write_text("{}")
    with pytest.raises(MoesaicError, match="cannot be read") as error:
        make(config, tokenizer=config.path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_eos_is_refused(tmp_path, make):
    folder = tiny_tokenizer(tmp_path / "endless")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no eos token"):
        make(text_folder(tmp_path), tokenizer=folder)


def test_an_output_that_holds_its_own_source_is_refused(tmp_path, make):
    config = text_folder(tmp_path)
    with pytest.raises(MoesaicError, match="the input"):
        make(config, out=config.path, overwrite=True)
    assert len(list(config.path.iterdir())) == len(POEMS)


def test_a_full_disk_at_any_write_leaves_the_old_folder_or_the_whole_new_one(
    tmp_path, tokenizer, make
):
    talks = write_rows(tmp_path / "talks.jsonl", ({"messages": talk} for talk in TALKS[:3]))
    old = source(write_texts(tmp_path / "old", POEMS[:2]), name="s")
    new = [source(talks, name="s"), source(write_texts(tmp_path / "new", POEMS[2:4]), name="t")]
    make(old)
    before = listing(tmp_path / "out")

    def check(failed: bool) -> None:
        found = listing(tmp_path / "out")
        TokenFolder(tmp_path / "out").verify()
        assert found == before or set(TokenFolder(tmp_path / "out").sources) == {"s", "t"}
        assert not (tmp_path / ".out.partial").exists()
        if failed and found != before:
            make(old, overwrite=True)

    assert faults_in_turn(lambda: make(*new, overwrite=True), check) > 20
    assert TokenFolder(tmp_path / "out").sources == ("s", "t")
