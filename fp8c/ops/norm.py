"""RMSNorm joined with the quantize behind it: plain form and fake of the operator that `fused` registers.

The plain form is transformers' RMSNorm, operator by operator. The mean of squares is an FP32 sum, and its order is the
operator's own: a kernel may take another than PyTorch's. So the operator also returns the factor it found, and what comes
after it is exact: two roundings to x's type, then the quantize.

Legend: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8c.diagnostics import fail
from fp8c.ops import check_quantize_input, empty_quantized, quantized_format

SCHEMAS = {"rms_norm_quantize": "(Tensor x, Tensor weight, float eps, str fmt) -> (Tensor, Tensor, Tensor)"}


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """quantize(weight * (x * r).to(x.dtype), fmt) with r = rsqrt(mean(x^2) + eps), the norm in FP32.

    Shapes:  x bf16|f16|f32 [.., C], weight [C] of the same type -> a pair [R, C], r f32 [R, 1], where R is the product of
             the leading sizes
    """
    rows = x.reshape(-1, x.shape[-1])
    wide = rows.float()
    factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (*torch.ops.fp8c.quantize(weight * (wide * factor).to(x.dtype), fmt), factor)


def fake_rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    check_quantize_input(x)
    if weight.dim() != 1 or weight.dtype != x.dtype:
        raise fail("E0520", "fp8c::rms_norm_quantize takes x [.., C] and weight [C] of one type")
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    pair = empty_quantized(x, (rows, x.shape[-1]), quantized_format(fmt))
    return (*pair, x.new_empty((rows, 1), dtype=torch.float32))
