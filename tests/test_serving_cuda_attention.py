"""Attention over blocks, in Triton, finds what plain attention over whole sequences finds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from moesaic.model.norm import RMSNorm
from moesaic.model.rope import rotate
from tests.triton_interpreter import DEVICE  # skips where the kernels below cannot be imported

# isort: split
from moesaic.serving.cuda.attention import attend, cut, parts_for, tiles_of
from moesaic.serving.cuda.cache import HeadNorms, Places, rms_norm, rotate_and_store

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, BF16)


class Case:
    """Sequences with `ends` positions, of which the last `counts` are new, in shuffled blocks."""

    def __init__(self, counts, ends, *, heads, kv_heads, width, block_tokens=16, cache=BF16):
        self.counts, self.ends, self.width = counts, ends, width
        self.heads, self.kv_heads, self.block_tokens = heads, kv_heads, block_tokens
        self.starts = [end - count for end, count in zip(ends, counts, strict=True)]
        self.k = [draw(end, kv_heads, width, seed=s).to(cache) for s, end in enumerate(ends)]
        self.v = [draw(end, kv_heads, width, seed=s + 50).to(cache) for s, end in enumerate(ends)]
        sizes = [-(-end // block_tokens) for end in ends]
        numbers = torch.randperm(sum(sizes) + 3, generator=torch.Generator().manual_seed(1))
        self.tables = torch.zeros(len(ends), max(sizes), dtype=torch.int32)
        pools = torch.full((2, sum(sizes) + 3, kv_heads, block_tokens, width), 300.0)
        taken = iter(numbers.tolist())
        for s, end in enumerate(ends):
            for at in range(sizes[s]):
                block = self.tables[s, at] = next(taken)
                span = slice(at * block_tokens, min((at + 1) * block_tokens, end))
                for pool, kept in ((pools[0], self.k[s]), (pools[1], self.v[s])):
                    rows = kept[span].float().transpose(0, 1)
                    pool[block, :, : rows.shape[1]] = rows.cpu()
        self.k_pool, self.v_pool = pools.to(DEVICE, cache)
        self.tables = self.tables.to(DEVICE)
        self.q_THC = draw(sum(counts), heads, width, seed=9)

    def ours(self, window=None):
        tiles = tiles_of(self.counts, self.starts, group=self.heads // self.kv_heads, device=DEVICE)
        return attend(self.q_THC, self.k_pool, self.v_pool, self.tables, tiles, window=window)

    def by_hand(self, window=None):
        """Every sequence by itself, whole, in float32."""
        parts = []
        ends = itertools.accumulate(self.counts)
        for s, (count, last) in enumerate(zip(self.counts, ends, strict=True)):
            q = self.q_THC[last - count : last].float().transpose(0, 1)
            k, v = (kept[s].float().transpose(0, 1) for kept in (self.k, self.v))
            new = torch.arange(self.starts[s], self.ends[s], device=DEVICE)[:, None]
            distance = new - torch.arange(self.ends[s], device=DEVICE)
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            y = functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, enable_gqa=True
            )
            parts.append(y[0].transpose(0, 1))
        return torch.cat(parts)


CASES = {
    "one token, one position": ([1], [1], 4, 4, 64),
    "single tokens, last blocks partly full": ([1, 1, 1], [40, 16, 131], 4, 2, 64),
    "36 heads of 128": ([1, 5], [70, 21], 36, 36, 128),
    "three queries a key": ([1, 30], [33, 90], 9, 3, 64),
    "a whole prompt of 150": ([150], [150], 3, 1, 64),
    "a head of 80": ([1, 7], [20, 27], 4, 2, 80),
    "32 queries a key": ([1, 6], [20, 27], 32, 1, 16),
}


@pytest.mark.parametrize("window", [None, 1, 24])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_over_blocks_equals_plain_attention(case, window):
    counts, ends, heads, kv_heads, width = case
    made = Case(counts, ends, heads=heads, kv_heads=kv_heads, width=width)
    # The weights of a softmax and the result are rounded to bfloat16, 8 bits.
    torch.testing.assert_close(
        made.ours(window).float(), made.by_hand(window), rtol=2**-7, atol=2**-7
    )


@pytest.mark.parametrize("block_tokens", [1, 24])
def test_blocks_may_have_any_size(block_tokens):
    made = Case([1, 9], [50, 41], heads=4, kv_heads=2, width=32, block_tokens=block_tokens)
    torch.testing.assert_close(made.ours().float(), made.by_hand(), rtol=2**-7, atol=2**-7)


def test_a_cache_in_e4m3_is_widened_exactly():
    made = Case([1, 12], [100, 40], heads=6, kv_heads=2, width=64, cache=FP8)
    torch.testing.assert_close(made.ours().float(), made.by_hand(), rtol=2**-7, atol=2**-7)


def test_tiles_hold_every_token_once():
    counts, starts = [1, 70, 3, 1], [9, 0, 5, 0]
    for group in (1, 3, 64, 100):
        tiles = cut(counts, starts, group=group)
        assert [tile[0] for tile in tiles[True]] == [0, 3]
        found = {}
        for sequence, first, tokens, position in tiles[True] + tiles[False]:
            assert 1 <= tokens <= max(1, 64 // group)
            for t in range(tokens):
                assert first + t not in found
                found[first + t] = (sequence, position + t)
        expected = [(s, starts[s] + t) for s, count in enumerate(counts) for t in range(count)]
        assert [found[t] for t in range(75)] == expected


def test_the_number_of_parts_depends_on_the_number_of_programs_alone():
    assert [parts_for(n) for n in (1, 9, 40, 100, 129, 1000)] == [32, 16, 4, 2, 1, 1]


@pytest.mark.parametrize("cache", [BF16, FP8], ids=str)
@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "head norms"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 64), (2, 2, 80)])
def test_queries_are_rotated_and_keys_and_values_written_where_they_belong(
    heads, kv_heads, width, has_norms, cache
):
    tokens, block_tokens = 5, 4
    qkv_TO = draw(tokens, (heads + 2 * kv_heads) * width) * 3
    qkv_TO[0, [-width, -1]] = 3000.0  # more than e4m3 has
    angles = torch.rand(tokens, width // 2, device=DEVICE).repeat(1, 2) * 6
    blocks_T = torch.tensor([3, 3, 0, 5, 5], device=DEVICE)
    rows_T = torch.tensor([2, 3, 0, 0, 1], device=DEVICE)
    places = Places(angles.cos(), angles.sin(), blocks_T, rows_T)
    norms = None
    q_THC, k_TGC, v_TGC = (
        part.unflatten(1, (-1, width))
        for part in qkv_TO.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    )
    if has_norms:
        norms = HeadNorms(draw(width).float(), draw(width, seed=1).float(), 1e-5)
        q_norm, k_norm = RMSNorm(width, 1e-5).to(DEVICE), RMSNorm(width, 1e-5).to(DEVICE)
        q_norm.weight.data, k_norm.weight.data = norms.q_C, norms.k_C
        q_THC, k_TGC = q_norm(q_THC).detach(), k_norm(k_TGC).detach()
    q_THC, k_TGC = (
        rotate(part.transpose(0, 1), angles.cos(), angles.sin()).transpose(0, 1)
        for part in (q_THC, k_TGC)
    )
    shape = (6, kv_heads, block_tokens, width)
    pools = [torch.zeros(shape, device=DEVICE).to(cache) for _ in "kv"]
    expected = [pool.clone() for pool in pools]
    for pool, new_TGC in zip(expected, (k_TGC, v_TGC), strict=True):
        kept = new_TGC.float().clamp(-448, 448) if cache == FP8 else new_TGC
        pool[blocks_T, :, rows_T] = kept.to(cache)
    ours = rotate_and_store(qkv_TO, places, *pools, norms)
    # Products and sums of rope may be fused: a last bit of the result.
    torch.testing.assert_close(ours, q_THC, rtol=2**-7, atol=1e-6)
    for pool, wanted in zip(pools, expected, strict=True):
        step = 2**-3 if cache == FP8 else 2**-7
        torch.testing.assert_close(pool.float(), wanted.float(), rtol=step, atol=1e-6)


def test_the_norm_is_the_models():
    x_TD = draw(3, 1500) * 4
    norm = RMSNorm(1500, 1e-6).to(DEVICE)
    norm.weight.data = draw(1500, seed=1).float()
    ours = rms_norm(x_TD, norm.weight.data, 1e-6)
    torch.testing.assert_close(ours, norm(x_TD).detach(), rtol=2**-7, atol=1e-6)
