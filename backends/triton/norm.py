# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""RMSNorm and the quantize behind it from one read (`fp8c/ops/norm.py` says what is computed).

Legend: C columns of a row, in tiles of 128; a row stays in registers between its sum of squares and its quantize.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8c.backends.triton.numerics import fp8_codes, magnitude_bits, quotient, reciprocal, scale_of, store_scale
from fp8c.backends.triton.quantize import codes_of, readable, scale_bytes
from fp8c.formats import Element
from fp8c.ops import empty_quantized, quantized_format
from fp8c.ops.fused import plain

TILES_PER_WARP = 16
LARGEST = 16384  # columns whose row fits into registers


@triton.jit(do_not_specialize=("s_col",))
def norm_kernel(
    x_ptr, w_ptr, q_ptr, s_ptr, factor_ptr, C, eps, x_row, q_row, s_row, s_col,
    TILES: tl.constexpr, EVEN: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: a whole row, a [TILES, 128] tile."""
    dtype = x_ptr.dtype.element_ty
    tiles = tl.arange(0, TILES)
    cols = tiles[:, None] * 128 + tl.arange(0, 128)[None, :]
    tile_ok = tiles < tl.cdiv(C, 128)
    col_ok = tile_ok[:, None] if EVEN else cols < C
    weight = tl.load(w_ptr + cols, mask=col_ok, other=0.0)
    row = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + row * x_row + cols, mask=col_ok, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x * x, 1), 0) / C
    factor = tl.rsqrt(mean + eps)
    normed = (x * factor).to(dtype).to(tl.float32)
    y = (normed * weight.to(tl.float32)).to(dtype).to(tl.float32)
    scale = scale_of(tl.max(magnitude_bits(y), 1), ELEMENT, KIND)
    lift, lifted, inverse = reciprocal(scale, KIND, False)
    codes = fp8_codes(quotient(y, lift[:, None], lifted[:, None], inverse[:, None], KIND, False), ELEMENT)
    store_scale(s_ptr + row * s_row + tiles.to(tl.int64) * s_col, scale, tile_ok, KIND)
    tl.store(q_ptr + row * q_row + cols, codes, mask=col_ok)
    tl.store(factor_ptr + row, factor)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """`fp8c::rms_norm_quantize`."""
    parsed, width = quantized_format(fmt), x.shape[-1]
    is_narrow = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype is x.dtype
    fits = parsed.group == (1, 128) and parsed.element is not Element.E5M6 and width <= LARGEST
    if not (is_narrow and fits) or x.numel() == 0:
        return plain("rms_norm_quantize")(x, weight, eps, fmt)  # type: ignore[no-any-return]
    rows = readable(x.reshape(-1, width))
    q, s = empty_quantized(rows, rows.shape, parsed)
    factor = rows.new_empty((rows.shape[0], 1), dtype=torch.float32)
    tiles = triton.next_power_of_2(triton.cdiv(width, 128))
    norm_kernel[(rows.shape[0],)](
        rows, weight.contiguous(), q.view(torch.uint8), scale_bytes(s), factor, width, eps,
        rows.stride(0), q.stride(0), s.stride(0), s.stride(1),
        TILES=tiles, EVEN=width % 128 == 0, **codes_of(parsed),
        num_warps=max(tiles // TILES_PER_WARP, 1),
    )  # fmt: skip
    return q, s, factor
