"""SwiGLU and the quantizes around it on Hopper (`fp8c/ops/swiglu.py` says what is computed).

Bit for bit as the Triton kernels, but for the gradient of the router's weight, whose terms are added in another order. What
these kernels don't take raises `Unsupported`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fp8c.backends.cuda.fused import ACCESS_BYTES, FusedConfig, address, check_rows, codes_of, start
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.formats import Format
from fp8c.ops import empty_quantized, quantized_format, restarts

ROW, COLUMN = (1, 128), (128, 1)
# Threads of a block, blocks that fit into a multiprocessor, tiles under way and at work.
FORWARD_THREADS, FORWARD_BLOCKS, FORWARD_STAGES = 128, 6, 2
_ROWS_OF_WARP = 8
BACKWARD_THREADS, BACKWARD_BLOCKS = 256, 2
_BACKWARD_SHARED_BYTES = 3 * 8 * BACKWARD_THREADS * 16 + 2 * 128 * 8 + 4 * 3 * 64 * 4 + 128 * 16 + 2 * 3 * 128 * 8 + 32

Pair = tuple[Tensor, Tensor]


class _Forward(ctypes.Structure):
    """`Arguments` in swiglu_forward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gate", "up", "weight", "q", "s", "c", "cs")),
        *((name, ctypes.c_longlong) for name in ("s_row", "s_col", "cs_row", "cs_col")),
        *((name, ctypes.c_int) for name in ("gate_row", "up_row", "q_row", "c_row", "R", "F")),
    ]


class _Backward(ctypes.Structure):
    """`Arguments` in swiglu_backward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("dh", "c", "cs", "weight", "ends", "d", "ds", "dweight")),
        *((name, ctypes.c_void_p) for name in ("h", "hs", "dt", "dts")),
        *((f"{name}_{axis}", ctypes.c_longlong) for name in ("cs", "ds", "hs", "dts") for axis in ("row", "col")),
        *((name, ctypes.c_int) for name in ("dh_row", "c_row", "d_row", "h_col", "dt_col", "R", "F", "E", "groups")),
    ]


# Instances ----------------------------------------------------------------------------------------------------------


def quantize_config(gate: Tensor, up: Tensor, weight: Tensor | None, fmt: str) -> FusedConfig:
    """The instance that serves `swiglu_quantize`, whose operands may have no data. Raises: `Unsupported`, as all here."""
    return _forward_config(gate, up, weight, quantized_format(fmt), None)


def quantize_cached_config(gate_up: Tensor, weight: Tensor | None, fmt: str, cache: str) -> FusedConfig:
    gate, up = _halves(gate_up)
    return _forward_config(gate, up, weight, quantized_format(fmt), quantized_format(cache))


def _forward_config(gate: Tensor, up: Tensor, weight: Tensor | None, fmt: Format, cache: Format | None) -> FusedConfig:
    kept = fmt if cache is None else cache
    _check_features(gate.shape[-1], gate, up)
    _check_groups((fmt, ROW), (kept, ROW))
    flags = (("WEIGHTED", weight is not None), ("CACHED", cache is not None), ("STAGES", FORWARD_STAGES))
    shared_bytes = FORWARD_STAGES * 8 * FORWARD_THREADS * ACCESS_BYTES
    constants = (*codes_of(fmt), *codes_of(kept, "_C"), *flags)
    size = ctypes.sizeof(_Forward)
    return FusedConfig("swiglu_forward.cu", FORWARD_THREADS, FORWARD_BLOCKS, size, constants, shared_bytes)


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
    kept, h, d, dt = (quantized_format(f) for f in (cache, fmt_h, fmt_d, fmt_dt))
    _check_features(dh.shape[-1], dh)
    _check_groups((kept, ROW), (h, COLUMN), (d, ROW), (dt, COLUMN))
    check_rows(q)
    formats = (*codes_of(d), *codes_of(kept, "_C"), *codes_of(h, "_H"), *codes_of(dt, "_T"))
    constants = (*formats, ("WEIGHTED", weight is not None), ("EXPERTS", offs is not None))
    size = ctypes.sizeof(_Backward)
    return FusedConfig("swiglu_backward.cu", BACKWARD_THREADS, BACKWARD_BLOCKS, size, constants, _BACKWARD_SHARED_BYTES)


def _check_features(features: int, *inputs: Tensor) -> None:
    if any(x.dtype is not torch.bfloat16 or x.dim() != 2 or x.numel() == 0 for x in inputs) or features % 128:
        raise Unsupported("the fused kernels read BF16 matrices of whole groups of 128 features")
    check_rows(*inputs)


def _check_groups(*formats: tuple[Format, tuple[int, int]]) -> None:
    if any(fmt.group != group for fmt, group in formats):
        raise Unsupported("the fused kernels make groups of 1x128 and 128x1")


def _halves(gate_up: Tensor) -> Pair:
    features = gate_up.shape[-1] // 2
    return gate_up[..., :features], gate_up[..., features:]


# Launchers ----------------------------------------------------------------------------------------------------------


def swiglu_quantize(gate: Tensor, up: Tensor, weight: Tensor | None, fmt: str) -> Pair:
    """`fp8c::swiglu_quantize`."""
    return _forward(quantize_config(gate, up, weight, fmt), gate, up, weight, quantized_format(fmt), None)[:2]


def swiglu_quantize_cached(
    gate_up: Tensor, weight: Tensor | None, fmt: str, cache: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fp8c::swiglu_quantize_cached`."""
    config = quantize_cached_config(gate_up, weight, fmt, cache)
    return _forward(config, *_halves(gate_up), weight, quantized_format(fmt), quantized_format(cache))


def _forward(
    config: FusedConfig, gate: Tensor, up: Tensor, weight: Tensor | None, fmt: Format, cache: Format | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, features = gate.shape
    q, s = empty_quantized(gate, (rows, features), fmt)
    c, cs = (q, s) if cache is None else empty_quantized(gate, (rows, 2 * features), cache)
    weight = _as_weight(weight)
    arguments = _Forward(
        *(address(x) for x in (gate, up, weight, q, s, c, cs)), *s.stride(), *cs.stride(),
        *(x.stride(0) for x in (gate, up, q, c)), rows, features,
    )  # fmt: skip
    tiles = -(-rows // _ROWS_OF_WARP) * (features // 128)
    start(config, -(-tiles // (config.threads // 32)), arguments, gate.device)
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
    config = backward_config(dh, q, s, weight, offs, cache, fmt_h, fmt_d, fmt_dt)
    rows, features = dh.shape
    formats = [quantized_format(f) for f in (fmt_h, fmt_d, fmt_dt)]
    (h, hs), (d, ds), (dt, dts) = (
        empty_quantized(dh, (rows, width), fmt, restarts(fmt, offs))
        for fmt, width in zip(formats, (features, 2 * features, 2 * features))
    )
    weight, experts, groups = _as_weight(weight), 0 if offs is None else offs.shape[0], hs.shape[0]
    ends = None if offs is None else offs.to(torch.int32).contiguous()
    parts = dh.new_empty((features // 128, rows if weight is not None else 0), dtype=torch.float32)
    arguments = _Backward(
        *(address(x) for x in (dh, q, s, weight, ends, d, ds, parts, h, hs, dt, dts)),
        *s.stride(), *ds.stride(), *hs.stride(), *dts.stride(),
        dh.stride(0), q.stride(0), d.stride(0), h.stride(1), dt.stride(1), rows, features, experts, groups,
    )  # fmt: skip
    start(config, groups * (features // 128), arguments, dh.device)
    return h, hs, d, ds, dt, dts, parts.sum(0)[:, None]


def _as_weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()
