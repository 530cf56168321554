# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""SwiGLU and the quantizes around it (`fp8c/ops/swiglu.py` says what is computed).

Every intermediate is rounded to the type of the inputs where the model's own operators round; exp and the division behind
it are the GPU's approximations, as in PyTorch's silu. Backward takes two kernels, one for what lies along rows and one for
what lies along columns: arithmetic, not memory, is what they wait for, and apart they need half the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8c.backends.triton.numerics import approximate_reciprocal
from fp8c.backends.triton.quantize import (
    ELEMENTS,
    KINDS,
    as_ends,
    as_words,
    codes_of,
    is_wide,
    padded,
    readable,
    scale_bytes,
)
from fp8c.backends.triton.tiles import group_rows, load_quantized, load_tile, store_column_groups, store_row_groups
from fp8c.formats import Element, Format
from fp8c.ops import empty_quantized, is_stored_transposed, quantized_format, restarts
from fp8c.ops.fused import plain

FORWARD_ROWS = 8
FORWARD_WARPS, CACHED_WARPS = 1, 2  # three quantizes leave a warp registers for four rows
ROW_TILE, ROW_WARPS = 16, 2
COLUMN_TILE, COLUMN_VECTOR, COLUMN_WARPS = 32, 2, 4


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in four instructions; 0 below -87.3, where the value is no normal number."""
    e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * -1.4426950408889634], tl.float32, True, 1)
    return approximate_reciprocal(e + 1.0)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """FP32 to the type of the model. BF16 two at a time: one by one the conversion runs at a quarter of the rate."""
    if DTYPE == tl.bfloat16:
        y = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def times(a, b):
    """The product of two numbers of the model's type, rounded once: what multiplying in FP32 and rounding gives, too."""
    if a.dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.bfloat16, True, 2)
    else:
        y = (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)
    return y


@triton.jit(do_not_specialize=("R", "s_col", "cs_col"))
def forward_kernel(
    gate_ptr, up_ptr, weight_ptr, q_ptr, s_ptr, c_ptr, cs_ptr, R, F,
    gate_row, up_row, q_row, s_row, s_col, c_row, cs_row, cs_col,
    ROWS: tl.constexpr, WEIGHTED: tl.constexpr, CACHED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ELEMENT: tl.constexpr, KIND: tl.constexpr, ELEMENT_C: tl.constexpr, KIND_C: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows by 128 features. CACHED: gate and up as well, side by side in one pair."""
    dtype = gate_ptr.dtype.element_ty
    tiles = tl.cdiv(F, 128)
    pid = tl.program_id(0)
    tile = pid % tiles
    rows = (pid // tiles) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < R
    gate = load_tile(gate_ptr, rows, row_ok, tile, F, gate_row, EVEN)
    up = load_tile(up_ptr, rows, row_ok, tile, F, up_row, EVEN)
    if CACHED:
        store_row_groups(
            gate, c_ptr, cs_ptr, rows, row_ok, tile, 2 * F, c_row, cs_row, cs_col,
            ROWS, 128, EVEN, ELEMENT_C, KIND_C, WIDE,
        )  # fmt: skip
        store_row_groups(
            up, c_ptr, cs_ptr, rows, row_ok, tile + tiles, 2 * F, c_row, cs_row, cs_col,
            ROWS, 128, EVEN, ELEMENT_C, KIND_C, WIDE,
        )  # fmt: skip
    h = times(rounded(gate * sigmoid(gate), dtype), rounded(up, dtype)).to(tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_ptr + rows, mask=row_ok, other=0.0)
        h = rounded(h * weight[:, None], dtype).to(tl.float32)
    store_row_groups(
        h, q_ptr, s_ptr, rows, row_ok, tile, F, q_row, s_row, s_col, ROWS, 128, EVEN, ELEMENT, KIND, WIDE
    )  # fmt: skip


@triton.jit
def differentiate(dh, gate, up, weight, WEIGHTED: tl.constexpr):
    """(h, gradient of gate, of up, terms of the gradient of weight), each rounded as the model's operators round.

    dh, gate, up in the model's type; weight FP32; the results in FP32.
    """
    DTYPE: tl.constexpr = dh.dtype
    wide = gate.to(tl.float32)
    s = sigmoid(wide)
    silu = rounded(wide * s, DTYPE)
    product = times(silu, up)
    h = product
    dproduct = dh
    if WEIGHTED:
        h = rounded(product.to(tl.float32) * weight[:, None], DTYPE)
        dproduct = rounded(dh.to(tl.float32) * weight[:, None], DTYPE)
    dsilu = times(dproduct, up).to(tl.float32)
    dgate = rounded(dsilu * s * (1.0 + wide * (1.0 - s)), DTYPE)
    dup = times(dproduct, silu)
    terms = dh.to(tl.float32) * product.to(tl.float32)
    return h.to(tl.float32), dgate.to(tl.float32), dup.to(tl.float32), terms


@triton.jit(do_not_specialize=("R", "s_col", "cs_col"))
def backward_rows_kernel(
    dh_ptr, c_ptr, cs_ptr, weight_ptr, q_ptr, s_ptr, dweight_ptr, R, F,
    dh_row, c_row, cs_row, cs_col, q_row, s_row, s_col,
    ROWS: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr,
    ELEMENT_C: tl.constexpr, KIND_C: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows by 128 features; dweight [F / 128, R] gets this tile's part of the sum over features."""
    dtype = dh_ptr.dtype.element_ty
    tiles = F // 128
    pid = tl.program_id(0)
    tile = pid % tiles
    rows = (pid // tiles) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < R
    weight = tl.load(weight_ptr + rows, mask=row_ok, other=0.0) if WEIGHTED else None
    cols = tile * 128 + tl.arange(0, 128)
    dh = tl.load(dh_ptr + rows.to(tl.int64)[:, None] * dh_row + cols[None, :], mask=row_ok[:, None], other=0.0)
    gate = load_quantized(
        c_ptr, cs_ptr, rows, row_ok, tile * 128, 2 * F, c_row, cs_row, cs_col, ROWS, 128, True, ELEMENT_C, KIND_C
    )  # fmt: skip
    up = load_quantized(
        c_ptr, cs_ptr, rows, row_ok, (tile + tiles) * 128, 2 * F, c_row, cs_row, cs_col,
        ROWS, 128, True, ELEMENT_C, KIND_C,
    )  # fmt: skip
    _, dgate, dup, terms = differentiate(dh, rounded(gate, dtype), rounded(up, dtype), weight, WEIGHTED)
    store_row_groups(
        dgate, q_ptr, s_ptr, rows, row_ok, tile, 2 * F, q_row, s_row, s_col, ROWS, 128, True, ELEMENT, KIND, WIDE
    )  # fmt: skip
    store_row_groups(
        dup, q_ptr, s_ptr, rows, row_ok, tile + tiles, 2 * F, q_row, s_row, s_col, ROWS, 128, True, ELEMENT, KIND, WIDE
    )  # fmt: skip
    if WEIGHTED:
        tl.store(dweight_ptr + tile.to(tl.int64) * R + rows, tl.sum(terms, 1), mask=row_ok)


@triton.jit
def backward_columns_kernel(
    dh_ptr, c_ptr, cs_ptr, weight_ptr, h_ptr, hs_ptr, q_ptr, s_ptr, offs_ptr, R, F, experts,
    dh_row, c_row, cs_row, cs_col, h_col, hs_row, hs_col, q_col, s_row, s_col,
    COLS: tl.constexpr, VEC: tl.constexpr, E_PAD: tl.constexpr, WEIGHTED: tl.constexpr, WIDE: tl.constexpr,
    ELEMENT_C: tl.constexpr, KIND_C: tl.constexpr, ELEMENT_H: tl.constexpr, KIND_H: tl.constexpr,
    ELEMENT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: one group of 128 rows by COLS features: h and the gradients of gate and up."""
    dtype = dh_ptr.dtype.element_ty
    tiles = F // COLS
    pid = tl.program_id(0)
    group = pid // tiles
    first = (pid % tiles) * COLS
    cols = tl.max_contiguous(tl.multiple_of(first + tl.arange(0, COLS), VEC), VEC)  # as in load_quantized
    if E_PAD == 0:
        begin = group * 128
        end = tl.minimum(begin + 128, R)
    else:
        begin, end, _ = group_rows(offs_ptr, experts, group, 128, E_PAD)
    rows = begin + tl.arange(0, 128)
    row_ok = rows < end
    stored = group * 128 + tl.arange(0, 128)
    stored_ok = row_ok if E_PAD == 0 else stored >= 0
    weight = tl.load(weight_ptr + rows, mask=row_ok, other=0.0) if WEIGHTED else None
    dh = tl.load(dh_ptr + rows.to(tl.int64)[:, None] * dh_row + cols[None, :], mask=row_ok[:, None], other=0.0)
    gate = load_quantized(
        c_ptr, cs_ptr, rows, row_ok, first, 2 * F, c_row, cs_row, cs_col, 128, COLS, True, ELEMENT_C, KIND_C, VEC
    )  # fmt: skip
    up = load_quantized(
        c_ptr, cs_ptr, rows, row_ok, first + F, 2 * F, c_row, cs_row, cs_col, 128, COLS, True, ELEMENT_C, KIND_C, VEC
    )  # fmt: skip
    h, dgate, dup, _ = differentiate(dh, rounded(gate, dtype), rounded(up, dtype), weight, WEIGHTED)
    store_column_groups(
        h, h_ptr, hs_ptr, stored, stored_ok, cols, F, group, h_col, hs_row, hs_col, True, ELEMENT_H, KIND_H, WIDE
    )  # fmt: skip
    store_column_groups(
        dgate, q_ptr, s_ptr, stored, stored_ok, cols, 2 * F, group, q_col, s_row, s_col, True, ELEMENT, KIND, WIDE
    )  # fmt: skip
    store_column_groups(
        dup, q_ptr, s_ptr, stored, stored_ok, cols + F, 2 * F, group, q_col, s_row, s_col, True, ELEMENT, KIND, WIDE
    )  # fmt: skip


# Launchers ----------------------------------------------------------------------------------------------------------


def swiglu_quantize(gate: Tensor, up: Tensor, weight: Tensor | None, fmt: str) -> tuple[Tensor, Tensor]:
    """`fp8c::swiglu_quantize`."""
    parsed = quantized_format(fmt)
    if parsed.group != (1, 128) or gate.dim() != 2 or gate.numel() == 0:
        return plain("swiglu_quantize")(gate, up, weight, fmt)  # type: ignore[no-any-return]
    return _forward(readable(gate), readable(up), weight, parsed, None)[:2]


def swiglu_quantize_cached(
    gate_up: Tensor, weight: Tensor | None, fmt: str, cache: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fp8c::swiglu_quantize_cached`."""
    parsed, kept = quantized_format(fmt), quantized_format(cache)
    features = gate_up.shape[1] // 2
    fits = parsed.group == (1, 128) and kept.group == (1, 128) and features % 128 == 0
    if not fits or gate_up.numel() == 0:
        return plain("swiglu_quantize_cached")(gate_up, weight, fmt, cache)  # type: ignore[no-any-return]
    x = readable(gate_up)
    return _forward(x[:, :features], x[:, features:], weight, parsed, kept)


def _forward(
    gate: Tensor, up: Tensor, weight: Tensor | None, fmt: Format, cache: Format | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, features = gate.shape
    q, s = empty_quantized(gate, (rows, features), fmt)
    kept = fmt if cache is None else cache
    c, cs = (q, s) if cache is None else empty_quantized(gate, (rows, 2 * features), kept)
    words, cache_words = as_words(q, fmt), as_words(c, kept)
    forward_kernel[(triton.cdiv(rows, FORWARD_ROWS) * triton.cdiv(features, 128),)](
        gate, up, gate if weight is None else weight.float().contiguous(),
        words, scale_bytes(s), cache_words, scale_bytes(cs), rows, features,
        gate.stride(0), up.stride(0), words.stride(0), s.stride(0), s.stride(1),
        cache_words.stride(0), cs.stride(0), cs.stride(1),
        ROWS=FORWARD_ROWS, WEIGHTED=weight is not None, CACHED=cache is not None, EVEN=features % 128 == 0,
        WIDE=is_wide(gate), **codes_of(fmt), ELEMENT_C=ELEMENTS[kept.element], KIND_C=_kind(kept),
        num_warps=FORWARD_WARPS if cache is None else CACHED_WARPS,
    )  # fmt: skip
    return q, s, c, cs


def swiglu_backward_quantize(
    dh: Tensor,
    q: Tensor,
    s: Tensor,
    weight: Tensor | None,
    offs: Tensor | None,
    cache: str,
    fmt_h: str,
    fmt_d: str,
    fmt_dt: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`fp8c::swiglu_backward_quantize`."""
    kept, formats = quantized_format(cache), [quantized_format(f) for f in (fmt_h, fmt_d, fmt_dt)]
    rows, features = dh.shape
    groups_fit = kept.group == formats[1].group == (1, 128) and formats[0].group == formats[2].group == (128, 1)
    fits = groups_fit and all(is_stored_transposed(f, 2) for f in formats[::2]) and kept.element is not Element.E5M6
    if not fits or features % 128 or dh.numel() == 0 or q.stride(1) != 1:
        return plain("swiglu_backward_quantize")(dh, q, s, weight, offs, cache, fmt_h, fmt_d, fmt_dt)  # type: ignore[no-any-return]
    dh = readable(dh)
    (h, hs), (d, ds), (dt, dts) = (
        empty_quantized(dh, (rows, width), fmt, restarts(fmt, offs))
        for fmt, width in zip(formats, (features, 2 * features, 2 * features))
    )
    given = dh if weight is None else weight.float().contiguous()
    parts = dh.new_empty((features // 128, rows if weight is not None else 0), dtype=torch.float32)
    codes, scale, words = q.view(torch.uint8), scale_bytes(s), as_words(d, formats[1])
    backward_rows_kernel[(triton.cdiv(rows, ROW_TILE) * (features // 128),)](
        dh, codes, scale, given, words, scale_bytes(ds), parts, rows, features,
        dh.stride(0), codes.stride(0), scale.stride(0), scale.stride(1), words.stride(0), ds.stride(0), ds.stride(1),
        ROWS=ROW_TILE, WEIGHTED=weight is not None, WIDE=is_wide(dh),
        ELEMENT_C=ELEMENTS[kept.element], KIND_C=_kind(kept), **codes_of(formats[1]), num_warps=ROW_WARPS,
    )  # fmt: skip
    experts = 0 if offs is None else offs.shape[0]
    backward_columns_kernel[(hs.shape[0] * (features // COLUMN_TILE),)](
        dh, codes, scale, given, h.view(torch.uint8), scale_bytes(hs), dt.view(torch.uint8), scale_bytes(dts),
        dh if offs is None else as_ends(offs), rows, features, experts,
        dh.stride(0), codes.stride(0), scale.stride(0), scale.stride(1),
        h.stride(1), hs.stride(0), hs.stride(1), dt.stride(1), dts.stride(0), dts.stride(1),
        COLS=COLUMN_TILE, VEC=COLUMN_VECTOR, E_PAD=padded(experts), WEIGHTED=weight is not None, WIDE=is_wide(dh),
        ELEMENT_C=ELEMENTS[kept.element], KIND_C=_kind(kept), ELEMENT_H=ELEMENTS[formats[0].element],
        KIND_H=_kind(formats[0]), **codes_of(formats[2]), num_warps=COLUMN_WARPS,
    )  # fmt: skip
    return h, hs, d, ds, dt, dts, parts.sum(0)[:, None]


def _kind(fmt: Format) -> int:
    assert fmt.scale is not None
    return KINDS[fmt.scale]
