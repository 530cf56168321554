"""From 1x128 pairs: back to floating point, and to 128x1 or 1x128 in another format, with rows gathered on the way.

What a kernel can't take goes to the plain form, as in `quantize.py`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8c.backends.triton.quantize import ELEMENTS, KINDS, as_ends, as_words, padded, scale_bytes
from fp8c.backends.triton.tiles import (
    group_rows,
    load_quantized,
    store_column_groups,
    store_row_groups,
)
from fp8c.formats import Element, Format
from fp8c.ops import empty_quantized, is_stored_transposed, original_shape, portable, quantized_format, restarts
from fp8c.ops.fused import plain

ROW_GROUP, COLUMN_GROUP = (1, 128), (128, 1)
OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

ROW_TILE, ROW_WARPS = 16, 4
GATHER_ROWS, GATHER_COLS, GATHER_WARPS = 64, 64, 4
COLUMN_TILE = 64
# Columns that a thread reads and warps; True: new scales are powers of two and nothing is masked, which takes fewer registers.
COLUMN_SHAPES = {True: (8, 2), False: (4, 4)}


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("R", "s_col"))
def dequantize_kernel(
    q_ptr, s_ptr, out_ptr, R, C, q_row, s_row, s_col, out_row,
    ROWS: tl.constexpr, EVEN: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows by 128 columns."""
    tiles = tl.cdiv(C, 128)
    pid = tl.program_id(0)
    tile = pid % tiles
    rows = (pid // tiles) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < R
    x = load_quantized(q_ptr, s_ptr, rows, row_ok, tile * 128, C, q_row, s_row, s_col, ROWS, 128, EVEN, ELEMENT, KIND)
    cols = tile * 128 + tl.arange(0, 128)
    mask = row_ok[:, None] if EVEN else row_ok[:, None] & (cols < C)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * out_row + cols[None, :], x, mask=mask)


@triton.jit
def columns_kernel(
    q_ptr, s_ptr, rows_ptr, qt_ptr, st_ptr, offs_ptr, R, C, experts, q_row, s_row, s_col, qt_col, st_row, st_col,
    COLS: tl.constexpr, VEC: tl.constexpr, E_PAD: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr,
    ELEMENT: tl.constexpr, KIND: tl.constexpr, ELEMENT_T: tl.constexpr, KIND_T: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one group of 128 rows by COLS columns. GATHER: row t is row rows[t] of the data."""
    tiles = tl.cdiv(C, COLS)
    pid = tl.program_id(0)
    group = pid // tiles
    first = (pid % tiles) * COLS
    cols = first + tl.arange(0, COLS)
    if E_PAD == 0:
        begin = group * 128
        end = tl.minimum(begin + 128, R)
    else:
        begin, end, _ = group_rows(offs_ptr, experts, group, 128, E_PAD)
    rows = begin + tl.arange(0, 128)
    row_ok = rows < end
    stored = group * 128 + tl.arange(0, 128)
    stored_ok = row_ok if E_PAD == 0 else stored >= 0  # experts' blocks are filled up with zeros
    source = tl.load(rows_ptr + rows, mask=row_ok, other=0) if GATHER else rows
    x = load_quantized(
        q_ptr, s_ptr, source, row_ok, first, C, q_row, s_row, s_col, 128, COLS, EVEN, ELEMENT, KIND, VEC
    )  # fmt: skip
    store_column_groups(
        x, qt_ptr, st_ptr, stored, stored_ok, cols, C, group, qt_col, st_row, st_col, EVEN, ELEMENT_T, KIND_T, WIDE
    )  # fmt: skip


@triton.jit(do_not_specialize=("R", "s_col", "out_s_col"))
def rows_kernel(
    q_ptr, s_ptr, out_ptr, out_s_ptr, R, C, q_row, s_row, s_col, out_row, out_s_row, out_s_col,
    ROWS: tl.constexpr, EVEN: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr,
    ELEMENT_OUT: tl.constexpr, KIND_OUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows by 128 columns, from one 1x128 format to another."""
    tiles = tl.cdiv(C, 128)
    pid = tl.program_id(0)
    tile = pid % tiles
    rows = (pid // tiles) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < R
    x = load_quantized(q_ptr, s_ptr, rows, row_ok, tile * 128, C, q_row, s_row, s_col, ROWS, 128, EVEN, ELEMENT, KIND)
    store_row_groups(
        x, out_ptr, out_s_ptr, rows, row_ok, tile, C, out_row, out_s_row, out_s_col,
        ROWS, 128, EVEN, ELEMENT_OUT, KIND_OUT, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=("R", "s_col", "out_s_col"))
def gather_kernel(
    q_ptr, s_ptr, rows_ptr, out_ptr, out_s_ptr, R, C, q_row, s_row, s_col, out_row, out_s_row, out_s_col,
    groups, share, ROWS: tl.constexpr, COLS: tl.constexpr, SHARE_PAD: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows by COLS bytes (or words) of the data, and `share` of the rows' scales.

    All rows of the first columns come first: a row that is read several times is then found in the L2.
    """
    bands = tl.cdiv(R, ROWS)
    pid = tl.program_id(0)
    tile = pid // bands
    rows = (pid % bands) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < R
    source = tl.load(rows_ptr + rows, mask=row_ok, other=0).to(tl.int64)
    cols = tile * COLS + tl.arange(0, COLS)
    mask = row_ok[:, None] & (cols < C)[None, :]
    data = tl.load(q_ptr + source[:, None] * q_row + cols[None, :], mask=mask, other=0, eviction_policy="evict_last")
    to = out_ptr + rows.to(tl.int64)[:, None] * out_row + cols[None, :]
    tl.store(to, data, mask=mask, eviction_policy="evict_first")
    group = tile * share + tl.arange(0, SHARE_PAD)
    scale_ok = row_ok[:, None] & (group < tl.minimum((tile + 1) * share, groups))[None, :]
    scale = tl.load(s_ptr + source[:, None] * s_row + group.to(tl.int64)[None, :] * s_col, mask=scale_ok, other=0)
    pointers = out_s_ptr + rows.to(tl.int64)[:, None] * out_s_row + group.to(tl.int64)[None, :] * out_s_col
    tl.store(pointers, scale, mask=scale_ok)


# Launchers ----------------------------------------------------------------------------------------------------------


def dequantize(
    q: Tensor, s: Tensor, fmt: str, dtype: torch.dtype, offs: Tensor | None = None, cols: int | None = None
) -> Tensor:
    """`fp8c::dequantize`; meaning: `backends.reference.quantize`."""
    parsed = quantized_format(fmt)
    if not _readable(q, parsed) or offs is not None or dtype not in OUTPUT_DTYPES:
        return portable("dequantize")(q, s, fmt, dtype, offs, cols)  # type: ignore[no-any-return]
    shape = original_shape(q, parsed, cols)
    out = q.new_empty(shape, dtype=dtype)
    flat = out.view(-1, shape[-1])
    words, scale = _flat_words(q, parsed), scale_bytes(s if s.dim() == 2 else s.reshape(-1, s.shape[-1]))
    height, width = flat.shape
    dequantize_kernel[(triton.cdiv(height, ROW_TILE) * triton.cdiv(width, 128),)](
        words, scale, flat, height, width, words.stride(0), scale.stride(0), scale.stride(1), flat.stride(0),
        ROWS=ROW_TILE, EVEN=width % 128 == 0, ELEMENT=ELEMENTS[parsed.element], KIND=_kind(parsed), num_warps=ROW_WARPS,
    )  # fmt: skip
    return out


def requantize(
    q: Tensor, s: Tensor, src: str, dst: str, offs: Tensor | None = None, cols: int | None = None
) -> tuple[Tensor, Tensor]:
    """`fp8c::requantize`."""
    old, new = quantized_format(src), quantized_format(dst)
    is_flat = q.dim() == 2 and _readable(q, old)
    if is_flat and new.group == COLUMN_GROUP and is_stored_transposed(new, 2):
        return _to_columns(q, s, None, old, new, offs, cols)
    if is_flat and new.group == ROW_GROUP:
        return _to_rows(q, s, old, new, cols)
    return portable("requantize")(q, s, src, dst, offs, cols)  # type: ignore[no-any-return]


def gather_requantized(
    q: Tensor, s: Tensor, rows: Tensor, src: str, dst: str, offs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`fp8c::gather_requantized`."""
    old, new = quantized_format(src), quantized_format(dst)
    fits = q.dim() == 2 and _readable(q, old) and new.group == COLUMN_GROUP and is_stored_transposed(new, 2)
    if not fits or rows.numel() == 0 or old.element is Element.E5M6:
        return plain("gather_requantized")(q, s, rows, src, dst, offs)  # type: ignore[no-any-return]
    return _to_columns(q, s, rows.contiguous(), old, new, offs, None)


def gather_quantized(q: Tensor, s: Tensor, rows: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """`fp8c::gather_quantized`."""
    parsed = quantized_format(fmt)
    if not (q.dim() == 2 and _readable(q, parsed)) or rows.numel() == 0:
        return plain("gather_quantized")(q, s, rows, fmt)  # type: ignore[no-any-return]
    height = rows.shape[0]
    out = q.new_empty((height, q.shape[1]))
    out_s = empty_quantized(q, (height, s.shape[1] * 128), parsed)[1]
    words, to = _widest(q, out)
    scale, to_scale = scale_bytes(s), scale_bytes(out_s)
    tiles, groups = triton.cdiv(words.shape[1], GATHER_COLS), scale.shape[1]
    share = triton.cdiv(groups, tiles)
    gather_kernel[(triton.cdiv(height, GATHER_ROWS) * tiles,)](
        words, scale, rows.contiguous(), to, to_scale, height, words.shape[1], words.stride(0),
        scale.stride(0), scale.stride(1), to.stride(0), to_scale.stride(0), to_scale.stride(1), groups, share,
        ROWS=GATHER_ROWS, COLS=GATHER_COLS, SHARE_PAD=triton.next_power_of_2(share), num_warps=GATHER_WARPS,
    )  # fmt: skip
    return out, out_s


def _widest(q: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Data as 4-byte words where its rows allow it."""
    fits = q.shape[1] % 4 == 0 and q.stride(0) % 4 == 0 and q.data_ptr() % 4 == 0
    dtype = torch.int32 if fits else torch.uint8
    return q.view(dtype), out.view(dtype)


def _to_columns(
    q: Tensor, s: Tensor, rows: Tensor | None, old: Format, new: Format, offs: Tensor | None, cols: int | None
) -> tuple[Tensor, Tensor]:
    height, width = original_shape(q, old, cols)
    if rows is not None:
        height = rows.shape[0]
    offs = restarts(new, offs)
    qt, st = empty_quantized(q, (height, width), new, offs)
    experts = 0 if offs is None else offs.shape[0]
    words, scale = as_words(q, old), scale_bytes(s)
    is_even = width % 128 == 0  # masks take registers
    vector, warps = COLUMN_SHAPES[_kind(new) != 0 and is_even]
    columns_kernel[(st.shape[0] * triton.cdiv(width, COLUMN_TILE),)](
        words, scale, words if rows is None else rows, qt.view(torch.uint8), scale_bytes(st),
        words if offs is None else as_ends(offs), height, width, experts,
        words.stride(0), scale.stride(0), scale.stride(1), qt.stride(1), st.stride(0), st.stride(1),
        COLS=COLUMN_TILE, VEC=vector, E_PAD=padded(experts), GATHER=rows is not None, EVEN=is_even,
        ELEMENT=ELEMENTS[old.element], KIND=_kind(old), ELEMENT_T=ELEMENTS[new.element], KIND_T=_kind(new),
        WIDE=_kind(old) == 0, num_warps=warps,
    )  # fmt: skip
    return qt, st


def _to_rows(q: Tensor, s: Tensor, old: Format, new: Format, cols: int | None) -> tuple[Tensor, Tensor]:
    height, width = original_shape(q, old, cols)
    out, out_s = empty_quantized(q, (height, width), new)
    words, scale = as_words(q, old), scale_bytes(s)
    to, to_scale = as_words(out, new), scale_bytes(out_s)
    rows_kernel[(triton.cdiv(height, ROW_TILE) * triton.cdiv(width, 128),)](
        words, scale, to, to_scale, height, width, words.stride(0), scale.stride(0), scale.stride(1),
        to.stride(0), to_scale.stride(0), to_scale.stride(1),
        ROWS=ROW_TILE, EVEN=width % 128 == 0, ELEMENT=ELEMENTS[old.element], KIND=_kind(old),
        ELEMENT_OUT=ELEMENTS[new.element], KIND_OUT=_kind(new), WIDE=_kind(old) == 0, num_warps=ROW_WARPS,
    )  # fmt: skip
    return out, out_s


def _readable(q: Tensor, fmt: Format) -> bool:
    """Data in 1x128 groups that the kernels can read in place."""
    merges = q.dim() == 2 or q.is_contiguous()
    is_packed = fmt.element is not Element.E5M6 or (q.stride(-2) % 4 == 0 and q.data_ptr() % 4 == 0)
    return q.numel() > 0 and fmt.group == ROW_GROUP and q.stride(-1) == 1 and merges and is_packed


def _flat_words(q: Tensor, fmt: Format) -> Tensor:
    words = as_words(q, fmt)
    return words.reshape(-1, words.shape[-1])


def _kind(fmt: Format) -> int:
    assert fmt.scale is not None
    return KINDS[fmt.scale]
