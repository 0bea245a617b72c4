"""The job behind `moesaic generate`: one prompt, one answer, from an engine of its own."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moesaic.checkpoint.folder import read_spec
from moesaic.data.tokenizer import load_tokenizer
from moesaic.errors import ConfigError, ServingError
from moesaic.serving.config import EngineConfig, GenerateConfig, RequestConfig, SamplingConfig
from moesaic.serving.engine.engine import Engine, completions
from moesaic.serving.engine.load import device_of
from moesaic.serving.engine.request import Completion, Event

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def generate(
    config: GenerateConfig, *, on_text: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Answer one prompt.

    Args:
        config: What to ask of which model.
        on_text: Called with each piece of the answer as it arrives, on the caller's thread.

    Returns:
        `text`, `finish_reason` (`stop` or `length`), `prompt_tokens`, `new_tokens`, `seed`,
        `prefill_seconds` and `decode_tokens_per_second` (None for a single token).

    Raises:
        ConfigError: The prompt is empty or too long, a grammar cannot be used, or there is no such
            device.
        FolderError: The model or its tokenizer cannot be read.
    """
    spec = read_spec(config.model)
    tokenizer = load_tokenizer(config.model)
    prompt_ids = encode_prompt(tokenizer, config.prompt, system=config.system, raw=config.raw)
    length = len(prompt_ids) + config.max_new_tokens
    # Before anything large is loaded.
    device_of(config.device)
    if not prompt_ids:
        raise ConfigError("The prompt is empty. Give at least one word.")
    if length > spec.max_positions:
        raise ConfigError(
            f"The prompt has {len(prompt_ids)} tokens, and max_new_tokens is "
            f"{config.max_new_tokens}; together more than the model's context of "
            f"{spec.max_positions}. Shorten the one or lower the other."
        )
    engine = EngineConfig(
        model=config.model,
        dtype=config.dtype,
        weights=config.weights,
        device=config.device,
        implementation=config.implementation,
        max_sequences=1,
        max_context=length,
        kv_tokens=length,
        prefix_cache=False,
    )
    with Engine.load(engine) as loaded:
        return _summary(_answer(loaded, prompt_ids, request_of(config), on_text))


def request_of(config: SamplingConfig) -> RequestConfig:
    """The same sampling as a request of the engine."""
    names = (field.name for field in dataclasses.fields(SamplingConfig))
    return RequestConfig(**{name: getattr(config, name) for name in names})


def _answer(
    engine: Engine,
    prompt_ids: list[int],
    sampling: RequestConfig,
    on_text: Callable[[str], None] | None,
) -> Completion:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request = engine.submit(prompt_ids, sampling, on_event=events.put)

    def show(event: Event) -> None:
        if event.text and on_text is not None:
            on_text(event.text)

    [answer] = completions(request, events, on_event=show)
    if answer.finish_reason == "error":
        raise ServingError(f"The answer ended early: {answer.error}")
    return answer


def _summary(answer: Completion) -> dict[str, Any]:
    decoded = len(answer.tokens) - 1
    seconds = answer.decode_seconds
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.usage.prompt_tokens,
        "new_tokens": len(answer.tokens),
        "seed": answer.seed,
        "prefill_seconds": answer.first_token_seconds or 0.0,
        "decode_tokens_per_second": decoded / seconds if decoded > 0 and seconds > 0 else None,
    }


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
