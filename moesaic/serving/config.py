"""How text is generated. Nothing here loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError

LEAST_DIVISOR = 1e-6
"""Scores divided by less might overflow float32, and infinite ones have no probabilities."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen, and when to stop.

    Scores pass through these in the order of the fields, as in Hugging Face's `generate`.
    """

    repetition_penalty: float = 1.0
    """Divides the score, or multiplies a negative one, of every token seen so far; 1 is off."""

    temperature: float = 0.0
    """Divides the scores before the softmax; 0 takes the likeliest token every time."""

    top_k: int = 0
    """Choose among this many likeliest tokens; 0 for all."""

    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability; 1 for all."""

    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability."""

    seed: int | None = None
    """Same seed, same text; none draws a new seed each time."""

    max_new_tokens: int = 256
    """Stop after this many tokens."""

    stop: tuple[str, ...] = ()
    """Stop where one of these texts appears; it is not part of the answer."""

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or LEAST_DIVISOR <= self.temperature < math.inf):
            raise ConfigError(
                f"temperature is {self.temperature}. Choose 0, or {LEAST_DIVISOR:g} or more."
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}. Choose 1 or more, or 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}. Choose above 0, at most 1.")
        if not 0 <= self.min_p < 1:
            raise ConfigError(f"min_p is {self.min_p}. Choose 0 or more, below 1.")
        if not LEAST_DIVISOR <= self.repetition_penalty <= 1 / LEAST_DIVISOR:
            raise ConfigError(
                f"repetition_penalty is {self.repetition_penalty}. Choose from {LEAST_DIVISOR:g} "
                f"to {1 / LEAST_DIVISOR:g}; 1 is off."
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}. Ask for at least 1.")
        if "" in self.stop:
            raise ConfigError("A stop text is empty, so every answer would be. Leave it out.")
        self._refuse_what_greedy_ignores()

    def _refuse_what_greedy_ignores(self) -> None:
        if self.temperature > 0:
            return
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("seed", None)):
            if getattr(self, name) != off:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, but temperature 0 always takes the "
                    f"likeliest token. Set a temperature such as 0.7, or leave {name} out."
                )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """One prompt for one model."""

    model: Path
    """Hugging Face folder with a tokenizer, dense or MoE, 16-bit or FP8."""

    prompt: str
    """What the model is asked."""

    system: str | None = None
    """System message for the chat template; none leaves the template's own."""

    raw: bool = False
    """Continue the prompt as it stands, without the chat template."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations. FP8 weights are widened to it while loading."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.raw and self.system is not None:
            raise ConfigError("raw leaves out the chat template, so system has no place. Drop one.")
