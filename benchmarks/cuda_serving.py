"""Time each Triton kernel of serving beside torch's own way, on one GPU.

    python benchmarks/cuda_serving.py

Sizes are Skywork-MoE's on one of eight cards: 4608 wide, 5 heads of 128, 16 experts of 1536 of
their 12,288 columns. Every kernel's result is held against torch's before it is timed. Times are
medians with a cold L2 cache, ours and torch's in turns. Without a GPU this says so and ends.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from measuring_machine import machine, save
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from moesaic.serving.cuda.tiles import Activations

WIDTH, INNER, EXPERTS, TOP_K = 4608, 1536, 16, 2
HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 5, 5, 128, 16
DEVICE = "cuda"
ROWS = (1, 8, 64, 2048)
LOOKS = ((1, 1, 1024), (8, 1, 1024), (64, 1, 1024), (8, 1, 8192), (1, 512, 512), (1, 512, 4096))
"""Sequences, new tokens of each, positions of each."""
TOLERANCES: dict[Activations, float] = {"wide": 0.02, "float8": 0.1}
"""Largest difference over the largest result."""
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Pair(NamedTuple):
    """Two ways to compute the same."""

    name: str
    ours: Callable[[], Tensor]
    torchs: Callable[[], Tensor]
    least_bytes: int
    """What must be read at least: weights or cache."""
    tolerance: float


def main() -> None:
    reason = why_not()
    if reason is not None:
        print(f"nothing is measured: {reason}")
        return
    from triton.testing import do_bench

    rows = []
    for pair in (*linears(), *experts_pairs(), *attentions()):
        ours, torchs = pair.ours().float(), pair.torchs().float()
        error = float((ours - torchs).abs().max() / torchs.abs().max())
        if error > pair.tolerance:
            sys.exit(f"{pair.name}: results differ by {error:.3f}, more than {pair.tolerance}")
        times = [do_bench(way, return_mode="median") for way in (pair.ours, pair.torchs) * 2]
        our_ms, torch_ms = min(times[0::2]), min(times[1::2])
        read = pair.least_bytes / our_ms / 1e6
        print(
            f"{pair.name:44} {our_ms * 1e3:8.1f} us   torch {torch_ms * 1e3:8.1f} us   "
            f"{torch_ms / our_ms:5.2f}x   {read:6.0f} GB/s   error {error:.4f}",
            flush=True,
        )
        rows.append(
            {
                "name": pair.name,
                "us": our_ms * 1e3,
                "torch_us": torch_ms * 1e3,
                "gb_per_s": read,
                "error": error,
            }
        )
    name = torch.cuda.get_device_name()
    save("cuda_serving", {"machine": machine() | {"gpu": name}, "kernels": rows})


def why_not() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 9):
        return "the GPU has no 8-bit products (sm89 and later have)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=BF16) / shape[-1] ** 0.5


def linears() -> Iterator[Pair]:
    from moesaic.quantization.fp8 import dequantize, quantize_per_channel
    from moesaic.serving.cuda.linear import linear
    from moesaic.serving.cuda.tiles import Weight

    weight = Weight(*quantize_per_channel(draw(3 * HEADS * HEAD_DIM, WIDTH)))
    w_OI = dequantize(*weight, BF16)
    for rows in ROWS:
        x_TI = draw(rows, WIDTH) * 50
        for activations in ("wide", "float8"):
            yield Pair(
                f"linear, e4m3 weights, {activations} rows, {rows}",
                lambda x=x_TI, a=activations: linear(x, weight, activations=a),
                lambda x=x_TI: functional.linear(x, w_OI),
                weight.values.nbytes,
                TOLERANCES[activations],
            )


def experts_pairs() -> Iterator[Pair]:
    from moesaic.moe.dispatch import combine, gather, plan_dispatch
    from moesaic.moe.experts import grouped_swiglu
    from moesaic.quantization.fp8 import dequantize, quantize_per_channel
    from moesaic.serving.cuda.experts import experts
    from moesaic.serving.cuda.tiles import Weight

    shapes = ((INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
    rounded = [
        Weight(*(part.unflatten(0, (EXPERTS, -1)) for part in quantize_per_channel(w)))
        for w in (draw(EXPERTS * rows, columns) for rows, columns in shapes)
    ]
    wide = [dequantize(*weight, BF16) for weight in rounded]
    plain = [Weight(w) for w in wide]
    for tokens in ROWS:
        x_TD = draw(tokens, WIDTH) * 50
        gates_TK, experts_TK = torch.rand(tokens, EXPERTS, device=DEVICE).topk(TOP_K)

        def by_torch(
            x_TD: Tensor = x_TD, gates: Tensor = gates_TK, e: Tensor = experts_TK
        ) -> Tensor:
            plan = plan_dispatch(e, num_experts=EXPERTS)
            return combine(grouped_swiglu(gather(x_TD, plan), plan.counts_E, *wide), gates, plan)

        touched = len(experts_TK.unique())
        for name, weights, activations in (
            ("bfloat16", plain, "wide"),
            ("e4m3", rounded, "wide"),
            ("e4m3", rounded, "float8"),
        ):
            yield Pair(
                f"experts, {name} weights, {activations} rows, {tokens}",
                lambda x=x_TD, e=experts_TK, g=gates_TK, w=weights, a=activations: experts(
                    x, e, g, *w, activations=a
                ),
                by_torch,
                sum(w.values[0].nbytes for w in weights) * touched,
                TOLERANCES[activations],
            )


def attentions() -> Iterator[Pair]:
    from moesaic.serving.cuda.attention import attend, tiles_of

    for sequences, new, length in LOOKS:
        blocks = sequences * length // BLOCK_TOKENS
        shape = (blocks, KV_HEADS, BLOCK_TOKENS, HEAD_DIM)
        tables = torch.randperm(blocks, device=DEVICE).to(torch.int32).view(sequences, -1)
        q_THC = torch.randn(sequences * new, HEADS, HEAD_DIM, device=DEVICE, dtype=BF16)
        distance = torch.arange(length - new, length)[:, None] - torch.arange(length)
        mask = None if new == 1 else (distance >= 0).to(DEVICE)
        tiles = tiles_of(
            [new] * sequences, [length - new] * sequences, group=HEADS // KV_HEADS, device=DEVICE
        )
        for dtype in (BF16, FP8):
            pools = [torch.randn(shape, device=DEVICE).to(dtype) for _ in "kv"]
            # Torch gets keys and values wide and side by side: the work that blocks save is done.
            k, v = (
                pool.to(BF16)[tables.long()].transpose(1, 2).flatten(2, 3).contiguous()
                for pool in pools
            )

            def by_torch(
                q: Tensor = q_THC,
                k: Tensor = k,
                v: Tensor = v,
                n: int = new,
                m: Tensor | None = mask,
            ) -> Tensor:
                q_BHtC = q.unflatten(0, (-1, n)).transpose(1, 2)
                y = functional.scaled_dot_product_attention(q_BHtC, k, v, attn_mask=m)
                return y.transpose(1, 2).flatten(0, 1)

            yield Pair(
                f"attention, {'e4m3' if dtype == FP8 else 'bfloat16'} cache, "
                f"{sequences} x {new} of {length}",
                lambda q=q_THC, p=pools, t=tables, n=tiles: attend(q, *p, t, n),
                by_torch,
                sum(pool.nbytes for pool in pools),
                TOLERANCES["wide"],
            )


if __name__ == "__main__":
    main()
