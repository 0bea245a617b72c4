"""Score the experts for each token and choose the best few.

    z = x W^T                            raw logits, one an expert
    z~ = lambda (z - mean) / (std + eps) optional (Skywork-MoE Eq. 6), per token over its experts
    g = softmax(z~)                      over *all* experts, chosen or not
    gates = top k of g, divided by their sum when the spec renormalises (Eq. 2)

The normalisation is part of the model: it runs in training and in inference alike. All of
this is done in at least float32, whatever the activations are.

Shapes.
    T tokens     D model width     E experts     K experts per token
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moesaic.spec import MoESpec


class RouterOutput(NamedTuple):
    """What the router decided, in at least float32."""

    logits_TE: Tensor
    """Raw scores, before normalisation."""

    probs_TE: Tensor
    """Softmax of the (normalised) scores; rows sum to 1."""

    gates_TK: Tensor
    """Weight of each chosen expert."""

    experts_TK: Tensor
    """Which experts they are, best first, int64."""


def normalise_logits(logits_TE: Tensor, scale: float, eps: float) -> Tensor:
    """Standardise each token's logits over its experts, then multiply by `scale`.

    Skywork-MoE Eq. 6. The standard deviation is the unbiased one (E - 1), as in the vendor's
    inference code. `eps` is added to it. Logits that are all equal give zeros; their
    derivative, which Eq. 6 leaves open, is taken as if the standard deviation were 1.

    Args:
        logits_TE: Router scores, (T, E), E at least 2.
        scale: Lambda, the standard deviation of the result.
        eps: Added to the standard deviation.
    """
    centred_TE = logits_TE - logits_TE.mean(dim=-1, keepdim=True)
    variance_T1 = centred_TE.square().sum(dim=-1, keepdim=True) / (logits_TE.shape[-1] - 1)
    # The square root has no derivative at 0, and `where` after it would still pass on a NaN.
    std_T1 = torch.where(variance_T1 > 0, variance_T1, 1.0).sqrt()
    return centred_TE * (scale / (std_T1 + eps))


def sum_to_one(gates_TK: Tensor) -> Tensor:
    """The same gates in float64, divided by their sum once more.

    Float32 gates sum to 1 only to their last bit. Where experts are equal, as they are after
    upcycling, what is missing is an error of the layer; models with activations in the tens of
    thousands show it in the third decimal. At inference, in float32, it need not be there.
    """
    wide_TK = gates_TK.double()
    tiny = torch.finfo(torch.float32).tiny
    return wide_TK / wide_TK.sum(dim=-1, keepdim=True).clamp_min(tiny)


class Router(nn.Module):
    """The gate of one MoE layer: a matrix (E, D) without bias, and how its scores are read."""

    def __init__(self, spec: MoESpec, hidden_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_dim))
        if spec.selection_bias:
            bias_E = torch.zeros(spec.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias_E)
        else:
            self.e_score_correction_bias = None

    def forward(self, x_TD: Tensor) -> RouterOutput:
        """Choose `top_k` experts for each token of x_TD, (T, D)."""
        return self.choose(self.score(x_TD))

    def score(self, x_TD: Tensor) -> Tensor:
        """Raw logits, (..., E), at least float32, of x, (..., D)."""
        # At least float32: bfloat16 rounds near-ties to exact ties, which topk breaks arbitrarily.
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return nn.functional.linear(x_TD.to(dtype), self.weight.to(dtype))

    def choose(self, logits_TE: Tensor) -> RouterOutput:
        """Choose `top_k` experts for each token from its raw logits, (T, E)."""
        spec = self.spec
        scores_TE = logits_TE
        if spec.gate_norm_scale is not None:
            scores_TE = normalise_logits(logits_TE, spec.gate_norm_scale, spec.gate_norm_eps)
        probs_TE = scores_TE.softmax(dim=-1)
        bias_E = self.e_score_correction_bias
        if bias_E is None:
            gates_TK, experts_TK = probs_TE.topk(spec.top_k, dim=-1)
        else:
            # The bias decides who is chosen, never how much a chosen expert counts.
            experts_TK = (probs_TE.detach() + bias_E).topk(spec.top_k, dim=-1).indices
            gates_TK = probs_TE.gather(-1, experts_TK)
        if spec.renormalize:
            # An expert chosen for its bias may have a probability that is 0 in floating point.
            tiny = torch.finfo(gates_TK.dtype).tiny
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True).clamp_min(tiny)
        return RouterOutput(logits_TE, probs_TE, gates_TK, experts_TK)
