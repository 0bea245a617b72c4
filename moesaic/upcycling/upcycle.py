"""Dense folder in, MoE folder out, one tensor at a time.

Each tensor of the new model is made from the one or three dense tensors it comes from and
written at once, so memory does not grow with the model. With `copy` not even that is
copied: experts are written straight from the dense file's memory map.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.folder import (
    WeightReader,
    WeightWriter,
    check_complete,
    copy_tokenizer,
    read_config,
    read_finite,
    read_spec,
    write_config,
)
from moesaic.checkpoint.names import Entry, disk_entries
from moesaic.config import to_toml
from moesaic.console import track
from moesaic.errors import ConfigError, FolderError
from moesaic.files import NewFolder
from moesaic.spec import ModelSpec
from moesaic.upcycling.config import UpcycleConfig, upcycled_spec
from moesaic.upcycling.initialise import (
    INNER_DIM,
    dropped_positions,
    normal,
    part_of_mlp,
    router_weight,
    with_noise,
    with_positions_redrawn,
)
from moesaic.upcycling.proof import hash_files, prove
from moesaic.upcycling.verdict import verdict

_DENSE_NAME = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""The dense MLP's matrix that becomes an expert's: the SiLU branch, the other, the output."""


def upcycle(config: UpcycleConfig) -> dict[str, Any]:
    """Make a mixture of experts of a dense model folder.

    Args:
        config: What to make of which folder.

    Returns:
        `out`, `family`, `num_params`, `active_params`, `moe_layers`, `seconds_writing`, `proof`
        (what proof.json holds; None from scratch or when not asked for) and `verdict` (None
        without budgets).

    Raises:
        ConfigError: What is asked for does not fit the model.
        SpecError: A config.json is of an unknown family.
        FolderError: An input is missing, damaged or not finite, or `out` is taken or cannot be
            written. Then there is nothing under `out`, or what was there before.
        DataError: The proof's text cannot be used.
    """
    dense = _dense_spec(config.dense)
    spec = upcycled_spec(dense, config)
    _refuse_absurd_size(config.out, spec)
    start = time.perf_counter()
    mixed = [folder for folder, _ in config.mixed_folders()]
    with NewFolder(config.out, overwrite=config.overwrite, inputs=[config.dense, *mixed]) as new:
        dtype = _write_weights(new.path, dense, spec, config)
        write_config(new.path, spec, dtype=str(dtype).removeprefix("torch."), extra=None)
        copy_tokenizer(config.dense, new.path)
        (new.path / "upcycle.toml").write_text(to_toml(config), encoding="utf-8")
        seconds_writing = time.perf_counter() - start
        proof = _prove(new.path, config) if config.prove and not config.from_scratch else None
    return {
        "out": str(config.out),
        "family": spec.family,
        "init": "from scratch" if config.from_scratch else config.init,
        "num_params": spec.num_params(),
        "active_params": spec.active_params(),
        "experts": config.experts,
        "top_k": config.top_k,
        "moe_layers": list(spec.moe_layers),
        "seconds_writing": seconds_writing,
        "proof": proof,
        "verdict": _verdict(dense, spec, config),
    }


def _dense_spec(folder: Path) -> ModelSpec:
    spec = read_spec(folder)
    if read_config(folder).get("quantization_config"):
        raise FolderError(
            f"{folder} is quantised. Upcycle the model it was made from, and quantise the result."
        )
    return spec


def _refuse_absurd_size(out: Path, spec: ModelSpec) -> None:
    """Refuse what no disk here holds, before its billions of tensor names are made."""
    out = out.absolute()
    parent = next(folder for folder in (out, *out.parents) if folder.is_dir())
    total = shutil.disk_usage(parent).total
    if spec.num_params() > total:
        raise FolderError(
            f"The model would have {spec.num_params():,} parameters, a byte each at the least, but "
            f"the disk of {parent} holds {total:,} bytes. Ask for fewer experts."
        )


def _write_weights(
    path: Path, dense: ModelSpec, spec: ModelSpec, config: UpcycleConfig
) -> torch.dtype:
    """Write every tensor of the new model; the dtype that its embedding has is returned."""
    entries = disk_entries(spec)
    with ExitStack() as stack:
        if config.from_scratch:
            base_dtype = _config_dtype(config.dense)
            plan = [(entry.name, _dtype_of(entry, base_dtype), entry.shape) for entry in entries]
            tensors = _scratch_tensors(spec, config, base_dtype)
        else:
            sources = _open_sources(stack, dense, config)
            base = sources[-1]
            base_dtype = base.dtype("model.embed_tokens.weight")
            plan = [
                (entry.name, _dtype_of(entry, base.dtype(_dense_param(entry))), entry.shape)
                for entry in entries
            ]
            tensors = _upcycled_tensors(entries, spec, sources, config)
        writer = stack.enter_context(WeightWriter(path, plan))
        for (name, dtype, _), tensor in zip(
            track(plan, label="Writing weights"), tensors, strict=True
        ):
            writer.write(name, tensor.to(dtype))
    return base_dtype


def _dtype_of(entry: Entry, dtype: torch.dtype) -> torch.dtype:
    # Selection biases move by steps that bfloat16 would lose.
    return torch.float32 if entry.param.endswith("e_score_correction_bias") else dtype


class _Source:
    """One dense model that weights come from, checked to be finite as they are first read."""

    def __init__(self, folder: Path, reader: WeightReader, spec: ModelSpec) -> None:
        self.folder = folder
        self._reader = reader
        self._names = {entry.param: entry.name for entry in disk_entries(spec)}
        self._checked: set[str] = set()

    def dtype(self, param: str) -> torch.dtype:
        return self._reader.entries[self._names[param]].dtype

    def read(self, param: str) -> Tensor:
        name = self._names[param]
        if name in self._checked:
            return self._reader.read(name)
        self._checked.add(name)
        return read_finite(self._reader, name)


def _open_sources(stack: ExitStack, dense: ModelSpec, config: UpcycleConfig) -> list[_Source]:
    """For each of a layer's experts the model it is copied from; the base comes last, always."""
    base = _open(stack, config.dense, dense)
    sources = []
    for folder, count in config.mixed_folders():
        spec = _dense_spec(folder)
        _check_same_shapes(config.dense, dense, folder, spec)
        sources += [_open(stack, folder, spec)] * count
    return sources + [base] * (config.experts - len(sources)) + [base]


def _open(stack: ExitStack, folder: Path, spec: ModelSpec) -> _Source:
    reader = stack.enter_context(WeightReader(folder))
    check_complete(reader, spec)
    source = _Source(folder, reader, spec)
    for name, info in reader.entries.items():
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
            raise FolderError(
                f"Tensor {name} of {folder} is {info.dtype}. "
                "Upcycling needs floats of 16 bits or more."
            )
    return source


_SIZES = (
    "num_layers",
    "hidden_dim",
    "ffn_dim",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
)


def _check_same_shapes(base: Path, dense: ModelSpec, folder: Path, spec: ModelSpec) -> None:
    if spec.moe is not None:
        raise ConfigError(f"{folder} is a mixture of experts already. Mix in dense models.")
    for size in _SIZES:
        if getattr(spec, size) != getattr(dense, size):
            raise ConfigError(
                f"{folder} has {size} {getattr(spec, size)}, but the base {base} has "
                f"{getattr(dense, size)}. Mix models of one shape."
            )


def _dense_param(entry: Entry) -> str:
    """The dense model's parameter that gives this tensor its values, or for routers its dtype."""
    prefix, moe, rest = entry.param.partition(".block_sparse_moe.")
    if not moe:
        return entry.param
    matrix = rest.rpartition(".")[2] if rest.startswith("experts.") else "w1"
    return f"{prefix}.mlp.{_DENSE_NAME[matrix]}.weight"


def _upcycled_tensors(
    entries: list[Entry], spec: ModelSpec, sources: list[_Source], config: UpcycleConfig
) -> Iterator[Tensor]:
    for entry in entries:
        if entry.expert is not None:
            weight = sources[entry.expert].read(_dense_param(entry))
            if weight.dtype != sources[-1].dtype(_dense_param(entry)):
                raise ConfigError(
                    f"{sources[entry.expert].folder} has {weight.dtype} weights, but the base has "
                    f"{sources[-1].dtype(_dense_param(entry))}. Mix models of one dtype."
                )
            yield _expert_tensor(entry, weight, config)
        elif ".block_sparse_moe." in entry.param:
            yield _gate_tensor(entry, spec, config)
        else:
            yield sources[-1].read(entry.param)


def _expert_tensor(entry: Entry, weight: Tensor, config: UpcycleConfig) -> Tensor:
    assert entry.expert is not None, f"{entry=}"
    prefix, _, matrix = entry.param.rpartition(".")
    expert = f"{prefix}.{entry.expert}"
    name = f"{expert}.{matrix}"
    if config.init == "noise":
        return with_noise(weight, config.noise_std, seed=config.seed, name=name)
    if config.init == "drop":
        ffn_dim = weight.shape[INNER_DIM[matrix]]
        positions = dropped_positions(ffn_dim, config.drop_ratio, seed=config.seed, name=expert)
        return with_positions_redrawn(
            weight, positions, dim=INNER_DIM[matrix], seed=config.seed, name=name
        )
    if config.init == "granular":
        part = entry.expert % config.granularity
        return part_of_mlp(weight, part, matrix=matrix, granularity=config.granularity)
    return weight  # copy and mix


def _gate_tensor(entry: Entry, spec: ModelSpec, config: UpcycleConfig) -> Tensor:
    if entry.param.endswith("e_score_correction_bias"):
        return torch.zeros(entry.shape)
    # From scratch there are no groups whose rows would have to be equal.
    granularity = 1 if config.from_scratch else config.granularity
    return router_weight(
        config.experts,
        spec.hidden_dim,
        std=config.gate_std,
        granularity=granularity,
        seed=config.seed,
        name=entry.param,
    )


def _scratch_tensors(
    spec: ModelSpec, config: UpcycleConfig, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Norms 1, biases 0, matrices normal."""
    for entry in disk_entries(spec):
        if entry.param.endswith("norm.weight"):
            yield torch.ones(entry.shape)
        elif len(entry.shape) < 2:
            yield torch.zeros(entry.shape)
        elif entry.param.endswith(".block_sparse_moe.gate.weight"):
            yield _gate_tensor(entry, spec, config)
        else:
            # Each expert has its own name, so that no two are drawn alike.
            name = entry.param if entry.expert is None else f"{entry.param}.{entry.expert}"
            yield normal(entry.shape, std=config.scratch_std, seed=config.seed, name=name)


def _config_dtype(folder: Path) -> torch.dtype:
    config = read_config(folder)
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise FolderError(f"{folder}/config.json has dtype {name!r}. Write bfloat16 or float32.")
    return dtype


def _prove(path: Path, config: UpcycleConfig) -> dict[str, Any]:
    """Compare both models on text and write proof.json beside the weights."""
    proof = prove(
        config.dense,
        path,
        text=config.proof_text,
        tokens=config.proof_tokens,
        dtype=getattr(torch, config.proof_dtype),
    )
    is_exact = config.init in ("copy", "granular")
    folders = [config.dense, *(folder for folder, _ in config.mixed_folders())]
    proof = {
        "init": config.init,
        "expected": "exact" if is_exact else "differs",
        **proof,
        "seed": config.seed,
        "inputs": {str(folder): hash_files(folder) for folder in folders},
    }
    (path / "proof.json").write_text(json.dumps(proof, indent=2) + "\n", encoding="utf-8")
    return proof


def _verdict(dense: ModelSpec, spec: ModelSpec, config: UpcycleConfig) -> dict[str, Any] | None:
    if config.dense_tokens is None or config.moe_tokens is None:
        return None
    return verdict(
        dense,
        spec,
        dense_tokens=config.dense_tokens,
        moe_tokens=config.moe_tokens,
        relative_cost=config.relative_cost,
    )
