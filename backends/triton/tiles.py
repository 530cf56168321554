"""Reading and writing tiles of quantized values: the parts that the kernels share.

Legend: R rows, C columns; a tile has 128 columns; `tile` is its index along the columns. Rows groups are 1 x G, column
groups G x 1. Data offsets are int64, so a tensor may hold more than 2^31 elements. EVEN: C is a multiple of 128, so no
column needs a mask. `q_*`, `s_*` are strides in elements; E5M6 data is addressed in 4-byte words, 48 for 128 codes.

Triton compiles a kernel anew where an integer argument is 1 or 16 divides it. Kernels that work along rows do without
(`do_not_specialize`) for R and the strides of scales, which follow the number of tokens: a step with another number of
them waits for no compiler. Transposed data is written along R, in pieces as wide as what divides R: there it stays.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from fp8c.backends.triton.numerics import (
    e5m6_codes,
    e5m6_unpacked,
    e5m6_values,
    e5m6_words,
    fp8_codes,
    fp8_values,
    largest_bits,
    load_scale,
    magnitude_bits,
    quotient,
    reciprocal,
    scale_of,
    store_scale,
)


@triton.jit
def group_rows(offs_ptr, experts, index, G: tl.constexpr, E_PAD: tl.constexpr):
    """First and one past the last row of group `index`, where groups restart per expert; none if no expert owns it.

    Also where the last expert ends. The rule is `fp8c.ops.scale_shape`'s: expert e has scale rows from start_e // G + e on.
    """
    e = tl.arange(0, E_PAD)
    is_expert = e < experts
    ends = tl.load(offs_ptr + e, mask=is_expert, other=0)
    starts = tl.load(offs_ptr + e - 1, mask=is_expert & (e > 0), other=0)
    first = starts // G + e
    owner = tl.sum((is_expert & (first <= index)).to(tl.int32), 0) - 1
    is_owner = e == owner
    start = tl.sum(tl.where(is_owner, starts, 0), 0)
    begin = start + (index - tl.sum(tl.where(is_owner, first, 0), 0)) * G
    end = tl.minimum(begin + G, tl.sum(tl.where(is_owner, ends, 0), 0))
    return begin, end, tl.max(ends, 0)


@triton.jit
def load_tile(x_ptr, rows, row_ok, tile, C, x_row, EVEN: tl.constexpr):
    """128 columns of some rows as FP32; 0 where masked."""
    cols = tile * 128 + tl.arange(0, 128)
    pointers = x_ptr + rows.to(tl.int64)[:, None] * x_row + cols[None, :]
    mask = row_ok[:, None] if EVEN else row_ok[:, None] & (cols < C)[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_quantized(
    q_ptr, s_ptr, rows, row_ok, first, C, q_row, s_row, s_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, EVEN: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr,
    VEC: tl.constexpr = 16,
):  # fmt: skip
    """COLS columns from `first` on of data with 1x128 scales: data * scale in FP32; 0 where masked. COLS divides 128.

    VEC: bytes that one thread reads at a time. Where the columns are reduced every thread makes the scales of the columns
    it read, so wide reads cost more arithmetic there than they save. (The hint must stand where the numbers are made.)
    """
    scale = load_scale(s_ptr + rows.to(tl.int64) * s_row + (first // 128).to(tl.int64) * s_col, row_ok, KIND)
    if ELEMENT == 2:
        eights = first // 8 + tl.arange(0, COLS // 8)
        pointers = q_ptr + rows.to(tl.int64)[:, None] * q_row + (eights * 3)[None, :]
        mask = row_ok[:, None] & (eights < (C + 7) // 8)[None, :]
        words_0 = tl.load(pointers, mask=mask, other=0)
        words_1 = tl.load(pointers + 1, mask=mask, other=0)
        words_2 = tl.load(pointers + 2, mask=mask, other=0)
        values = e5m6_values(e5m6_unpacked(words_0, words_1, words_2, ROWS, COLS))
    else:
        cols = tl.max_contiguous(tl.multiple_of(first + tl.arange(0, COLS), VEC), VEC)
        mask = row_ok[:, None] if EVEN else row_ok[:, None] & (cols < C)[None, :]
        codes = tl.load(q_ptr + rows.to(tl.int64)[:, None] * q_row + cols[None, :], mask=mask, other=0)
        values = fp8_values(codes, ELEMENT)
    return values * scale[:, None]


@triton.jit
def store_row_groups(
    x, q_ptr, s_ptr, rows, row_ok, tile, C, q_row, s_row, s_col,
    ROWS: tl.constexpr, G: tl.constexpr, EVEN: tl.constexpr,
    ELEMENT: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Quantize a [ROWS, 128] tile in groups of 1 x G and store it row by row."""
    if G == 128:
        scale = scale_of(largest_bits(x, 1), ELEMENT, KIND)
        lift, lifted, inverse = reciprocal(scale, KIND, WIDE)
        payload = quotient(x, lift[:, None], lifted[:, None], inverse[:, None], KIND, WIDE)
        store_scale(s_ptr + rows.to(tl.int64) * s_row + tile.to(tl.int64) * s_col, scale, row_ok, KIND)
    else:
        per_tile: tl.constexpr = 128 // G
        grouped = tl.reshape(x, (ROWS, per_tile, G))
        scale = scale_of(largest_bits(grouped, 2), ELEMENT, KIND)
        lift, lifted, inverse = reciprocal(scale, KIND, WIDE)
        payload = quotient(grouped, lift[:, :, None], lifted[:, :, None], inverse[:, :, None], KIND, WIDE)
        payload = tl.reshape(payload, (ROWS, 128))
        groups = tile * per_tile + tl.arange(0, per_tile)
        pointers = s_ptr + rows.to(tl.int64)[:, None] * s_row + groups.to(tl.int64)[None, :] * s_col
        store_scale(pointers, scale, row_ok[:, None] & (groups * G < C)[None, :], KIND)
    if ELEMENT == 2:
        first, second, third = e5m6_words(e5m6_codes(payload), ROWS)
        pointers = q_ptr + rows.to(tl.int64)[:, None] * q_row + (tile * 48 + tl.arange(0, 16) * 3)[None, :]
        mask = row_ok[:, None] & (tile * 16 + tl.arange(0, 16) < (C + 7) // 8)[None, :]
        tl.store(pointers, first, mask=mask)
        tl.store(pointers + 1, second, mask=mask)
        tl.store(pointers + 2, third, mask=mask)
    else:
        cols = tile * 128 + tl.arange(0, 128)
        mask = row_ok[:, None] if EVEN else row_ok[:, None] & (cols < C)[None, :]
        tl.store(q_ptr + rows.to(tl.int64)[:, None] * q_row + cols[None, :], fp8_codes(payload, ELEMENT), mask=mask)


@triton.jit
def store_column_groups(
    x, q_ptr, s_ptr, stored, stored_ok, cols, C, group, q_col, s_row, s_col, EVEN: tl.constexpr,
    ELEMENT: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Quantize a tile whose rows are one group of every column and store it transposed: `stored` rows are contiguous."""
    scale = scale_of(tl.max(magnitude_bits(x), 0), ELEMENT, KIND)
    lift, lifted, inverse = reciprocal(scale, KIND, WIDE)
    codes = fp8_codes(quotient(x, lift[None, :], lifted[None, :], inverse[None, :], KIND, WIDE), ELEMENT)
    col_ok = cols < C
    store_scale(s_ptr + group.to(tl.int64) * s_row + cols.to(tl.int64) * s_col, scale, col_ok, KIND)
    mask = stored_ok[:, None] if EVEN else stored_ok[:, None] & col_ok[None, :]
    tl.store(q_ptr + cols.to(tl.int64)[None, :] * q_col + stored[:, None], codes, mask=mask)
