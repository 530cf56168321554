"""128x1 groups on Hopper, by quantize_columns.cu and requantize_columns.cu, under the names and with the arguments of the operators.

What they don't take raises `Unsupported`, and Triton serves it: other formats than E4M3, a width that 128 does not divide,
rows that 16 does not divide where groups don't restart, data that can't be read 16 bytes at a time. `..._config` says which
instance serves a call, whose tensors may have no data.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from fp8c.backends.cuda.fused import ACCESS_BYTES, FusedConfig, address, kind_of, start_blocks
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.formats import Element, Format, ScaleKind
from fp8c.ops import empty_quantized, quantized_format, restarts

Pair = tuple[Tensor, Tensor]

GROUP, TILE = (128, 1), 128
THREADS = 256  # of a block
_LARGEST = 2**30  # axis: offsets in bytes are products of 32-bit numbers
_INDEX_BITS = {torch.int32: 32, torch.int64: 64}

# Tiles of a slab; measured, as are the blocks below (tools/bench/results/h200_columns_2026-11-22.json).
SLAB = 4
GATHER_SLAB = 2
# Two tiles with their scales and exponents, where rows come from, where the block works, the columns' factors or
# divisors.
_REQUANTIZE_SHARED_BYTES = 2 * (TILE * TILE + TILE * 4 + 4 * 8) + TILE * 4 + 32 + TILE * 2 + TILE // 2 * 16


class _Columns(ctypes.Structure):
    """`Columns` in columns.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scale_in", "gathered", "ends")),
        *((name, ctypes.c_void_p) for name in ("out", "scale", "row_out", "row_scale")),
        *((name, ctypes.c_uint32) for name in ("data_row", "scale_in_row", "scale_in_col", "out_col", "scale_row")),
        *((name, ctypes.c_uint32) for name in ("row_out_row", "row_scale_row", "row_scale_col")),
        *((name, ctypes.c_int) for name in ("rows", "columns", "groups", "experts", "slab")),
    ]


# The operators ------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, fmt: str, offs: Tensor | None = None) -> Pair:
    """`fp8c::quantize`."""
    return _launch(quantize_config(x, fmt, offs), x, None, None, offs, fmt)[0]


def quantize_both(x: Tensor, fmt: str, fmt_t: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fp8c::quantize_both`."""
    config = quantize_both_config(x, fmt, fmt_t, offs)
    rows = empty_quantized(x, x.shape, quantized_format(fmt))
    columns, _ = _launch(config, x, None, None, offs, fmt_t, rows)
    return *rows, *columns


def gather_quantize(x: Tensor, rows: Tensor, fmt: str, offs: Tensor | None = None) -> Pair:
    """`fp8c::gather_quantize`."""
    return _launch(gather_quantize_config(x, rows, fmt, offs), x, None, rows, offs, fmt)[0]


def requantize(q: Tensor, s: Tensor, src: str, dst: str, offs: Tensor | None = None, cols: int | None = None) -> Pair:
    """`fp8c::requantize`."""
    config = requantize_config(q, s, src, dst, offs, cols)
    return _launch(config, q, s, None, restarts(quantized_format(dst), offs), dst)[0]


def gather_requantized(q: Tensor, s: Tensor, rows: Tensor, src: str, dst: str, offs: Tensor | None = None) -> Pair:
    """`fp8c::gather_requantized`."""
    config = gather_requantized_config(q, s, rows, src, dst, offs)
    return _launch(config, q, s, rows, restarts(quantized_format(dst), offs), dst)[0]


# Which instance -----------------------------------------------------------------------------------------------------


def quantize_config(x: Tensor, fmt: str, offs: Tensor | None = None) -> FusedConfig:
    return _choose(x, None, offs, None, None, quantized_format(fmt))


def quantize_both_config(x: Tensor, fmt: str, fmt_t: str, offs: Tensor | None = None) -> FusedConfig:
    row = quantized_format(fmt)
    if row.group != (1, TILE):
        raise Unsupported("the rows' groups are no 1x128")
    return _choose(x, None, offs, None, row, quantized_format(fmt_t))


def gather_quantize_config(x: Tensor, rows: Tensor, fmt: str, offs: Tensor | None = None) -> FusedConfig:
    return _choose(x, rows, offs, None, None, quantized_format(fmt))


def requantize_config(
    q: Tensor, s: Tensor, src: str, dst: str, offs: Tensor | None = None, cols: int | None = None
) -> FusedConfig:
    return _choose(q, None, offs, quantized_format(src), None, quantized_format(dst))


def gather_requantized_config(
    q: Tensor, s: Tensor, rows: Tensor, src: str, dst: str, offs: Tensor | None = None
) -> FusedConfig:
    return _choose(q, rows, offs, quantized_format(src), None, quantized_format(dst))


def _choose(
    data: Tensor, rows: Tensor | None, offs: Tensor | None, old: Format | None, row: Format | None, fmt: Format
) -> FusedConfig:
    """The instance for BF16 data, or E4M3 of format `old`. Raises: `Unsupported`."""
    formats = [f for f in (old, row, fmt) if f is not None]
    if fmt.group != GROUP or (old is not None and old.group != (1, TILE)):
        raise Unsupported("groups are no 128x1, or no 1x128 in what is read")
    dtype = torch.bfloat16 if old is None else torch.float8_e4m3fn
    if data.dtype is not dtype or any(f.element is not Element.E4M3 for f in formats):
        raise Unsupported("the kernels read BF16 and E4M3 and write E4M3")
    if data.dim() != 2 or data.stride(1) != 1 or data.stride(0) * data.element_size() % ACCESS_BYTES != 0:
        raise Unsupported(f"the kernels don't read strides {data.stride()}")
    height = (data if rows is None else rows).shape[0]
    if height == 0 or data.shape[0] == 0 or max(height, *data.shape, data.stride(0)) >= _LARGEST:
        raise Unsupported("the kernels need elements, and offsets of 32 bits along an axis")
    if data.shape[1] % TILE != 0 or (offs is None and height % ACCESS_BYTES != 0):
        raise Unsupported("rows end within a tile's 128 columns, or columns within 16 bytes")
    if (offs is not None and offs.dim() != 1) or (rows is not None and rows.dtype not in _INDEX_BITS):
        raise Unsupported("the kernels read one axis of offsets, and indices of 32 or 64 bits")
    bits = 0 if rows is None else _INDEX_BITS[rows.dtype]
    return _instance(old is not None, row is not None, bits, *(f and f.scale for f in (old, row, fmt)))


@cache
def _instance(
    is_from_fp8: bool,
    has_rows: bool,
    index_bits: int,
    kind_in: ScaleKind | None,
    kind_row: ScaleKind | None,
    kind: ScaleKind | None,
) -> FusedConfig:
    kinds = (("KIND_IN", kind_in), ("KIND_ROW", kind_row), ("KIND", kind))
    constants = (
        ("ROWS_TOO", has_rows),
        ("GATHERS", index_bits),
        *((name, 0 if k is None else kind_of(k)) for name, k in kinds),
    )
    size, includes = ctypes.sizeof(_Columns), ("columns.cuh", "groups.cuh")
    if is_from_fp8:
        is_fp32 = ScaleKind.FP32 in (kind_in, kind)
        own = (*constants, ("WIDE", _order(is_fp32, index_bits != 0)[1]))
        return FusedConfig(
            "requantize_columns.cu",
            THREADS,
            4,
            size,
            own,
            _REQUANTIZE_SHARED_BYTES,
            (*includes, "halves.cuh"),
            starts_early=True,
        )
    blocks = 3 if has_rows else 5 if index_bits else 4
    return FusedConfig("quantize_columns.cu", THREADS, blocks, size, constants, includes=includes, starts_early=True)


def _order(is_fp32: bool, gathers: bool) -> tuple[int, int]:
    """Tiles that a block requantizes, one after another, and such runs of a slab: a run has its rows looked up once, a wide slab
    reads longer lines. Measured (tools/bench/results/h200_kernel_shapes_2026-11-22.json, h200_fused_2026-11-22*.json)."""
    if gathers:
        return (4, 1) if is_fp32 else (3, 1)
    return (2, 1) if is_fp32 else (1, 2)


# Launch -------------------------------------------------------------------------------------------------------------


def _launch(
    config: FusedConfig,
    data: Tensor,
    scale: Tensor | None,
    rows: Tensor | None,
    offs: Tensor | None,
    fmt: str,
    row_out: Pair | None = None,
) -> tuple[Pair, Pair | None]:
    """Fill a new pair of `fmt`, and `row_out`, from the data or from its `rows`."""
    if data.data_ptr() % ACCESS_BYTES != 0:
        raise Unsupported("data starts within 16 bytes")
    rows = None if rows is None else rows.contiguous()
    height, width = (data if rows is None else rows).shape[0], data.shape[1]
    out = empty_quantized(data, (height, width), quantized_format(fmt), offs)
    ends = None if offs is None else offs.to(torch.int32).contiguous()
    row_data, row_scale = row_out or (None, None)
    groups, tiles = out[1].shape[0], width // TILE
    run = 1
    if scale is None:
        slab = tiles if row_out is not None else SLAB if rows is None else GATHER_SLAB
    else:
        kinds = dict(config.constants)
        is_fp32 = kind_of(ScaleKind.FP32) in (kinds["KIND_IN"], kinds["KIND"])
        run = slab = _order(is_fp32, rows is not None)[0]
    arguments = _Columns(
        *(address(t) for t in (data, scale, rows, ends, *out, row_data, row_scale)),
        _stride(data, 0), _stride(scale, 0), _stride(scale, 1), _stride(out[0], 1), _stride(out[1], 0),
        _stride(row_data, 0), _stride(row_scale, 0), _stride(row_scale, 1),
        height, width, groups, 0 if ends is None else ends.shape[0], slab,
    )  # fmt: skip
    start_blocks(config, groups * -(-tiles // run), arguments, data.device)
    return out, row_out


def _stride(t: Tensor | None, axis: int) -> int:
    """In bytes."""
    return 0 if t is None else t.stride(axis) * t.element_size()
