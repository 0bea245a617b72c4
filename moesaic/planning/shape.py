"""What the planner must know of a model: the sizes of its matrices, layer by layer.

A `ModelShape` says more families than training builds (latent attention, two-matrix networks,
learned positions), and less of each: nothing about how weights are named or rotated. It comes
from the name of a preset, from any `config.json` that describes a decoder, or from a `ModelSpec`.

Matrices are written as inputs times outputs. How tensor-parallel ranks share one:

    columns     each has some of the outputs        rows    each has some of the inputs
    whole       each has all of it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moesaic.errors import PlanError
from moesaic.spec import PRESETS, ModelSpec


class Matrix(NamedTuple):
    """One weight matrix that tokens are multiplied by."""

    name: str
    inputs: int
    outputs: int
    shared: Literal["columns", "rows", "whole"]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Causal attention of one layer: grouped queries, or latent attention (DeepSeek-V2)."""

    heads: int
    kv_heads: int
    head_dim: int
    """Of queries and keys; with latent attention, of their part without positions."""
    value_dim: int
    """Of values."""
    q_rank: int | None = None
    """Width of the queries' latent; None: queries come straight from the hidden state."""
    kv_rank: int | None = None
    """Width of the keys' and values' latent; None: no latent attention."""
    rope_dim: int = 0
    """Width that latent attention adds to each query, and to one key for all heads."""
    bias: bool = False
    """On queries, keys and values."""
    out_bias: bool = False
    """On the output."""
    norms: bool = False
    """A norm over each query and key head."""
    window: int | None = None
    """A token attends to this many latest positions; None: to all before it."""

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Its weight matrices."""
        out = Matrix("output", self.heads * self.value_dim, hidden, "rows")
        if self.kv_rank is None:
            width = (self.heads + self.kv_heads) * self.head_dim + self.kv_heads * self.value_dim
            return (Matrix("qkv", hidden, width, "columns"), out)
        query = self.heads * self.score_dim
        if self.q_rank is None:
            queries: tuple[Matrix, ...] = (Matrix("queries", hidden, query, "columns"),)
        else:
            queries = (
                Matrix("queries_down", hidden, self.q_rank, "whole"),
                Matrix("queries_up", self.q_rank, query, "columns"),
            )
        up = self.heads * (self.head_dim + self.value_dim)
        return (
            *queries,
            Matrix("latent_down", hidden, self.kv_rank + self.rope_dim, "whole"),
            Matrix("latent_up", self.kv_rank, up, "columns"),
            out,
        )

    @property
    def score_dim(self) -> int:
        """Width over which a query and a key are multiplied."""
        return self.head_dim + self.rope_dim

    def vectors(self, hidden: int) -> int:
        """Parameters that are no matrix: biases and norms inside."""
        count = 0
        if self.bias:
            width = (self.heads + self.kv_heads) * self.head_dim + self.kv_heads * self.value_dim
            count += width
        if self.out_bias:
            count += hidden
        if self.norms:
            count += 2 * self.head_dim
        if self.kv_rank is not None:
            count += self.kv_rank + (self.q_rank or 0)
        return count

    def parameters(self, hidden: int) -> int:
        """All of them, the norm before attention not counted."""
        return _size(self.matrices(hidden)) + self.vectors(hidden)

    def attended(self, sequence: int) -> float:
        """Positions that a token attends to on average, itself included."""
        if self.window is None or self.window >= sequence:
            return (sequence + 1) / 2
        window = self.window
        return (window * (window + 1) / 2 + (sequence - window) * window) / sequence

    def core_flops(self, sequence: int) -> float:
        """Operations of scores and values of one token's forward pass, all heads."""
        return 2 * self.heads * (self.score_dim + self.value_dim) * self.attended(sequence)


@dataclass(frozen=True, kw_only=True)
class DenseShape:
    """A feed-forward network that every token passes."""

    ffn_dim: int
    matrices_count: int = 3
    """3 where one matrix gates another (SwiGLU), else 2."""
    bias: bool = False

    def matrices(self, hidden: int) -> tuple[Matrix, ...]:
        """Its weight matrices, gate and up as one."""
        return _network("", hidden, self.ffn_dim, self.matrices_count)

    def parameters(self, hidden: int) -> int:
        """All of them, the norm before it not counted."""
        bias = (self.matrices_count - 1) * self.ffn_dim + hidden if self.bias else 0
        return _size(self.matrices(hidden)) + bias


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """A mixture of experts."""

    experts: int
    top_k: int
    expert_dim: int
    """Inner width of one routed expert."""
    shared_dim: int = 0
    """Inner width of the shared experts together; 0 for none."""
    shared_gate: bool = False
    """Whether the shared expert has a gate of its own."""
    matrices_count: int = 3
    bias: bool = False

    def expert(self, hidden: int) -> tuple[Matrix, ...]:
        """Weight matrices of one routed expert."""
        return _network("expert_", hidden, self.expert_dim, self.matrices_count)

    def shared(self, hidden: int) -> tuple[Matrix, ...]:
        """Weight matrices of the shared experts, as one network."""
        if not self.shared_dim:
            return ()
        return _network("shared_", hidden, self.shared_dim, self.matrices_count)

    def expert_parameters(self, hidden: int) -> int:
        """Of one routed expert."""
        bias = (self.matrices_count - 1) * self.expert_dim + hidden if self.bias else 0
        return _size(self.expert(hidden)) + bias

    def router_parameters(self, hidden: int) -> int:
        """Of the router and the shared expert's gate, which no rank shares."""
        return (
            hidden * self.experts
            + (self.experts if self.bias else 0)
            + (hidden if self.shared_gate else 0)
        )

    def parameters(self, hidden: int, *, experts: int | None = None) -> int:
        """All of them, or with so many experts; the norm before it not counted."""
        count = self.experts if experts is None else experts
        return (
            self.router_parameters(hidden)
            + count * self.expert_parameters(hidden)
            + _size(self.shared(hidden))
        )


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One layer: attention, then a feed-forward network or experts."""

    attention: AttentionShape
    feed_forward: DenseShape | MoEShape


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer, as the planner sees it."""

    name: str
    vocab: int
    hidden: int
    layers: tuple[LayerShape, ...]
    tied: bool = False
    """Whether the head is the embedding's table."""
    positions: int = 0
    """Learned positions; 0 where they are rotated in."""
    norm: Literal["rms", "layer"] = "rms"
    """A layer norm has a bias."""

    def __post_init__(self) -> None:
        # Equal layers become one object, by which it is seen at once that they are equal.
        known: dict[LayerShape, LayerShape] = {}
        layers = tuple(known.setdefault(layer, layer) for layer in self.layers)
        object.__setattr__(self, "layers", layers)

    @property
    def norm_parameters(self) -> int:
        """Of one norm over the hidden state."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding and the learned positions."""
        return (self.vocab + self.positions) * self.hidden

    def layer_parameters(self, layer: int, *, experts: int | None = None) -> int:
        """Of one layer, or with so many experts."""
        shape = self.layers[layer]
        network = shape.feed_forward
        if isinstance(network, MoEShape):
            second = network.parameters(self.hidden, experts=experts)
        else:
            second = network.parameters(self.hidden)
        return shape.attention.parameters(self.hidden) + second + 2 * self.norm_parameters

    @cached_property
    def _total(self) -> tuple[int, int]:
        ends = self.embedding_parameters + self.norm_parameters
        if not self.tied:
            ends += self.vocab * self.hidden
        total = active = ends
        for layer, shape in enumerate(self.layers):
            network = shape.feed_forward
            top_k = network.top_k if isinstance(network, MoEShape) else None
            total += self.layer_parameters(layer)
            active += self.layer_parameters(layer, experts=top_k)
        return total, active

    def parameters(self) -> int:
        """All of them, all experts counted."""
        return self._total[0]

    def active_parameters(self) -> int:
        """Those that one token goes through, the input embedding among them."""
        return self._total[1]

    def flops_per_token(self, sequence: int) -> float:
        """Operations of one token's forward and backward pass, causal, nothing computed again.

        Counted as published model FLOPs are: 6 for each matrix parameter, head included, and
        three times the forward pass of attention's scores and values.
        """
        products = self.vocab * self.hidden
        core = 0.0
        for layer in self.layers:
            products += _size(layer.attention.matrices(self.hidden))
            network = layer.feed_forward
            if isinstance(network, MoEShape):
                products += self.hidden * network.experts + _size(network.shared(self.hidden))
                products += network.top_k * _size(network.expert(self.hidden))
            else:
                products += _size(network.matrices(self.hidden))
            core += layer.attention.core_flops(sequence)
        return 6.0 * products + 3.0 * core

    def cut_to(self, layers: int, *, name: str | None = None) -> ModelShape:
        """The same model with only its first layers, as benchmarks have it."""
        if not 1 <= layers <= len(self.layers):
            raise PlanError(
                f"{self.name} has {len(self.layers)} layers and cannot be cut to {layers}."
            )
        return replace(self, layers=self.layers[:layers], name=name or self.name)


def unit_names(shape: ModelShape) -> list[str]:
    """Every unit, in order, as a plan's file names them."""
    parts = ("attention", "feed_forward")
    layers = [f"{layer}.{part}" for layer in range(len(shape.layers)) for part in parts]
    return ["embedding", *layers, "head"]


def _network(prefix: str, hidden: int, inner: int, count: int) -> tuple[Matrix, ...]:
    return (
        Matrix(f"{prefix}up", hidden, (count - 1) * inner, "columns"),
        Matrix(f"{prefix}down", inner, hidden, "rows"),
    )


def _size(matrices: tuple[Matrix, ...]) -> int:
    return sum(matrix.inputs * matrix.outputs for matrix in matrices)


def shape_of(spec: ModelSpec) -> ModelShape:
    """The shape of a model that can be trained."""
    dense = DenseShape(ffn_dim=spec.ffn_dim)
    experts = None
    if spec.moe is not None:
        experts = MoEShape(
            experts=spec.moe.num_experts,
            top_k=spec.moe.top_k,
            expert_dim=spec.moe.expert_dim,
            shared_dim=spec.moe.shared_expert_dim,
            shared_gate=spec.moe.shared_expert_dim > 0,
        )
    layers = []
    for layer in range(spec.num_layers):
        attention = AttentionShape(
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            value_dim=spec.head_dim,
            bias=spec.qkv_bias,
            out_bias=spec.out_bias,
            norms=spec.qk_norm,
            window=spec.window_of(layer),
        )
        network = experts if experts is not None and spec.is_moe_layer(layer) else dense
        layers.append(LayerShape(attention=attention, feed_forward=network))
    return ModelShape(
        name=spec.family,
        vocab=spec.vocab_size,
        hidden=spec.hidden_dim,
        layers=tuple(layers),
        tied=spec.tied_embeddings,
    )


def preset_shapes() -> list[str]:
    """Names that `read_shape` knows."""
    folder = resources.files("moesaic.planning") / "models"
    files = [item.name.removesuffix(".json") for item in folder.iterdir()]
    return sorted({*files, *PRESETS})


def read_shape(source: str | Path | ModelSpec) -> ModelShape:
    """A model's shape.

    Args:
        source: The name of a preset, a `config.json`, a folder that has one, or a spec.

    Raises:
        PlanError: There is no such model, or its config does not describe a decoder.
    """
    if isinstance(source, ModelSpec):
        return shape_of(source)
    name = str(source)
    known = name.lower()
    if known in PRESETS:
        return replace(shape_of(PRESETS[known]), name=known)
    preset = resources.files("moesaic.planning") / "models" / f"{known}.json"
    if known in preset_shapes():
        return shape_from_config(json.loads(preset.read_text(encoding="utf-8")), name=known)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise PlanError(
            f"There is no model {name!r}: no such file or folder, and no preset. "
            f"Presets are {', '.join(preset_shapes())}."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} is not readable JSON: {error}.") from None
    if not isinstance(config, dict):
        raise PlanError(f"{path} is no config.json: it does not hold an object.")
    label = path.parent.name if path.name == "config.json" else path.stem
    try:
        return shape_from_config(config, name=label or path.stem)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


_SPELLINGS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab": ("vocab_size",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "top_k": ("num_experts_per_tok", "num_selected_experts", "experts_per_token", "moe_topk"),
    "expert_dim": ("moe_intermediate_size", "expert_intermediate_size"),
    "positions": ("n_positions", "max_position_embeddings"),
}

_TWO_MATRICES = (
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "falcon", "mpt"),
    *("phi", "nemotron", "starcoder2", "persimmon"),
)
"""Families whose feed-forward networks have no gate."""

_LAYER_NORM = (*_TWO_MATRICES, "stablelm", "cohere")

_LEARNED_POSITIONS = ("gpt2", "gpt_neo", "gpt_bigcode", "opt")

_ALL_BIASED = ("gpt2", "gpt_neo", "gpt_neox", "gpt_bigcode", "opt", "bloom", "phi", "starcoder2")

_TIED = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "gemma")
"""Families that tie the head to the embedding where the config is silent."""

_RECURRENT = ("mamba", "rwkv", "linear_attention", "hybrid_override_pattern", "ssm")


class _Config:
    """A `config.json` in one of the families' spellings."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def missing(self, *wanted: str) -> list[str]:
        return [_SPELLINGS[name][0] for name in wanted if self.number(name) is None]

    def number(self, name: str, default: int | None = None) -> int | None:
        for key in _SPELLINGS.get(name, (name,)):
            value = self.raw.get(key)
            if isinstance(value, list) and value and len(set(map(str, value))) == 1:
                value = value[0]
            if value is None:
                continue
            if type(value) is not int or value < 0 or value > 10**9:
                raise PlanError(f"{key} is {value!r}; a whole number is needed.")
            return value
        return default

    def required(self, name: str) -> int:
        value = self.number(name)
        assert value is not None, name
        if value < 1:
            raise PlanError(f"{_SPELLINGS[name][0]} is {value}; it must be at least 1.")
        return value


def shape_from_config(config: Mapping[str, Any], *, name: str = "model") -> ModelShape:
    """The shape that a `config.json` describes.

    Raises:
        PlanError: Keys are missing or make no sense, or the model is no plain decoder.
    """
    nested = config.get("text_config")
    if isinstance(nested, Mapping) and "hidden_size" in nested:
        config = nested
    kind = str(config.get("model_type", ""))
    _refuse_other_than_decoders(config, kind)
    keys = _Config(config)
    if missing := keys.missing("layers", "hidden", "heads", "vocab"):
        raise PlanError(
            f"The config lacks {', '.join(missing)}. The planner needs num_hidden_layers, "
            f"hidden_size, num_attention_heads, vocab_size and intermediate_size."
        )
    layers, hidden = keys.required("layers"), keys.required("hidden")
    if layers > 10_000:
        raise PlanError(f"num_hidden_layers is {layers}. 1 to 10,000 is needed.")
    heads = keys.required("heads")
    networks = _read_networks(config, keys, kind, layers=layers, hidden=hidden)
    attention = _read_attention(config, keys, kind, heads=heads, hidden=hidden)
    windows = _read_windows(config, keys, kind, layers)
    default_tied = kind.startswith(_TIED)
    return ModelShape(
        name=name,
        vocab=keys.required("vocab"),
        hidden=hidden,
        layers=tuple(
            LayerShape(attention=replace(attention, window=window), feed_forward=network)
            for window, network in zip(windows, networks, strict=True)
        ),
        tied=bool(config.get("tie_word_embeddings", default_tied)),
        positions=(keys.number("positions", 0) or 0) if kind in _LEARNED_POSITIONS else 0,
        norm="layer" if kind in _LAYER_NORM else "rms",
    )


def _refuse_other_than_decoders(config: Mapping[str, Any], kind: str) -> None:
    types = config.get("layer_types")
    described = " ".join([kind, *map(str, types if isinstance(types, list) else ()), *config])
    recurrent = next((word for word in _RECURRENT if word in described.lower()), None)
    if recurrent or config.get("is_encoder_decoder"):
        what = f"{recurrent!r}" if recurrent else "an encoder"
        raise PlanError(
            f"The config (model_type {kind!r}) has {what}; the planner knows decoders whose "
            f"layers are attention and a feed-forward network or experts."
        )


def _read_attention(
    config: Mapping[str, Any], keys: _Config, kind: str, *, heads: int, hidden: int
) -> AttentionShape:
    all_biased = kind in _ALL_BIASED
    bias = bool(config.get("attention_bias", config.get("qkv_bias", all_biased or kind == "qwen2")))
    if kind == "qwen2_moe":
        bias = bool(config.get("qkv_bias", True))
    out_bias = bias and kind in (*_ALL_BIASED, "llama", "qwen3", "qwen3_moe", "gpt_oss")
    if kind == "skywork":
        out_bias = bool(config.get("attention_out_bias", False))
    kv_rank = keys.number("kv_lora_rank")
    if kv_rank:
        parts = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if missing := [part for part in parts if keys.number(part) is None]:
            raise PlanError(
                f"The config has kv_lora_rank {kv_rank} (latent attention) but lacks "
                f"{', '.join(missing)}."
            )
        head_dim, rope_dim, value_dim = (keys.number(part) or 0 for part in parts)
        return AttentionShape(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            value_dim=value_dim,
            q_rank=keys.number("q_lora_rank") or None,
            kv_rank=kv_rank,
            rope_dim=rope_dim,
        )
    if keys.number("head_dim") is None and kind != "qwen3" and hidden % heads:
        raise PlanError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim "
            f"is not given. Give head_dim."
        )
    head_dim = keys.number("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    kv_heads = 1 if config.get("multi_query") else keys.number("kv_heads", heads) or heads
    if heads % kv_heads:
        raise PlanError(
            f"{heads} attention heads cannot share {kv_heads} key-value heads evenly. "
            f"num_key_value_heads must divide {heads}."
        )
    return AttentionShape(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        bias=bias,
        out_bias=out_bias,
        norms=bool(config.get("qk_norm", kind in ("qwen3", "qwen3_moe"))),
    )


def _read_networks(
    config: Mapping[str, Any], keys: _Config, kind: str, *, layers: int, hidden: int
) -> list[DenseShape | MoEShape]:
    count = 2 if kind in _TWO_MATRICES else 3
    all_biased = kind in _ALL_BIASED
    experts = keys.number("experts", 0) or 0
    ffn = keys.number("ffn")
    if ffn is None and kind in ("gpt2", "gptj", "gpt_neo", "bloom", "falcon"):
        ffn = 4 * hidden
    expert_dim = keys.number("expert_dim")
    if expert_dim is None:
        expert_dim = ffn
    if experts <= 1 and not ffn:
        raise PlanError("The config lacks intermediate_size.")
    dense = DenseShape(ffn_dim=ffn or 1, matrices_count=count, bias=all_biased)
    if experts <= 1:
        return [dense] * layers
    if missing := keys.missing("top_k") or ([] if expert_dim else ["moe_intermediate_size"]):
        raise PlanError(f"The config has {experts} experts but lacks {', '.join(missing)}.")
    top_k = keys.required("top_k")
    if top_k > experts:
        raise PlanError(f"num_experts_per_tok is {top_k}, but there are {experts} experts.")
    assert expert_dim is not None
    shared = keys.number("shared_expert_intermediate_size", 0) or 0
    if not shared:
        shared = (keys.number("n_shared_experts", 0) or 0) * expert_dim
    moe = MoEShape(
        experts=experts,
        top_k=top_k,
        expert_dim=expert_dim,
        shared_dim=shared,
        shared_gate=shared > 0 and kind in ("qwen2_moe", "skywork"),
        matrices_count=count,
        bias=kind == "gpt_oss",
    )
    routed = _moe_layers(config, keys, layers)
    if len(routed) < layers and ffn is None:
        raise PlanError("The config lacks intermediate_size, which its dense layers need.")
    return [moe if layer in routed else dense for layer in range(layers)]


def _moe_layers(config: Mapping[str, Any], keys: _Config, layers: int) -> set[int]:
    named = config.get("moe_layers")
    if isinstance(named, list):
        return {int(layer) for layer in named}
    first = keys.number("first_k_dense_replace", 0) or 0
    steps = ("decoder_sparse_step", "moe_expert_interval", "interleave_moe_layer_step")
    step = next((keys.number(key) or 1 for key in steps if keys.number(key)), 1)
    every = {layer for layer in range(first, layers) if (layer + 1) % step == 0}
    dense = config.get("mlp_only_layers")
    return every - set(dense if isinstance(dense, list) else ())


def _read_windows(
    config: Mapping[str, Any], keys: _Config, kind: str, layers: int
) -> list[int | None]:
    window = keys.number("sliding_window")
    if not window or (kind.startswith("qwen") and not config.get("use_sliding_window", False)):
        return [None] * layers
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return [window if "sliding" in str(type_) else None for type_ in types]
    return [window] * layers
