"""Triton's experts and linear layers compute what torch computes, at sizes that fit no tile."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moesaic.quantization.fp8 import quantize_per_channel
from tests.triton_interpreter import DEVICE  # skips where the kernels below cannot be imported

# isort: split
from moesaic.serving.cuda.experts import experts, schedule_blocks
from moesaic.serving.cuda.linear import _cut_depth, linear
from moesaic.serving.cuda.tiles import TILES, Weight, round_rows

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, BF16)


def rounded(w: torch.Tensor, scaling: str) -> Weight:
    """`w` in e4m3, with scales of the kind that is asked for."""
    wide = w.float().reshape(-1, *w.shape[-2:])
    _, rows, columns = wide.shape
    if scaling == "row":
        scales = wide.abs().amax(2, keepdim=True) / 448
        spread = scales
    elif scaling == "tensor":
        scales = wide.abs().amax((1, 2), keepdim=True) / 448
        spread = scales
    else:
        pads = (0, -columns % 128, 0, -rows % 128)
        blocks = functional.pad(wide, pads).unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
        scales = blocks.abs().amax((2, 4)) / 448
        spread = scales.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :rows, :columns]
    values = (wide / spread).clamp(-448, 448).to(FP8)
    lead = w.shape[:-2]
    # What lies behind the last row is no number, so that reading it shows.
    behind = torch.full((256,), float("nan"), device=w.device).to(FP8)
    values = torch.cat((values.flatten(), behind))[: w.numel()].view(w.shape)
    return Weight(values, scales.reshape(*lead, *scales.shape[1:]))


def widened(weight: Weight) -> torch.Tensor:
    """The numbers a weight stands for, float32."""
    if weight.scales is None:
        return weight.values.float()
    scales = weight.scales
    rows, columns = weight.values.shape[-2:]
    if weight.is_scaled_by_block:
        scales = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)
        scales = scales[..., :rows, :columns]
    return weight.values.float() * scales


def as_rounded(x: torch.Tensor, activations: str) -> torch.Tensor:
    if activations == "wide":
        return x.float()
    q, scale = quantize_per_channel(x.cpu())
    return (q.float() * scale).to(x.device)


def test_rows_are_rounded_as_weights_are():
    x_TI = torch.cat((draw(5, 1100, scale=30.0), torch.zeros(1, 1100, dtype=BF16, device=DEVICE)))
    q_TI, scale_T = round_rows(x_TI)
    expected, expected_scale = quantize_per_channel(x_TI.cpu())
    assert torch.equal(q_TI.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scale_T.cpu(), expected_scale[:, 0])


@pytest.mark.parametrize("activations", ["wide", "float8"])
@pytest.mark.parametrize("scaling", ["row", "tensor", "block"])
@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 40, 200), (17, 130, 300), (70, 65, 128)]
)
def test_a_linear_layer_equals_torch(rows, columns, depth, scaling, activations):
    x_TI, bias_O = draw(rows, depth), draw(columns).float()
    weight = rounded(draw(columns, depth, scale=0.1), scaling)
    expected = as_rounded(x_TI, activations) @ widened(weight).T + bias_O
    y = linear(x_TI, weight, bias_O, activations=activations, out_dtype=torch.float32)
    # Sums of the same products in another order; widened weights meet bfloat16 rows exactly.
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)


def test_weights_without_scales_go_to_torch():
    x_TI, weight = draw(3, 64), Weight(draw(10, 64))
    assert torch.equal(linear(x_TI, weight), functional.linear(x_TI, weight.values))


def test_a_cut_depth_is_whole_and_in_whole_steps():
    for programs in (1, 60, 300):
        for depth in (64, 200, 4608):
            parts, length = _cut_depth(programs, depth, step=128)
            assert length % 128 == 0
            assert (parts - 1) * length < depth <= parts * length


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    ("held", "first", "copies"), [(5, 0, 100), (3, 4, 40), (1, 0, 300), (6, 1, 1)]
)
def test_every_copy_of_a_held_expert_stands_in_one_block_of_that_expert(held, first, copies, rows):
    generator = torch.Generator().manual_seed(copies)
    chosen_N = torch.randint(0, 9, (copies,), generator=generator)
    chosen_N[chosen_N == 2] = 3  # an expert that nobody chose
    schedule = schedule_blocks(chosen_N.to(DEVICE)[:, None], held, first_expert=first, rows=rows)
    found = {}
    for expert, block in zip(
        *(t.tolist() for t in (schedule.expert_B, schedule.order_BR)), strict=True
    ):
        if expert < 0:
            continue
        real = [copy for copy in block if copy < copies]
        assert real, "a block of nobody"
        assert block == real + [copies] * (rows - len(real)), "gaps stand at the end"
        assert not set(real) & set(found)
        found |= dict.fromkeys(real, expert + first)
    wanted = {n: e for n, e in enumerate(chosen_N.tolist()) if first <= e < first + held}
    assert found == wanted


def experts_by_hand(x_TD, experts_TK, gates_TK, w1, w3, w2, *, first, activations):
    """Copy by copy, rounded where the kernels round."""
    out_TD = torch.zeros(x_TD.shape, device=x_TD.device)
    weights = [widened(w) for w in (w1, w3, w2)]
    for t, k in torch.cartesian_prod(*map(torch.arange, experts_TK.shape)).tolist():
        expert = int(experts_TK[t, k]) - first
        if not 0 <= expert < len(weights[0]):
            continue
        x_1D = as_rounded(x_TD[t : t + 1], activations)
        a_1F, b_1F = x_1D @ weights[0][expert].T, x_1D @ weights[1][expert].T
        h_1F = as_rounded((functional.silu(a_1F) * b_1F).to(BF16), activations)
        y_1D = (h_1F @ weights[2][expert].T).to(BF16)
        out_TD[t] += gates_TK[t, k] * y_1D[0].float()
    return out_TD.to(BF16)


@pytest.mark.parametrize(
    ("scaling", "activations"),
    [
        ("none", "wide"),
        ("row", "wide"),
        ("tensor", "wide"),
        ("block", "wide"),
        ("row", "float8"),
        ("tensor", "float8"),
        ("block", "float8"),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "num_experts", "held", "first"), [(1, 4, 4, 0), (37, 5, 2, 2), (90, 3, 3, 0)]
)
def test_experts_equal_a_plain_loop(tokens, num_experts, held, first, scaling, activations):
    dim, inner, top_k = 200, 136, 2
    x_TD = draw(tokens, dim)
    scores = draw(tokens, num_experts, seed=1).float()
    scores[:, 0] -= 100  # nobody goes to the first expert
    gates_TK, experts_TK = scores.softmax(-1).topk(top_k)
    shapes = [(held, inner, dim), (held, inner, dim), (held, dim, inner)]
    drawn = [draw(*shape, seed=seed, scale=0.1) for seed, shape in enumerate(shapes)]
    w1, w3, w2 = (Weight(w) if scaling == "none" else rounded(w, scaling) for w in drawn)
    ours = experts(
        x_TD, experts_TK, gates_TK, w1, w3, w2, first_expert=first, activations=activations
    )
    by_hand = experts_by_hand(
        x_TD, experts_TK, gates_TK, w1, w3, w2, first=first, activations=activations
    )
    assert by_hand.abs().max() > 0
    # A last bit of bfloat16 in h or y, and with e4m3 the neighbour (1/16) of a few of h's numbers.
    tolerance = {"wide": 0.01, "float8": 0.03}[activations]
    torch.testing.assert_close(ours, by_hand, rtol=tolerance, atol=tolerance)


def test_a_rank_without_experts_adds_nothing():
    x_TD = draw(3, 16)
    nothing = Weight(x_TD.new_empty(0, 8, 16)), Weight(x_TD.new_empty(0, 8, 16))
    chosen_TK = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    out_TD = experts(x_TD, chosen_TK, torch.ones(3, 1), *nothing, Weight(x_TD.new_empty(0, 16, 8)))
    assert torch.equal(out_TD, torch.zeros_like(x_TD))


def test_tiles_are_powers_of_two_that_a_tensor_core_takes():
    for tile in TILES:
        assert all(size & (size - 1) == 0 for size in (tile.rows, tile.columns, tile.depth))
        assert tile.rows >= 16
        assert tile.depth >= 32, "the least depth of an 8-bit product"
        assert tile.depth <= 128, "a step may not cross from one scale of a block to the next"
