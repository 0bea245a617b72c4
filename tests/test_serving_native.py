"""The serving kernels against plain float32 mathematics, in C++ and in torch's operations."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from moesaic.model.rope import rope_tables
from moesaic.moe.router import Router
from moesaic.quantization.fp8 import quantize_per_channel
from moesaic.serving.native import build, plain
from moesaic.serving.native.halves import (
    AttentionHalf,
    DenseHalf,
    ExpertsHalf,
    HeadHalf,
    Step,
    WholeLayers,
)
from moesaic.serving.native.matrices import PackedExperts, PackedLinear
from moesaic.spec import MoESpec, RopeSpec

KINDS = ("bfloat16", "float8", "int8")

# Activations and results are rounded to bfloat16 (2^-9 of their size) in a few places, and the
# order of sums differs; a wrong weight, row or scale is wrong by its whole size.
TOLERANCE = 0.012


@pytest.fixture(params=["tiles", "vectors", "torch"])
def native(request):
    """Whether weights are packed for C++; with the processor's tiles and without."""
    if request.param == "torch":
        yield False
        return
    if not build.available():
        pytest.skip("needs a CPU with AVX512 and bfloat16 products, and a C++ compiler")
    torch.ops.moesaic_serving.use_tiles(request.param == "tiles")
    yield True
    torch.ops.moesaic_serving.use_tiles(True)


def assert_close(found, expected, tolerance=TOLERANCE):
    """Within `tolerance` of the largest expected number."""
    assert found.shape == expected.shape
    error = (found.float() - expected.float()).abs().max().item() if expected.numel() else 0.0
    largest = expected.float().abs().max().item() if expected.numel() else 1.0
    assert error <= tolerance * largest, f"{error=}, {largest=}"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight(rows, columns, kind, seed=0):
    """A weight as it is stored, its scale, and what it means in float32."""
    data, scale = plain.stored(random(rows, columns, seed=seed) / columns**0.5, kind, None)
    meant = data.float() if scale is None else data.float() * scale[:, None]
    return data, scale, meant


# ---- one matrix -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 33, 200])
def test_a_product_is_that_of_the_weights_as_stored(native, kind, rows):
    data, scale, meant = weight(75, 100, kind)
    bias = random(75)
    x = random(rows, 100).bfloat16()
    packed = PackedLinear.pack(data, kind, scale_O=scale, bias_O=bias, native=native)
    expected = x.float() @ meant.T + bias
    # int8 meets activations of 16 bits, each within 2^-16 of its row's largest.
    assert_close(packed(x, torch.float32), expected, 1e-4 if kind == "int8" else 1e-5)
    assert_close(packed(x), expected)


@pytest.mark.parametrize(("out", "into"), [(1, 1), (32, 64), (31, 65), (4608, 128), (100, 1536)])
def test_any_size_of_matrix_is_padded_without_a_trace(native, out, into):
    data, _, meant = weight(out, into, "bfloat16")
    x = random(3, into).bfloat16()
    packed = PackedLinear.pack(data, "bfloat16", native=native)
    assert_close(packed(x, torch.float32), x.float() @ meant.T, 1e-5)


@pytest.mark.parametrize("kind", ["float8", "int8"])
@pytest.mark.parametrize("rows", [1, 20])
def test_every_number_of_8_bits_is_widened_exactly(native, kind, rows):
    codes = torch.arange(256, dtype=torch.uint8).view(plain.DTYPES[kind])
    finite = codes[~codes.float().isnan()]
    data = finite[:, None].repeat(1, 64)
    x = torch.zeros(rows, 64, dtype=torch.bfloat16)
    x[-1, 37] = 1
    packed = PackedLinear.pack(data, kind, scale_O=torch.ones(len(finite)), native=native)
    assert torch.equal(packed(x, torch.float32)[-1], finite.float())


def test_packed_bytes_are_what_the_ledger_counts(native):
    if not native:
        pytest.skip("only packed weights are padded")
    for kind, (rows, columns) in itertools.product(KINDS, [(75, 100), (960, 576), (32, 64)]):
        up, wide = -(-rows // 32) * 32, -(-columns // 64) * 64
        expected = up * wide * 2 if kind == "bfloat16" else up * wide + 4 * up
        packed = PackedLinear.pack(weight(rows, columns, kind)[0].float(), kind, native=True)
        assert packed.nbytes == expected
        experts = PackedExperts(3, columns, expert_dim=rows, kind=kind, native=True)
        back = PackedLinear.pack(random(columns, rows), kind, native=True)
        assert experts.nbytes == 3 * (2 * expected + back.nbytes)


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_weights_are_rounded_to_8_bits_when_packed(native, kind):
    w = random(40, 64)
    x = random(5, 64).bfloat16()
    packed = PackedLinear.pack(w, kind, native=native)
    # e4m3 keeps 3 bits of fraction; int8 the 127th part of a row's largest.
    assert_close(packed(x, torch.float32), x.float() @ w.T, 0.05 if kind == "float8" else 0.01)
    if kind == "float8":
        data, scale = quantize_per_channel(w)
        same = PackedLinear.pack(data, kind, scale_O=scale, native=native)
        assert torch.equal(packed(x), same(x))


# ---- experts ----------------------------------------------------------------------------------


def make_experts(count, width, inner, kind, native):
    parts = [
        [weight(*shape, kind, seed=10 * e + i) for e in range(count)]
        for i, shape in enumerate([(inner, width), (inner, width), (width, inner)])
    ]
    packed = PackedExperts(count, width, expert_dim=inner, kind=kind, native=native)
    for expert, triple in enumerate(zip(*parts, strict=True)):
        data, scales, _ = zip(*triple, strict=True)
        packed.fill(expert, *data, scales=None if scales[0] is None else scales)
    return packed, [torch.stack([part[2] for part in column]) for column in parts]


def dense_experts(x, experts, gates, w1, w3, w2, first=0):
    """Every expert on every token, in float32."""
    y = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(w1.shape[0]):
        h = functional.silu(x.float() @ w1[expert].T) * (x.float() @ w3[expert].T)
        share = (gates * (experts == expert + first)).sum(-1, keepdim=True)
        y += share * (h @ w2[expert].T)
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 9, 200])
@pytest.mark.parametrize(("width", "inner"), [(48, 40), (96, 130)])
def test_experts_compute_the_sum_over_the_chosen_ones(native, kind, tokens, width, inner):
    packed, weights = make_experts(5, width, inner, kind, native)
    x = random(tokens, width).bfloat16()
    experts = torch.stack([torch.randperm(5)[:2] for _ in range(tokens)])
    gates = torch.rand(tokens, 2)
    assert_close(packed(x, experts, gates), dense_experts(x, experts, gates, *weights))


def test_copies_for_experts_of_other_ranks_are_left_out(native):
    packed, weights = make_experts(3, 64, 32, "bfloat16", native)
    x = random(40, 64).bfloat16()
    experts = torch.stack([torch.randperm(8)[:2] for _ in range(40)])
    gates = torch.rand(40, 2)
    expected = dense_experts(x, experts, gates, *weights, first=4)
    assert_close(packed(x, experts, gates, first_expert=4), expected)
    assert (packed(x, torch.zeros_like(experts), gates, first_expert=4) == 0).all()


def test_an_idle_expert_changes_nothing(native):
    packed, weights = make_experts(4, 64, 32, "bfloat16", native)
    x = random(21, 64).bfloat16()
    experts = torch.full((21, 1), 2)
    gates = torch.rand(21, 1)
    assert_close(packed(x, experts, gates), dense_experts(x, experts, gates, *weights))


MIXTURES = {
    "plain": MoESpec(num_experts=6, top_k=2, expert_dim=40, renormalize=False),
    "renormalised": MoESpec(num_experts=6, top_k=3, expert_dim=40),
    "normalised logits": MoESpec(num_experts=6, top_k=2, expert_dim=40, gate_norm_scale=1.5),
    "selection bias": MoESpec(num_experts=6, top_k=2, expert_dim=40, selection_bias=True),
    "shared expert": MoESpec(num_experts=6, top_k=2, expert_dim=40, shared_expert_dim=24),
    "everything": MoESpec(
        num_experts=70,
        top_k=4,
        expert_dim=40,
        gate_norm_scale=1.0,
        selection_bias=True,
        shared_expert_dim=72,
    ),
}


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("moe", MIXTURES.values(), ids=MIXTURES.keys())
def test_the_experts_half_is_norm_router_and_experts(native, moe, dtype, tokens):
    width = 80
    x, norm = random(tokens, width).to(dtype) * 3, random(width) + 2
    router = Router(moe, width)
    router.weight.data = random(moe.num_experts, width)
    if moe.selection_bias:
        router.e_score_correction_bias = random(moe.num_experts) / 10
    packed, weights = make_experts(moe.num_experts, width, moe.expert_dim, "bfloat16", native)
    shared, shared_weights = make_experts(1, width, moe.shared_expert_dim or 8, "int8", native)
    gate = random(width) / 9
    half = ExpertsHalf(
        norm_D=norm,
        norm_eps=1e-5,
        router_ED=router.weight,
        moe=moe,
        bias_E=router.e_score_correction_bias,
        experts=packed,
        shared=shared if moe.shared_expert_dim else None,
        shared_gate_D=gate if moe.shared_expert_dim else None,
    )
    normed = plain.norm(x, norm, 1e-5).bfloat16()
    with torch.no_grad():
        routed = router(normed)
    expected = dense_experts(normed, routed.experts_TK, routed.gates_TK, *weights)
    if moe.shared_expert_dim:
        every = torch.zeros(tokens, 1, dtype=torch.int64)
        share = (normed.float() @ gate).sigmoid()[:, None]
        expected += dense_experts(normed, every, share, *shared_weights)
    y, experts = half(x)
    assert y.dtype == dtype
    assert torch.equal(experts, routed.experts_TK)
    assert_close(y, expected)


def test_a_rank_without_experts_adds_only_its_shared_columns(native):
    moe = MoESpec(num_experts=4, top_k=2, expert_dim=40, shared_expert_dim=24)
    shared, weights = make_experts(1, 64, 24, "bfloat16", native)
    held = PackedExperts(0, 64, expert_dim=40, kind="bfloat16", native=native)
    x, norm, router = random(7, 64), torch.ones(64), random(4, 64)
    settings = {"norm_D": norm, "norm_eps": 1e-6, "router_ED": router, "moe": moe}
    y, experts = ExpertsHalf(**settings, experts=held, shared=shared)(x)
    normed = plain.norm(x, norm, 1e-6).bfloat16()
    every = torch.zeros(7, 1, dtype=torch.int64)
    assert_close(y, dense_experts(normed, every, torch.ones(7, 1), *weights))
    assert torch.equal(experts, plain.choose(normed, router, None, moe)[1])
    y, _ = ExpertsHalf(**settings, experts=held)(x)
    assert (y == 0).all()


@pytest.mark.parametrize("tokens", [1, 6, 50])
def test_the_dense_half_is_norm_and_network(native, tokens):
    network, weights = make_experts(1, 72, 136, "float8", native)
    x, norm = random(tokens, 72).bfloat16(), random(72)
    half = DenseHalf(norm_D=norm, norm_eps=1e-5, network=network)
    normed = plain.norm(x, norm, 1e-5).bfloat16()
    every = torch.zeros(tokens, 1, dtype=torch.int64)
    assert_close(half(x), dense_experts(normed, every, torch.ones(tokens, 1), *weights))


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_head_gives_float32_logits(native, tokens):
    data, _, meant = weight(999, 72, "bfloat16")
    x, norm = random(tokens, 72).bfloat16(), random(72)
    head = HeadHalf(
        norm_D=norm, norm_eps=1e-5, head=PackedLinear.pack(data, "bfloat16", native=native)
    )
    logits = head(x)
    assert logits.dtype == torch.float32
    assert_close(logits, plain.norm(x, norm, 1e-5).bfloat16().float() @ meant.T, 1e-5)


# ---- attention --------------------------------------------------------------------------------


def attention_of_one(x, half, weights, cos, sin, past_k, past_v, cache_dtype):
    """One sequence by plain torch: what the half adds, and all keys and values."""
    qkv, bias, out = weights
    width, groups = half.head_dim, half.group_sizes
    heads, kv = sum(groups), len(groups)
    rows = plain.norm(x, half.norm_D, half.norm_eps).bfloat16().float() @ qkv.T + bias
    q, k, v = rows.view(len(x), -1, width).split([heads, kv, kv], dim=1)
    if half.q_norm_C is not None:
        q = plain.norm(q, half.q_norm_C, half.norm_eps)
    if half.k_norm_C is not None:
        k = plain.norm(k, half.k_norm_C, half.norm_eps)

    def turn(part):
        first, second = part.chunk(2, dim=-1)
        return part * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    def kept(part):
        return part.bfloat16().to(cache_dtype).float()

    k, v = torch.cat([past_k, kept(turn(k))]), torch.cat([past_v, kept(v)])
    q = turn(q).bfloat16().float()
    position = torch.arange(len(k) - len(x), len(k))
    ahead = position[:, None] - torch.arange(len(k))[None]
    seen = (ahead >= 0) & (ahead < (half.window or len(k) + 1))
    y = []
    for head in range(heads):
        group = sum(head >= end for end in itertools.accumulate(groups))
        scores = q[:, head] @ k[:, group].T / width**0.5
        y.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, group])
    return torch.cat(y, -1) @ out.T, k, v


CASES = {
    "grouped heads of 64": {"groups": (3, 3, 3), "dim": 64},
    "36 heads of 128": {"groups": (1,) * 36, "dim": 128},
    "heads of 8": {"groups": (2, 2), "dim": 8},
    "heads of 16 with a window": {"groups": (2, 2), "dim": 16, "window": 21},
    "window of one": {"groups": (2,), "dim": 64, "window": 1},
    "norms of queries and keys": {"groups": (4,), "dim": 32, "norms": True},
    "unequal groups": {"groups": (1, 3, 2), "dim": 96},
    "many queries share a head": {"groups": (11,), "dim": 64, "window": 300},
    "e4m3": {"groups": (3, 3), "dim": 64, "cache": torch.float8_e4m3fn},
    "e4m3, heads of 40": {"groups": (2,), "dim": 40, "cache": torch.float8_e4m3fn},
    "float32": {"groups": (3,), "dim": 64, "cache": torch.float32},
    "float32, heads of 24": {"groups": (3,), "dim": 24, "cache": torch.float32},
}


@pytest.mark.parametrize("block_tokens", [16, 5])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_attention_half_attends_to_what_was_cached(native, case, block_tokens):
    groups, dim = case["groups"], case["dim"]
    cache = case.get("cache", torch.bfloat16)
    heads, kv, width = sum(groups), len(groups), 72
    data, _, qkv = weight((heads + 2 * kv) * dim, width, "bfloat16")
    bias = random(len(data)) / 4
    out_data, _, out = weight(width, heads * dim, "bfloat16")
    half = AttentionHalf(
        norm_D=random(width),
        norm_eps=1e-5,
        qkv=PackedLinear.pack(data, "bfloat16", bias_O=bias, native=native),
        out=PackedLinear.pack(out_data, "bfloat16", native=native),
        group_sizes=groups,
        head_dim=dim,
        q_norm_C=random(dim) + 1 if case.get("norms") else None,
        k_norm_C=random(dim, seed=1) + 1 if case.get("norms") else None,
        window=case.get("window"),
    )
    # New tokens of four sequences in three steps: whole prompts, chunks behind a past, single ones.
    steps = [[37, 1, 2, 0], [1, 33, 70, 3], [1, 1, 4, 290], [2, 1, 1, 1]]
    lengths = [sum(column) for column in zip(*steps, strict=True)]
    needed = [-(-length // block_tokens) for length in lengths]
    blocks = torch.randperm(sum(needed)).to(torch.int32).split(needed)
    tables = torch.full((4, max(needed)), -7, dtype=torch.int32)
    for row, own in zip(tables, blocks, strict=True):
        row[: len(own)] = own
    # What was never written must never be read.
    pools = [torch.full((sum(needed), kv, block_tokens, dim), torch.nan).to(cache) for _ in "kv"]
    past = [(torch.empty(0, kv, dim), torch.empty(0, kv, dim)) for _ in lengths]
    done = [0] * 4
    for counts in steps:
        active = [s for s in range(4) if counts[s]]
        cos, sin = zip(
            *(
                rope_tables(RopeSpec(), dim, torch.arange(done[s], done[s] + counts[s]))
                for s in active
            ),
            strict=True,
        )
        x = [random(counts[s], width, seed=s + done[s]).bfloat16() for s in active]
        step = Step(
            torch.tensor([done[s] for s in active]),
            torch.tensor([counts[s] for s in active]),
            tables[active],
            torch.cat(cos),
            torch.cat(sin),
        )
        y = half(torch.cat(x), step, *pools).split([counts[s] for s in active])
        for i, s in enumerate(active):
            expected, *past[s] = attention_of_one(
                x[i], half, (qkv, bias, out), cos[i], sin[i], *past[s], cache
            )
            # A key that rounds to the other neighbour in e4m3 is wrong by an eighth of its size.
            assert_close(y[i], expected, 0.05 if cache == torch.float8_e4m3fn else TOLERANCE)
            done[s] += counts[s]


def test_a_rank_without_heads_adds_nothing(native):
    half = AttentionHalf(
        norm_D=torch.ones(8), norm_eps=1e-6, qkv=None, out=None, group_sizes=(), head_dim=8
    )
    one = torch.ones(1, dtype=torch.int64)
    step = Step(one, one, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8), torch.ones(1, 8))
    pool = torch.zeros(1, 0, 4, 8)
    assert (half(torch.ones(1, 8), step, pool, pool) == 0).all()


@pytest.mark.parametrize("value", [0.0, 2**-9, 0.0146, 0.017, 1.0625, -1.1875, 447.0, 900.0, -1e9])
def test_the_cache_rounds_to_e4m3_as_torch_does_and_keeps_what_is_too_large(native, value):
    pool = torch.zeros(1, 1, 4, 16, dtype=torch.float8_e4m3fn)
    bias = torch.full((48,), value)
    half = AttentionHalf(
        norm_D=torch.ones(16),
        norm_eps=1e-6,
        qkv=PackedLinear.pack(torch.zeros(48, 16), "bfloat16", bias_O=bias, native=native),
        out=PackedLinear.pack(torch.zeros(16, 16), "bfloat16", native=native),
        group_sizes=(1,),
        head_dim=16,
    )
    step = Step(
        torch.zeros(1, dtype=torch.int64),
        torch.ones(1, dtype=torch.int64),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.ones(1, 16),
        torch.zeros(1, 16),
    )
    half(torch.ones(1, 16), step, pool.clone(), pool)
    expected = torch.tensor(value).bfloat16().float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert (pool[0, 0, 0].float() == expected.float()).all()


def test_all_layers_in_one_call_are_the_halves_one_by_one(native):
    width, groups, dim = 96, (2, 2), 16
    moe = MoESpec(num_experts=4, top_k=2, expert_dim=40)
    layers = []
    for layer in range(4):
        qkv = PackedLinear.pack(random(8 * dim, width, seed=layer) / 9, "int8", native=native)
        out = PackedLinear.pack(random(width, 4 * dim, seed=layer) / 9, "int8", native=native)
        settings = {"norm_D": torch.ones(width), "norm_eps": 1e-5}
        attention = AttentionHalf(**settings, qkv=qkv, out=out, group_sizes=groups, head_dim=dim)
        if layer == 1:
            network, _ = make_experts(1, width, 72, "float8", native)
            layers.append((attention, DenseHalf(**settings, network=network)))
            continue
        experts, _ = make_experts(4, width, 40, "bfloat16", native)
        router = random(4, width, seed=layer)
        second = ExpertsHalf(**settings, router_ED=router, moe=moe, experts=experts)
        layers.append((attention, second))
    counts = torch.tensor([7, 1])
    step = Step(
        torch.zeros(2, dtype=torch.int64),
        counts,
        torch.tensor([[1, 2], [3, 0]], dtype=torch.int32),
        *rope_tables(RopeSpec(), dim, torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])),
    )

    def pools():
        return [torch.zeros(4, 2, 4, dim, dtype=torch.bfloat16) for _ in layers]

    x = random(8, width)  # float32, in which the two ways of adding are one
    whole, chosen = x.clone(), []
    caches = (pools(), pools())
    for (first, second), k, v in zip(layers, *caches, strict=True):
        x += first(x, step, k, v)
        if isinstance(second, DenseHalf):
            x += second(x)
        else:
            y, experts = second(x)
            x += y
            chosen.append(experts)
    again = (pools(), pools())
    found = WholeLayers(layers)(whole, step, *again)
    assert torch.equal(whole, x)
    assert all(torch.equal(a, b) for a, b in zip(found, chosen, strict=True))
    for new, old in zip(again, caches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True))


# ---- how it is computed -----------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_threads(native):
    if not native:
        pytest.skip("torch's own products may")
    moe = MoESpec(num_experts=6, top_k=2, expert_dim=130)
    packed, _ = make_experts(6, 96, 130, "int8", native)
    half = ExpertsHalf(
        norm_D=torch.ones(96), norm_eps=1e-5, router_ED=random(6, 96), moe=moe, experts=packed
    )
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([half(random(tokens, 96).bfloat16())[0] for tokens in (1, 40)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_is_left_out_where_fewer_threads_come_than_were_asked_for():
    if not build.available():
        pytest.skip("only the C++ shares work out by itself")
    code = """
import torch
from moesaic.serving.native import build
from moesaic.serving.native.matrices import PackedLinear
assert build.available()
torch.set_num_threads(3)
packed = PackedLinear.pack(torch.ones(640, 64), "bfloat16", native=True)
assert (packed(torch.ones(2, 64).bfloat16()) == 64).all()
"""
    limits = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=limits, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_activations_that_do_not_fit_are_refused():
    if not build.available():
        pytest.skip("only the C++ checks")
    packed = PackedLinear.pack(random(32, 64), "bfloat16", native=True)
    with pytest.raises(RuntimeError, match="contiguous"):
        packed(random(3, 63))
    with pytest.raises(RuntimeError, match="bfloat16 or float32"):
        packed(random(3, 64).half())
