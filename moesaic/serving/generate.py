"""The job behind `moesaic generate`: one prompt, one answer, with a key-value cache.

The prompt goes through the model once (prefill), then one token at a time (decode).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.checkpoint.folder import read_config
from moesaic.console import note
from moesaic.data.tokenizer import load_tokenizer
from moesaic.errors import ConfigError
from moesaic.model.build import load_model
from moesaic.model.cache import KVCache
from moesaic.model.transformer import Transformer
from moesaic.quantization.compressed import IN_WORDS, quantization_of
from moesaic.serving.config import GenerateConfig, SamplingConfig
from moesaic.serving.sample import next_token
from moesaic.serving.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def generate(
    config: GenerateConfig, *, on_text: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Answer one prompt.

    Args:
        config: What to ask of which model.
        on_text: Called with each piece of the answer as it arrives.

    Returns:
        `text`, `finish_reason` (`stop` or `length`), `prompt_tokens`, `new_tokens`, `seed`,
        `prefill_seconds` and `decode_tokens_per_second` (None for a single token).

    Raises:
        ConfigError: The prompt is empty or too long, or there is no such device.
        FolderError: The model or its tokenizer cannot be read.
    """
    quantization = quantization_of(read_config(config.model))
    if quantization is not None:
        what = IN_WORDS[quantization.format]
        note(f"{config.model} is {what}: its weights are widened to {config.dtype} while loading.")
    tokenizer = load_tokenizer(config.model)
    model = load_model(
        config.model, dtype=getattr(torch, config.dtype), device=_device(config.device)
    )
    answer = generate_text(
        model,
        tokenizer,
        config.prompt,
        sampling=config,
        system=config.system,
        raw=config.raw,
        eos_token_ids=eos_token_ids(config.model, model),
        on_text=on_text,
    )
    return answer.summary()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered, and how long it took."""

    text: str
    tokens: tuple[int, ...]
    """Token ids of the answer, without the end token."""
    finish_reason: Literal["stop", "length"]
    """`stop`: an end token or a stop text; `length`: max_new_tokens were reached."""
    prompt_tokens: int
    seed: int | None
    """The seed that was used; None at temperature 0."""
    prefill_seconds: float
    """Until the first token was there."""
    decode_seconds: float
    """From the first token to the last."""

    def summary(self) -> dict[str, Any]:
        """Ready for JSON."""
        decoded = len(self.tokens) - 1
        rate = decoded / self.decode_seconds if decoded > 0 and self.decode_seconds > 0 else None
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.tokens),
            "seed": self.seed,
            "prefill_seconds": self.prefill_seconds,
            "decode_tokens_per_second": rate,
        }


def generate_text(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    sampling: SamplingConfig,
    system: str | None = None,
    raw: bool = False,
    eos_token_ids: Collection[int] = (),
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer a question, or continue a text.

    Args:
        model: A model in eval mode.
        tokenizer: Its tokenizer.
        prompt: What the user says. It goes through the tokenizer's chat template if there is one.
        sampling: How tokens are chosen, and when to stop.
        system: System message for the chat template.
        raw: Continue the prompt as it stands, without the template.
        eos_token_ids: Tokens that end an answer, beside those of the model's spec.
        on_text: Called with each piece of text as it becomes certain.

    Raises:
        ConfigError: The prompt is empty, or with max_new_tokens longer than the model's context,
            or `system` is given and there is no template, or the template refuses it.
    """
    prompt_ids = encode_prompt(tokenizer, prompt, system=system, raw=raw)
    seed = sampling.seed
    if seed is None and sampling.temperature > 0:
        seed = torch.seed() % 2**32
    stream = TextStream(tokenizer, sampling.stop)
    ends = {*eos_token_ids, *model.spec.eos_token_ids}
    tokens: list[int] = []
    pieces: list[str] = []

    def give(text: str) -> None:
        pieces.append(text)
        if text and on_text is not None:
            on_text(text)

    finish: Literal["stop", "length"] = "length"
    start = first = last = time.perf_counter()
    for token in generate_tokens(model, prompt_ids, sampling=sampling, seed=seed):
        last = time.perf_counter()
        first = first if tokens else last
        if token in ends:
            finish = "stop"
            break
        tokens.append(token)
        give(stream.add(token))
        if stream.is_stopped:
            finish = "stop"
            break
    give(stream.finish())
    return Answer(
        text="".join(pieces),
        tokens=tuple(tokens),
        finish_reason=finish,
        prompt_tokens=len(prompt_ids),
        seed=seed,
        prefill_seconds=first - start,
        decode_seconds=last - first,
    )


@torch.no_grad()
def generate_tokens(
    model: Transformer,
    prompt_ids: list[int],
    *,
    sampling: SamplingConfig,
    seed: int | None = None,
) -> Iterator[int]:
    """Yield `max_new_tokens` tokens, end tokens included; the caller stops when it likes.

    Raises:
        ConfigError: The prompt is empty, or with max_new_tokens longer than the model's context.
    """
    length = len(prompt_ids) + sampling.max_new_tokens
    if not prompt_ids:
        raise ConfigError("The prompt is empty. Give at least one word.")
    if length > model.spec.max_positions:
        raise ConfigError(
            f"The prompt has {len(prompt_ids)} tokens, and max_new_tokens is "
            f"{sampling.max_new_tokens}; together more than the model's context of "
            f"{model.spec.max_positions}. Shorten the one or lower the other."
        )
    device = model.head_weight.device
    dtype = model.compute_dtype or model.head_weight.dtype
    cache = KVCache(model.spec, 1, length, dtype=dtype, device=device)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    # In bfloat16 a score near 25 is known to 0.1 only, and the best two are often nearer.
    head_VD = model.head_weight.to(torch.promote_types(dtype, torch.float32))
    seen = list(prompt_ids)
    new = prompt_ids
    for _ in range(sampling.max_new_tokens):
        hidden_D = _last_hidden(model, torch.tensor([new], device=device), cache)
        logits_V = F.linear(hidden_D.to(head_VD.dtype), head_VD).cpu()
        token = next_token(logits_V, sampling, seen=seen, generator=generator)
        yield token
        seen.append(token)
        new = [token]


def _last_hidden(model: Transformer, input_ids_BS: Tensor, cache: KVCache) -> Tensor:
    # The head only sees the last position: a long prompt's logits would fill gigabytes.
    hidden_BSD, _ = model.hidden(input_ids_BS, cache=cache)
    return hidden_BSD[0, -1]


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: str, *, system: str | None = None, raw: bool = False
) -> list[int]:
    """Token ids of a prompt, put as the chat template says if there is one and `raw` is not set.

    Raises:
        ConfigError: `system` is given and there is no template, or the template refuses it.
    """
    if raw or not tokenizer.chat_template:
        if system is not None:
            raise ConfigError("Without a chat template system has no place. Leave it out.")
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ConfigError(f"The chat template refuses this: {error}. Try raw.") from error
    # The template writes its special tokens itself, such as the one that begins a text.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def eos_token_ids(folder: Path, model: Transformer) -> set[int]:
    """Tokens that end an answer: those of `config.json` and of `generation_config.json`."""
    ends = set(model.spec.eos_token_ids)
    path = folder / "generation_config.json"
    if path.is_file():
        stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ends.update([stated] if isinstance(stated, int) else stated or ())
    return ends


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("The device is cuda, but no GPU is usable here. Use cpu or auto.")
    return torch.device("cuda")
