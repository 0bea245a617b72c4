"""Time the serving kernels beside torch's own operations and beside the memory's bandwidth.

    python benchmarks/serving_kernels.py

The shapes are the demo's: SmolLM2-135M with 8 experts, top-2. Weights of many layers take turns, so
that every one comes from memory, as in a step. Within a round everything is measured once, one
after the other, so that a busy machine slows all of it; the best of all rounds counts. The limit is
the bytes that must be read over the bandwidth at which a plain kernel reads 16 MiB of another
256 MiB, found in the same rounds. More than all of it means that a third-level cache, which a
server shares among many, still had some of the weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import measuring_machine
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.model.rope import rope_tables
from moesaic.moe.experts import grouped_swiglu
from moesaic.serving.native import build
from moesaic.serving.native.halves import AttentionHalf, ExpertsHalf, HeadHalf, Step
from moesaic.serving.native.matrices import PackedExperts, PackedLinear
from moesaic.spec import PRESETS, MoESpec, RopeSpec

KINDS = ("bfloat16", "float8", "int8")
ROWS = (1, 8, 32, 512)
CONTEXT = 512  # positions that a decoding sequence has
BLOCK = 16
HEADS = 4  # copies of the head that take turns

SPEC = PRESETS["smollm2-135m"]
MOE = MoESpec(num_experts=8, top_k=2, expert_dim=SPEC.ffn_dim)
D, F, V, H, G, C = SPEC.hidden_dim, SPEC.ffn_dim, SPEC.vocab_size, 9, 3, 64


@dataclass
class Case:
    """One operation at one number of rows, done in several ways."""

    name: str
    rows: int
    bytes_of: dict[str, float]
    flops: float
    ways: dict[str, list[Callable[[], object]]]


class Weights:
    """One layer, packed in every way, and plain."""

    def __init__(self, layers: int) -> None:
        # Values hardly matter to the time; one random layer is enough, but not its memory.
        self.qkv, self.out = torch.randn((H + 2 * G) * C, D) / 24, torch.randn(D, H * C) / 24
        self.up, self.down = torch.randn(F, D) / 24, torch.randn(D, F) / 39
        self.head, self.router = torch.randn(V, D) / 24, torch.randn(8, D)
        settings = {"norm_D": torch.ones(D), "norm_eps": 1e-5}
        self.attention, self.experts, self.heads = {}, {}, {}
        for kind in KINDS:
            self.attention[kind] = [
                AttentionHalf(
                    **settings,
                    qkv=PackedLinear.pack(self.qkv, kind),
                    out=PackedLinear.pack(self.out, kind),
                    group_sizes=(H // G,) * G,
                    head_dim=C,
                )
                for _ in range(layers)
            ]
            self.experts[kind] = [
                ExpertsHalf(**settings, router_ED=self.router, moe=MOE, experts=self._packed(kind))
                for _ in range(layers)
            ]
            self.heads[kind] = [
                HeadHalf(**settings, head=PackedLinear.pack(self.head, kind)) for _ in range(HEADS)
            ]
        self.plain = [
            [w.bfloat16().clone() for w in (self.qkv, self.out)]
            + [w.bfloat16().expand(8, *w.shape).clone() for w in (self.up, self.up, self.down)]
            for _ in range(layers)
        ]
        self.plain_heads = [self.head.bfloat16().clone() for _ in range(HEADS)]

    def _packed(self, kind: str) -> PackedExperts:
        packed = PackedExperts(MOE.num_experts, D, expert_dim=F, kind=kind)
        for expert in range(MOE.num_experts):
            packed.fill(expert, self.up, self.up, self.down)
        return packed


def item_bytes(kind: str) -> int:
    return 2 if kind == "bfloat16" else 1


def cases(weights: Weights) -> list[Case]:
    found = []
    for rows in ROWS:
        x = torch.randn(rows, D).bfloat16()
        found += [experts_case(weights, x), attention_case(weights, x)]
        if rows <= 32:
            found.append(head_case(weights, x))
    return found


def experts_case(weights: Weights, x: Tensor) -> Case:
    rows = x.shape[0]
    _, chosen = weights.experts["bfloat16"][0](x)
    counts = torch.bincount(chosen.flatten(), minlength=MOE.num_experts)
    order = chosen.flatten().argsort(stable=True)
    gates = torch.rand(rows, MOE.top_k)

    def plain(layer: list[Tensor]) -> Tensor:
        scores = functional.linear(x.float(), weights.router).softmax(-1).topk(MOE.top_k)
        copies = x[order // MOE.top_k]
        y = grouped_swiglu(copies, counts, *layer[2:]) * gates.flatten()[order, None].bfloat16()
        return torch.zeros_like(x).index_add_(0, order // MOE.top_k, y) + scores.values.sum() * 0

    touched = int((counts > 0).sum()) * 3 * D * F
    return Case(
        "experts",
        rows,
        {kind: touched * item_bytes(kind) for kind in KINDS},
        2.0 * rows * MOE.top_k * 3 * D * F,
        {
            **{k: [lambda h=h: h(x) for h in weights.experts[k]] for k in KINDS},
            "torch": [lambda w=w: plain(w) for w in weights.plain],
        },
    )


def attention_case(weights: Weights, x: Tensor) -> Case:
    """Decoding sequences behind a context, or one prompt of 512."""
    rows = x.shape[0]
    decodes = rows <= 32
    sequences, new, start = (rows, 1, CONTEXT - 1) if decodes else (1, rows, 0)
    blocks = -(-(start + new) // BLOCK)
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    positions = torch.arange(start, start + new).repeat(sequences)
    step = Step(
        torch.full((sequences,), start),
        torch.full((sequences,), new),
        tables,
        *rope_tables(RopeSpec(), C, positions),
    )
    pool = [torch.randn(sequences * blocks, G, BLOCK, C).bfloat16() for _ in "kv"]
    keys, values = (torch.randn(sequences, G, start + new, C).bfloat16() for _ in "kv")

    def plain(layer: list[Tensor]) -> Tensor:
        rows_of = functional.linear(x, layer[0]).view(sequences, new, H + 2 * G, C)
        q = rows_of[:, :, :H].transpose(1, 2)
        q = q * step.cos_TC[0].bfloat16() + q * step.sin_TC[0].bfloat16()
        y = functional.scaled_dot_product_attention(
            q, keys, values, is_causal=not decodes, enable_gqa=True
        )
        return functional.linear(y.transpose(1, 2).reshape(rows, H * C), layer[1])

    matrices = ((H + 2 * G) * C + H * C) * D
    cache = 2 * sequences * (start + new) * G * C * 2
    attended = sequences * new * (start + new if decodes else new / 2)
    return Case(
        "attention",
        rows,
        {kind: matrices * item_bytes(kind) + cache for kind in KINDS},
        2.0 * rows * matrices + 4.0 * attended * H * C,
        {
            **{k: [lambda h=h: h(x, step, *pool) for h in weights.attention[k]] for k in KINDS},
            "torch": [lambda w=w: plain(w) for w in weights.plain],
        },
    )


def head_case(weights: Weights, x: Tensor) -> Case:
    return Case(
        "head",
        x.shape[0],
        {kind: V * D * item_bytes(kind) for kind in KINDS},
        2.0 * x.shape[0] * V * D,
        {
            **{kind: [lambda h=h: h(x) for h in weights.heads[kind]] for kind in KINDS},
            "torch": [lambda w=w: functional.linear(x, w).float() for w in weights.plain_heads],
        },
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(found: list[Case], buffer: Tensor, budget: float) -> tuple[dict, float]:
    """The best time of each way of each case, and the best bandwidth, in bytes a second."""
    best: dict[tuple[str, int, str], float] = {}
    bandwidth, turn = 0.0, 0
    parts = buffer.split(16 << 20)  # about what an operation reads, so that as much disturbs it
    end = time.perf_counter() + budget
    while time.perf_counter() < end or turn < 3:
        for repeat in range(3):
            part = parts[(3 * turn + repeat) % len(parts)]
            took = seconds(lambda part=part: torch.ops.moesaic_serving.read(part))
            bandwidth = max(bandwidth, part.nbytes / took)
        for case in found:
            for way, works in case.ways.items():
                key = case.name, case.rows, way
                for repeat in range(3):
                    work = works[(3 * turn + repeat) % len(works)]
                    best[key] = min(best.get(key, float("inf")), seconds(work))
        turn += 1
    return best, bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not build.available():
        raise SystemExit("The kernels cannot be built or run here.")
    torch.manual_seed(0)
    weights = Weights(arguments.layers)
    buffer = torch.ops.moesaic_serving.empty_weights([256 << 20], torch.empty(0, dtype=torch.int8))
    buffer.zero_()
    found = cases(weights)
    with torch.no_grad():
        best, bandwidth = measure(found, buffer, arguments.seconds)
    print(f"{arguments.threads} threads; a kernel reads {bandwidth / 1e9:.1f} GB/s")
    rows = []
    for case in found:
        base = best[case.name, case.rows, "torch"]
        print(f"{case.name:9} {case.rows:4} rows  torch {base * 1e6:8.0f} us")
        for kind in KINDS:
            took = best[case.name, case.rows, kind]
            limit = case.bytes_of[kind] / bandwidth
            rows.append(
                {
                    "operation": case.name,
                    "rows": case.rows,
                    "weights": kind,
                    "us": took * 1e6,
                    "torch_us": base * 1e6,
                    "limit_us": limit * 1e6,
                    "gflops": case.flops / took / 1e9,
                }
            )
            print(
                f"  {kind:9} {took * 1e6:8.0f} us  {base / took:5.1f} x torch  "
                f"{limit / took:4.0%} of the bandwidth's limit  {case.flops / took / 1e9:6.0f} GF/s"
            )
    measuring_machine.save(
        "serving_kernels",
        {
            "machine": measuring_machine.machine(),
            "threads": arguments.threads,
            "bandwidth_gb_s": bandwidth / 1e9,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
