"""What clients send and get: OpenAI's bodies, each field checked, none ignored.

A field that is not here is refused by its name, and so is a value that would change nothing. Of
OpenAI's fields those stand here that this server does as OpenAI says; a few more stand here with
the one value that asks for nothing, because clients send it. Moesaic's own come last in each
class: OpenAI's client sends them with `extra_body`. null is the same as leaving a field out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

LARGEST_N = 128
"""Answers to one prompt at most, as in OpenAI's API."""

LARGEST_TOP_LOGPROBS = 20
"""Other tokens that an answer may list beside each of its own, as in OpenAI's API."""

LARGEST_SEED = 2**63 - 1


class Body(BaseModel):
    """What a client sends: types as they stand here, and no other fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class Reply(BaseModel):
    """What it gets."""

    model_config = ConfigDict(extra="forbid")


# What a text is asked for with


class StreamOptions(Body):
    """More about a stream."""

    include_usage: bool | None = None
    """Send one more chunk at the end, with no choices, that counts the tokens."""
    include_obfuscation: Literal[False] | None = None
    """Padding against watchers of the wire is not added."""


Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class SamplingFields(Body):
    """How tokens are chosen, and when to stop: the same for chat and for plain completions."""

    model: str
    """As /v1/models names it."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """1 unless given; 0 takes the likeliest token every time."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """Token id to what is added to its score."""
    n: Annotated[int, Field(ge=1, le=LARGEST_N)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED - 1, le=LARGEST_SEED)] | None = None
    """Same seed, same answer; each of n answers draws differently."""
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Written into the log."""

    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Moesaic's own. Choose among so many likeliest tokens; 0 for all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Moesaic's own. Drop tokens less likely than this share of the likeliest one's."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Moesaic's own. Divides scores of tokens seen so far; 1 is off."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    """Moesaic's own. Stop at any of these tokens, which are no part of the answer."""
    ignore_eos: bool | None = None
    """Moesaic's own. Go on after the model's end token, up to max_tokens; for load tests."""
    experts: bool | None = None
    """Moesaic's own. Say which experts each new token used, layer by layer."""

    @model_validator(mode="after")
    def _only_streams_have_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self


# Chat


class TextPart(Body):
    """A part of a message. Images, sound and files are not understood."""

    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class SystemMessage(Body):
    """`developer` is what OpenAI calls system messages now; templates know `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str
    """JSON."""


class CallMessage(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Body):
    """What the model said before; also as it stood in an answer, with its empty fields."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[CallMessage] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant message needs content or tool_calls")
        return self


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments; none takes no arguments."""
    strict: bool | None = None
    """Arguments follow the schema where a call is required; with `auto` only false may be said."""


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Body):
    type: Literal["text"]


class JsonFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """The answer follows the schema in either case."""


class SchemaFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Body):
    """Moesaic's own: text that matches a regular expression."""

    type: Literal["regex"]
    regex: Annotated[str, StringConstraints(min_length=1, max_length=10_000)]


ResponseFormat = Annotated[
    TextFormat | JsonFormat | SchemaFormat | RegexFormat, Field(discriminator="type")
]


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Up to the end of the context unless given."""
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The older name of max_completion_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LARGEST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    """Whether one answer may call several functions; true unless given."""
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    store: Literal[False] | None = None
    """Nothing is stored."""
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one thing; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        named = isinstance(self.tool_choice, NamedTool)
        if not self.tools:
            if named or self.tool_choice in ("auto", "required"):
                raise ValueError("tool_choice needs tools")
            if self.parallel_tool_calls is not None:
                raise ValueError("parallel_tool_calls needs tools")
            return self
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, no tool does")
        if self.tool_choice in (None, "auto") and any(tool.function.strict for tool in self.tools):
            raise ValueError(
                "strict needs tool_choice to be required or to name a function: what a model may "
                "or may not call is not held to a schema"
            )
        is_shaped = self.response_format is not None and self.response_format.type != "text"
        if is_shaped and self.tool_choice != "none":
            raise ValueError("response_format and tools are both forms of an answer; give one")
        return self


# Plain completions

Tokens = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=2048)]
    """Text or token ids, one prompt or several."""
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """16 unless given. 0 is for `echo` alone, to read the prompt's own logprobs."""
    echo: bool | None = None
    """Begin the answer with the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=LARGEST_TOP_LOGPROBS)] | None = None
    """Other tokens listed beside each; with `echo` beside those of the prompt too."""
    best_of: Literal[1] | None = None
    suffix: None = None

    response_format: ResponseFormat | None = None
    """Moesaic's own here: the form that an answer has, as in chat."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which without echo asks for nothing")
        return self


# Embeddings


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: str
    input: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    """base64: little-endian float32."""
    user: str | None = None

    pooling: Literal["mean", "last"] | None = None
    """Moesaic's own. Of the last layer's normed hidden states: their mean unless given, or that of
    the last token. Of length 1 in either case."""


# Answers


class CachedTokens(Reply):
    cached_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]
    refusal: None = None


class ReplyFunction(Reply):
    name: str
    arguments: str


class ReplyCall(Reply):
    id: str
    type: Literal["function"] = "function"
    function: ReplyFunction


class ReplyMessage(Reply):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ReplyCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class TokenExperts(Reply):
    """Which experts a token used."""

    text: str
    experts: list[list[int]]
    """Layer by layer, best first."""


class ChatChoice(Reply):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    experts: list[TokenExperts] | None = None


class ChatCompletion(Reply):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    experts: list[TokenExperts] | None = None


class Completion(Reply):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Embedding(Reply):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Reply):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    pooling: Literal["mean", "last"]


class MoEFacts(Reply):
    """What a mixture of experts is made of."""

    layers: int
    """Those with experts."""
    experts: int
    top_k: int


class ModelFacts(Reply):
    """Moesaic's own."""

    chat: bool
    """Whether it has a chat template."""
    moe: MoEFacts | None
    """None of a dense model."""


class Model(Reply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    """Tokens of a prompt and its answer together."""
    moesaic: ModelFacts


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(Reply):
    status: Literal["ok", "draining", "failed"]


class Fault(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Reply):
    """OpenAI's form of every error."""

    error: Fault
