"""The job behind `moesaic inspect`: what a model folder is, in numbers.

Sizes come from the headers of the weight files, counts and operations from the spec; only
the experts' similarity reads weights, a slice at a time.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic.checkpoint.folder import WeightReader, check_complete, read_config, read_spec
from moesaic.evaluation.similarity import folder_similarity
from moesaic.quantization.compressed import quantization_of
from moesaic.reporting import words
from moesaic.reporting.config import InspectConfig


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Describe a model folder, dense or MoE, 16-bit or FP8.

    Returns:
        `spec`, every fact of the model; `parameters`, all and `active_parameters`, those that
        one token uses; `flops_per_token`, of a forward pass at `context`, two for each
        multiply-add; `weight_bytes` and `bytes_by_dtype`, on disk; `cache_bytes_per_token`, keys
        and values in 16 bit; `format` and
        `quantization`, the scheme, or None; `similarity` by layer, see
        `moesaic.evaluation.similarity`, or None. Ready for JSON.

    Raises:
        FolderError: If the folder is missing, damaged or incomplete.
        SpecError: If it holds a model that Moesaic does not know.
    """
    folder = Path(config.model)
    spec = read_spec(folder)
    with WeightReader(folder) as reader:
        check_complete(reader, spec)
        by_dtype: dict[str, int] = {}
        for entry in reader.entries.values():
            name = str(entry.dtype).removeprefix("torch.")
            by_dtype[name] = by_dtype.get(name, 0) + entry.num_bytes
    quantization = quantization_of(read_config(folder))
    similarity = None
    if spec.moe is not None and config.similarity:
        similarity = {str(layer): value for layer, value in folder_similarity(folder).items()}
    return {
        "folder": str(folder),
        "family": spec.family,
        "parameters": spec.num_params(),
        "active_parameters": spec.active_params(),
        "context": config.context,
        "flops_per_token": spec.flops_per_token(config.context),
        "weight_bytes": sum(by_dtype.values()),
        "bytes_by_dtype": by_dtype,
        "cache_bytes_per_token": 2 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim,
        "format": None if quantization is None else quantization.format,
        "quantization": None if quantization is None else quantization.scheme,
        "similarity": similarity,
        "spec": dataclasses.asdict(spec),
    }


def render(summary: Mapping[str, Any]) -> str:
    """What `inspect` returned, as a table for people."""
    spec, moe = summary["spec"], summary["spec"]["moe"]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("model", f"{summary['folder']}, family {summary['family']}")
    table.add_row(
        "layers",
        f"{spec['num_layers']} of width {spec['hidden_dim']:,}: {spec['num_heads']} heads of "
        f"{spec['head_dim']} on {spec['num_kv_heads']} key-value heads",
    )
    if moe is None or len(spec["moe_layers"]) < spec["num_layers"]:
        dense = spec["num_layers"] - len(spec["moe_layers"])
        table.add_row("dense layers", f"{dense} with an inner width of {spec['ffn_dim']:,}")
    if moe is not None:
        table.add_row("MoE layers", f"{len(spec['moe_layers'])} with {_experts(moe)}")
    table.add_row(
        "vocabulary",
        f"{spec['vocab_size']:,} tokens, {'tied' if spec['tied_embeddings'] else 'untied'} "
        f"embeddings; context {spec['max_positions']:,} tokens",
    )
    parameters = words.count(summary["parameters"])
    if moe is not None:
        parameters += f", of which {words.count(summary['active_parameters'])} serve one token"
    table.add_row("parameters", parameters)
    table.add_row(
        "compute",
        f"{words.count(summary['flops_per_token'])} operations forward, for the token at position "
        f"{summary['context']:,}",
    )
    sizes = ", ".join(
        f"{words.byte_count(size)} {name}" for name, size in summary["bytes_by_dtype"].items()
    )
    table.add_row("weights", f"{words.byte_count(summary['weight_bytes'])} on disk: {sizes}")
    table.add_row("KV cache", f"{summary['cache_bytes_per_token']:,} bytes a token in 16 bit")
    if summary["quantization"] is not None:
        what = "int8" if summary["format"] == "int8" else "FP8 e4m3"
        table.add_row("quantised", f"{what}, one scale a {summary['quantization']}")
    if summary["similarity"]:
        table.add_row("similarity", "of the experts, layer by layer (1: copies, 0: unrelated)")
        _add_similarity(table, summary["similarity"])
    text = io.StringIO()
    Console(file=text, width=100, highlight=False, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _experts(moe: Mapping[str, Any]) -> str:
    parts = [
        f"{moe['num_experts']} experts of inner width {moe['expert_dim']:,}, top-{moe['top_k']}"
    ]
    if moe["shared_expert_dim"]:
        parts.append(f"a shared expert of {moe['shared_expert_dim']:,}")
    if moe["gate_norm_scale"] is not None:
        parts.append(f"gating logits normalised to {moe['gate_norm_scale']:g}")
    if moe["selection_bias"]:
        parts.append("a selection bias")
    return ", ".join(parts)


def _add_similarity(table: Table, by_layer: Mapping[str, float], *, a_row: int = 8) -> None:
    layers = list(by_layer)
    shown = words.cosines(*by_layer.values())
    for start in range(0, len(layers), a_row):
        row = layers[start : start + a_row]
        name = f"  layer {row[0]}" if len(row) == 1 else f"  {row[0]} to {row[-1]}"
        table.add_row(name, "  ".join(shown[start : start + a_row]))
