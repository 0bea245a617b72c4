"""The job behind `moesaic inspect`: what a model folder is, in numbers.

Sizes come from the headers of the weight files, counts and operations from the spec; only
the experts' similarity reads weights, a slice at a time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moesaic.checkpoint.folder import WeightReader, check_complete, read_config, read_spec
from moesaic.evaluation.similarity import folder_similarity
from moesaic.quantization.fp8 import scheme_of
from moesaic.reporting.config import InspectConfig


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Describe a model folder, dense or MoE, 16-bit or FP8.

    Returns:
        `spec`, every fact of the model; `parameters`, all and `active_parameters`, those that
        one token uses; `flops_per_token`, of a forward pass at `context`, two for each
        multiply-add; `weight_bytes` and `bytes_by_dtype`, on disk; `cache_bytes_per_token`, keys
        and values in 16 bit; `quantization`, the scheme or None; `similarity` by layer, see
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
        "quantization": scheme_of(read_config(folder)),
        "similarity": similarity,
        "spec": dataclasses.asdict(spec),
    }
