"""What is asked of a served model, and what its engine may use. Nothing here loads torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError
from moesaic.parallel.config import LaunchConfig

LEAST_DIVISOR = 1e-6
"""Scores divided by less might overflow float32, and infinite ones have no probabilities."""

MOST_PENALTY = 100.0
"""Far more than the distance between any two scores; beyond it arithmetic ends, not repetition."""

MOST_TOP_LOGPROBS = 100
"""More are no use to anybody and are bought with time."""

DType = Literal["bfloat16", "float32"]
Weights = Literal["auto", "float32", "bfloat16", "float8", "int8"]
KVCache = Literal["auto", "float32", "bfloat16", "float8"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen, and when to stop.

    Scores pass through these in the order of the fields; those that Hugging Face's `generate` has
    too do what they do there.
    """

    repetition_penalty: float = 1.0
    """Divides the score, or multiplies a negative one, of every token seen so far; 1 is off."""

    frequency_penalty: float = 0.0
    """Subtracted from the score of a token each time it was chosen; 0 is off."""

    presence_penalty: float = 0.0
    """Subtracted from the score of every token that was chosen at all; 0 is off."""

    regex: str | None = None
    """Only answers that match this regular expression as a whole."""

    json_schema: str | None = None
    """Only answers that are JSON of this schema."""

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

    stop_token_ids: tuple[int, ...] = ()
    """Stop at one of these tokens; it is not part of the answer."""

    ignore_eos: bool = False
    """Take the model's own end tokens for text like any other."""

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
        for name in ("frequency_penalty", "presence_penalty"):
            if not abs(getattr(self, name)) <= MOST_PENALTY:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}. Choose from {-MOST_PENALTY:g} to "
                    f"{MOST_PENALTY:g}; 0 is off."
                )
        least = self._least_new_tokens()
        if self.max_new_tokens < least:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}. Ask for at least {least}.")
        if "" in self.stop:
            raise ConfigError("A stop text is empty, so every answer would be. Leave it out.")
        self._check_grammar()

    def _least_new_tokens(self) -> int:
        return 1

    def _check_grammar(self) -> None:
        if self.regex is not None and self.json_schema is not None:
            raise ConfigError("Both regex and json_schema are given. Choose one.")
        if self.json_schema is not None:
            try:
                json.loads(self.json_schema)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"json_schema is not JSON: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class RequestConfig(SamplingConfig):
    """All that one request may ask of the engine."""

    n: int = 1
    """Answers to the prompt. Answer i > 0 is drawn from a seed made of `seed` and i."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the scores of these tokens, after the penalties and before the grammar."""

    logprobs: bool = False
    """Give the log probability of every chosen token, and its text and bytes."""

    top_logprobs: int = 0
    """With logprobs, give this many likeliest tokens beside each."""

    prompt_logprobs: bool = False
    """Give log probabilities, and `top_logprobs`, of the prompt's tokens too. Their prompt is
    computed anew, whatever the cache holds. max_new_tokens may then be 0."""

    experts: bool = False
    """Say which experts of each layer worked where a token was chosen."""

    embedding: Literal["none", "last", "mean"] = "none"
    """Instead of an answer give the model's normed hidden state after the last token, or the mean
    over all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ConfigError(f"n is {self.n}. Ask for at least 1 answer.")
        if self.n > 1 and (self.embedding != "none" or self.max_new_tokens == 0):
            raise ConfigError(f"n is {self.n}, but without new tokens all answers are one. Drop n.")
        if not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise ConfigError(
                f"top_logprobs is {self.top_logprobs}. Choose from 0 to {MOST_TOP_LOGPROBS}."
            )
        if self.top_logprobs and not (self.logprobs or self.prompt_logprobs):
            raise ConfigError("top_logprobs is given without logprobs. Ask for both.")
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= MOST_PENALTY:
                raise ConfigError(
                    f"The logit_bias of token {token} is {bias}. Choose from {-MOST_PENALTY:g} "
                    f"to {MOST_PENALTY:g}."
                )

    def _least_new_tokens(self) -> int:
        return 0 if self.prompt_logprobs or self.embedding != "none" else 1


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """A model to serve, and what it may take. Every default is Moesaic's own choice."""

    model: Path
    """Hugging Face folder with a tokenizer, dense or MoE, 16-bit or 8-bit."""

    plan: Path | None = None
    """What `moesaic plan serve` wrote; none: one rank."""

    dtype: DType = "bfloat16"
    """Of activations, and of weights that are not stored in 8 bits."""

    weights: Weights = "auto"
    """What matrices are stored in while serving; auto: 8-bit where the folder has them so, else as
    dtype."""

    kv_cache: KVCache = "auto"
    """What keys and values are stored in; auto: as dtype."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""

    implementation: Literal["auto", "torch", "native"] = "auto"
    """Whose kernels: torch's, or Moesaic's own; auto: our own where they can be built."""

    max_sequences: int = 32
    """Answers that are computed at the same time; more wait."""

    max_step_tokens: int = 512
    """Tokens that go through the model in one step. More makes long prompts faster, fewer makes
    answers that run beside them steadier."""

    max_waiting: int = 256
    """Answers that may wait; a request beyond that is not taken."""

    max_context: int | None = None
    """Tokens of prompt and answer together; none: as many as the model was made for."""

    kv_tokens: int | None = None
    """Tokens that the cache holds, over all answers; none: as many as max_sequences answers of
    max_context need, if memory_gib allows."""

    memory_gib: float | None = None
    """What weights, cache and work may take, on each rank; none: what they need, the cache at
    most half of what the others leave free, of a GPU's memory nine tenths."""

    block_tokens: int | None = None
    """Tokens in one block of the cache, of which prompts share whole ones; none: as the plan says,
    or 16."""

    prefix_cache: bool = True
    """Keep blocks of ended answers for prompts that begin alike."""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_step_tokens", "max_context", "kv_tokens"):
            self._check_count(name, 1)
        self._check_count("max_waiting", 0)
        self._check_count("block_tokens", 1)
        if self.max_step_tokens < self.max_sequences:
            raise ConfigError(
                f"max_step_tokens is {self.max_step_tokens}, but each of max_sequences "
                f"{self.max_sequences} answers takes one token a step. Raise the one or lower "
                f"the other."
            )
        if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
            raise ConfigError(f"memory_gib is {self.memory_gib}. Choose above 0.")

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}. Choose {least} or more.")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """One prompt for one model."""

    model: Path
    """Hugging Face folder with a tokenizer, dense or MoE, 16-bit or 8-bit."""

    prompt: str
    """What the model is asked."""

    system: str | None = None
    """System message for the chat template; none leaves the template's own."""

    raw: bool = False
    """Continue the prompt as it stands, without the chat template."""

    dtype: DType = "bfloat16"
    """Of activations, and of weights that are not stored in 8 bits."""

    weights: Weights = "auto"
    """What matrices are stored in; auto: 8-bit where the folder has them so, else as dtype."""

    implementation: Literal["auto", "torch", "native"] = "auto"
    """Whose kernels: torch's, or Moesaic's own; auto: our own where they can be built."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.raw and self.system is not None:
            raise ConfigError("raw leaves out the chat template, so system has no place. Drop one.")
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
class ServeConfig(EngineConfig):
    """An engine behind HTTP. Every default is Moesaic's own choice."""

    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines in: give api_keys then."""

    port: int = 8000
    """Port to listen on; 0 takes any that is free, and says which."""

    name: str | None = None
    """What clients call the model; none: what its folder is called."""

    ranks: int | None = None
    """Start so many processes on this machine, each with its share of every layer; none: as many
    as the plan has, or one."""

    api_keys: Path | None = None
    """File with one key a line. A request must carry one of them; none lets everyone in."""

    max_new_tokens: int | None = None
    """Tokens of one answer; a request for more is refused. None: up to the end of the context."""

    max_requests: int = 512
    """HTTP requests at the same time; more are answered 503."""

    max_body_bytes: int = 8 * 2**20
    """Longest body of a request."""

    body_seconds: float = 30.0
    """Longest that the first request of a connection, and the body of any, may take to come."""

    request_seconds: float = 600.0
    """Longest that an answer may take, from first to last."""

    write_seconds: float = 60.0
    """A client that reads nothing for so long is given up."""

    drain_seconds: float = 60.0
    """When asked to stop, answers that were begun have so long to end."""

    log: Literal["text", "json", "none"] = "text"
    """How each request is written to stderr, in one line."""

    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How ranks start, and how often they start again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "max_requests", "max_body_bytes", "ranks"):
            self._check_count(name, 1)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port is {self.port}. Choose from 0 to {2**16 - 1}.")
        for name in ("body_seconds", "request_seconds", "write_seconds", "drain_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}. Choose above 0.")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A conversation at the terminal."""

    model: str
    """Model folder, or the address of a server that speaks OpenAI's API, as
    http://127.0.0.1:8000."""

    system: str | None = None
    """System message; none leaves the template's own."""

    temperature: float = 0.7
    """0 takes the likeliest token every time."""

    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability; 1 for all."""

    seed: int | None = None
    """Same seed, same conversation; none draws a new seed for each answer."""

    max_new_tokens: int = 1024
    """Stop an answer after this many tokens."""

    name: str | None = None
    """The model's name on the server; none: the first that it lists."""

    api_key: str | None = None
    """Key for the server; none: what OPENAI_API_KEY says, if anything."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature is {self.temperature}. Choose from 0 to 2.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}. Choose above 0, at most 1.")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}. Ask for at least 1.")


@dataclass(frozen=True, kw_only=True)
class BenchServeConfig:
    """Load for a server that speaks OpenAI's API, and what is measured of it."""

    url: str
    """Its address, as http://127.0.0.1:8000."""

    name: str | None = None
    """The model's name there; none: the first that the server lists."""

    api_key: str | None = None
    """Key for the server; none: what OPENAI_API_KEY says, if anything."""

    requests: int = 64
    """Requests in all."""

    concurrency: int | None = None
    """Requests at the same time: as one ends the next begins. None: 8, unless rate is given."""

    rate: float | None = None
    """Requests a second, at random moments (Poisson), however many are open."""

    prompt_tokens: tuple[int, int] = (64, 256)
    """Least and most tokens of a prompt, drawn evenly. Exact with a tokenizer, else words."""

    output_tokens: tuple[int, int] = (32, 128)
    """Least and most tokens of an answer, drawn evenly."""

    tokenizer: Path | None = None
    """Model folder whose tokenizer the server has, so that prompts have exact lengths."""

    ignore_eos: bool = True
    """Ask for answers of exactly the length drawn. Not every server knows it: turn it off there."""

    seed: int = 0
    """Same seed, same prompts, lengths and moments."""

    timeout_seconds: float = 300.0
    """A request that takes longer has failed."""

    out: Path | None = None
    """Folder for `bench.json` and `bench.svg`; none only prints."""

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.rate is not None:
            raise ConfigError(
                "Both concurrency and rate are given. One fixes how many requests are open, the "
                "other how many begin; choose one."
            )
        for name in ("requests", "concurrency", "rate", "timeout_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}. Choose above 0.")
        for name in ("prompt_tokens", "output_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ConfigError(f"{name} is {least} to {most}. Choose 1 or more, least first.")
