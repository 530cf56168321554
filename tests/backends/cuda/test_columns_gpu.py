"""The CUDA quantizers of 128x1 groups on a GPU, each against the oracle, bit for bit: the cases of the Triton kernels."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper(), reason="needs a GPU of compute capability 9.0")]

CASES = Path(__file__).parents[1] / "triton" / "kernel_cases.py"
OPERATORS = ("quantize", "quantize_both", "gather_quantize", "requantize", "gather_requantized")


def load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("column_cases", CASES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["column_cases"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("group", ("quantize", "fused", "requantize"))
def test_even_sizes_agree_with_the_oracle(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8c.backends.cuda import operators
    from fp8c.backends.cuda.fused import start_blocks

    launched: set[Any] = set()

    def counted(config: Any, *rest: Any) -> None:
        launched.add(config)
        start_blocks(config, *rest)

    monkeypatch.setattr("fp8c.backends.cuda.columns.start_blocks", counted)
    cases = load_cases()
    for module in (cases.kernels, cases.retiling):
        for name in OPERATORS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, operators.first_on_hopper(name, getattr(module, name)))
    failed = []
    for name, case in cases.GROUPS[group]():
        try:
            case("cuda")
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)
    assert len(launched) >= 2, launched


def test_unaligned_data_is_left_to_triton() -> None:
    from fp8c.backends.cuda import columns
    from fp8c.backends.gemms.unsupported import Unsupported
    from fp8c.backends.lowering import register_kernels

    register_kernels("cuda")
    x = torch.randn(128 * 256 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(128, 256)
    fmt = "e4m3[128x1] fp32"
    with pytest.raises(Unsupported):
        columns.quantize(x, fmt)
    for found, expected in zip(torch.ops.fp8c.quantize(x, fmt), torch.ops.fp8c.quantize(x.clone(), fmt), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_captured_into_a_graph() -> None:
    from fp8c.backends.cuda import columns

    x = torch.randn(256, 384, device="cuda", dtype=torch.bfloat16)
    act, act_t = "e4m3[1x128] fp32", "e4m3[128x1] fp32"
    expected = columns.quantize_both(x, act, act_t)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = columns.quantize_both(x, act, act_t)
    graph.replay()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_a_kernel_that_starts_early_waits_for_what_it_reads() -> None:
    """Each launch reads what the one before it writes, to memory that held the result of other numbers before."""
    from fp8c.backends.cuda import columns

    act, act_t = "e4m3[1x128] fp32", "e4m3[128x1] fp32"
    inputs = [torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16) * 2.0**i for i in range(8)]
    index = torch.randint(0, 8192, (8192,), device="cuda")

    def chain(x: torch.Tensor, waits: bool) -> list[torch.Tensor]:
        rows, scale = columns.quantize_both(x, act, act_t)[:2]
        if waits:
            torch.cuda.synchronize()
        found = [
            *columns.requantize(rows, scale, act, act_t),
            *columns.gather_requantized(rows, scale, index, act, act_t),
        ]
        return [t.contiguous().view(torch.uint8).clone() for t in found]

    expected = [chain(x, waits=True) for x in inputs]
    for _ in range(5):
        for x, wanted in zip(inputs, expected, strict=True):
            for a, b in zip(chain(x, waits=False), wanted, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("exponent", (0, -100, 80))
def test_requantizing_divides_by_scales_of_24_bits(exponent: int) -> None:
    """Ordinary ones, those with their last 20 bits set, very small and very large ones: bit for bit what Triton divides."""
    from fp8c.backends.cuda import columns
    from fp8c.backends.triton import requantize
    from fp8c.ops import lay_out, quantized_format

    act, act_t, rows, groups = "e4m3[1x128] fp32", "e4m3[128x1] fp32", 8192, 16
    generator = torch.Generator().manual_seed(exponent)
    codes = torch.randint(0, 256, (rows, groups * 128), generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80  # a negative zero instead of NaN
    significands = torch.randint(2**23, 2**24, (rows, groups), generator=generator)
    # The largest of each column's group is this row's 448: so its scale is the row's.
    codes[5::128] = 0x7E
    significands[5::256] |= 0xFFFFF
    powers = torch.randint(-4, 1, (rows, groups), generator=generator)
    powers[5::128] = 1
    scale = (significands.double() * torch.exp2(powers + exponent - 23.0)).float()
    pair = lay_out(codes.view(torch.float8_e4m3fn).cuda(), scale.cuda(), quantized_format(act))
    found, expected = (f(*pair, act, act_t) for f in (columns.requantize, requantize.requantize))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    has_last_bits = found[1].contiguous().view(torch.int32) & 0xFFFFF == 0xFFFFF
    assert has_last_bits[::2].all() and not has_last_bits[1::2].all()
