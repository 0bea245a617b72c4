"""The job behind `moesaic evaluate`: held-out loss of models, side by side on the same text."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import ConfigError, FolderError
from moesaic.evaluation.config import EvaluateConfig
from moesaic.evaluation.heldout import HeldoutLoss, heldout_loss
from moesaic.files import refuse_impossible_file, write_text_atomic
from moesaic.model.build import load_model


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure every model on the same sequences, and each against the first.

    Returns:
        What was read (`data`, `split`, `sequences`, `tokens`) and `models`: for each its
        `label`, `folder`, `loss` (nats a token), `perplexity`, `standard_error`, `sources`
        and, from the second on, `difference` to the first with its standard error. Ready for
        JSON, and written to `config.out` if that is given.

    Raises:
        FolderError: A folder cannot be read, `config.out` cannot be written, or a model's loss is
            not finite.
        DataError: The tokens do not fit a model.
    """
    device = _device(config.device)
    if config.out is not None:
        refuse_impossible_file(config.out)
    tokens = TokenFolder(config.data)
    labels = config.labels or tuple(folder.resolve().name for folder in config.models)
    losses: list[HeldoutLoss] = []
    models: list[dict[str, Any]] = []
    for label, folder in zip(labels, config.models, strict=True):
        model = load_model(folder, dtype=getattr(torch, config.dtype), device=device)
        start = time.perf_counter()
        loss = heldout_loss(
            model,
            tokens,
            split=config.split,
            max_sequences=config.max_sequences,
            batch_size=config.batch_size,
            label=label,
        )
        seconds = time.perf_counter() - start
        del model  # two models need not fit together
        if not math.isfinite(loss.loss):
            raise FolderError(
                f"The loss of {folder} is {loss.loss} in {config.dtype}, so its weights are "
                f"damaged or overflow. Try dtype float32."
            )
        losses.append(loss)
        models.append(_described(label, folder, loss, losses[0]) | {"seconds": seconds})
    result = {
        "data": str(config.data),
        "split": config.split,
        "dtype": config.dtype,
        "sequence_length": tokens.sequence_length,
        "sequences": len(losses[0].sequences),
        "tokens": losses[0].tokens,
        "models": models,
    }
    if config.out is not None:
        write_text_atomic(config.out, json.dumps(result, indent=2) + "\n")
    return result


def _described(label: str, folder: Path, loss: HeldoutLoss, first: HeldoutLoss) -> dict[str, Any]:
    difference, error = (None, None) if loss is first else loss.minus(first)
    return {
        "label": label,
        "folder": str(folder),
        **_numbers(loss),
        "difference": difference,
        "difference_standard_error": error,
        "sources": {name: _numbers(part) for name, part in loss.sources.items() if part.tokens},
    }


def _numbers(loss: HeldoutLoss) -> dict[str, Any]:
    return {
        "loss": loss.loss,
        "perplexity": loss.perplexity,
        "standard_error": loss.standard_error,
        "tokens": loss.tokens,
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"The device {name!r} cannot be used here. Use cpu, cuda or auto."
        ) from error
