"""All experts of a layer as one grouped computation.

    y = (silu(x w1^T) * (x w3^T)) w2^T      each row with the weights of its own expert

Rows come sorted by expert with a count for each, and every implementation accepts any
counts, zero included. Weights may be wider than the activations (float32 masters, bfloat16
compute): they are cast to the activations' dtype once, and their gradients come back in their own.

    loop        one expert after the other in plain autograd: the reference, and the cheapest for
                few rows without gradients, because only the experts that have rows are touched
    padded      every expert's rows padded to a multiple of ROW_MULTIPLE. oneDNN builds a new
                primitive for every row count that it has not seen, and an MoE shows it new ones at
                every step; with padding there are few. Weight gradients go where they belong
    fused       `grouped_swiglu.cpp`: panels of weights are cast and packed as they are read, and
                activations and weight gradients are finished while still in the processor's
                cache. For CPUs with bfloat16 matrix products, where a compiler is found
    grouped_mm  torch's grouped matrix product, for CUDA

`auto` takes grouped_mm on CUDA and fused on a CPU, both for bfloat16, and padded otherwise.

Shapes.
    N rows, sorted by expert     P rows with padding     n rows of one expert
    E experts     D model width     F inner width of an expert
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.errors import ConfigError
from moesaic.moe import native
from moesaic.parallel.backward import wanted

Implementation = Literal["auto", "loop", "padded", "fused", "grouped_mm"]

ROW_MULTIPLE = 64
"""Rows of an expert are padded to a multiple of this."""

FLOAT32_ROW_MULTIPLE = 256
"""The same at float32 inference. With some 200 rows or fewer, MKL on several threads adds a long
sum up in another order than it does for a dense layer's rows, and equal experts give unequal
results. Training, where nothing is compared to the last bit, keeps the smaller one."""

FEW_ROWS = 64
"""At most this many rows, and no gradient to keep: touch only the experts that have rows."""


class Experts(nn.Module):
    """The routed experts' weights, stacked, and their grouped computation."""

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        *,
        expert_dim: int,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.implementation: Implementation = implementation
        self.w1 = nn.Parameter(torch.empty(num_experts, expert_dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, expert_dim, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_dim, expert_dim))

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Run each row through its expert, (N, D) -> (N, D)."""
        if self.w1.shape[0] == 0:  # a rank may hold none, and then no row is for it
            return x_ND.clone()
        return grouped_swiglu(
            x_ND, counts_E, self.w1, self.w3, self.w2, implementation=self.implementation
        )


def grouped_swiglu(
    x_ND: Tensor,
    counts_E: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor,
    w2_EDF: Tensor,
    *,
    implementation: Implementation = "auto",
) -> Tensor:
    """SwiGLU of each row with the weights of its expert.

    Args:
        x_ND: Rows sorted by expert, (N, D).
        counts_E: Rows of each expert, (E,), integers that sum to N.
        w1_EFD: Weights of the SiLU branch, (E, F, D).
        w3_EFD: Weights of the linear branch, (E, F, D).
        w2_EDF: Weights of the way back, (E, D, F).
        implementation: Which way to compute it; `auto` chooses for the device.

    Returns:
        y_ND: In x_ND's dtype, (N, D).
    """
    if implementation == "auto":
        implementation = _choose(x_ND, w1_EFD, w3_EFD, w2_EDF)
    y_ND: Tensor = _IMPLEMENTATIONS[implementation](x_ND, counts_E, w1_EFD, w3_EFD, w2_EDF)
    return y_ND


def _choose(x_ND: Tensor, *weights: Tensor) -> Implementation:
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, *weights))
    if x_ND.is_cuda:
        return "grouped_mm" if x_ND.dtype == torch.bfloat16 else "padded"
    if x_ND.shape[0] <= FEW_ROWS and not needs_grad:
        return "loop"
    if _fits_fused(x_ND, *weights) and native.available():
        return "fused"
    return "padded"


def _fits_fused(x_ND: Tensor, *weights: Tensor) -> bool:
    dtypes = {w.dtype for w in weights}
    return (
        x_ND.device.type == "cpu"
        and x_ND.dtype == torch.bfloat16
        and len(dtypes) == 1
        and dtypes <= {torch.float32, torch.bfloat16}
        and all(size > 0 and size % 32 == 0 for size in weights[0].shape[1:])
        and all(w.is_contiguous() for w in weights)
    )


def _loop(x_ND: Tensor, counts_E: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor) -> Tensor:
    parts = []
    for expert, rows in _spans(counts_E.tolist()):
        x_nD = x_ND[rows]
        w1, w3, w2 = (w[expert].to(x_ND.dtype) for w in (w1_EFD, w3_EFD, w2_EDF))
        h_nF = functional.silu(functional.linear(x_nD, w1)) * functional.linear(x_nD, w3)
        parts.append(functional.linear(h_nF, w2))
    return torch.cat(parts) if parts else x_ND.clone()


def _grouped_mm(
    x_ND: Tensor, counts_E: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor
) -> Tensor:
    mm = _torch_grouped_mm()
    ends_E = counts_E.cumsum(0).to(torch.int32)
    w1, w3, w2 = (w.to(x_ND.dtype).transpose(-2, -1) for w in (w1_EFD, w3_EFD, w2_EDF))
    h_NF = functional.silu(mm(x_ND, w1, offs=ends_E)) * mm(x_ND, w3, offs=ends_E)
    return mm(h_NF, w2, offs=ends_E)


def _torch_grouped_mm() -> Callable[..., Tensor]:
    # Public since torch 2.10; the private one before it takes the same arguments.
    public = getattr(functional, "grouped_mm", None)
    chosen: Callable[..., Tensor] = torch._grouped_mm if public is None else public
    return chosen


def _padded(
    x_ND: Tensor, counts_E: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor
) -> Tensor:
    exact = x_ND.dtype == torch.float32 and not torch.is_grad_enabled()
    multiple = FLOAT32_ROW_MULTIPLE if exact else ROW_MULTIPLE
    y_ND: Tensor = _PaddedSwiGLU.apply(  # type: ignore[no-untyped-call]
        x_ND, counts_E.tolist(), multiple, w1_EFD, w3_EFD, w2_EDF
    )
    return y_ND


def _fused(
    x_ND: Tensor, counts_E: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor
) -> Tensor:
    if not (_fits_fused(x_ND, w1_EFD, w3_EFD, w2_EDF) and native.available()):
        raise ConfigError(
            "The fused experts need a CPU with bfloat16 matrix products, a C++ compiler, bfloat16 "
            "activations, and widths that are multiples of 32. Use the padded ones."
        )
    y_ND: Tensor = _FusedSwiGLU.apply(  # type: ignore[no-untyped-call]
        x_ND.contiguous(), counts_E.tolist(), w1_EFD, w3_EFD, w2_EDF
    )
    return y_ND


_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "loop": _loop,
    "padded": _padded,
    "fused": _fused,
    "grouped_mm": _grouped_mm,
}


def _spans(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and where they are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _pad(rows_ND: Tensor, counts: list[int], padded: list[int]) -> Tensor:
    """Copy rows to where padding puts them; padding rows are zero."""
    rows_PD = rows_ND.new_empty(sum(padded), rows_ND.shape[1])
    start = 0
    for count, size, part in zip(counts, padded, rows_ND.split(counts), strict=True):
        rows_PD[start : start + count] = part
        rows_PD[start + count : start + size] = 0
        start += size
    return rows_PD


def _unpad(rows_PD: Tensor, counts: list[int], padded: list[int]) -> Tensor:
    parts = rows_PD.split(padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _PaddedSwiGLU(torch.autograd.Function):
    """SwiGLU on padded rows. Keeps x, h1 and h3, and recomputes the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        counts: list[int],
        multiple: int,
        w1_EFD: Tensor,
        w3_EFD: Tensor,
        w2_EDF: Tensor,
    ) -> Tensor:
        padded = [-(-count // multiple) * multiple for count in counts]
        w1, w3, w2 = (w.to(x_ND.dtype) for w in (w1_EFD, w3_EFD, w2_EDF))
        x_PD = _pad(x_ND, counts, padded)
        h1_PF = x_PD.new_empty(x_PD.shape[0], w1.shape[1])
        h3_PF = torch.empty_like(h1_PF)
        y_PD = torch.empty_like(x_PD)
        for expert, rows in _spans(padded):
            torch.mm(x_PD[rows], w1[expert].t(), out=h1_PF[rows])
            torch.mm(x_PD[rows], w3[expert].t(), out=h3_PF[rows])
            h_nF = functional.silu(h1_PF[rows]).mul_(h3_PF[rows])
            torch.mm(h_nF, w2[expert].t(), out=y_PD[rows])
        ctx.save_for_backward(x_PD, h1_PF, h3_PF, w1, w3, w2)
        ctx.counts, ctx.padded = counts, padded
        ctx.weight_dtypes = [w.dtype for w in (w1_EFD, w3_EFD, w2_EDF)]
        return _unpad(y_PD, counts, padded)

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, h1_PF, h3_PF, w1, w3, w2 = ctx.saved_tensors
        needs_x, needs_w1, needs_w3, needs_w2 = _needs(ctx.needs_input_grad, skip=2)
        dy_PD = _pad(dy_ND, ctx.counts, ctx.padded)
        dx_PD = torch.empty_like(x_PD) if needs_x else None
        dw1, dw3, dw2 = (
            w.new_empty(w.shape, dtype=dtype) if needed else None
            for w, dtype, needed in zip(
                (w1, w3, w2), ctx.weight_dtypes, (needs_w1, needs_w3, needs_w2), strict=True
            )
        )
        for expert, count in enumerate(ctx.padded):
            if count == 0:
                for dw in (dw1, dw3, dw2):
                    if dw is not None:
                        dw[expert].zero_()
        for expert, rows in _spans(ctx.padded):
            x_nD, dy_nD, h1_nF, h3_nF = x_PD[rows], dy_PD[rows], h1_PF[rows], h3_PF[rows]
            gate_nF = h1_nF.sigmoid()
            silu_nF = h1_nF * gate_nF
            if dw2 is not None:
                _write_product(dw2[expert], dy_nD.t(), silu_nF * h3_nF)
            dh_nF = dy_nD @ w2[expert]
            dh3_nF = dh_nF * silu_nF
            # d silu(h) / dh = s (1 + h (1 - s)) with s = sigmoid(h)
            slope_nF = (1 - gate_nF).mul_(h1_nF).add_(1).mul_(gate_nF)
            dh1_nF = dh_nF.mul_(h3_nF).mul_(slope_nF)
            if dw1 is not None:
                _write_product(dw1[expert], dh1_nF.t(), x_nD)
            if dw3 is not None:
                _write_product(dw3[expert], dh3_nF.t(), x_nD)
            if dx_PD is not None:
                torch.mm(dh1_nF, w1[expert], out=dx_PD[rows])
                dx_PD[rows].addmm_(dh3_nF, w3[expert])
        dx_ND = None if dx_PD is None else _unpad(dx_PD, ctx.counts, ctx.padded)
        return dx_ND, None, None, dw1, dw3, dw2


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, also where `out` is wider than the factors."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _needs(needs_input_grad: tuple[bool, ...], *, skip: int) -> list[bool]:
    """Whether the gradients of rows, w1, w3 and w2 are for this backward pass to compute."""
    needs_x, needs_w = bool(needs_input_grad[0]), needs_input_grad[1 + skip :]
    return [needs_x and wanted().activations, *(bool(n) and wanted().weights for n in needs_w)]


class _FusedSwiGLU(torch.autograd.Function):
    """The C++ operation. Keeps x, and h1 beside h3 in a layout of its own; no copy of a weight."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, counts: list[int], w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        y_ND: Tensor
        y_ND, h = torch.ops.moesaic.swiglu_forward(x_ND, counts, w1_EFD, w3_EFD, w2_EDF, keep)
        ctx.save_for_backward(x_ND, h, w1_EFD, w3_EFD, w2_EDF)
        ctx.counts = counts
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, h, *weights = ctx.saved_tensors
        needs = _needs(ctx.needs_input_grad, skip=1)
        found = torch.ops.moesaic.swiglu_backward(
            dy_ND.contiguous(), x_ND, ctx.counts, h, *weights, [int(need) for need in needs]
        )
        dx, dw1, dw3, dw2 = (g if need else None for g, need in zip(found, needs, strict=True))
        return dx, None, dw1, dw3, dw2
