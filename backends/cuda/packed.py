"""E5M6 on Hopper, by quantize_packed.cu: BF16 rows in groups of 1x128 whose scales are powers of two. Raises `Unsupported` as swiglu.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fp8c.backends.cuda.fused import FusedConfig, address, check_rows, kind_of, start_blocks
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.formats import Element, ScaleKind
from fp8c.ops import empty_quantized, quantized_format

_THREADS, _BLOCKS = 256, 6
_ROWS = 4  # of half a warp


class _Arguments(ctypes.Structure):
    """`Arguments` in quantize_packed.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "q", "s")),
        *((name, ctypes.c_longlong) for name in ("x_row", "q_row", "s_row", "s_col")),
        ("R", ctypes.c_int),
        ("C", ctypes.c_int),
    ]


def quantize_config(x: Tensor, fmt: str, offs: Tensor | None = None) -> FusedConfig:
    """The instance that serves x, whose data may be on no GPU. Raises: `Unsupported`."""
    parsed = quantized_format(fmt)
    if parsed.element is not Element.E5M6 or parsed.group != (1, 128) or parsed.scale in (None, ScaleKind.FP32):
        raise Unsupported("the kernel writes E5M6 in groups of 1x128 with powers of two as scales")
    if x.dtype is not torch.bfloat16 or x.dim() != 2 or x.numel() == 0 or x.shape[1] % 128:
        raise Unsupported("the kernel reads BF16 rows of whole groups of 128 columns")
    check_rows(x)
    assert parsed.scale is not None
    constants = (("KIND", kind_of(parsed.scale)),)
    return FusedConfig("quantize_packed.cu", _THREADS, _BLOCKS, ctypes.sizeof(_Arguments), constants)


def quantize(x: Tensor, fmt: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8c::quantize`; groups along rows don't look at `offs`."""
    config = quantize_config(x, fmt, offs)
    q, s = empty_quantized(x, x.shape, quantized_format(fmt))
    arguments = _Arguments(
        *(address(t) for t in (x, q, s)), x.stride(0), q.stride(0), *s.stride(), *x.shape
    )  # fmt: skip
    groups = -(-x.shape[0] // _ROWS) * (x.shape[1] // 128)
    start_blocks(config, -(-groups // (_THREADS // 16)), arguments, x.device)
    return q, s
