"""Every way to compute the experts gives what a plain loop gives."""

from __future__ import annotations

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.moe import native
from moesaic.moe.experts import Experts, grouped_swiglu

COUNTS = {
    "even": [4, 4, 4],
    "uneven": [1, 7, 3],
    "an idle expert": [5, 0, 6],
    "idle ends": [0, 9, 0],
    "padding and more": [65, 64, 130],
    "no rows": [0, 0, 0],
}
# torch's grouped product has no double precision; the others are compared in it.
DTYPES = {"loop": torch.float64, "padded": torch.float64, "grouped_mm": torch.float32}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
FAST = ["padded", "grouped_mm"]


def make_case(counts: list[int], dtype: torch.dtype, dim: int = 8, inner: int = 16):
    generator = torch.Generator().manual_seed(5)
    shapes = [
        (sum(counts), dim),
        (len(counts), inner, dim),
        (len(counts), inner, dim),
        (len(counts), dim, inner),
    ]
    tensors = [
        torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes
    ]
    return tensors[0], torch.tensor(counts), tensors[1:]


def swiglu_by_hand(x_ND, counts, w1, w3, w2):
    """Row by row, in the formula's own words."""
    rows, owners = [], [e for e, count in enumerate(counts) for _ in range(count)]
    for x, e in zip(x_ND, owners, strict=True):
        h1, h3 = w1[e] @ x, w3[e] @ x
        rows.append(w2[e] @ (h1 / (1 + torch.exp(-h1)) * h3))
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", ["loop", *FAST])
@pytest.mark.parametrize("counts", [COUNTS["uneven"], COUNTS["an idle expert"]], ids=str)
def test_experts_compute_the_formula(implementation, counts):
    dtype = DTYPES[implementation]
    x_ND, counts_E, weights = make_case(counts, dtype)
    ours = grouped_swiglu(x_ND, counts_E, *weights, implementation=implementation)
    by_hand = swiglu_by_hand(x_ND, counts, *weights)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(ours, by_hand, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_outputs_and_gradients_equal_the_loop(implementation, counts):
    dtype = DTYPES[implementation]
    x_ND, counts_E, weights = make_case(counts, dtype)
    dy_ND = torch.randn_like(x_ND)
    results = []
    for name in ("loop", implementation):
        y_ND = grouped_swiglu(x_ND, counts_E, *weights, implementation=name)
        inputs = [x_ND, *weights]
        grads = torch.autograd.grad((y_ND * dy_ND).sum(), inputs, allow_unused=True)
        # The loop never touches an idle expert's weights, so autograd may say None for zero.
        grads = [
            torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)
        ]
        results.append([y_ND, *grads])
    tolerance = TOLERANCES[dtype]
    for reference, ours in zip(*results, strict=True):
        # Absolute errors grow with the sums' size, so they are measured against the largest.
        largest = reference.abs().max().item() if reference.numel() else 0.0
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance * (1 + largest))


@pytest.mark.parametrize("implementation", ["loop", "padded"])
def test_gradients_are_those_of_finite_differences(implementation):
    x_ND, counts_E, weights = make_case([2, 0, 3], torch.float64, dim=2, inner=4)
    assert torch.autograd.gradcheck(
        lambda *t: grouped_swiglu(t[0], counts_E, *t[1:], implementation=implementation),
        (x_ND, *weights),
    )


@pytest.mark.parametrize("implementation", ["loop", *FAST])
def test_bfloat16_rows_with_float32_weights_give_float32_gradients(implementation):
    x_ND, counts_E, weights = make_case([70, 0, 33], torch.float32, dim=64, inner=96)
    weights = [(w / 10).detach().requires_grad_() for w in weights]
    exact = grouped_swiglu(x_ND, counts_E, *weights, implementation="loop")
    dy_ND = torch.randn_like(exact)
    exact_grads = torch.autograd.grad((exact * dy_ND).sum(), weights)
    y_ND = grouped_swiglu(x_ND.bfloat16(), counts_E, *weights, implementation=implementation)
    grads = torch.autograd.grad((y_ND.float() * dy_ND).sum(), weights)
    assert y_ND.dtype == torch.bfloat16
    # 2 % of the norm: a few roundings to 8 bits, averaged over many elements.
    assert (y_ND.float() - exact).norm() < 0.02 * exact.norm()
    for ours, reference in zip(grads, exact_grads, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_unchanged(frozen):
    x_ND, counts_E, weights = make_case([3, 70, 0], torch.float64)
    inputs = [x_ND, *weights]
    full = torch.autograd.grad(grouped_swiglu(x_ND, counts_E, *weights).sum(), inputs)
    inputs[frozen].requires_grad_(False)
    grouped_swiglu(x_ND, counts_E, *weights).sum().backward()
    for i, tensor in enumerate(inputs):
        if i == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, full[i], rtol=1e-12, atol=1e-12)


def test_few_rows_without_gradients_equal_the_padded_way():
    x_ND, counts_E, weights = make_case([1, 0, 2], torch.float64)
    with torch.no_grad():
        few = grouped_swiglu(x_ND, counts_E, *weights)
        padded = grouped_swiglu(x_ND, counts_E, *weights, implementation="padded")
    torch.testing.assert_close(few, padded, rtol=1e-12, atol=1e-12)


def test_gradients_of_two_micro_batches_add_up():
    x_ND, counts_E, weights = make_case([30, 40, 0], torch.float64)
    experts = Experts(3, 8, expert_dim=16).double()
    with torch.no_grad():
        for ours, given in zip((experts.w1, experts.w3, experts.w2), weights, strict=True):
            ours.copy_(given)
    experts(x_ND, counts_E).sum().backward()
    once = experts.w1.grad.clone()
    experts(x_ND, counts_E).sum().backward()
    torch.testing.assert_close(experts.w1.grad, 2 * once, rtol=1e-12, atol=0)


@pytest.fixture
def _fused():
    if not native.available():
        pytest.skip("needs a CPU with bfloat16 matrix products and a C++ compiler")


needs_native = pytest.mark.usefixtures("_fused")


@needs_native
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "inner"), [(64, 96), (160, 288), (32, 32)])
@pytest.mark.parametrize(
    "counts", [*COUNTS.values(), [1, 1, 1], [300, 0, 257], [600, 1, 40]], ids=str
)
def test_the_fused_operation_equals_the_loop(counts, dim, inner, weight_dtype):
    x_ND, counts_E, weights = make_case(counts, torch.float32, dim, inner)
    dy_ND = torch.randn(x_ND.shape)
    weights = [(w / 10).detach().to(weight_dtype) for w in weights]
    results = []
    for name, dtype in (("loop", torch.float64), ("fused", torch.bfloat16)):
        # The same numbers, exactly: whatever differs is how they are computed.
        inputs = [x_ND.detach().bfloat16().to(dtype).requires_grad_()]
        exact = dtype == torch.float64
        inputs += [
            (w.bfloat16().double() if exact else w).clone().requires_grad_() for w in weights
        ]
        y_ND = grouped_swiglu(inputs[0], counts_E, *inputs[1:], implementation=name)
        grads = torch.autograd.grad((y_ND * dy_ND.bfloat16()).sum(), inputs, allow_unused=True)
        results.append([y_ND, *grads])
        if name == "fused":
            assert [g.dtype for g in grads] == [torch.bfloat16] + [weight_dtype] * 3
    for reference, ours in zip(*results, strict=True):
        # 1 % of the norm: bfloat16's 2^-9, three times over.
        error = (ours.double() - reference).norm() if reference is not None else ours.norm()
        scale = reference.norm() if reference is not None else 0.0
        assert error <= 0.01 * scale


@needs_native
def test_the_fused_operation_gives_idle_experts_zero_gradients():
    x_ND, counts_E, weights = make_case([70, 0, 3], torch.float32, 64, 96)
    y_ND = grouped_swiglu(x_ND.bfloat16(), counts_E, *weights, implementation="fused")
    y_ND.sum().backward()
    for weight in weights:
        assert (weight.grad[1] == 0).all()
        assert weight.grad[0].isfinite().all()
        assert weight.grad[2].abs().max() > 0


@needs_native
@pytest.mark.parametrize("frozen", range(4))
def test_the_fused_operation_leaves_out_frozen_gradients(frozen):
    x_ND, counts_E, weights = make_case([70, 0, 3], torch.float32, 64, 96)
    x_ND = x_ND.detach().bfloat16().requires_grad_()
    inputs = [x_ND, *weights]
    run = lambda: grouped_swiglu(x_ND, counts_E, *weights, implementation="fused")  # noqa: E731
    full = torch.autograd.grad(run().sum(), inputs)
    inputs[frozen].requires_grad_(False)
    run().sum().backward()
    for i, tensor in enumerate(inputs):
        assert tensor.grad is None if i == frozen else torch.equal(tensor.grad, full[i])


@needs_native
def test_the_fused_operation_does_not_depend_on_the_number_of_threads():
    x_ND, counts_E, weights = make_case([70, 300, 3], torch.float32, 64, 96)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y_ND = grouped_swiglu(x_ND.bfloat16(), counts_E, *weights, implementation="fused")
        results.append([y_ND, *torch.autograd.grad(y_ND.sum(), weights)])
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@needs_native
def test_training_in_bfloat16_takes_the_fused_operation_by_itself():
    x_ND, counts_E, weights = make_case([70, 0, 3], torch.float32, 64, 96)
    y_ND = grouped_swiglu(x_ND.bfloat16(), counts_E, *weights)
    assert type(y_ND.grad_fn).__name__ == "_FusedSwiGLUBackward"


def test_widths_that_the_fused_operation_cannot_do_are_refused_by_name_and_avoided_by_auto():
    x_ND, counts_E, weights = make_case([70, 0, 3], torch.float32, 8, 16)
    with pytest.raises(ConfigError, match="multiples of 32"):
        grouped_swiglu(x_ND.bfloat16(), counts_E, *weights, implementation="fused")
    y_ND = grouped_swiglu(x_ND.bfloat16(), counts_E, *weights)
    assert type(y_ND.grad_fn).__name__ == "_PaddedSwiGLUBackward"
