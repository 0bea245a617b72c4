"""Triton's interpreter, with the rounding and the products of a GPU.

Importing this must come before anything imports triton, because triton decides at its first import
whether kernels are interpreted; tests/conftest.py sees to the variable. TRITON_INTERPRET=0 runs
the same tests on a GPU.

As it comes (3.6), the interpreter cuts bfloat16 off where a GPU rounds, rounds e4m3 wrongly where
a carry reaches the exponent, and multiplies the bit patterns of bfloat16 numbers in tl.dot. Here
all three are done by torch. The bound of a loop is read in a way that numpy 2.4 refuses.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if IS_INTERPRETED else "cuda"

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float8e4nv: torch.float8_e4m3fn,
}


def _as_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    plain = torch.from_numpy(np.ascontiguousarray(data).view(f"u{data.itemsize}").copy())
    return plain.view(_TORCH[dtype])


def _convert(data, source, target, _rounding):
    converted = _as_torch(np.atleast_1d(data), source).to(_TORCH[target])
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[converted.itemsize]
    return converted.view(unsigned).numpy().reshape(np.shape(data))


def _dot(_builder, a, b, sums, _precision, _imprecise):
    wide_a, wide_b = (
        _as_torch(side.data, side.dtype.scalar).float().reshape(side.data.shape) for side in (a, b)
    )
    product = (wide_a @ wide_b).numpy() + sums.data
    return interpreter.TensorHandle(product.astype(sums.data.dtype), sums.dtype.scalar)


def _patch_tensor(tensor, scope):
    _patch_tensor_as_it_comes(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


if IS_INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor_as_it_comes = interpreter._patch_lang_tensor
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
elif not torch.cuda.is_available():
    pytest.skip("triton's kernels need its interpreter or a GPU", allow_module_level=True)
