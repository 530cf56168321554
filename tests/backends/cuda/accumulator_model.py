"""Runs accumulator_model.cu, the bit-exact model of Hopper's FP8 GEMM, on the GPU."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fp8c.backends.cuda import launch
from fp8c.backends.cuda.build import compile_source

THREADS = 128


class _Operand(ctypes.Structure):
    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("row", ctypes.c_longlong),
        ("scales", ctypes.c_void_p),
        ("scale_row", ctypes.c_longlong),
        ("scale_col", ctypes.c_longlong),
        ("rows_per_scale", ctypes.c_int),
    ]


@cache
def _function() -> ctypes.c_void_p:
    torch.cuda.current_stream()
    code = compile_source(Path(__file__).with_name("accumulator_model.cu").read_text(), {})
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    launch._check(launch._driver().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    status = launch._driver().cuModuleGetFunction(ctypes.byref(function), module, b"accumulator_model")
    launch._check(status, "cuModuleGetFunction")
    return function


def model_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, b_rows_per_scale: int, promote: bool = True
) -> Tensor:
    """FP32 [M, N] as the tensor core makes it. Scales [M, K / 128] and [N / b_rows_per_scale, K / 128], any strides."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.zeros(m, n, device=a.device)
    if out.numel() == 0 or k == 0:
        return out
    values = [
        _Operand(a.data_ptr(), a.stride(0), a_scale.data_ptr(), *a_scale.stride(), 1),
        _Operand(b.data_ptr(), b.stride(0), b_scale.data_ptr(), *b_scale.stride(), b_rows_per_scale),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_longlong(n),
        *(ctypes.c_int(x) for x in (m, n, k, int(promote))),
    ]
    parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    grid = -(-out.numel() // THREADS)
    status = launch._driver().cuLaunchKernel(_function(), grid, 1, 1, THREADS, 1, 1, 0, stream, parameters, None)
    launch._check(status, "cuLaunchKernel")
    return out
