"""The Triton kernels on a GPU, each against the oracle, bit for bit (`kernel_cases.py`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def load(name: str) -> ModuleType:
    """A module of this folder: under importlib mode tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


GROUPS = ("quantize", "fused", "requantize", "swiglu", "combine")


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_agree_with_the_oracle(group: str) -> None:
    failed = []
    for name, case in load("kernel_cases").GROUPS[group]():
        try:
            case("cuda")
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)


def test_more_than_2_31_elements() -> None:
    """Data offsets are 64 bits wide: the last rows of a large tensor come out as they do alone."""
    from fp8c.backends.lowering import register_kernels

    register_kernels("cuda")
    ops = torch.ops.fp8c
    rows, cols, last, k = 2**17 + 256, 2**14 + 256, 256, 8
    assert rows * cols > 2**31
    row, column, row2, column2 = (
        f"e4m3[{group}] {scale}" for scale in ("fp32", "pow2") for group in ("1x128", "128x1")
    )
    x = torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda").normal_()
    tail = x[-last:]

    def check(name: str, found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            part = a[-b.shape[0] :]
            left, right = (torch.empty(b.shape, dtype=b.dtype, device="cuda").copy_(t) for t in (part, b))
            assert torch.equal(left.view(torch.uint8), right.view(torch.uint8)), (name, i)

    for fmt in (row, column, "e4m3[128x128] fp32"):
        check(fmt, ops.quantize(x, fmt), ops.quantize(tail, fmt))
    check("both", ops.quantize_both(x, row, column), ops.quantize_both(tail, row, column))
    check("swiglu", ops.swiglu_quantize_cached(x, None, row, row), ops.swiglu_quantize_cached(tail, None, row, row))
    order = torch.arange(rows, device="cuda")
    check("combine", (ops.gather_sum(x, order, k),), (ops.gather_sum(tail.clone(), order[:last], k),))
    check("gather", ops.gather_quantize(x, order, column), ops.gather_quantize(tail.clone(), order[:last], column))
    (pair, small), dtype = (ops.quantize(t, row2) for t in (x, tail)), torch.bfloat16
    del x, tail
    check("requantize", ops.requantize(*pair, row2, column2), ops.requantize(*small, row2, column2))
    check("dequantize", (ops.dequantize(*pair, row2, dtype),), (ops.dequantize(*small, row2, dtype),))
    check("gathered", ops.gather_quantized(*pair, order, row2), ops.gather_quantized(*small, order[:last], row2))
    turned, expected = ops.transposed(pair[0]), ops.transposed(small[0])
    assert torch.equal(turned[:, -last:].contiguous().view(torch.uint8), expected.view(torch.uint8))
