"""The scaled GEMMs on the CPU, under one of two accumulators.

`fp32` (the default): operands are dequantized to FP32 and multiplied by one FP32 BLAS call for each GEMM (and expert).
`hopper`: the truncating accumulator of Hopper's FP8 tensor core, promoted to FP32 registers every `promote_every`
elements of K, bit for bit (`backends/reference/tensor_core.py`). Choose it around a run:

    with accumulator("hopper"):
        loss = step(**batch).loss

Shapes, legend as in `fp8c.ops`: formats and scales are relative to the operands as passed. A bound for the FP32 results
is in `backends/reference/check.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fp8c.backends.reference import tensor_core
from fp8c.backends.reference.quantize import dequantize_f32, expert_blocks, expert_ranges
from fp8c.diagnostics import fail
from fp8c.formats import Format
from fp8c.ops import check_accumulator, quantized_format, scale_shape
from fp8c.ops.operands import Operands, takes_operands

Accumulator = Literal["fp32", "hopper"]

_ACCUMULATOR: ContextVar[Accumulator] = ContextVar("accumulator", default="fp32")


@contextmanager
def accumulator(name: Accumulator) -> Iterator[None]:
    """Run the scaled GEMMs inside the block with this accumulator, in this thread."""
    if name not in get_args(Accumulator):
        raise ValueError(f"unknown accumulator {name!r}; write one of {', '.join(get_args(Accumulator))}")
    token = _ACCUMULATOR.set(name)
    try:
        yield
    finally:
        _ACCUMULATOR.reset(token)


@takes_operands
def scaled_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """out = a @ b.T of two quantized matrices in any strides.

    Shapes: a [M, K], a_scale [M/g0, K/g1] of a_fmt; b [N, K], b_scale of b_fmt -> out [M, N] out_dtype.
    """
    check_operands("scaled_mm", x.a, x.b)
    return _product(*x[:4], quantized_format(x.a_fmt), quantized_format(x.b_fmt), x.promote_every).to(out_dtype)


@takes_operands
def scaled_grouped_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """One GEMM for each expert on its rows of a; rows past offs[-1] of the result are 0.

    Shapes: a [T, K] with groups of one row, b [E, N, K], offs int32 [E] -> out [T, N] out_dtype.
    """
    a, a_scale, b, b_scale = x[:4]
    left, right = quantized_format(x.a_fmt), quantized_format(x.b_fmt)
    check_operands("scaled_grouped_mm", a, b)
    if left.group is None or left.group[0] != 1:
        raise fail("E0520", f"fp8c::scaled_grouped_mm: groups of a must be one row high, found '{x.a_fmt}'")
    check_experts("scaled_grouped_mm", x.ends, b.shape[0])
    out = a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)
    for expert, start, end in expert_ranges(x.ends, a.shape[0]):
        if start < end:
            operands = (a[start:end], a_scale[start:end], b[expert], b_scale[expert])
            out[start:end] = _product(*operands, left, right, x.promote_every).to(out_dtype)
    return out


@takes_operands
def scaled_grouped_wgrad(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """out[e] = a[:, rows of e] @ b[:, rows of e].T, the weight gradient of each expert; 0 for one without rows.

    Shapes: a [N, T'] and b [K, T'] with groups 1 x g along T', T' = g * (T//g + E) as `fp8c.ops.data_shape` stores
            experts, scales [N, T'/g] and [K, T'/g], offs int32 [E] the ends among the T tokens -> out [E, N, K] out_dtype.
    """
    a, a_scale, b, b_scale = x[:4]
    experts = x.ends.shape[0]
    left, right = quantized_format(x.a_fmt), quantized_format(x.b_fmt)
    check_operands("scaled_grouped_wgrad", a, b)
    for fmt in (left, right):
        assert fmt.group is not None
        if fmt.group[0] != 1 or fmt.group[1] <= 1 or fmt.group != left.group:
            raise fail(
                "E0520",
                f"fp8c::scaled_grouped_wgrad: groups must run along T and be the same, as 1x128, found '{left.text}' and "
                f"'{right.text}'",
            )
    assert left.group is not None
    size = left.group[1]
    for fmt, operand, scale in ((left, a, a_scale), (right, b, b_scale)):
        expected = scale_shape(operand.shape, fmt)
        if list(scale.shape) != expected or operand.shape[1] % size or expected[1] < experts:
            raise fail(
                "E0520",
                f"fp8c::scaled_grouped_wgrad: expected scales {expected} with a whole group or more for each of "
                f"{experts} experts, found {list(scale.shape)}",
            )
    out = a.new_zeros((experts, a.shape[0], b.shape[0]), dtype=out_dtype)
    for expert, columns, groups in expert_blocks(x.ends, size, a.shape[1] // size):
        if columns.start < columns.stop:
            operands = (a[:, columns], a_scale[:, groups], b[:, columns], b_scale[:, groups])
            out[expert] = _product(*operands, left, right, x.promote_every).to(out_dtype)
    return out


def scaled_mm_add_(acc: Tensor, *operands: Any) -> None:
    """acc += a @ b.T; acc f32 [M, N], the rest as `scaled_mm` takes it. The FP32 product is rounded before it is added."""
    add_product("scaled_mm_add_", acc, scaled_mm(*operands, torch.float32))


def scaled_grouped_wgrad_add_(acc: Tensor, *operands: Any) -> None:
    """acc[e] += the weight gradient of expert e; acc f32 [E, N, K], the rest as `scaled_grouped_wgrad` takes it."""
    add_product("scaled_grouped_wgrad_add_", acc, scaled_grouped_wgrad(*operands, torch.float32))


def add_product(name: str, acc: Tensor, product: Tensor) -> None:
    """acc += product. Raises: E0520 when their shapes differ (nothing is broadcast) or acc is not FP32."""
    check_accumulator(name, acc, product.dim())
    if acc.shape != product.shape:
        raise fail("E0520", f"fp8c::{name}: the accumulator is {list(acc.shape)}, the product {list(product.shape)}")
    acc.add_(product)


def check_operands(name: str, a: Tensor, b: Tensor) -> None:
    """Raises: E0520 unless both operands are FP8 and agree on K."""
    fp8 = (torch.float8_e4m3fn, torch.float8_e5m2)
    if a.dtype not in fp8 or b.dtype not in fp8:
        raise fail("E0520", f"fp8c::{name}: expected FP8 operands, found {a.dtype} and {b.dtype}")
    if a.shape[-1] != b.shape[-1]:
        raise fail("E0520", f"fp8c::{name}: the operands' last axes differ: {list(a.shape)} and {list(b.shape)}")


def check_experts(name: str, offs: Tensor, experts: int) -> None:
    if offs.shape[0] != experts:
        raise fail("E0520", f"fp8c::{name}: offs has {offs.shape[0]} entries for {experts} experts")


def _product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, a_fmt: Format, b_fmt: Format, promote_every: int
) -> Tensor:
    """a @ b.T in FP32 under the accumulator in force."""
    if _ACCUMULATOR.get() == "hopper":
        return tensor_core.gemm(a, a_scale, b, b_scale, a_fmt, b_fmt, promote_every)
    return dequantize_f32(a, a_scale, a_fmt) @ dequantize_f32(b, b_scale, b_fmt).T
