"""What `upcycle` is asked for, and which model comes of it. Nothing here loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError, SpecError
from moesaic.spec import Family, ModelSpec, MoESpec

Initialisation = Literal["copy", "noise", "drop", "mix", "granular"]

_MOE_FAMILY: dict[str, Family] = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "skywork": "skywork",
}
"""The family that has a dense family's attention and experts in place of its MLPs."""


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How a dense model becomes a mixture of experts."""

    dense: Path
    """Hugging Face folder of the dense model; the base when experts come from several."""

    out: Path
    """Folder to write: the MoE model, with proof.json beside its weights."""

    experts: int
    """Experts in each MoE layer."""

    top_k: int = 2
    """Experts each token is sent to."""

    init: Initialisation = "copy"
    """Where experts come from. `copy`: each is the dense MLP. `noise`: copies plus noise. `drop`:
    copies of which a part is drawn anew (Drop-Upcycling). `mix`: copies of several dense
    models' MLPs. `granular`: each expert is a 1/granularity part of the MLP."""

    noise_std: float = 0.01
    """`noise`: standard deviation of the noise, in standard deviations of the weight it is added
    to. The figure is ours."""

    drop_ratio: float = 0.5
    """`drop`: part of each expert's inner width that is drawn anew (0.5 is the paper's best)."""

    mix: tuple[str, ...] = ()
    """`mix`: FOLDER=COUNT, a dense model of the same shapes and how many experts in each layer
    are copies of its MLP. The base makes the rest, which come last, and all other weights."""

    granularity: int = 1
    """`granular`: parts each MLP is cut into; experts and top_k are multiples of it."""

    gate_std: float = 0.02
    """Standard deviation of the routers' first weights, which are normal around 0."""

    gate_norm_scale: float | None = None
    """Lambda of gating logit normalisation (Skywork-MoE uses 1); none leaves logits raw."""

    selection_bias: bool = False
    """Give each expert a bias for selection alone, 0 at first (loss-free balancing)."""

    every: int = 1
    """Every how many layers there is an MoE: layer i has one when i + 1 is a multiple."""

    layers: tuple[int, ...] = ()
    """The layers that become MoE, from 0, in place of `every`."""

    from_scratch: bool = False
    """Draw every weight anew and take only the architecture from the dense model."""

    scratch_std: float = 0.02
    """`from_scratch`: standard deviation of every matrix but the routers. The figure is ours."""

    seed: int = 0
    """Where random numbers start; each tensor has its own, whatever the order of writing."""

    prove: bool = True
    """Run dense and MoE model on real text and write the differences to proof.json."""

    proof_text: Path | None = None
    """Text file for the proof; none takes the source of Python's standard library."""

    proof_tokens: int = 512
    """Tokens of that text to run, in rows of at most 512."""

    proof_dtype: Literal["float32", "float64"] = "float32"
    """What the proof computes in."""

    dense_tokens: float | None = None
    """Tokens the dense model was trained on. With `moe_tokens`: print whether to upcycle."""

    moe_tokens: float | None = None
    """Tokens the MoE will be trained on."""

    relative_cost: float = 2.0
    """GPU hours of an MoE token in those of a dense token. 2 is Skywork-MoE's figure for top-2
    with expert-parallel communication."""

    overwrite: bool = False
    """Replace `out` if it is there."""

    def __post_init__(self) -> None:
        self._check_experts()
        self._check_numbers()
        self._check_flags_belong_to_init()
        if self.init == "granular":
            self._check_granular()
        if self.init == "mix":
            self._check_mix()
        if self.layers and self.every != 1:
            raise ConfigError(
                f"layers ({', '.join(map(str, self.layers))}) and every ({self.every}) both say "
                "where MoE layers are. Give one of them."
            )
        if (self.dense_tokens is None) != (self.moe_tokens is None):
            raise ConfigError(
                "The verdict needs both budgets, dense_tokens and moe_tokens, but one is missing."
            )

    def _check_experts(self) -> None:
        if self.experts < 1:
            raise ConfigError(f"experts is {self.experts}. A layer needs 1 or more.")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"top_k is {self.top_k}, but each layer has {self.experts} experts. "
                f"Choose a top_k from 1 to {self.experts}."
            )
        if self.gate_norm_scale is None:
            return
        # Equal logits have a standard deviation of 0, and normalising them is 0 / 0.
        if self.experts < 2:
            raise ConfigError(
                "gate_norm_scale divides by a standard deviation over experts, which 1 expert "
                "does not have. Use 2 experts or more, or leave it out."
            )
        if self.gate_std == 0:
            raise ConfigError(
                "gate_std 0 makes all logits equal, and gate_norm_scale would divide by their "
                "standard deviation, 0. Use a gate_std above 0, or leave gate_norm_scale out."
            )

    def _check_numbers(self) -> None:
        at_least_0 = ("gate_std", "noise_std", "scratch_std", "dense_tokens", "moe_tokens")
        above_0 = ("gate_norm_scale", "relative_cost")
        for name in (*at_least_0, *above_0):
            value = getattr(self, name)
            if value is None:
                continue
            wrong = value <= 0 if name in above_0 else value < 0
            if wrong or not math.isfinite(value):
                least = "above 0" if name in above_0 else "0 or more"
                raise ConfigError(f"{name} is {value}. It must be a finite number, {least}.")
        if not 0 < self.drop_ratio <= 1:
            raise ConfigError(f"drop_ratio is {self.drop_ratio}. Choose one above 0, at most 1.")
        for name, least_count in (("every", 1), ("granularity", 1), ("proof_tokens", 2)):
            if getattr(self, name) < least_count:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}. It must be {least_count} or more."
                )

    def _check_flags_belong_to_init(self) -> None:
        owners = {
            "noise_std": ("noise", 0.01),
            "drop_ratio": ("drop", 0.5),
            "mix": ("mix", ()),
            "granularity": ("granular", 1),
        }
        for name, (init, default) in owners.items():
            if getattr(self, name) != default and self.init != init:
                raise ConfigError(
                    f"{name} is set, but init is {self.init}, which does not use it. "
                    f"Say init {init}, or leave {name} out."
                )
        # `granular` stays legal: it is an architecture too, many experts of a part's width.
        if self.from_scratch and self.init not in ("copy", "granular"):
            raise ConfigError(
                f"from_scratch draws every weight anew, so init {self.init} has no meaning. "
                "Leave one of them out."
            )
        if self.scratch_std != 0.02 and not self.from_scratch:
            raise ConfigError("scratch_std is set without from_scratch. Add it, or leave it out.")

    def _check_granular(self) -> None:
        parts = self.granularity
        if parts < 2:
            raise ConfigError("init granular cuts MLPs into parts. Choose a granularity from 2 on.")
        for name in ("experts", "top_k"):
            if getattr(self, name) % parts:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, which is not a multiple of granularity "
                    f"{parts}. Top-k must pick whole MLPs, so both experts and top_k must be."
                )
        if self.experts == parts and self.gate_norm_scale is not None:
            raise ConfigError(
                f"{parts} experts of granularity {parts} are one group with equal logits, whose "
                "standard deviation is 0. Use more experts, or leave gate_norm_scale out."
            )
        if self.gate_std == 0 and self.top_k != self.experts:
            raise ConfigError(
                "gate_std 0 makes all logits equal, so top-k would pick parts of different MLPs. "
                "With init granular use a gate_std above 0."
            )

    def _check_mix(self) -> None:
        if not self.mix:
            raise ConfigError("init mix needs dense models to mix in: mix FOLDER=COUNT.")
        taken = sum(count for _, count in self.mixed_folders())
        if taken > self.experts:
            raise ConfigError(
                f"mix asks for {taken} experts, but each layer has {self.experts}. "
                "The counts may add up to at most that; the base makes the rest."
            )

    def mixed_folders(self) -> list[tuple[Path, int]]:
        """Each folder of `mix`, and how many experts come from it."""
        pairs = []
        for item in self.mix:
            folder, equals, count = item.rpartition("=")
            if not (folder and equals and count.isdecimal() and int(count) > 0):
                raise ConfigError(
                    f"mix is {item!r}. Write FOLDER=COUNT with a count of 1 or more, "
                    "such as models/code=3."
                )
            pairs.append((Path(folder), int(count)))
        return pairs


def upcycled_spec(dense: ModelSpec, config: UpcycleConfig) -> ModelSpec:
    """The MoE model that `config` makes of a dense one.

    Raises:
        ConfigError: The model is an MoE already, or a number does not fit it.
    """
    if dense.moe is not None:
        raise ConfigError(
            f"{config.dense} is a mixture of {dense.moe.num_experts} experts already. "
            "Upcycling starts from a dense model."
        )
    if dense.ffn_dim % config.granularity:
        raise ConfigError(
            f"granularity {config.granularity} does not divide the MLP's inner width, "
            f"{dense.ffn_dim}. Choose one that does."
        )
    layers = _moe_layers(dense.num_layers, config)
    moe = MoESpec(
        num_experts=config.experts,
        top_k=config.top_k,
        expert_dim=dense.ffn_dim // config.granularity,
        renormalize=True,
        gate_norm_scale=config.gate_norm_scale,
        selection_bias=config.selection_bias,
    )
    # Where every layer is MoE no layer has the dense width, and Mixtral has no key for it.
    ffn_dim = moe.expert_dim if len(layers) == dense.num_layers else dense.ffn_dim
    changes = {"moe": moe, "moe_layers": layers, "ffn_dim": ffn_dim}
    try:
        return dense.replace(family=_MOE_FAMILY[dense.family], **changes)
    except SpecError:
        # That family cannot say all of it (normalised gates, some dense layers, biases ...).
        return dense.replace(family="skywork", **changes)


def _moe_layers(num_layers: int, config: UpcycleConfig) -> tuple[int, ...]:
    if not config.layers:
        if config.every > num_layers:
            raise ConfigError(
                f"every {config.every} leaves no MoE layer in a model of {num_layers} layers. "
                f"Choose at most {num_layers}."
            )
        return tuple(range(config.every - 1, num_layers, config.every))
    if len(set(config.layers)) != len(config.layers):
        raise ConfigError(f"layers names a layer twice: {', '.join(map(str, config.layers))}.")
    for layer in config.layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"layers names layer {layer}, but the model has layers 0 to {num_layers - 1}."
            )
    return tuple(sorted(config.layers))
