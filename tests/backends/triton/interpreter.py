"""Triton's interpreter with its conversions and fused multiply-add made right; import before any kernel.

Triton 3.6 to 3.9 interpret casts to FP8 and BF16 wrongly (ties, carries, saturation; triton issue 8322) and `fma` as two
roundings. Here casts are torch's, after the clamp that `cvt.rn.satfinite` does, and fma adds in FP64 before one rounding:
exact for the remainders that the kernels compute, because the product of two FP32 numbers fits FP64.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_original = interpreter._convert_float


def _unsigned(width: int) -> Any:
    return getattr(np, f"uint{width}")


def _convert_float(x: Any, src: Any, dst: Any, rounding: Any) -> Any:
    if src not in _TORCH or dst not in _TORCH:
        return _original(x, src, dst, rounding)
    raw = torch.from_numpy(np.ascontiguousarray(x).view(_unsigned(src.primitive_bitwidth)).copy())
    values = raw.view(_TORCH[src])
    if dst in _LARGEST:
        wide = values.float()
        values = wide.clamp(-_LARGEST[dst], _LARGEST[dst])  # NaN stays
    bits = values.to(_TORCH[dst]).view(_BITS[dst.primitive_bitwidth])
    if dst is tl.float8e4nv:
        bits = torch.where(wide.isnan(), 0x7F, bits.int()).to(torch.uint8)
    return bits.numpy().view(_unsigned(dst.primitive_bitwidth)).reshape(x.shape)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    with np.errstate(all="ignore"):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(x.data.dtype), x.dtype.scalar)


#: The instructions that kernels write themselves, by name, on FP32 or BF16 values.
_INSTRUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "ex2.approx.ftz.f32": torch.exp2,
    "rcp.approx.ftz.f32": torch.reciprocal,
    "cvt.rn.bf16x2.f32": torch.Tensor.bfloat16,
    "mul.rn.bf16x2": torch.mul,
    "max.NaN.xorsign.abs.f32": lambda a, b: torch.maximum(a.abs(), b.abs()).copysign(a * b),
}


class _Results:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def get_result(self, index: int) -> Any:
        assert index == 0
        return self.handle


def _inline_asm(self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int) -> _Results:
    """One instruction whose operands are whole tensors, element by element."""
    tensors = [
        torch.from_numpy(np.ascontiguousarray(v.data).view(_unsigned(v.dtype.scalar.primitive_bitwidth)).copy()).view(
            _TORCH[v.dtype.scalar]
        )
        for v in values
    ]
    found = _INSTRUCTIONS[text.split()[0]](*tensors)
    dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[found.dtype]
    raw = found.view(_BITS[dtype.primitive_bitwidth]).numpy()
    data = raw.view(np.float32 if dtype is tl.float32 else np.uint16).reshape(values[0].data.shape)
    return _Results(interpreter.TensorHandle(data, dtype))


def _reduce(self: Any, values: Any) -> Any:
    """`tl.reduce` with a function of our own, by halves: Triton calls it once for each element."""
    (x,) = values
    data = np.moveaxis(x.handle.data, self.axis, 0)
    while len(data) > 1:
        half = len(data) // 2
        first, second = (self.to_tensor(np.ascontiguousarray(part), x.dtype) for part in (data[:half], data[half:]))
        data = self.combine_fn.fn(first, second).handle.data
    return [self.to_tensor(data[0], x.dtype)]


interpreter.ReduceOps.generic_reduce = _reduce
interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_inline_asm = _inline_asm
interpreter.InterpreterBuilder.create_fma = _fma
np.seterr(all="ignore")
