"""What a model is: `ModelSpec`, and Hugging Face's `config.json` to and from it.

A spec is a fact, never a choice for one job. It counts parameters and floating-point
operations, and it is all that is needed to build a model or to read one from disk.
Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from moesaic.errors import SpecError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "skywork", "mixtral", "qwen2_moe", "qwen3_moe"]
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

    def replace(self, **changes: object) -> ModelSpec:
        """The same spec with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
