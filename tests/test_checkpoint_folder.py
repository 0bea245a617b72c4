"""Model folders: what is written is what is read, and what is damaged is refused in one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moesaic.checkpoint.folder import (
    INDEX,
    WEIGHTS,
    WeightReader,
    WeightWriter,
    check_complete,
    copy_tokenizer,
    read_config,
    read_finite,
    read_spec,
    write_config,
)
from moesaic.checkpoint.names import disk_entries
from moesaic.errors import FolderError
from moesaic.model.build import load_model, save_model
from tests.faults import faults_in_turn
from tests.tiny import LLAMA, MIXTRAL, TINY, tiny_folder, tiny_model

# Odd sizes and types of all widths: a tensor would start off its item size if laid out as listed.
MIXED = {
    "narrow": torch.randn(3).to(torch.float8_e4m3fn),
    "half": torch.randn(5, 3).to(torch.bfloat16),
    "single": torch.randn(7),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "double": torch.randn(2, dtype=torch.float64),
    "odd": torch.randn(1).to(torch.float16),
}


def plan_of(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_all(path: Path, tensors: dict[str, torch.Tensor], **options: int) -> None:
    path.mkdir(exist_ok=True)
    with WeightWriter(path, plan_of(tensors), **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def bits(tensor: torch.Tensor) -> list[int]:
    return (
        tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()
    )


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
        assert bits(found[name]) == bits(tensor), name


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(FolderError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_library_reads_what_we_write(tmp_path):
    write_all(tmp_path / "w", MIXED)
    assert_same(load_file(tmp_path / "w" / WEIGHTS), MIXED)
    with safe_open(tmp_path / "w" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path):
    save_file(MIXED, tmp_path / WEIGHTS)
    with WeightReader(tmp_path) as reader:
        assert_same({name: reader.read(name) for name in reader.entries}, MIXED)


def test_tensors_may_be_written_in_any_order_and_from_any_layout(tmp_path):
    tensors = {"a": torch.randn(6, 4).t(), "b": torch.randn(8)[::2], "c": torch.randn(2, 2)}
    tensors["d"] = torch.randn(4)[1:3:2]
    with WeightWriter(tmp_path, plan_of(tensors)) as writer:
        for name in ("d", "c", "a", "b"):
            writer.write(name, tensors[name])
    assert_same(load_file(tmp_path / WEIGHTS), tensors)


def test_large_weights_are_dealt_to_files_with_an_index(tmp_path):
    tensors = {f"t{i}": torch.randn(10, 10) for i in range(5)}
    write_all(tmp_path / "w", tensors, shard_bytes=900)
    shards = sorted(path.name for path in (tmp_path / "w").glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "w" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 5 * 400}
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "w" / shard)
    with WeightReader(tmp_path / "w") as reader:
        assert_same({name: reader.read(name) for name in reader.entries}, tensors)


def test_a_tensor_larger_than_a_file_should_be_gets_one_of_its_own(tmp_path):
    write_all(tmp_path / "w", {"a": torch.ones(4), "b": torch.ones(400)}, shard_bytes=100)
    assert len(list((tmp_path / "w").glob("*.safetensors"))) == 2


def test_transformers_reads_a_model_of_several_files(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model(MIXTRAL)
    folder = tiny_folder(tmp_path / "m", MIXTRAL, tokenizer=False)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    write_all(folder, tensors, shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in load_model(folder).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_write_that_the_system_cuts_short_goes_on(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: whole(fd, view[:7], offset))
    write_all(tmp_path / "w", MIXED)
    assert_same(load_file(tmp_path / "w" / WEIGHTS), MIXED)


def test_a_tensor_read_stays_when_the_reader_is_closed(tmp_path):
    save_file(MIXED, tmp_path / WEIGHTS)
    with WeightReader(tmp_path) as reader:
        tensor = reader.read("half")
    assert bits(tensor) == bits(MIXED["half"])


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_copying_a_tensor_many_times_takes_no_memory(tmp_path):
    size = 64 * 2**20
    save_file({"w": torch.zeros(size // 2, dtype=torch.bfloat16)}, tmp_path / WEIGHTS)
    plan = [(f"e{i}", torch.bfloat16, (size // 2,)) for i in range(4)]
    (tmp_path / "out").mkdir()
    with WeightReader(tmp_path) as reader:
        before = anonymous_bytes()
        with WeightWriter(tmp_path / "out", plan) as writer:
            for name, _, _ in plan:
                writer.write(name, read_finite(reader, "w"))
                assert anonymous_bytes() - before < size // 8
    assert (tmp_path / "out" / WEIGHTS).stat().st_size > 4 * size


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 517, 1022])
def test_one_value_that_is_not_finite_is_found(tmp_path, dtype, value, place):
    if dtype == torch.float8_e4m3fn:
        value = float("nan")  # the only value of e4m3fn that is not finite
    values = torch.randn(1023)
    good = values.clone().to(dtype)
    values[place] = value
    save_file({"good": good, "bad": values.to(dtype)}, tmp_path / WEIGHTS)
    with WeightReader(tmp_path) as reader:
        read_finite(reader, "good")
        assert "bad holds NaN or infinity" in refusal(lambda: read_finite(reader, "bad"))


def test_the_largest_finite_numbers_are_finite(tmp_path):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {
        str(dtype): torch.full((100,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
        for dtype in dtypes
    }
    save_file(tensors, tmp_path / WEIGHTS)
    with WeightReader(tmp_path) as reader:
        for name in tensors:
            read_finite(reader, name)


# Damage done to a good folder, and words that the refusal must say.


def cut(folder: Path, by: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-by])


def replace_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def split_up(folder: Path) -> dict[str, object]:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    write_all(folder, tensors, shard_bytes=20_000)
    loaded: dict[str, object] = json.loads((folder / INDEX).read_text())
    return loaded


def lose_a_shard(folder: Path) -> None:
    split_up(folder)
    min(folder.glob("*.safetensors")).unlink()


def index_the_wrong_shard(folder: Path) -> None:
    index = split_up(folder)
    index["weight_map"]["model.norm.weight"] = min(folder.glob("*.safetensors")).name
    (folder / INDEX).write_text(json.dumps(index))


def index_another_folder(folder: Path) -> None:
    index = split_up(folder)
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def empty_index(folder: Path) -> None:
    split_up(folder)
    (folder / INDEX).write_text("{}")


def tensor_twice(folder: Path) -> None:
    split_up(folder)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)


def header_of_no_sense(folder: Path) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + b"1234")


def header_not_json(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((5).to_bytes(8, "little") + b"{oops" + b"1234")


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(31)


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int32)


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def fused_experts(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.ones(4, 48, 32)


def fp8_without_scale(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("does not exist",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "config not JSON": (lambda f: (f / "config.json").write_text("{,"), ("not valid JSON",)),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ("UTF-8",)),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ("list", "object")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("neither", WEIGHTS)),
    "a pickle": (pickle_only, ("pytorch_model.bin", "pickle")),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), (WEIGHTS, "0 bytes")),
    "one byte short": (lambda f: cut(f, 1), (WEIGHTS, "cut short", "bytes")),
    "header cut": (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 7 + b"\1"), ("cut short",)),
    "header of no sense": (header_of_no_sense, ("damaged", "w has")),
    "header not JSON": (header_not_json, ("damaged", "not JSON")),
    "shard missing": (lose_a_shard, (INDEX, "model-00001-of", "missing")),
    "shard elsewhere": (index_another_folder, (INDEX, "../elsewhere.safetensors")),
    "index wrong": (index_the_wrong_shard, (INDEX, "model.norm.weight", "does not hold")),
    "index empty": (empty_index, (INDEX, "weight_map")),
    "tensor twice": (tensor_twice, ("both in", "model-00001-of")),
    "tensor missing": (
        lambda f: replace_tensors(f, lambda t: t.pop("lm_head.weight")),
        ("lacks lm_head.weight",),
    ),
    "tensor extra": (
        lambda f: replace_tensors(f, lambda t: t.setdefault("surplus", torch.ones(1))),
        ("surplus", "leaves out"),
    ),
    "experts stacked": (
        lambda f: replace_tensors(f, fused_experts),
        ("lacks lm_head.weight", "save_original_format=True"),
    ),
    "wrong shape": (
        lambda f: replace_tensors(f, wrong_shape),
        ("model.norm.weight", "[31]", "[32]"),
    ),
    "integers": (lambda f: replace_tensors(f, integers), ("model.norm.weight", "int32")),
    "NaN": (lambda f: replace_tensors(f, not_a_number), ("layers.1.mlp.up_proj", "NaN")),
    "FP8 without scale": (
        lambda f: replace_tensors(f, fp8_without_scale),
        ("up_proj.weight is FP8", "weight_scale is missing"),
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, damage, words):
    folder = tiny_folder(tmp_path / "model", LLAMA, tokenizer=False)
    load_model(folder)
    damage(folder)
    message = refusal(lambda: load_model(folder))
    assert all(word in message for word in (str(folder), *words)), message


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model").write_text("")
    assert "is a file" in refusal(lambda: read_config(tmp_path / "model"))
    assert "is a file" in refusal(lambda: WeightReader(tmp_path / "model"))


def test_many_missing_tensors_are_counted_not_listed(tmp_path):
    folder = tiny_folder(tmp_path / "model", LLAMA, tokenizer=False)
    write_config(folder, LLAMA.replace(num_layers=5), dtype="float32")
    with WeightReader(folder) as reader:
        message = refusal(lambda: check_complete(reader, read_spec(folder)))
    assert "model.layers.3.input_layernorm.weight" in message
    assert "and 15 more tensors" in message


def test_what_readers_pass_over_is_passed_over(tmp_path):
    spec = LLAMA.replace(tied_embeddings=True)
    folder = tiny_folder(tmp_path / "model", spec, tokenizer=False)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        name = "model.layers.0.self_attn.q_proj"
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = torch.ones(32, 1)

    replace_tensors(folder, add)
    with WeightReader(folder) as reader:
        check_complete(reader, spec)


def test_a_full_disk_at_any_write_leaves_the_old_folder_and_nothing_else(tmp_path):
    spec = TINY["skywork moe"].replace(num_layers=1, moe_layers=(0,))
    source = tiny_folder(tmp_path / "source", spec)
    out = tmp_path / "models" / "out"
    save_model(tiny_model(spec, seed=1), out, like=source)
    old, new = (tiny_model(spec, seed=seed).lm_head.weight.bfloat16() for seed in (1, 2))
    changed = tiny_model(spec, seed=2)

    def check(has_failed: bool) -> None:
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        found = load_model(out, dtype=torch.bfloat16).lm_head.weight
        # Flushing the rename may fail when the new folder is already in its place, and whole.
        assert torch.equal(found, new) or (has_failed and torch.equal(found, old))
        assert (out / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
        save_model(tiny_model(spec, seed=1), out, like=source, overwrite=True)

    faults = faults_in_turn(lambda: save_model(changed, out, like=source, overwrite=True), check)
    # The header and every tensor are a write of their own; so are config and tokenizer files.
    assert faults > len(disk_entries(spec)) + 5


def test_a_file_that_may_not_grow_is_refused_by_name_and_bytes(tmp_path):
    save_model(tiny_model(LLAMA), tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = refusal(
            lambda: save_model(tiny_model(LLAMA, seed=1), tmp_path / "out", overwrite=True)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "model.safetensors were not written: File too large" in message
    assert "bytes" in message
    load_model(tmp_path / "out")


def test_weights_larger_than_the_disk_are_refused_before_a_byte_is_written(tmp_path):
    plan = [("w", torch.bfloat16, (2**30, 2**20))]
    assert "take 2,251,799,813,685,248" in refusal(lambda: WeightWriter(tmp_path, plan))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moesaic.checkpoint.folder.write_config", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny_model(LLAMA), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_config_written_over_a_longer_one_is_whole(tmp_path):
    write_config(tmp_path, LLAMA, extra={"note": "x" * 1000})
    write_config(tmp_path, LLAMA)
    assert "note" not in read_config(tmp_path)
    assert read_spec(tmp_path) == LLAMA


def test_extra_keys_stand_in_the_config(tmp_path):
    write_config(tmp_path, LLAMA, extra={"quantization_config": {"bits": 8}})
    assert read_config(tmp_path)["quantization_config"] == {"bits": 8}
    assert read_spec(tmp_path) == LLAMA


def test_a_copied_tokenizer_says_the_same(tmp_path):
    from transformers import AutoTokenizer

    source = tiny_folder(tmp_path / "source", LLAMA)
    (source / "generation_config.json").write_text("{}")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(source, tmp_path / "copy")
    write_config(tmp_path / "copy", LLAMA)
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert WEIGHTS not in names
    text = "One prompt, två språk."
    chat = [{"role": "user", "content": text}]
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "copy", source))
    assert ours.decode(ours(text).input_ids) == text
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.apply_chat_template(chat, tokenize=False) == f"<|user|>{text}</s>"


def test_whatever_bytes_are_flipped_a_file_is_read_or_refused_in_one_line(tmp_path):
    write_all(tmp_path, MIXED)
    path = tmp_path / WEIGHTS
    good = path.read_bytes()
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    refusals = []
    for place in range(header_bytes):
        for flip in (1, 16, 128):
            path.write_bytes(good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :])
            try:
                with WeightReader(tmp_path) as reader:
                    for name in reader.entries:
                        reader.read(name)
            except FolderError as error:
                refusals.append(str(error))
    assert len(refusals) > header_bytes
    assert not any("\n" in refusal for refusal in refusals)
