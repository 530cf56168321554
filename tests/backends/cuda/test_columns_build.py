"""The CUDA quantizers, compiled without a GPU: no spills, and a choice that depends on sizes and formats alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="its package has cuobjdump, and its launchers ask for the kernels")

from fp8c.backends.cuda import build, columns
from fp8c.backends.cuda.columns import ColumnsConfig
from fp8c.backends.triton import KERNELS, ahead
from fp8c.formats import ScaleKind

needs_compiler = pytest.mark.skipif(not build.has_compiler(), reason="neither NVRTC nor nvcc is installed")

FP32, POW2, E8M0 = ScaleKind.FP32, ScaleKind.POW2, ScaleKind.E8M0
BOTH = ColumnsConfig(False, True, 0, FP32, FP32, FP32)
GATHERED = ColumnsConfig(True, False, 64, POW2, FP32, POW2)
ROW, COLUMN, ROW2, COLUMN2 = (f"e4m3[{group}] {scale}" for scale in ("fp32", "pow2") for group in ("1x128", "128x1"))


@needs_compiler
@pytest.mark.parametrize(
    "config",
    (
        BOTH,
        replace(BOTH, kind_rows=POW2, kind=E8M0),
        replace(BOTH, has_rows=False, index_bits=32),
        GATHERED,
        replace(GATHERED, index_bits=0, kind_in=FP32, kind=FP32),
        replace(GATHERED, kind_in=E8M0, kind=FP32),
    ),
)
def test_registers_suffice(config: ColumnsConfig) -> None:
    registers, spilled_bytes = ahead.resources(build.compile_cubin(config))
    assert spilled_bytes == 0
    assert registers * config.threads * 3 <= 65536  # three blocks an SM at least


def chosen(op: str, *arguments: Any) -> list[ColumnsConfig]:
    with columns.recording() as found, ahead.recording({}):
        KERNELS[op](*arguments)
    return found


def meta(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(rows, cols, dtype=dtype, device="meta")


def test_even_sizes_are_theirs() -> None:
    x, ends = meta(256, 384), torch.empty(4, dtype=torch.int32, device="meta")
    rows = torch.empty(256, dtype=torch.int64, device="meta")
    assert chosen("quantize_both", x, ROW, COLUMN) == [BOTH]
    assert chosen("quantize_both", meta(250, 384), ROW, COLUMN, ends) == [BOTH]
    assert chosen("quantize", x, COLUMN2) == [ColumnsConfig(False, False, 0, FP32, FP32, POW2)]
    assert chosen("gather_quantize", x, rows, COLUMN, ends) == [ColumnsConfig(False, False, 64, FP32, FP32, FP32)]
    pair = (meta(256, 384, torch.float8_e4m3fn), meta(256, 3, torch.float32))
    assert chosen("gather_requantized", *pair, rows, ROW2, COLUMN2, ends) == [GATHERED]
    assert chosen("requantize", *pair, ROW2, COLUMN2) == [replace(GATHERED, index_bits=0)]


@pytest.mark.parametrize(
    ("op", "arguments"),
    (
        ("quantize_both", (meta(250, 384), ROW, COLUMN)),  # rows end within 16 bytes of the transposed data
        ("quantize_both", (meta(256, 200), ROW, COLUMN)),
        ("quantize_both", (meta(256, 384, torch.float32), ROW, COLUMN)),
        ("quantize_both", (meta(256, 384), "e5m6[1x128] pow2", COLUMN)),
        ("quantize", (meta(256, 384), "e5m2[128x1] fp32")),
        ("quantize", (meta(256, 384), "e4m3[64x1] fp32")),
        ("quantize", (meta(256, 384), ROW)),
    ),
)
def test_others_are_left_to_triton(op: str, arguments: tuple[Any, ...]) -> None:
    assert chosen(op, *arguments) == []
