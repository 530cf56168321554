"""SwiGLU and its backward with the quantizes around them on Hopper (`fp8c/ops/swiglu.py` says what is computed).

Bit for bit as the Triton kernels, but for the gradient of the router's weight, whose terms are added in another order. What
the kernel doesn't take raises `Unsupported`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fp8c.backends.cuda.fused import FusedConfig, address, check_rows, codes_of, start, start_blocks
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.formats import ScaleKind
from fp8c.ops import empty_quantized, quantized_format, restarts

ROW, COLUMN = (1, 128), (128, 1)
THREADS, BLOCKS = 256, 2  # of a block, of a multiprocessor
_FORWARD_THREADS, _FORWARD_BLOCKS, _FORWARD_ROWS = 128, 5, 4  # rows: of a thread, as ROWS in swiglu_forward.cu
# The tile's inputs (codes and scales of the next one too), sums of each 8 columns, reciprocals of rows and columns, where the
# tiles are, barriers.
_SHARED_BYTES = 3 * 128 * 256 + 16 * 137 * 4 + 2 * 128 * 16 + 128 * 2 * 8 + 16 * 3 * 4 * 8 + 4 * 16 + 2 * 8
_ADD_THREADS, _ADD_BLOCKS = 128, 8  # as THREADS, BLOCKS, of add_parts.cu


class _Parts(ctypes.Structure):
    """`Arguments` in add_parts.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("parts", "total")] + [(name, ctypes.c_int) for name in ("P", "R")]


class _Arguments(ctypes.Structure):
    """`Arguments` in swiglu_backward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dh", "c", "cs", "weight", "ends", "d", "ds", "dweight")),
        *((name, ctypes.c_void_p) for name in ("h", "hs", "dt", "dts")),
        *((f"{name}_{axis}", ctypes.c_uint32) for name in ("cs", "ds") for axis in ("row", "col")),
        *((name, ctypes.c_uint32) for name in ("hs_row", "dts_row")),
        *((name, ctypes.c_uint32) for name in ("dh_row", "c_row", "d_row", "h_col", "dt_col")),
        *((name, ctypes.c_int) for name in ("R", "F", "E", "groups")),
        ("claimed", ctypes.c_void_p),
    ]


class _ForwardArguments(ctypes.Structure):
    """`Arguments` in swiglu_forward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "up", "weight", "q", "s", "c", "cs")),
        *((name, ctypes.c_longlong) for name in ("gate_row", "up_row")),
        *((f"{name}_{part}", ctypes.c_longlong) for name in ("q", "c") for part in ("row", "s_row", "s_col")),
        ("R", ctypes.c_int),
        ("F", ctypes.c_int),
    ]


def cached_config(gate_up: Tensor, weight: Tensor | None, fmt: str, cache: str) -> FusedConfig:
    """The instance that serves operands of these sizes, whose data may be on no GPU. Raises: `Unsupported`."""
    made, kept = quantized_format(fmt), quantized_format(cache)
    if gate_up.dtype is not torch.bfloat16 or gate_up.numel() == 0 or gate_up.shape[1] % 256:
        raise Unsupported("the kernel reads BF16 rows of whole groups of 128 features")
    if (made.group, kept.group) != (ROW, ROW):
        raise Unsupported("the kernel makes groups of 1x128")
    if ScaleKind.FP32 not in (made.scale, kept.scale):
        raise Unsupported("Triton's kernel is as fast with scales that are powers of two")
    check_rows(gate_up)
    constants = (*codes_of(made), *codes_of(kept, "_C"), ("WEIGHTED", weight is not None))
    size = ctypes.sizeof(_ForwardArguments)
    return FusedConfig(
        "swiglu_forward.cu", _FORWARD_THREADS, _FORWARD_BLOCKS, size, constants, includes=("factors.cuh",)
    )


def swiglu_quantize_cached(
    gate_up: Tensor, weight: Tensor | None, fmt: str, cache: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fp8c::swiglu_quantize_cached`. Raises: `Unsupported` as `cached_config`, and without a compiler."""
    config = cached_config(gate_up, weight, fmt, cache)
    gate, up = gate_up.chunk(2, 1)
    q, s = empty_quantized(gate, gate.shape, quantized_format(fmt))
    c, cs = empty_quantized(gate, gate_up.shape, quantized_format(cache))
    weight = None if weight is None else weight.float().contiguous()
    rows, features = gate.shape
    arguments = _ForwardArguments(
        *(address(x) for x in (gate, up, weight, q, s, c, cs)),
        gate.stride(0), up.stride(0), q.stride(0), *s.stride(), c.stride(0), *cs.stride(), rows, features,
    )  # fmt: skip
    parts = -(-rows // _FORWARD_ROWS) * (features // 128)
    start_blocks(config, -(-parts * 16 // _FORWARD_THREADS), arguments, gate_up.device)
    return q, s, c, cs


def backward_config(
    dh: Tensor,
    q: Tensor,
    s: Tensor,
    weight: Tensor | None,
    offs: Tensor | None,
    cache: str,
    fmt_h: str,
    fmt_d: str,
    fmt_dt: str,
) -> FusedConfig:
    """The instance that serves operands of these sizes, whose data may be on no GPU. Raises: `Unsupported`."""
    kept, h, d, dt = (quantized_format(f) for f in (cache, fmt_h, fmt_d, fmt_dt))
    if dh.dtype is not torch.bfloat16 or dh.numel() == 0 or dh.shape[1] % 128:
        raise Unsupported("the kernel reads BF16 rows of whole groups of 128 features")
    if (kept.group, d.group, h.group, dt.group) != (ROW, ROW, COLUMN, COLUMN):
        raise Unsupported("the kernel makes groups of 1x128 and 128x1")
    check_rows(dh, q)
    formats = (*codes_of(d), *codes_of(kept, "_C"), *codes_of(h, "_H"), *codes_of(dt, "_T"))
    constants = (*formats, ("WEIGHTED", weight is not None), ("EXPERTS", offs is not None))
    size = ctypes.sizeof(_Arguments)
    then = None
    if weight is not None:
        then = FusedConfig("add_parts.cu", _ADD_THREADS, _ADD_BLOCKS, ctypes.sizeof(_Parts), ())
    return FusedConfig("swiglu_backward.cu", THREADS, BLOCKS, size, constants, _SHARED_BYTES, ("groups.cuh",), then)


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
    """`fp8c::swiglu_backward_quantize`. Raises: `Unsupported` as `backward_config`, and without a compiler."""
    config = backward_config(dh, q, s, weight, offs, cache, fmt_h, fmt_d, fmt_dt)
    rows, features = dh.shape
    formats = [quantized_format(f) for f in (fmt_h, fmt_d, fmt_dt)]
    (h, hs), (d, ds), (dt, dts) = (
        empty_quantized(dh, (rows, width), fmt, restarts(fmt, offs))
        for fmt, width in zip(formats, (features, 2 * features, 2 * features))
    )
    assert hs.stride(1) == dts.stride(1) == 1  # `empty_quantized`'s: stored four at a time
    weight = None if weight is None else weight.float().contiguous()
    experts, groups = 0 if offs is None else offs.shape[0], hs.shape[0]
    ends = None if offs is None else offs.to(torch.int32).contiguous()
    given = rows if weight is not None else 0
    parts, dweight = (dh.new_empty(shape, dtype=torch.float32) for shape in ((features // 128, given), (given, 1)))
    claimed = torch.zeros(1, device=dh.device, dtype=torch.int32)
    arguments = _Arguments(
        *(address(x) for x in (dh, q, s, weight, ends, d, ds, parts, h, hs, dt, dts)),
        *s.stride(), *ds.stride(), hs.stride(0), dts.stride(0),
        dh.stride(0), q.stride(0), d.stride(0), h.stride(1), dt.stride(1), rows, features, experts, groups,
        address(claimed),
    )  # fmt: skip
    start(config, groups * (features // 128), arguments, dh.device)
    if config.then is not None:
        sizes = _Parts(address(parts), address(dweight), features // 128, rows)
        start_blocks(config.then, -(-rows // _ADD_THREADS), sizes, dh.device)
    return h, hs, d, ds, dt, dts, dweight
