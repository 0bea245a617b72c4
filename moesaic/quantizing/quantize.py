"""The job behind `moesaic quantize`: 8-bit weights, written while they are read.

Attention's four projections and every feed-forward matrix, routed, shared or dense, become
e4m3 floats or integers of 8 bits; embeddings, head, norms, biases and routers stay as they are,
in 16 bits. No more than two tensors are in memory at a time, whatever the size of the model.

How far a weight is from what it was is told as a relative root mean square,
sqrt(sum (w' - w)^2 / sum w^2), over all tensors of a kind and for the worst of them. The
loss, when a token folder is given, is measured with the rounded weights and exact
activations; an engine that multiplies in 8 bits rounds activations as well.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
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
from moesaic.console import track
from moesaic.errors import ConfigError
from moesaic.evaluation.config import EvaluateConfig
from moesaic.evaluation.evaluate import evaluate
from moesaic.files import NewFolder
from moesaic.quantization import int8
from moesaic.quantization.compressed import (
    IN_WORDS,
    Format,
    Scheme,
    compressed_tensors_config,
    quantization_of,
)
from moesaic.quantization.fp8 import (
    dequantize,
    quantize_per_channel,
    quantize_per_tensor,
)
from moesaic.quantizing.config import QuantizeConfig

_ROUTERS = (".gate.weight", ".shared_expert_gate.weight")
_EXPERTS = (".experts.w1", ".experts.w2", ".experts.w3")

Plan = list[tuple[str, torch.dtype, tuple[int, ...]]]


def quantize(config: QuantizeConfig) -> dict[str, Any]:
    """Write a copy of a model folder with weights of 8 bits.

    Returns:
        What happened, ready for JSON, and written to `quantization.json` in the folder:
        `format`, `scheme`, `bytes_before` and `bytes_after` of the weights, `kinds` (for each
        kind of tensor how many, `relative_rms`, and the worst one), `seconds`, and with a token
        folder `heldout`: `before`, `after` and `difference` in nats a token.

    Raises:
        ConfigError: The model is quantised already.
        FolderError: A folder cannot be read or written, or a weight is not finite.
    """
    start = time.perf_counter()
    done = quantization_of(read_config(config.model))
    if done is not None:
        raise ConfigError(
            f"{config.model} is {IN_WORDS[done.format]} already. Quantise the 16-bit model instead."
        )
    spec = read_spec(config.model)
    entries = disk_entries(spec)
    errors: dict[str, KindError] = {}
    new_folder = NewFolder(config.out, overwrite=config.overwrite, inputs=[config.model])
    with WeightReader(config.model) as reader, new_folder as new:
        check_complete(reader, spec)
        plan = _plan(entries, reader, config.format, config.scheme)
        writer = WeightWriter(new.path, plan)
        _write_weights(entries, reader, writer, config, errors)
        writer.close()
        ignore = ["lm_head"] + [
            entry.name.removesuffix(".weight")
            for entry in entries
            if entry.param.endswith(_ROUTERS)
        ]
        write_config(
            new.path,
            spec,
            dtype=str(_kept_dtype(entries[0], reader)).removeprefix("torch."),
            extra={
                "quantization_config": compressed_tensors_config(
                    config.scheme, ignore, format=config.format
                )
            },
        )
        copy_tokenizer(config.model, new.path)
        summary = {
            "model": str(config.model),
            "out": str(config.out),
            "format": config.format,
            "scheme": config.scheme,
            "bytes_before": sum(_bytes(info.dtype, info.shape) for info in reader.entries.values()),
            "bytes_after": sum(_bytes(dtype, shape) for _, dtype, shape in plan),
            "kinds": {kind: error.summary() for kind, error in errors.items()},
            "seconds": time.perf_counter() - start,
        }
        if config.data is not None:
            summary["heldout"] = _heldout(config, new.path)
        (new.path / "quantization.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


@dataclass
class KindError:
    """How far the tensors of one kind are from what they were."""

    tensors: int = 0
    error: float = 0.0
    """Sum of squared differences."""
    power: float = 0.0
    """Sum of squared weights."""
    worst: float = -1.0
    worst_tensor: str = ""

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """Count one more tensor."""
        error = float((after - before).square().sum(dtype=torch.float64))
        power = float(before.square().sum(dtype=torch.float64))
        self.tensors += 1
        self.error += error
        self.power += power
        if _relative(error, power) > self.worst:
            self.worst, self.worst_tensor = _relative(error, power), name

    def summary(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "tensors": self.tensors,
            "relative_rms": _relative(self.error, self.power),
            "worst_relative_rms": self.worst,
            "worst_tensor": self.worst_tensor,
        }


def _relative(error: float, power: float) -> float:
    return math.sqrt(error / power) if power else 0.0


def _is_rounded(entry: Entry) -> bool:
    return entry.param.endswith("_proj.weight") or entry.param.endswith(_EXPERTS)


def _kept_dtype(entry: Entry, reader: WeightReader) -> torch.dtype:
    dtype = reader.entries[entry.name].dtype
    # The selection bias moves by less than a bfloat16 step, so it alone stays wide.
    wide = dtype.itemsize > 2 and not entry.param.endswith("e_score_correction_bias")
    return torch.bfloat16 if wide else dtype


def _plan(entries: list[Entry], reader: WeightReader, format: Format, scheme: Scheme) -> Plan:
    plan: Plan = []
    dtype = torch.int8 if format == "int8" else torch.float8_e4m3fn
    for entry in entries:
        if not _is_rounded(entry):
            plan.append((entry.name, _kept_dtype(entry, reader), entry.shape))
            continue
        scales = (entry.shape[0], 1) if scheme == "channel" else (1,)
        plan.append((entry.name, dtype, entry.shape))
        plan.append((f"{entry.name}_scale", torch.float32, scales))
    return plan


def _write_weights(
    entries: list[Entry],
    reader: WeightReader,
    writer: WeightWriter,
    config: QuantizeConfig,
    errors: dict[str, KindError],
) -> None:
    names = {(entry.param, entry.expert): entry.name for entry in entries}
    for entry in track(entries, label="quantising"):
        weight = read_finite(reader, entry.name)
        if not _is_rounded(entry):
            writer.write(entry.name, weight.to(_kept_dtype(entry, reader)))
            continue
        weight = weight.float()
        if config.format == "int8":
            rounded, scale = int8.quantize_per_channel(weight)
        elif config.scheme == "channel":
            rounded, scale = quantize_per_channel(weight)
        else:
            largest = _largest(entry, names, reader)
            rounded, scale = quantize_per_tensor(weight, largest=largest)
        writer.write(entry.name, rounded)
        writer.write(f"{entry.name}_scale", scale)
        kind = _kind(entry.param)
        errors.setdefault(kind, KindError()).add(entry.name, weight, dequantize(rounded, scale))


def _largest(
    entry: Entry, names: dict[tuple[str, int | None], str], reader: WeightReader
) -> Tensor | None:
    """Largest magnitude in an expert's w1 and w3, which an engine multiplies in one go."""
    head, _, matrix = entry.param.rpartition(".")
    if matrix not in ("w1", "w3") or entry.expert is None:
        return None
    pair = [names[f"{head}.{which}", entry.expert] for which in ("w1", "w3")]
    return torch.stack([reader.read(name).float().abs().amax() for name in pair]).amax()


def _kind(param: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `self_attn.q_proj`."""
    return param.split(".", 3)[3].removesuffix(".weight").removeprefix("block_sparse_moe.")


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _heldout(config: QuantizeConfig, quantised: Path) -> dict[str, Any]:
    assert config.data is not None, f"{config=}"
    result = evaluate(
        EvaluateConfig(
            models=(config.model, quantised),
            labels=("before", "after"),
            data=config.data,
            max_sequences=config.max_sequences,
            batch_size=config.batch_size,
        )
    )
    before, after = result["models"]
    return {
        "data": str(config.data),
        "tokens": result["tokens"],
        "before": before["loss"],
        "after": after["loss"],
        "difference": after["difference"],
        "difference_standard_error": after["difference_standard_error"],
    }
