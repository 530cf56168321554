"""RMSNorm and the quantize behind it on Hopper (`fp8c/ops/norm.py` says what is computed). Raises `Unsupported` as swiglu.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fp8c.backends.cuda.fused import FusedConfig, address, check_rows, codes_of, start_blocks
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.ops import empty_quantized, quantized_format

_RUN = 8  # columns that a thread reads at a time
# Blocks of 256 threads where 128 would hold more than 8 runs each.
_THREADS, _MANY_THREADS, _RUNS = 128, 256, 8
_THREADS_OF_ALL = 896  # of a multiprocessor: a thread has 72 registers


class _Arguments(ctypes.Structure):
    """`Arguments` in rms_norm.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "q", "s", "factor")),
        *((name, ctypes.c_longlong) for name in ("x_row", "q_row", "s_row", "s_col")),
        ("R", ctypes.c_int),
        ("C", ctypes.c_int),
        ("eps", ctypes.c_float),
    ]


def norm_config(x: Tensor, weight: Tensor, eps: float, fmt: str) -> FusedConfig:
    """The instance that serves operands of these sizes, whose data may be on no GPU. Raises: `Unsupported`."""
    parsed, columns = quantized_format(fmt), x.shape[-1]
    largest = _MANY_THREADS * _RUN * _RUNS
    if (
        x.dtype is not torch.bfloat16
        or weight.dtype is not x.dtype
        or columns % 128
        or columns > largest
        or x.numel() == 0
    ):
        raise Unsupported(f"the kernel reads BF16 rows of whole groups of 128 columns, {largest} at most")
    if parsed.group != (1, 128) or weight.stride(0) != 1 or weight.data_ptr() % 16:
        raise Unsupported("the kernel makes groups of 1x128")
    check_rows(x.reshape(-1, columns))
    threads = _THREADS if columns <= _THREADS * _RUN * _RUNS else _MANY_THREADS
    chunks = -(-columns // (threads * _RUN))
    constants = (*codes_of(parsed), ("CHUNKS", chunks))
    return FusedConfig("rms_norm.cu", threads, _THREADS_OF_ALL // threads, ctypes.sizeof(_Arguments), constants)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """`fp8c::rms_norm_quantize`."""
    config = norm_config(x, weight, eps, fmt)
    rows = x.reshape(-1, x.shape[-1])
    q, s = empty_quantized(rows, rows.shape, quantized_format(fmt))
    factor = rows.new_empty((rows.shape[0], 1), dtype=torch.float32)
    arguments = _Arguments(
        *(address(t) for t in (rows, weight, q, s, factor)),
        rows.stride(0), q.stride(0), *s.stride(), *rows.shape, eps,
    )  # fmt: skip
    start_blocks(config, rows.shape[0], arguments, x.device)
    return q, s, factor
