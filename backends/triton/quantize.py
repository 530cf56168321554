"""Quantizers in Triton: 1xG rows, Gx1 columns (stored transposed), both from one read, 128x128 blocks both ways.

What a kernel can't take (other groups, E5M6 in columns, empty tensors) goes to the plain form. Inputs are read in
place when their last axis is contiguous, else copied.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8c.backends.triton.numerics import fp8_codes, magnitude_bits, quotient, reciprocal, scale_of, store_scale
from fp8c.backends.triton.tiles import group_rows, load_tile, store_column_groups, store_row_groups
from fp8c.formats import Element, Format, ScaleKind
from fp8c.ops import check_quantize_input, empty_quantized, experts_of, is_stored_transposed, portable, quantized_format
from fp8c.ops.fused import plain

ELEMENTS = {Element.E4M3: 0, Element.E5M2: 1, Element.E5M6: 2}
KINDS = {ScaleKind.FP32: 0, ScaleKind.POW2: 1, ScaleKind.E8M0: 2}
ROW_GROUPS = (32, 64, 128)  # widths of the groups that divide a tile
COLUMN_GROUPS = (32, 64, 128)
BLOCK = (128, 128)

# Tile shapes and warps; measured on an H200 (tools/bench/results).
ROW_TILE, ROW_WARPS = 16, 2
COLUMN_TILE, COLUMN_VECTOR, COLUMN_WARPS = 64, 4, 4
BOTH_ROWS, BOTH_COLUMNS, BOTH_VECTOR, BOTH_WARPS = 64, 128, 8, 4
STRAIGHT_WARPS, TURNED_WARPS = 8, 4
MASKED_WARPS = 16  # masks take registers


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("R", "s_col"))
def row_kernel(
    x_ptr, q_ptr, s_ptr, R, C, x_row, q_row, s_row, s_col,
    ROWS: tl.constexpr, G: tl.constexpr, EVEN: tl.constexpr,
    ELEMENT: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows by 128 columns."""
    tiles = tl.cdiv(C, 128)
    pid = tl.program_id(0)
    tile = pid % tiles
    rows = (pid // tiles) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < R
    x = load_tile(x_ptr, rows, row_ok, tile, C, x_row, EVEN)
    store_row_groups(
        x, q_ptr, s_ptr, rows, row_ok, tile, C, q_row, s_row, s_col, ROWS, G, EVEN, ELEMENT, KIND, WIDE
    )  # fmt: skip


@triton.jit
def column_kernel(
    x_ptr, rows_ptr, q_ptr, s_ptr, offs_ptr, R, C, experts, x_row, q_col, s_row, s_col,
    COLS: tl.constexpr, VEC: tl.constexpr, G: tl.constexpr, E_PAD: tl.constexpr, GATHER: tl.constexpr,
    EVEN: tl.constexpr,
    ELEMENT: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one group of G rows by COLS columns. E_PAD: experts rounded up, 0 when groups don't restart.

    GATHER: row t is row rows[t] of x.
    """
    tiles = tl.cdiv(C, COLS)
    pid = tl.program_id(0)
    group = pid // tiles
    cols = tl.max_contiguous(
        tl.multiple_of((pid % tiles) * COLS + tl.arange(0, COLS), VEC), VEC
    )  # as in load_quantized
    if E_PAD == 0:
        begin = group * G
        end = tl.minimum(begin + G, R)
    else:
        begin, end, _ = group_rows(offs_ptr, experts, group, G, E_PAD)
    rows = begin + tl.arange(0, G)
    row_ok = rows < end
    stored = group * G + tl.arange(0, G)
    stored_ok = row_ok if E_PAD == 0 else stored >= 0  # experts' blocks are filled up with zeros
    source = tl.load(rows_ptr + rows, mask=row_ok, other=0) if GATHER else rows
    mask = row_ok[:, None] if EVEN else row_ok[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + source.to(tl.int64)[:, None] * x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    store_column_groups(
        x, q_ptr, s_ptr, stored, stored_ok, cols, C, group, q_col, s_row, s_col, EVEN, ELEMENT, KIND, WIDE
    )


@triton.jit
def both_kernel(
    x_ptr, q_ptr, s_ptr, qt_ptr, st_ptr, offs_ptr, R, C, experts, x_row, q_row, s_row, s_col, qt_col, st_row, st_col,
    E_PAD: tl.constexpr, EVEN: tl.constexpr, ELEMENT: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
    ELEMENT_T: tl.constexpr, KIND_T: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One program: 128 rows by 128 columns, quantized along the rows and along the columns."""
    tiles = tl.cdiv(C, 128)
    pid = tl.program_id(0)
    tile = pid % tiles
    group = pid // tiles
    if E_PAD == 0:
        begin = group * 128
        end = tl.minimum(begin + 128, R)
    else:
        begin, end, last = group_rows(offs_ptr, experts, group, 128, E_PAD)
        programs = tl.num_programs(0) // tiles
        share = (R - last + programs - 1) // programs
        tail_end = tl.minimum(last + (group + 1) * share, R)
        for first in range(last + group * share, tail_end, ROWS):  # rows of no expert have row groups all the same
            tail = first + tl.arange(0, ROWS)
            x = load_tile(x_ptr, tail, tail < tail_end, tile, C, x_row, EVEN)
            store_row_groups(
                x, q_ptr, s_ptr, tail, tail < tail_end, tile, C, q_row, s_row, s_col,
                ROWS, 128, EVEN, ELEMENT, KIND, WIDE,
            )  # fmt: skip
    # Two rounds over the same tile, the second from the L1 cache: half the registers, so more programs in flight.
    for first in range(0, 128, ROWS):
        rows = begin + first + tl.arange(0, ROWS)
        row_ok = rows < end
        x = load_tile(x_ptr, rows, row_ok, tile, C, x_row, EVEN)
        store_row_groups(
            x, q_ptr, s_ptr, rows, row_ok, tile, C, q_row, s_row, s_col, ROWS, 128, EVEN, ELEMENT, KIND, WIDE
        )  # fmt: skip
    rows = begin + tl.arange(0, 128)
    row_ok = rows < end
    stored = group * 128 + tl.arange(0, 128)
    stored_ok = row_ok if E_PAD == 0 else stored >= 0
    for first in range(0, 128, COLS):
        part = tl.max_contiguous(tl.multiple_of(tile * 128 + first + tl.arange(0, COLS), VEC), VEC)
        mask = row_ok[:, None] if EVEN else row_ok[:, None] & (part < C)[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_row + part[None, :], mask=mask, other=0.0).to(tl.float32)
        store_column_groups(
            x, qt_ptr, st_ptr, stored, stored_ok, part, C, group, qt_col, st_row, st_col, EVEN, ELEMENT_T, KIND_T, WIDE
        )  # fmt: skip


@triton.jit
def block_kernel(
    x_ptr, q_ptr, qt_ptr, s_ptr, R, C, x_matrix, x_row,
    EVEN: tl.constexpr, STRAIGHT: tl.constexpr, TURNED: tl.constexpr,
    ELEMENT: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: one 128 x 128 block of one matrix; the data as it is, transposed, or both. Outputs are contiguous."""
    tiles = tl.cdiv(C, 128)
    bands = tl.cdiv(R, 128)
    pid = tl.program_id(0)
    matrix = (pid // (tiles * bands)).to(tl.int64)
    rows = (pid // tiles) % bands * 128 + tl.arange(0, 128)
    cols = pid % tiles * 128 + tl.arange(0, 128)
    mask = (rows < R)[:, None] & (cols < C)[None, :] if not EVEN else None
    pointers = x_ptr + matrix * x_matrix + rows.to(tl.int64)[:, None] * x_row + cols[None, :]
    x = tl.load(pointers, mask=mask, other=0.0 if not EVEN else None).to(tl.float32)
    scale = scale_of(tl.max(tl.max(magnitude_bits(x), 1), 0), ELEMENT, KIND)
    lift, lifted, inverse = reciprocal(scale, KIND, WIDE)
    codes = fp8_codes(quotient(x, lift, lifted, inverse, KIND, WIDE), ELEMENT)
    store_scale(s_ptr + pid, scale, None, KIND)
    if STRAIGHT:
        q_ptr += matrix * R * C
        tl.store(q_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :], codes, mask=mask)
    if TURNED:
        qt_ptr += matrix * R * C
        tl.store(qt_ptr + cols.to(tl.int64)[None, :] * R + rows[:, None], codes, mask=mask)


# Launchers ----------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, fmt: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8c::quantize`; meaning: `backends.reference.quantize`."""
    parsed = quantized_format(fmt)
    check_quantize_input(x)
    experts_of(parsed, offs, x.dim())
    assert parsed.group is not None
    if x.numel() == 0:
        return empty_groups(x, parsed, offs)
    g0, g1 = parsed.group
    if g0 == 1 and g1 in ROW_GROUPS:
        return _rows(x, parsed)
    if g0 in COLUMN_GROUPS and is_stored_transposed(parsed, x.dim()):
        return _columns(x, parsed, offs)
    if parsed.group == BLOCK and offs is None and parsed.element is not Element.E5M6:
        return _blocks(x, parsed, straight=True, turned=False)[::2]
    return portable("quantize")(x, fmt, offs)  # type: ignore[no-any-return]


def quantize_both(x: Tensor, fmt: str, fmt_t: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fp8c::quantize_both`; a single read where the formats are 1x128 and 128x1."""
    rows, columns = quantized_format(fmt), quantized_format(fmt_t)
    check_quantize_input(x)
    fits = rows.group == (1, 128) and columns.group == (128, 1) and is_stored_transposed(columns, x.dim())
    if x.numel() == 0 or not fits:
        return plain("quantize_both")(x, fmt, fmt_t, offs)  # type: ignore[no-any-return]
    x = readable(x)
    (q, s), (qt, st) = empty_quantized(x, x.shape, rows), empty_quantized(x, x.shape, columns, offs)
    height, width = x.shape
    experts = 0 if offs is None else offs.shape[0]
    groups = st.shape[0]
    words = as_words(q, rows)
    both_kernel[(groups * triton.cdiv(width, 128),)](
        x, words, scale_bytes(s), qt.view(torch.uint8), scale_bytes(st), x if offs is None else as_ends(offs),
        height, width, experts, x.stride(0), words.stride(0), s.stride(0), s.stride(1),
        qt.stride(1), st.stride(0), st.stride(1),
        E_PAD=padded(experts), EVEN=width % 128 == 0, **codes_of(rows), WIDE=is_wide(x),
        ELEMENT_T=ELEMENTS[columns.element], KIND_T=KINDS[columns.scale],  # type: ignore[index]
        ROWS=BOTH_ROWS, COLS=BOTH_COLUMNS, VEC=BOTH_VECTOR, num_warps=BOTH_WARPS if width % 128 == 0 else MASKED_WARPS, num_stages=1,
    )  # fmt: skip
    return q, s, qt, st


def quantize_weight(w: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """`fp8c::quantize_weight`."""
    parsed = quantized_format(fmt)
    check_quantize_input(w)
    if w.numel() == 0 or parsed.group != BLOCK or parsed.element is Element.E5M6:
        return plain("quantize_weight")(w, fmt)  # type: ignore[no-any-return]
    # Two kernels that each write once are faster than one with both data in registers (340 against 381 us).
    q, _, s = _blocks(w, parsed, straight=True, turned=False)
    return q, _blocks(w, parsed, straight=False, turned=True)[1], s


def quantize_transposed(w: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """`fp8c::quantize_transposed`."""
    parsed = quantized_format(fmt)
    check_quantize_input(w)
    if w.numel() == 0 or parsed.group != BLOCK or parsed.element is Element.E5M6:
        return plain("quantize_transposed")(w, fmt)  # type: ignore[no-any-return]
    return _blocks(w, parsed, straight=False, turned=True)[1:]


def _rows(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    assert fmt.group is not None
    x = readable(x)
    q, s = empty_quantized(x, x.shape, fmt)
    words = as_words(q, fmt)
    # A stack of matrices is one matrix, as its outputs are contiguous.
    flat = x.reshape(-1, x.shape[-1])
    scale = s if s.dim() == 2 else s.view(-1, s.shape[-1])
    words = words.reshape(-1, words.shape[-1])
    height, width = flat.shape
    row_kernel[(triton.cdiv(height, ROW_TILE) * triton.cdiv(width, 128),)](
        flat, words, scale_bytes(scale), height, width, flat.stride(0), words.stride(0), scale.stride(0), scale.stride(1),
        ROWS=ROW_TILE, G=fmt.group[1], EVEN=width % 128 == 0, **codes_of(fmt), WIDE=is_wide(x), num_warps=ROW_WARPS,
    )  # fmt: skip
    return q, s


def gather_quantize(x: Tensor, rows: Tensor, fmt: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8c::gather_quantize`."""
    parsed = quantized_format(fmt)
    check_quantize_input(x)
    fits = parsed.group is not None and parsed.group[0] in COLUMN_GROUPS and is_stored_transposed(parsed, x.dim())
    if x.numel() == 0 or rows.numel() == 0 or not fits:
        return plain("gather_quantize")(x, rows, fmt, offs)  # type: ignore[no-any-return]
    return _columns(x, parsed, offs, rows.contiguous())


def _columns(x: Tensor, fmt: Format, offs: Tensor | None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    assert fmt.group is not None
    x = readable(x)
    height, width = x.shape if rows is None else (rows.shape[0], x.shape[1])
    q, s = empty_quantized(x, (height, width), fmt, offs)
    experts = 0 if offs is None else offs.shape[0]
    column_kernel[(s.shape[0] * triton.cdiv(width, COLUMN_TILE),)](
        x, x if rows is None else rows, q.view(torch.uint8), scale_bytes(s), x if offs is None else as_ends(offs),
        height, width, experts, x.stride(0), q.stride(1), s.stride(0), s.stride(1),
        COLS=COLUMN_TILE, VEC=COLUMN_VECTOR, G=fmt.group[0], E_PAD=padded(experts), GATHER=rows is not None, EVEN=width % 128 == 0,
        **codes_of(fmt), WIDE=is_wide(x), num_warps=COLUMN_WARPS,
    )  # fmt: skip
    return q, s


def _blocks(w: Tensor, fmt: Format, straight: bool, turned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Data, data transposed, scale; what isn't asked for is not written."""
    w = readable(w)
    q, s = empty_quantized(w, w.shape, fmt)
    *leading, height, width = w.shape
    matrices = w.shape[0] if leading else 1
    qt = q.new_empty((*leading, width, height)) if turned else q
    is_even = height % 128 == 0 and width % 128 == 0
    block_kernel[(matrices * triton.cdiv(height, 128) * triton.cdiv(width, 128),)](
        w, q.view(torch.uint8), qt.view(torch.uint8), scale_bytes(s), height, width,
        w.stride(0) if leading else 0, w.stride(-2),
        EVEN=is_even, STRAIGHT=straight, TURNED=turned,
        **codes_of(fmt), WIDE=is_wide(w), num_warps=(TURNED_WARPS if turned else STRAIGHT_WARPS) if is_even else MASKED_WARPS,
    )  # fmt: skip
    return q, qt, s


def empty_groups(x: Tensor, fmt: Format, offs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pair of a tensor without elements: its groups, where there are any, hold nothing but zeros."""
    q, s = empty_quantized(x, x.shape, fmt, offs)
    return q, s.fill_(1.0)


def readable(x: Tensor) -> Tensor:
    """x itself when its last axis is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def is_wide(x: Tensor) -> bool:
    """More than 11 significant bits: see `numerics`."""
    return x.dtype is torch.float32


def as_words(q: Tensor, fmt: Format) -> Tensor:
    """The data as the kernels address it: bytes, or 4-byte words of packed E5M6."""
    return q.view(torch.int32) if fmt.element is Element.E5M6 else q.view(torch.uint8)


def scale_bytes(s: Tensor) -> Tensor:
    """E8M0 scales are written as bytes."""
    return s.view(torch.uint8) if s.dtype is torch.float8_e8m0fnu else s


def as_ends(offs: Tensor) -> Tensor:
    return offs if offs.dtype is torch.int32 and offs.is_contiguous() else offs.to(torch.int32).contiguous()


def padded(experts: int) -> int:
    return triton.next_power_of_2(experts) if experts else 0


def codes_of(fmt: Format) -> dict[str, int]:
    assert fmt.scale is not None
    return {"ELEMENT": ELEMENTS[fmt.element], "KIND": KINDS[fmt.scale]}
