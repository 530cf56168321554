"""Check a scaled GEMM against FP64: the same operands, exact products, and a bound that is derived, not picked.

The exact value of an element is sum_k (a_k * sa) * (b_k * sb); its magnitude M is the sum of the absolute terms. FP64
computes both with relative error below K * 2**-53, which is nothing here.

FP32 summation, in any order (Higham, Accuracy and Stability, section 3.1): every term passes through at most K + 3
roundings, whether the operands are scaled first (two roundings), or partial sums are scaled and then added (the product
of the scales, its product with the partial sum, one more addition for each promotion), and one more is left as a margin
for a split of K: |error| <= gamma(K + 4) * M with gamma(n) = n u / (1 - n u) and u = 2**-24.

Hopper's accumulator (`tensor_core.py`) makes one instruction of each 32 terms. Its 33 terms (32 products and the running
sum) are cut below 2**(top - 13), and so is the result. 2**top is at most the largest term or running sum, and cutting
toward zero never makes a sum larger than the sum of magnitudes, so one instruction loses at most 34 * 2**-13 * M of its
promotion interval, where a subnormal operand counts as the smallest normal number, whose exponent it has. An interval of
L elements has ceil(L / 32) instructions; the promotions and scales add the FP32 bound.

The result is then rounded once to its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8c.backends.reference.formats import decode, decode_scale
from fp8c.backends.reference.gemm import Accumulator
from fp8c.backends.reference.quantize import apply_scale, expert_blocks, expert_ranges
from fp8c.backends.reference.tensor_core import FRACTION_BITS, TERMS, promotion_interval
from fp8c.formats import MIN_NORMAL_EXPONENT, Format
from fp8c.ops import quantized_format

GEMMS = ("scaled_mm", "scaled_grouped_mm", "scaled_grouped_wgrad")

_FP32_ROUNDOFF = 2.0**-24
_FP32_SMALLEST_NORMAL = 2.0**-126  # a product below it may lose bits, or be flushed to zero on a GPU
_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}  # of one more rounding, from FP32


@dataclass(frozen=True)
class Evaluation:
    """A GEMM evaluated in FP64. `bound` is the largest error that `accumulator` and the output dtype explain."""

    exact: Tensor
    bound: Tensor


@dataclass(frozen=True)
class GemmCheck:
    """How far a result is from the exact one. `worst_ratio` is the largest error / bound; above 1 the GEMM is wrong.

    Elements that must not be finite (an operand's group holds NaN or an infinity) count as right when they are not, and
    as infinitely wrong when they are. An infinity is right where the exact value overflows the output's dtype.
    """

    op: str
    shape: tuple[int, ...]
    worst_ratio: float
    max_error: float
    relative_error: float  # Frobenius norm of the error over that of the exact result
    nonfinite: int  # elements that are not finite, and must not be

    @property
    def is_within_bound(self) -> bool:
        return self.worst_ratio <= 1.0


def check_gemm(op: str, args: Sequence[Any], out: Tensor, accumulator: Accumulator = "fp32") -> GemmCheck:
    """Compare `out` with the FP64 value of the GEMM `op` (one of `GEMMS`) on `args`, the arguments of the operator."""
    evaluation = evaluate_gemm(op, args, accumulator)
    exact, bound = evaluation.exact, evaluation.bound
    must_be_finite, is_finite = exact.isfinite(), out.isfinite().cpu()
    error = (out.cpu().double() - exact).abs().where(must_be_finite & is_finite, 0.0)
    ratio = torch.where(error == 0, 0.0, error / bound)
    may_overflow = exact.abs() + bound >= torch.finfo(out.dtype).max
    ratio = ratio.where((must_be_finite == is_finite) | may_overflow, torch.inf)
    norm = exact.where(must_be_finite, 0.0).norm().item()
    return GemmCheck(
        op=op,
        shape=tuple(out.shape),
        worst_ratio=ratio.max().item() if ratio.numel() else 0.0,
        max_error=error.max().item() if error.numel() else 0.0,
        relative_error=error.norm().item() / norm if norm else 0.0,
        nonfinite=int((~must_be_finite).sum()),
    )


def evaluate_gemm(op: str, args: Sequence[Any], accumulator: Accumulator = "fp32") -> Evaluation:
    """Evaluate a GEMM in FP64 on the CPU, with the error bound of `accumulator`."""
    tensors: list[Any] = [t.cpu() if isinstance(t, Tensor) else t for t in args]
    match op:
        case "scaled_mm":
            a, a_scale, b, b_scale, a_fmt, b_fmt, promote_every, out_dtype = tensors
            left, right = quantized_format(a_fmt), quantized_format(b_fmt)
            return _evaluate(a, a_scale, b, b_scale, left, right, promote_every, out_dtype, accumulator)
        case "scaled_grouped_mm":
            return _evaluate_grouped_mm(tensors, accumulator)
        case "scaled_grouped_wgrad":
            return _evaluate_grouped_wgrad(tensors, accumulator)
        case _:
            raise ValueError(f"not a scaled GEMM: {op!r}; expected one of {', '.join(GEMMS)}")


def _summation_bound(magnitude: Tensor, k: int) -> Tensor:
    roundings = (k + 4) * _FP32_ROUNDOFF
    assert roundings < 1, f"K = {k} is beyond the range of the bound"
    return roundings / (1 - roundings) * magnitude + (k + 4) * _FP32_SMALLEST_NORMAL


def _rounded_bound(bound: Tensor, exact: Tensor, out_dtype: torch.dtype) -> Tensor:
    info = torch.finfo(out_dtype)
    half_quantum = info.smallest_normal * info.eps / 2  # half the smallest subnormal
    return bound + _ROUNDOFF[out_dtype] * (exact.abs() + bound) + half_quantum


def _dequantize_f64(q: Tensor, s: Tensor, fmt: Format) -> Tensor:
    """Exact: a product of an 8-bit payload and an FP32 scale fits FP64."""
    return apply_scale(decode(q, fmt.element).double(), decode_scale(s).double(), fmt)


def _lifted_f64(q: Tensor, s: Tensor, fmt: Format) -> Tensor:
    """Magnitudes in which a subnormal payload counts as the smallest normal number, whose exponent it carries."""
    values = decode(q, fmt.element).double().abs()
    lifted = torch.where(values == 0, values, values.clamp_min(2.0 ** MIN_NORMAL_EXPONENT[fmt.element]))
    return apply_scale(lifted, decode_scale(s).double(), fmt)


def _evaluate(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    a_fmt: Format,
    b_fmt: Format,
    promote_every: int,
    out_dtype: torch.dtype,
    accumulator: Accumulator,
) -> Evaluation:
    k = a.shape[1]
    left, right = _dequantize_f64(a, a_scale, a_fmt), _dequantize_f64(b, b_scale, b_fmt)
    exact = left @ right.T
    bound = _summation_bound(left.abs() @ right.abs().T, k)
    if accumulator == "hopper":
        interval = min(promotion_interval(promote_every, a_fmt, b_fmt, k), max(k, 1))
        instructions = -(-interval // TERMS)
        magnitude = _lifted_f64(a, a_scale, a_fmt) @ _lifted_f64(b, b_scale, b_fmt).T
        bound = bound + instructions * (TERMS + 2) * 2.0**-FRACTION_BITS * magnitude
    return Evaluation(exact, _rounded_bound(bound, exact, out_dtype))


def _evaluate_grouped_mm(args: Sequence[Any], accumulator: Accumulator) -> Evaluation:
    a, a_scale, b, b_scale, offs, a_fmt, b_fmt, promote_every, out_dtype = args
    left, right = quantized_format(a_fmt), quantized_format(b_fmt)
    exact, bound = (torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64) for _ in range(2))
    for expert, start, end in expert_ranges(offs, a.shape[0]):
        rows = slice(start, end)
        part = _evaluate(
            a[rows], a_scale[rows], b[expert], b_scale[expert], left, right, promote_every, out_dtype, accumulator
        )
        exact[rows], bound[rows] = part.exact, part.bound
    return Evaluation(exact, bound)


def _evaluate_grouped_wgrad(args: Sequence[Any], accumulator: Accumulator) -> Evaluation:
    a, a_scale, b, b_scale, offs, a_fmt, b_fmt, promote_every, out_dtype = args
    left, right = quantized_format(a_fmt), quantized_format(b_fmt)
    assert left.group is not None
    size = left.group[1]
    exact, bound = (torch.zeros(len(offs), a.shape[0], b.shape[0], dtype=torch.float64) for _ in range(2))
    for expert, columns, groups in expert_blocks(offs, size, a.shape[1] // size):
        operands = (a[:, columns], a_scale[:, groups], b[:, columns], b_scale[:, groups])
        part = _evaluate(*operands, left, right, promote_every, out_dtype, accumulator)
        exact[expert], bound[expert] = part.exact, part.bound
    return Evaluation(exact, bound)
