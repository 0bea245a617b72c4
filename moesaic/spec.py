"""What a model is: `ModelSpec`, and Hugging Face's `config.json` to and from it.

A spec is a fact, never a choice for one job. It counts parameters and floating-point
operations, and it is all that is needed to build a model or to read one from disk.
Nothing here loads torch.

`config.json` is read in the spelling of transformers 4.57 and of 5.x, and written in both at
once (`rope_theta` + `rope_scaling` beside `rope_parameters`, `num_experts` beside
`num_local_experts`, `torch_dtype` beside `dtype`), because each reads only its own and takes
a default, silently, for what it does not find. What a family cannot say is refused, both ways.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from moesaic.errors import SpecError

Family = Literal[
    "llama", "mistral", "qwen2", "qwen3", "skywork", "mixtral", "qwen2_moe", "qwen3_moe"
]
"""The `model_type` under which a folder is written. `skywork` is the family that can say
everything, dense or MoE; the others are Hugging Face's own."""

RopeScaling = Literal["none", "linear", "dynamic", "llama3"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding, half-split (NeoX) style."""

    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""

    scaling: RopeScaling = "none"
    """How positions beyond the original context are reached."""

    factor: float = 1.0
    """Context stretch; read by every scaling but `none`."""

    low_freq_factor: float = 1.0
    """`llama3`: wavelengths longer than original / low_freq_factor are stretched."""

    high_freq_factor: float = 4.0
    """`llama3`: wavelengths shorter than original / high_freq_factor are left alone."""

    original_max_positions: int | None = None
    """Context before the stretch; `llama3` and `dynamic` need it."""

    def __post_init__(self) -> None:
        if self.theta <= 0 or self.factor < 1:
            raise SpecError(
                f"Rope has theta {self.theta} and factor {self.factor}; theta must be positive "
                "and factor at least 1."
            )
        if self.scaling in ("dynamic", "llama3") and self.original_max_positions is None:
            raise SpecError(f"Rope scaling {self.scaling!r} needs original_max_positions.")
        if self.scaling == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise SpecError(
                f"Rope scaling 'llama3' has high_freq_factor {self.high_freq_factor}, which must "
                f"be above low_freq_factor {self.low_freq_factor}."
            )


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """The mixture of experts that stands in a layer instead of one feed-forward network."""

    num_experts: int
    """Routed experts in a layer."""

    top_k: int
    """Experts each token is sent to."""

    expert_dim: int
    """Inner width of one routed expert."""

    renormalize: bool = True
    """Divide the chosen gates by their sum (Skywork-MoE Eq. 2)."""

    gate_norm_scale: float | None = None
    """Lambda of gating logit normalisation (Skywork-MoE Eq. 6); None leaves logits raw."""

    gate_norm_eps: float = 1e-6
    """Added to the standard deviation of the logits. The report gives none; this one is ours."""

    selection_bias: bool = False
    """A bias per expert, added for selection only (loss-free balancing, arXiv 2408.15664)."""

    shared_expert_dim: int = 0
    """Inner width of an expert every token visits, with its own sigmoid gate; 0 for none."""

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.expert_dim < 1:
            raise SpecError(
                f"An MoE layer needs at least 1 expert of width 1, not {self.num_experts} "
                f"of width {self.expert_dim}."
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise SpecError(
                f"top_k is {self.top_k}, but the layer has {self.num_experts} experts. "
                f"Choose a top_k from 1 to {self.num_experts}."
            )
        if self.shared_expert_dim < 0:
            raise SpecError(f"shared_expert_dim is {self.shared_expert_dim}; use 0 for none.")
        if self.gate_norm_scale is not None and self.gate_norm_scale <= 0:
            raise SpecError(
                f"gate_norm_scale is {self.gate_norm_scale}; lambda must be positive, "
                "or None for no normalisation."
            )
        if self.gate_norm_scale is not None and self.num_experts < 2:
            raise SpecError(
                "Gating logit normalisation divides by a standard deviation over experts, "
                "which one expert does not have. Use 2 experts or more."
            )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer, dense or MoE."""

    family: Family
    vocab_size: int
    hidden_dim: int
    ffn_dim: int
    """Inner width of the dense feed-forward network."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-6
    rope: RopeSpec = RopeSpec()
    qkv_bias: bool = False
    out_bias: bool = False
    """Bias on the attention's output projection."""
    qk_norm: bool = False
    """RMSNorm over each query and key head, before rope (Qwen3)."""
    tied_embeddings: bool = False
    sliding_window: int | None = None
    """A token attends to this many latest positions, itself included, in `sliding_layers`."""
    sliding_layers: tuple[int, ...] = ()
    moe: MoESpec | None = None
    moe_layers: tuple[int, ...] = ()
    """Layers whose feed-forward network is an MoE; empty exactly when `moe` is None."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_dim",
            "ffn_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise SpecError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value "
                f"heads evenly. num_kv_heads must divide {self.num_heads}."
            )
        if self.head_dim % 2:
            raise SpecError(f"head_dim is {self.head_dim}; rope turns pairs, so it must be even.")
        for name, layers in (
            ("sliding_layers", self.sliding_layers),
            ("moe_layers", self.moe_layers),
        ):
            if list(layers) != sorted(set(layers) & set(range(self.num_layers))):
                raise SpecError(
                    f"{name} is {list(layers)}; it must rise and stay within "
                    f"0 to {self.num_layers - 1}."
                )
        if (self.sliding_window is None) != (not self.sliding_layers):
            raise SpecError(
                f"sliding_window is {self.sliding_window}, but {len(self.sliding_layers)} layers "
                "slide. Give both or neither."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise SpecError(f"sliding_window is {self.sliding_window}; it must be at least 1.")
        if (self.moe is None) != (not self.moe_layers):
            raise SpecError(
                f"moe is {'absent' if self.moe is None else 'given'}, but {len(self.moe_layers)} "
                "layers are MoE. Give both or neither."
            )
        if (
            self.rope.scaling == "dynamic"
            and self.rope.original_max_positions != self.max_positions
        ):
            raise SpecError(
                "Rope scaling 'dynamic' starts at max_positions in every reader; "
                f"original_max_positions is {self.rope.original_max_positions}, but "
                f"max_positions is {self.max_positions}."
            )
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_ids):
            if token is not None and not -1 <= token < self.vocab_size:
                raise SpecError(f"Token id {token} is outside the vocabulary of {self.vocab_size}.")
        _check_family(self)

    def replace(self, **changes: object) -> ModelSpec:
        """The same spec with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the feed-forward network of `layer` is an MoE."""
        return layer in self.moe_layers

    def window_of(self, layer: int) -> int | None:
        """How many latest positions a token of `layer` attends to; None for all of them."""
        return self.sliding_window if layer in self.sliding_layers else None

    def num_params(self) -> int:
        """Parameters, all experts counted. The selection bias is a buffer and does not count."""
        experts = 0 if self.moe is None else self.moe.num_experts
        return self._count_params(experts)

    def active_params(self) -> int:
        """Parameters one token goes through, the input embedding among them."""
        return self._count_params(0 if self.moe is None else self.moe.top_k)

    def flops_per_token(self, context: float) -> float:
        """Floating-point operations of one token's forward pass, 2 per multiply-add.

        Counted: every matrix product, router and head included, and scores and values of
        attention. Not counted: norms, rope, activations, softmax and the embedding look-up.

        Args:
            context: Positions the token attends to, itself included; a layer with a sliding
                window attends to at most its window. For a causal sequence of S tokens the
                mean is (S + 1) / 2.
        """
        norms = (2 * self.num_layers + 1) * self.hidden_dim
        if self.qk_norm:
            norms += self.num_layers * 2 * self.head_dim
        biases = self.num_layers * self._bias_params()
        # A tied embedding is used as the head; an untied one is only looked up.
        lookup = 0 if self.tied_embeddings else self.vocab_size * self.hidden_dim
        matmul_params = self.active_params() - norms - biases - lookup
        attended: float = 0
        for layer in range(self.num_layers):
            window = self.window_of(layer)
            attended += context if window is None else min(context, window)
        return 2.0 * matmul_params + 4.0 * self.q_dim * attended

    def _bias_params(self) -> int:
        qkv = self.q_dim + 2 * self.kv_dim if self.qkv_bias else 0
        return qkv + (self.hidden_dim if self.out_bias else 0)

    def _count_params(self, experts: int) -> int:
        width = self.hidden_dim
        attention = 2 * width * self.q_dim + 2 * width * self.kv_dim + self._bias_params()
        norms = 2 * width + (2 * self.head_dim if self.qk_norm else 0)
        total = self.num_layers * (attention + norms) + width
        total += self.vocab_size * width * (1 if self.tied_embeddings else 2)
        total += (self.num_layers - len(self.moe_layers)) * 3 * width * self.ffn_dim
        if self.moe is not None:
            moe_layer = width * self.moe.num_experts + experts * 3 * width * self.moe.expert_dim
            if self.moe.shared_expert_dim:
                moe_layer += 3 * width * self.moe.shared_expert_dim + width
            total += len(self.moe_layers) * moe_layer
        return total


@dataclass(frozen=True, kw_only=True)
class _FamilyRules:
    """What a `model_type` can say, and what its config leaves unsaid."""

    architecture: str
    is_moe: bool | None
    """None: either."""
    qkv_bias: bool | None = False
    """None: either."""
    out_bias: Literal["never", "with_qkv", "free"] = "never"
    qk_norm: bool | None = False
    windows: Literal["none", "all_or_none", "by_layer"] = "none"
    has_every_layer_moe: bool = False
    has_shared_expert: bool = False
    default_theta: float = 10_000.0
    default_norm_eps: float = 1e-6
    default_tokens: tuple[int | None, int | None] = (None, None)
    """bos and eos, where the config is silent."""


_FAMILIES: dict[str, _FamilyRules] = {
    "llama": _FamilyRules(
        architecture="LlamaForCausalLM",
        is_moe=False,
        qkv_bias=None,
        out_bias="with_qkv",
        default_tokens=(1, 2),
    ),
    "mistral": _FamilyRules(
        architecture="MistralForCausalLM",
        is_moe=False,
        windows="all_or_none",
        default_tokens=(1, 2),
    ),
    "qwen2": _FamilyRules(
        architecture="Qwen2ForCausalLM", is_moe=False, qkv_bias=True, windows="by_layer"
    ),
    "qwen3": _FamilyRules(
        architecture="Qwen3ForCausalLM",
        is_moe=False,
        qkv_bias=None,
        out_bias="with_qkv",
        qk_norm=True,
        windows="by_layer",
    ),
    "skywork": _FamilyRules(
        architecture="SkyworkForCausalLM",
        is_moe=None,
        qkv_bias=None,
        out_bias="free",
        qk_norm=None,
        windows="by_layer",
        has_shared_expert=True,
        default_tokens=(1, 2),
    ),
    "mixtral": _FamilyRules(
        architecture="MixtralForCausalLM",
        is_moe=True,
        windows="all_or_none",
        has_every_layer_moe=True,
        default_theta=1e6,
        default_norm_eps=1e-5,
        default_tokens=(1, 2),
    ),
    "qwen2_moe": _FamilyRules(
        architecture="Qwen2MoeForCausalLM",
        is_moe=True,
        qkv_bias=None,
        windows="by_layer",
        has_shared_expert=True,
    ),
    "qwen3_moe": _FamilyRules(
        architecture="Qwen3MoeForCausalLM",
        is_moe=True,
        qkv_bias=None,
        out_bias="with_qkv",
        qk_norm=True,
        windows="all_or_none",
    ),
}


def _check_family(spec: ModelSpec) -> None:
    """Refuse what `spec.family` cannot say. `skywork` can say everything."""
    rules = _FAMILIES.get(spec.family)
    if rules is None:
        raise SpecError(
            f"Family {spec.family!r} is unknown. Known: {', '.join(sorted(get_args(Family)))}."
        )

    def refuse(what: str) -> SpecError:
        return SpecError(f"Family {spec.family!r} {what}. Family 'skywork' can say it.")

    if rules.is_moe is not None and rules.is_moe != (spec.moe is not None):
        raise refuse("has MoE layers" if rules.is_moe else "is dense and has no MoE layers")
    if rules.qkv_bias is not None and rules.qkv_bias != spec.qkv_bias:
        raise refuse(f"has qkv_bias {rules.qkv_bias}, not {spec.qkv_bias}")
    if rules.qk_norm is not None and rules.qk_norm != spec.qk_norm:
        raise refuse(f"has qk_norm {rules.qk_norm}, not {spec.qk_norm}")
    if rules.out_bias == "never" and spec.out_bias:
        raise refuse("has no bias on the attention's output")
    if rules.out_bias == "with_qkv" and spec.out_bias != spec.qkv_bias:
        raise refuse("has a bias on query, key, value and output, or on none of them")
    if rules.windows == "none" and spec.sliding_layers:
        raise refuse("has no sliding window")
    if rules.windows == "all_or_none" and len(spec.sliding_layers) not in (0, spec.num_layers):
        raise refuse(
            f"slides every layer or none, not {len(spec.sliding_layers)} of {spec.num_layers}"
        )
    if spec.moe is None:
        return
    if spec.family != "skywork":
        if spec.moe.gate_norm_scale is not None:
            raise refuse("has no gating logit normalisation")
        if spec.moe.selection_bias:
            raise refuse("has no selection bias")
    if spec.moe.shared_expert_dim and not rules.has_shared_expert:
        raise refuse("has no shared expert")
    if rules.has_every_layer_moe:
        if len(spec.moe_layers) != spec.num_layers:
            raise refuse(f"is MoE in all {spec.num_layers} layers, not {len(spec.moe_layers)}")
        if not spec.moe.renormalize:
            raise refuse("always renormalises the chosen gates")
        if spec.moe.expert_dim != spec.ffn_dim:
            raise refuse(
                f"has one inner width, but expert_dim is {spec.moe.expert_dim} and ffn_dim "
                f"is {spec.ffn_dim}"
            )


class _Keys:
    """The keys of one config.json, each read with its type; a fault names key and value."""

    def __init__(self, config: Mapping[str, Any], *, prefix: str = "") -> None:
        self.config = config
        self.prefix = prefix

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.config.get(key) is not None

    def fault(self, key: str, reason: str) -> SpecError:
        """The error for a value that cannot be: key, value, reason."""
        return SpecError(f"config.json: {self.prefix}{key} is {self.config.get(key)!r}; {reason}.")

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; without a default the key must be there."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fault(key, "an integer is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fault(key, "a number is needed")
        if not -sys.float_info.max <= value <= sys.float_info.max:
            raise self.fault(key, "a finite number is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, "true or false is needed")
        return value

    def table(self, key: str) -> _Keys:
        """A nested object, empty when absent."""
        value = self.config.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.fault(key, "an object is needed")
        return _Keys(value, prefix=f"{self.prefix}{key}.")

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers, or one integer; empty when absent or null."""
        value = self.config.get(key)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.fault(key, "an integer or a list of integers is needed")
        return tuple(items)

    def agree(self, first: str, second: str) -> None:
        """Refuse two spellings of one fact that say different things."""
        if self.has(first) and self.has(second) and self.config[first] != self.config[second]:
            raise self.fault(
                first, f"but {self.prefix}{second} is {self.config[second]!r}. Keep one of the two"
            )

    def refuse_unless(self, key: str, allowed: tuple[object, ...], reason: str) -> None:
        """Refuse a value that asks for something this decoder does not do."""
        if self.has(key) and self.config[key] not in allowed:
            raise self.fault(key, reason)

    def _value(self, key: str, default: object) -> object:
        value = self.config.get(key)
        if value is not None:
            return value
        if default is None:
            raise SpecError(f"config.json: {self.prefix}{key} is missing.")
        return default


_MAX_LAYERS = 10_000
"""More are taken for a damaged file, before anything is counted layer by layer."""


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """Read a Hugging Face `config.json`, in the spelling of transformers 4.57 or 5.x.

    Raises:
        SpecError: The family is unknown, the config asks for something this decoder does not
            do, a value has the wrong type, or two values contradict each other.
    """
    keys = _Keys(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise keys.fault("model_type", f"known are {', '.join(sorted(_FAMILIES))}")
    family = cast(Family, model_type)
    rules = _FAMILIES[family]
    keys.refuse_unless("hidden_act", ("silu", "swish"), "only silu is supported")
    keys.refuse_unless("mlp_bias", (False,), "a bias in the feed-forward network is not supported")
    keys.agree("dtype", "torch_dtype")

    num_layers = keys.integer("num_hidden_layers")
    num_heads = keys.integer("num_attention_heads")
    hidden_dim = keys.integer("hidden_size")
    ffn_dim = keys.integer("intermediate_size")
    if not 1 <= num_layers <= _MAX_LAYERS:
        raise keys.fault("num_hidden_layers", f"1 to {_MAX_LAYERS:,} is needed")
    if num_heads < 1:
        raise keys.fault("num_attention_heads", "at least 1 is needed")
    if not keys.has("head_dim") and family == "qwen3":
        head_dim = 128
    elif not keys.has("head_dim") and hidden_dim % num_heads:
        raise keys.fault("hidden_size", f"{num_heads} heads do not divide it. Give head_dim")
    else:
        head_dim = keys.integer("head_dim", hidden_dim // num_heads)
    max_positions = keys.integer("max_position_embeddings")

    if family == "qwen2":
        qkv_bias, out_bias = True, False
        keys.refuse_unless("attention_bias", (True,), "qwen2 always has a bias on q, k and v")
    elif family == "qwen2_moe":
        qkv_bias, out_bias = keys.flag("qkv_bias", True), False
    else:
        qkv_bias = keys.flag("attention_bias", False)
        out_bias = qkv_bias if rules.out_bias == "with_qkv" else False
    if family == "skywork":
        out_bias = keys.flag("attention_out_bias", False)

    window, sliding_layers = _read_windows(keys, family, num_layers)
    moe, moe_layers = _read_moe(keys, family, num_layers=num_layers, ffn_dim=ffn_dim)
    bos, eos = rules.default_tokens
    return ModelSpec(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        hidden_dim=hidden_dim,
        ffn_dim=ffn_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=keys.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=keys.number("rms_norm_eps", rules.default_norm_eps),
        rope=_read_rope(keys, rules.default_theta, max_positions=max_positions),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm=keys.flag("qk_norm", False) if rules.qk_norm is None else rules.qk_norm,
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        sliding_window=window,
        sliding_layers=sliding_layers,
        moe=moe,
        moe_layers=moe_layers,
        bos_token_id=keys.integer("bos_token_id")
        if keys.has("bos_token_id")
        # A null is a fact; only a key that is not there takes the family's default.
        else None
        if "bos_token_id" in config
        else bos,
        eos_token_ids=keys.integers("eos_token_id")
        if "eos_token_id" in config or eos is None
        else (eos,),
        pad_token_id=keys.integer("pad_token_id") if keys.has("pad_token_id") else None,
    )


def _read_rope(keys: _Keys, default_theta: float, *, max_positions: int) -> RopeSpec:
    old, new = keys.table("rope_scaling"), keys.table("rope_parameters")
    for table in (old, new):
        table.agree("type", "rope_type")
        table.refuse_unless("partial_rotary_factor", (1, 1.0), "only whole heads are rotated")
        if "full_attention" in table.config:
            raise table.fault("full_attention", "one rope for all layers is needed")
    keys.refuse_unless("partial_rotary_factor", (1, 1.0), "only whole heads are rotated")

    def kind(table: _Keys) -> str:
        return str(table.config.get("rope_type", table.config.get("type", "default")))

    if old.config and new.config:
        shared = (set(old.config) & set(new.config)) - {"type", "rope_type"}
        for key in sorted(shared):
            if old.config[key] != new.config[key]:
                raise old.fault(key, f"but rope_parameters.{key} is {new.config[key]!r}")
        if kind(old) != kind(new):
            raise old.fault("rope_type", f"but rope_parameters.rope_type is {kind(new)!r}")
    theta = keys.number("rope_theta", default_theta)
    for table in (old, new):
        if table.has("rope_theta"):
            nested = table.number("rope_theta")
            if keys.has("rope_theta") and nested != theta:
                raise table.fault("rope_theta", f"but rope_theta is {theta!r}")
            theta = nested
    table = old if old.config else new
    match kind(table):
        case "default":
            return RopeSpec(theta=theta)
        case "linear":
            return RopeSpec(theta=theta, scaling="linear", factor=table.number("factor"))
        case "dynamic":
            original = table.integer("original_max_position_embeddings", max_positions)
            if original != max_positions:
                raise table.fault(
                    "original_max_position_embeddings",
                    f"dynamic rope starts at max_position_embeddings, {max_positions}",
                )
            return RopeSpec(
                theta=theta,
                scaling="dynamic",
                factor=table.number("factor"),
                original_max_positions=max_positions,
            )
        case "llama3":
            return RopeSpec(
                theta=theta,
                scaling="llama3",
                factor=table.number("factor"),
                low_freq_factor=table.number("low_freq_factor"),
                high_freq_factor=table.number("high_freq_factor"),
                original_max_positions=table.integer("original_max_position_embeddings"),
            )
        case other:
            raise SpecError(
                f"config.json: {table.prefix}rope_type is {other!r}; "
                "supported are default, linear, dynamic, llama3."
            )


def _read_windows(
    keys: _Keys, family: Family, num_layers: int
) -> tuple[int | None, tuple[int, ...]]:
    every = tuple(range(num_layers))
    if family == "llama":
        return None, ()
    if family.startswith("qwen") and not keys.flag("use_sliding_window", False):
        types = keys.config.get("layer_types")
        if isinstance(types, list) and "sliding_attention" in types:
            raise keys.fault("layer_types", "but use_sliding_window is false")
        return None, ()
    default = 4096 if family.startswith("qwen") or family == "mistral" else None
    absent = "sliding_window" not in keys.config and default is not None
    if not keys.has("sliding_window") and not absent:
        return None, ()
    window = keys.integer("sliding_window", default)
    if family in ("mistral", "mixtral", "qwen3_moe"):
        return window, every
    types = keys.config.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or any(kind not in known for kind in types):
            raise keys.fault("layer_types", f"a list of {' or '.join(known)} is needed")
        if len(types) != num_layers:
            raise keys.fault("layer_types", f"it must name all {num_layers} layers")
        layers = tuple(i for i in every if types[i] == "sliding_attention")
    elif family == "skywork":
        layers = every
    else:
        first = keys.integer("max_window_layers", 28)
        # transformers 5.x: qwen2_moe alternates below max_window_layers, the others slide above.
        layers = (
            tuple(i for i in every if i % 2 == 0 and i < first)
            if family == "qwen2_moe"
            else tuple(i for i in every if i >= first)
        )
    return (window, layers) if layers else (None, ())


def _read_moe(
    keys: _Keys, family: Family, *, num_layers: int, ffn_dim: int
) -> tuple[MoESpec | None, tuple[int, ...]]:
    if _FAMILIES[family].is_moe is False:
        return None, ()
    experts = keys.integers("num_experts")
    if len(set(experts)) > 1:
        raise keys.fault("num_experts", "the same number in every layer is needed")
    local = keys.integers("num_local_experts")
    if experts and local and experts[0] != local[0]:
        raise keys.fault("num_experts", f"but num_local_experts is {local[0]}. Keep one of the two")
    count = (experts or local or (0,))[0]
    if family == "skywork" and count <= 1 and not keys.has("num_experts_per_tok"):
        return None, ()
    if not experts and not local:
        raise SpecError("config.json: num_experts is missing.")
    if not keys.has("num_experts_per_tok"):
        raise SpecError("config.json: num_experts_per_tok is missing.")
    top_k = keys.integer("num_experts_per_tok")
    if family == "mixtral":
        moe = MoESpec(num_experts=count, top_k=top_k, expert_dim=ffn_dim)
        return moe, tuple(range(num_layers))
    if family == "skywork":
        keys.refuse_unless("moe_2layer_gate", (False,), "a two-layer gate is not supported")
        keys.refuse_unless(
            "moe_feature_no_mul_topk", (True,), "multiplying inputs by k is not supported"
        )
        normalised = keys.flag("moe_use_logits_norm", False)
        moe = MoESpec(
            num_experts=count,
            top_k=top_k,
            expert_dim=keys.integer("moe_intermediate_size", ffn_dim),
            renormalize=keys.flag("norm_topk_prob", True),
            gate_norm_scale=keys.number("moe_gate_norm_std", 1.0) if normalised else None,
            gate_norm_eps=keys.number("moe_gate_norm_eps", 1e-6),
            selection_bias=keys.flag("moe_selection_bias", False),
            shared_expert_dim=keys.integer("shared_expert_intermediate_size", 0),
        )
        if keys.has("moe_layers"):
            return moe, keys.integers("moe_layers")
        return moe, _every_nth(num_layers, keys, "moe_expert_interval")
    moe = MoESpec(
        num_experts=count,
        top_k=top_k,
        expert_dim=keys.integer("moe_intermediate_size"),
        renormalize=keys.flag("norm_topk_prob", False),
        shared_expert_dim=keys.integer("shared_expert_intermediate_size", 5632)
        if family == "qwen2_moe"
        else 0,
    )
    dense = keys.integers("mlp_only_layers")
    if any(not 0 <= layer < num_layers for layer in dense):
        raise keys.fault("mlp_only_layers", f"layers run from 0 to {num_layers - 1}")
    layers = _every_nth(num_layers, keys, "decoder_sparse_step")
    return moe, tuple(layer for layer in layers if layer not in dense)


def _every_nth(num_layers: int, keys: _Keys, key: str) -> tuple[int, ...]:
    step = keys.integer(key, 1)
    if not 1 <= step <= num_layers:
        raise keys.fault(key, f"1 to {num_layers} is needed")
    return tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0)


def spec_to_hf(spec: ModelSpec, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The `config.json` that transformers 4.57 and 5.x both read as `spec`.

    Args:
        spec: The model.
        dtype: Name of the type the weights are stored in, such as "bfloat16".

    Raises:
        SpecError: transformers' class of this family would refuse the model, or compute
            something else in one of the two versions.
    """
    _refuse_unportable(spec)
    rules = _FAMILIES[spec.family]
    config: dict[str, Any] = {
        "architectures": [rules.architecture],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_dim,
        "intermediate_size": spec.ffn_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_ids[0]
        if len(spec.eos_token_ids) == 1
        else list(spec.eos_token_ids) or None,
        "pad_token_id": spec.pad_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    config |= _write_rope(spec)
    config |= _write_attention(spec)
    if spec.moe is not None:
        config |= _write_moe(spec, spec.moe)
    return config


def _refuse_unportable(spec: ModelSpec) -> None:
    if spec.family == "llama" and spec.hidden_dim % spec.num_heads:
        raise SpecError(
            f"transformers refuses a llama whose hidden_size {spec.hidden_dim} is not a multiple "
            f"of its {spec.num_heads} heads. Write it as family 'skywork'."
        )
    if spec.family == "qwen2_moe":
        if spec.q_dim != spec.hidden_dim:
            raise SpecError(
                f"transformers 4.57 refuses a qwen2_moe whose heads are {spec.q_dim} wide together "
                f"and hidden_size {spec.hidden_dim}. Write it as family 'skywork'."
            )
        if spec.sliding_window is not None:
            raise SpecError(
                "transformers 4.57 decodes a qwen2_moe with a sliding window wrongly from its "
                f"cache (sliding_window is {spec.sliding_window}). Write it as family 'skywork'."
            )


def _write_rope(spec: ModelSpec) -> dict[str, Any]:
    rope = spec.rope
    scaling: dict[str, Any] | None = None
    if rope.scaling != "none":
        # Floats, because transformers 4.57 warns about integers here.
        scaling = {"rope_type": rope.scaling, "factor": float(rope.factor)}
    if rope.scaling == "llama3" and scaling is not None:
        scaling["low_freq_factor"] = float(rope.low_freq_factor)
        scaling["high_freq_factor"] = float(rope.high_freq_factor)
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return {
        "rope_theta": float(rope.theta),
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": float(rope.theta),
            **(scaling or {"rope_type": "default"}),
        },
    }


def _write_attention(spec: ModelSpec) -> dict[str, Any]:
    written: dict[str, Any] = {}
    if spec.family == "qwen2_moe":
        written["qkv_bias"] = spec.qkv_bias
    elif spec.family != "qwen2":
        written["attention_bias"] = spec.qkv_bias
    if spec.family == "llama":
        written["mlp_bias"] = False
    if spec.family == "skywork":
        written["attention_out_bias"] = spec.out_bias
        written["qk_norm"] = spec.qk_norm
    if spec.family in ("mistral", "mixtral", "skywork") or spec.family.startswith("qwen"):
        written["sliding_window"] = spec.sliding_window
    if spec.family.startswith("qwen"):
        written["use_sliding_window"] = spec.sliding_window is not None
    if spec.family in ("qwen2", "qwen3", "qwen2_moe", "skywork"):
        written["layer_types"] = [
            "sliding_attention" if layer in spec.sliding_layers else "full_attention"
            for layer in range(spec.num_layers)
        ]
    if spec.family in ("qwen2", "qwen3", "qwen2_moe"):
        # layer_types decides; this is what a reader without it makes the closest of.
        written["max_window_layers"] = min(spec.sliding_layers, default=spec.num_layers)
    return written


def _write_moe(spec: ModelSpec, moe: MoESpec) -> dict[str, Any]:
    written: dict[str, Any] = {
        "num_local_experts": moe.num_experts,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    if spec.family == "mixtral":
        return written | {"router_jitter_noise": 0.0}
    written["moe_intermediate_size"] = moe.expert_dim
    written["norm_topk_prob"] = moe.renormalize
    step = spec.moe_layers[0] + 1
    is_regular = spec.moe_layers == tuple(range(step - 1, spec.num_layers, step))
    if spec.family == "skywork":
        written["architectures"] = ["SkyworkMoeForCausalLM"]
        # A list, and these three flags spelt out, as the loaders of the release have them.
        written["num_experts"] = [moe.num_experts]
        written["moe_2layer_gate"] = False
        written["moe_feature_no_mul_topk"] = True
        written["moe_use_mixtral_gating"] = False
        written["moe_expert_interval"] = step if is_regular else 1
        written["moe_layers"] = None if is_regular else list(spec.moe_layers)
        written["moe_selection_bias"] = moe.selection_bias
        written["shared_expert_intermediate_size"] = moe.shared_expert_dim
        if moe.gate_norm_scale is not None:
            # Only when on: a loader of the release tests for the key, not for its value.
            written["moe_use_logits_norm"] = True
            written["moe_gate_norm_std"] = moe.gate_norm_scale
            written["moe_gate_norm_eps"] = moe.gate_norm_eps
        return written
    if spec.family == "qwen2_moe":
        written["shared_expert_intermediate_size"] = moe.shared_expert_dim
    written["decoder_sparse_step"] = step if is_regular else 1
    written["mlp_only_layers"] = (
        []
        if is_regular
        else [layer for layer in range(spec.num_layers) if layer not in spec.moe_layers]
    )
    return written


PRESETS: dict[str, ModelSpec] = {
    # Skywork-MoE report, appendix A, table 2, and Skywork-13B (arXiv 2310.19341). Neither
    # prints rope's base, the norm's epsilon or token ids: the loaders' defaults stand here.
    "skywork-13b": ModelSpec(
        family="skywork",
        vocab_size=65_536,
        hidden_dim=4_608,
        ffn_dim=12_288,
        num_layers=52,
        num_heads=36,
        num_kv_heads=36,
        head_dim=128,
        max_positions=4_096,
    ),
    "skywork-moe-146b": ModelSpec(
        family="skywork",
        vocab_size=65_536,
        hidden_dim=4_608,
        ffn_dim=12_288,
        num_layers=52,
        num_heads=36,
        num_kv_heads=36,
        head_dim=128,
        max_positions=8_192,
        moe=MoESpec(num_experts=16, top_k=2, expert_dim=12_288, gate_norm_scale=1.0),
        moe_layers=tuple(range(52)),
    ),
    "smollm2-135m": ModelSpec(
        family="llama",
        vocab_size=49_152,
        hidden_dim=576,
        ffn_dim=1_536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_positions=8_192,
        norm_eps=1e-5,
        rope=RopeSpec(theta=100_000.0),
        tied_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
        pad_token_id=2,
    ),
}
"""Models with a name, as facts; their weights are not part of the project."""
