"""The scaled GEMM in Triton: one kernel for dense, row-grouped and reduction-grouped products.

Legend: out [M, N] = sum over K of a [M, K] * b [N, K], each operand with its scales; E experts. One program makes a
BM x BN tile, with partial sums over BK of the reduction that are scaled and added to FP32 registers outside the tensor
core: `acc += dot(a, b) * scale` (its own accumulator may be truncating, and scales change there). NATIVE: groups of 32
with E8M0 scales, which the tensor core applies itself (compute capability 10.0).

    GROUPING 0   dense
    GROUPING 1   rows of a and out in groups: a [T, K], b [E, N, K] -> out [T, N]; expert E stands for the rows after the
                 last group, which are 0
    GROUPING 2   stretches of K in groups, each in whole blocks of the scale group: a [N, T'], b [K, T'] -> out [E, N, K]

Scale groups are ROWS x COLS of an operand, 0 for the whole axis; `COLS` divides BK, or BK divides it.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def,attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from fp8c.backends.triton.numerics import load_scale

DENSE, ROW_GROUPS, REDUCTION_GROUPS = 0, 1, 2


@triton.jit
def rows_of_tile(offs_ptr, tile_m, M, experts, BM: tl.constexpr, E_PAD: tl.constexpr):
    """(first row, one past the last row of the group, expert) of a row tile; no rows if the tile has no group.

    Group `experts` holds the rows after the last expert's. A group has its own tiles: none holds rows of two.
    """
    e = tl.arange(0, E_PAD)
    starts = tl.load(offs_ptr + e - 1, mask=(e > 0) & (e <= experts), other=0)
    starts = tl.where(e <= experts, starts, M)
    ends = tl.load(offs_ptr + e, mask=e < experts, other=M)
    count = tl.cdiv(ends - starts, BM)
    before = tl.cumsum(count, 0) - count
    is_owner = (before <= tile_m) & (tile_m < before + count)
    first = tl.sum(tl.where(is_owner, starts + (tile_m - before) * BM, 0), 0)
    return first, tl.sum(tl.where(is_owner, ends, 0), 0), tl.sum(tl.where(is_owner, e, 0), 0)


@triton.jit
def row_scales(s_ptr, rows, row_ok, col, s_row, s_col, ROWS: tl.constexpr, KIND: tl.constexpr):
    """Scales of some rows at group `col` along K."""
    group = (rows if ROWS == 1 else rows // ROWS).to(tl.int64)
    return load_scale(s_ptr + group * s_row + tl.cast(col, tl.int64) * s_col, row_ok, KIND)


@triton.jit
def tile_scale(s_ptr, row, col, s_row, s_col, ROWS: tl.constexpr, KIND: tl.constexpr):
    """The one scale of a tile whose rows, from `row` on, lie in one group."""
    group = 0 if ROWS == 0 else row // ROWS
    return load_scale(s_ptr + tl.cast(group, tl.int64) * s_row + tl.cast(col, tl.int64) * s_col, row >= 0, KIND)


@triton.jit
def gemm_kernel(
    a_ptr, a_s_ptr, b_ptr, b_s_ptr, out_ptr, offs_ptr, M, N, K, experts,
    a_row, a_col, as_row, as_col, b_group, b_row, b_col, bs_group, bs_row, bs_col, out_group, out_row,
    GROUPING: tl.constexpr, E_PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BAND: tl.constexpr, A_ROWS: tl.constexpr, A_COLS: tl.constexpr, B_ROWS: tl.constexpr, B_COLS: tl.constexpr,
    A_KIND: tl.constexpr, B_KIND: tl.constexpr, A_TYPE: tl.constexpr, B_TYPE: tl.constexpr,
    EVEN_K: tl.constexpr, ADD: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the output. `*_row`, `*_col`, `*_group` are strides in elements. ADD: out += product."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BN)
    expert = 0
    if GROUPING == 1:
        tiles_m = tl.num_programs(0) // tiles_n
    else:
        tiles_m = tl.cdiv(M, BM)
        expert = pid // (tiles_m * tiles_n)
        pid = pid % (tiles_m * tiles_n)
    # Bands of BAND row tiles, column by column: neighbours read the same rows of b, and soon again the same rows of a.
    band = pid // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    within = pid % (BAND * tiles_n)
    tile_m = band * BAND + within % height
    col = (within // height) * BN

    first_k = 0
    length = K
    if GROUPING == 1:
        row, end, expert = rows_of_tile(offs_ptr, tile_m, M, experts, BM, E_PAD)
        length = tl.where(expert < experts, K, 0)
        expert = tl.minimum(expert, experts - 1)
    else:
        row = tile_m * BM
        end = M
    if GROUPING == 2:
        start = tl.load(offs_ptr + expert - 1, mask=expert > 0, other=0)
        tokens = tl.load(offs_ptr + expert) - start
        first_k = (start // A_COLS + expert) * A_COLS
        length = tl.cdiv(tokens, A_COLS) * A_COLS
        out_ptr += expert.to(tl.int64) * out_group
    if GROUPING == 1:
        b_ptr += expert.to(tl.int64) * b_group
        b_s_ptr += expert.to(tl.int64) * bs_group

    rows = row + tl.arange(0, BM)
    cols = col + tl.arange(0, BN)
    row_ok = rows < end
    col_ok = cols < N
    kk = tl.arange(0, BK)
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * a_row
    b_ptrs = b_ptr + cols.to(tl.int64)[:, None] * b_row
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, length, BK):
        places = (first_k + k + kk).to(tl.int64)
        if EVEN_K:
            a_ok = row_ok[:, None]
            b_ok = col_ok[:, None]
        else:
            k_ok = (k + kk < length)[None, :]
            a_ok = row_ok[:, None] & k_ok
            b_ok = col_ok[:, None] & k_ok
        a = tl.load(a_ptrs + places[None, :] * a_col, mask=a_ok, other=0.0)
        b = tl.load(b_ptrs + places[None, :] * b_col, mask=b_ok, other=0.0)
        if NATIVE:
            group = (first_k + k) // 32 + tl.arange(0, BK // 32)
            group_ok = (k + tl.arange(0, BK // 32) * 32 < length)[None, :]
            a_s = tl.load(
                a_s_ptr + rows.to(tl.int64)[:, None] * as_row + group.to(tl.int64)[None, :] * as_col,
                mask=row_ok[:, None] & group_ok, other=127,
            )  # fmt: skip
            b_s = tl.load(
                b_s_ptr + cols.to(tl.int64)[:, None] * bs_row + group.to(tl.int64)[None, :] * bs_col,
                mask=col_ok[:, None] & group_ok, other=127,
            )  # fmt: skip
            acc = tl.dot_scaled(a, a_s, A_TYPE, tl.trans(b), b_s, B_TYPE, acc)
        else:
            part = tl.dot(a, tl.trans(b))
            a_group = 0 if A_COLS == 0 else (first_k + k) // A_COLS
            b_group_k = 0 if B_COLS == 0 else (first_k + k) // B_COLS
            # One scale for the tile's columns (or rows) where they all lie in one group: one multiplication less each.
            if B_ROWS == 0 or B_ROWS % BN == 0:
                b_one = tile_scale(b_s_ptr, col, b_group_k, bs_row, bs_col, B_ROWS, B_KIND)
                if A_ROWS == 0 or (A_ROWS % BM == 0 and GROUPING != 1):
                    acc += part * (tile_scale(a_s_ptr, row, a_group, as_row, as_col, A_ROWS, A_KIND) * b_one)
                else:
                    a_s = row_scales(a_s_ptr, rows, row_ok, a_group, as_row, as_col, A_ROWS, A_KIND)
                    acc += part * (a_s * b_one)[:, None]
            else:
                b_s = row_scales(b_s_ptr, cols, col_ok, b_group_k, bs_row, bs_col, B_ROWS, B_KIND)
                if A_ROWS == 0 or (A_ROWS % BM == 0 and GROUPING != 1):
                    a_one = tile_scale(a_s_ptr, row, a_group, as_row, as_col, A_ROWS, A_KIND)
                    acc += part * (b_s * a_one)[None, :]
                else:
                    a_s = row_scales(a_s_ptr, rows, row_ok, a_group, as_row, as_col, A_ROWS, A_KIND)
                    acc += part * (a_s[:, None] * b_s[None, :])
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * out_row + cols[None, :]
    mask = row_ok[:, None] & col_ok[None, :]
    if ADD:
        acc += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
