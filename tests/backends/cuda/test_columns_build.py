"""The CUDA quantizers of 128x1 groups, compiled without a GPU: no spills, and a choice by sizes and formats alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="its package has cuobjdump")

from fp8c.backends.cuda import build
from fp8c.backends.cuda.fused import FusedConfig
from fp8c.backends.cuda.operators import CONFIGS
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.backends.triton import ahead

needs_compiler = pytest.mark.skipif(not build.has_compiler(), reason="neither NVRTC nor nvcc is installed")

ROW, ROW2, ROW8 = (f"e4m3[1x128] {scale}" for scale in ("fp32", "pow2", "e8m0"))
COLUMN, COLUMN2, COLUMN8 = (f"e4m3[128x1] {scale}" for scale in ("fp32", "pow2", "e8m0"))


def meta(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(rows, cols, dtype=dtype, device="meta")


X, ENDS = meta(256, 384), torch.empty(4, dtype=torch.int32, device="meta")
PAIR = (meta(256, 384, torch.float8_e4m3fn), meta(256, 3, torch.float32))
INDEX = torch.empty(256, dtype=torch.int64, device="meta")
SERVED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("quantize", (X, COLUMN)),
    ("quantize", (meta(250, 384), COLUMN8, ENDS)),
    ("quantize_both", (X, ROW, COLUMN)),
    ("quantize_both", (meta(250, 384), ROW2, COLUMN8, ENDS)),
    ("gather_quantize", (X, INDEX, COLUMN2, ENDS)),
    ("gather_quantize", (X, INDEX.int(), COLUMN)),
    ("requantize", (*PAIR, ROW, COLUMN)),
    ("requantize", (*PAIR, ROW2, COLUMN2)),
    ("gather_requantized", (*PAIR, INDEX, ROW2, COLUMN2, ENDS)),
    ("gather_requantized", (*PAIR, INDEX, ROW8, COLUMN)),
)
LEFT: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("quantize", (meta(256, 384), ROW)),
    ("quantize", (meta(256, 384), "e4m3[64x1] fp32")),
    ("quantize", (meta(256, 384), "e5m2[128x1] fp32")),
    ("quantize", (meta(0, 384), COLUMN)),
    ("quantize", (meta(384, 256).t(), COLUMN)),
    ("quantize_both", (meta(250, 384), ROW, COLUMN)),  # a column would end within 16 bytes
    ("quantize_both", (meta(256, 200), ROW, COLUMN)),
    ("quantize_both", (meta(256, 384, torch.float32), ROW, COLUMN)),
    ("quantize_both", (meta(256, 384), "e5m6[1x128] pow2", COLUMN)),
    ("requantize", (*PAIR, ROW, ROW2)),
)


@needs_compiler
@pytest.mark.parametrize(("op", "arguments"), SERVED)
def test_registers_suffice(op: str, arguments: tuple[Any, ...]) -> None:
    config: FusedConfig = CONFIGS[op](*arguments)
    registers, spilled_bytes = ahead.resources(build.compile_cubin(config))
    assert spilled_bytes == 0
    assert registers * config.threads * config.blocks <= 65536


@pytest.mark.parametrize(("op", "arguments"), LEFT)
def test_others_are_left_to_triton(op: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(Unsupported):
        CONFIGS[op](*arguments)
