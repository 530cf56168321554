"""The choice among GEMM implementations on a GPU: measured times, captured graphs, operands of more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8c.backends.gemms import candidates, choice, dispatch, measured
from fp8c.backends.gemms.unsupported import Unsupported

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="no GPU of compute capability 9.0")]

ROW, BLOCK = "e4m3[1x128] fp32", "e4m3[128x128] fp32"
scaled_mm = torch.ops.fp8c.scaled_mm


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FP8C_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv(choice.ENVIRONMENT, raising=False)
    measured.table_of.cache_clear()
    yield
    measured.table_of.cache_clear()


def payload(*shape: int) -> Tensor:
    return (torch.randn(shape, device="cuda") * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def row_scales(rows: int, k: int) -> Tensor:
    return torch.rand(k // 128, -(-rows // 4) * 4, device="cuda").t()[:rows]


def operands(m: int, n: int, k: int) -> tuple[Any, ...]:
    b_scale = torch.rand(-(-n // 128), k // 128, device="cuda")
    return payload(m, k), row_scales(m, k), payload(n, k), b_scale, ROW, BLOCK, 128, torch.bfloat16


def test_implementations_that_serve_a_gemm_agree_and_one_is_kept() -> None:
    arguments = operands(1024, 512, 1024)
    with choice.using(choice.MEASURE):
        first = dispatch.order("scaled_mm", arguments)
        assert dispatch.order("scaled_mm", arguments) == first
    table = measured.table_of(0)
    (found,) = table.choices.values()
    assert {"cuda", "triton", "cublaslt"} <= set(found.us), "cuBLASLt reads these scales as they lie"
    assert table.path is not None and table.path.exists() and first[0] == found.implementation


def test_nothing_is_measured_in_a_capture_and_each_implementation_can_be_captured() -> None:
    arguments = operands(300, 512, 1024)
    results = {}
    for word in ("measure", "cuda", "triton"):
        with choice.using(choice.read_policy(word)):
            if word != "measure":
                scaled_mm(*arguments)  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results[word] = scaled_mm(*arguments)
            graph.replay()
    torch.cuda.synchronize()
    assert not measured.table_of(0).choices
    assert torch.equal(results["measure"], results["cuda"])
    assert measured.agree(results["triton"], results["cuda"])


@pytest.mark.parametrize("name", candidates.DEFAULT)
@pytest.mark.parametrize("sizes", [(2**31 // 7168 + 600, 256, 7168), (2**31 // 32768 + 600, 32768, 128)])
def test_more_elements_than_32_bits_count(name: str, sizes: tuple[int, int, int]) -> None:
    """Of an operand, and of the result: the last rows are those of a product of the last rows alone."""
    a, a_scale, *others = operands_of_codes(*sizes)
    last = (sizes[0] - 512) // 256 * 256
    out = candidates.call(name, "scaled_mm", (a, a_scale, *others))
    alone = row_scales(sizes[0] - last, sizes[2]).copy_(a_scale[last:])
    wanted = candidates.call(name, "scaled_mm", (a[last:].clone(), alone, *others))
    assert torch.equal(out[last:], wanted) and bool(wanted.any())


def operands_of_codes(m: int, n: int, k: int) -> tuple[Any, ...]:
    """As `operands`, without an FP32 copy of payloads of gigabytes."""
    a, b = (
        torch.randint(0, 0x78, (rows, k), device="cuda", dtype=torch.uint8).view(torch.float8_e4m3fn) for rows in (m, n)
    )
    b_scale = torch.rand(n // 128, k // 128, device="cuda")
    return a, row_scales(m, k), b, b_scale, ROW, BLOCK, 128, torch.bfloat16


def test_triton_serves_what_the_cuda_kernels_do_not() -> None:
    rows = "e4m3[row] fp32"
    arguments = (
        payload(200, 300),
        torch.rand(200, 1, device="cuda"),
        payload(130, 300),
        torch.rand(130, 1, device="cuda"),
    )
    with pytest.raises(Unsupported, match="no instance for groups row by row"):
        candidates.call("cuda", "scaled_mm", (*arguments, rows, rows, 128, torch.float32))
    out = scaled_mm(*arguments, rows, rows, 128, torch.float32)
    portable = candidates.call("portable", "scaled_mm", (*arguments, rows, rows, 128, torch.float32))
    assert measured.agree(out, portable)
