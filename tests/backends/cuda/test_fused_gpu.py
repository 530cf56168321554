"""Hopper's fused kernels on a GPU: bit for bit what Triton's compute, which are compared with the oracle."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="no GPU of compute capability 9.0")]

if IS_HOPPER:
    import fp8c.backends.reference
    import fp8c.ops.combine
    import fp8c.ops.decompositions
    import fp8c.ops.fused  # noqa: F401
    from fp8c.backends.cuda import build, operators
    from fp8c.backends.triton import norm, quantize, swiglu

ROOT = Path(__file__).parents[3]
FORMATS = (  # of the cached inputs, h, the gradient along rows, along columns
    ("e4m3[1x128] fp32", "e4m3[128x1] fp32", "e4m3[1x128] fp32", "e4m3[128x1] fp32"),
    ("e4m3[1x128] pow2", "e4m3[128x1] pow2", "e4m3[1x128] fp32", "e4m3[128x1] pow2"),
    ("e4m3[1x128] e8m0", "e4m3[128x1] e8m0", "e5m2[1x128] e8m0", "e5m2[128x1] e8m0"),
)
SPLITS: tuple[list[int] | None, ...] = (
    None,  # no experts
    [1000],
    [0, 0, 300, 300, 1000],  # experts without rows
    [130, 131, 700],  # rows of no expert
    [],
    [*range(25, 1001, 25)],
)


def drawn(rows: int, cols: int, seed: int) -> Tensor:
    """Rows of very different magnitude, zeros of both signs, subnormals, an infinity and a NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    x *= torch.exp2(torch.randint(-20, 20, (rows, 1), generator=generator))
    x[torch.rand(rows, cols, generator=generator) < 0.05] = 0.0
    x[torch.rand(rows, cols, generator=generator) < 0.05] *= -0.0
    x[1], x[2], x[7] = 0.0, x[2] * 1e-38, -0.0
    x[3] *= 1e-30
    x[4, cols // 2], x[5, cols // 3] = torch.inf, torch.nan
    x[6] *= 1e32
    return x.bfloat16().cuda()


def same(found: Tensor, expected: Tensor, label: object) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, label
    assert found.stride() == expected.stride(), label
    left, right = (t.view({1: torch.uint8, 4: torch.int32}[t.element_size()]) for t in (found, expected))
    assert torch.equal(left, right), (label, int((left != right).sum()))


def ends_of(split: list[int] | None) -> Tensor | None:
    """Of 40 experts, more than a warp has lanes; [] stands for experts that have no row at all."""
    if split is None:
        return None
    ends = split + [split[-1] if split else 0] * (40 - len(split))
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("fmt", ("e5m6[1x128] pow2", "e5m6[1x128] e8m0"))
def test_quantize_packed(fmt: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.abs() <= 65024]
    whole = torch.full((-(-len(every) // 127), 128), 65024.0, dtype=torch.bfloat16)  # so that scales are 1
    whole[:, 1:] = torch.nn.functional.pad(every, (0, len(whole) * 127 - len(every))).view(-1, 127)
    inputs = [drawn(rows, cols, rows) for rows, cols in ((1000, 256), (301, 384), (9, 128), (2048, 7168))]
    for x in (*inputs, inputs[0][:1], inputs[1][:, 128:], whole.cuda()):
        found, expected = (f(x, fmt) for f in (operators.KERNELS["quantize"], quantize.quantize))
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            same(a, b, (list(x.shape), i))


@pytest.mark.parametrize("cache", ("e4m3[1x128] fp32", "e4m3[1x128] pow2", "e5m2[1x128] e8m0"))
@pytest.mark.parametrize("is_weighted", (True, False))
def test_swiglu_cached(cache: str, is_weighted: bool) -> None:
    for (rows, features), element in itertools.product(
        ((1000, 256), (301, 384), (2, 128), (2048, 2048)), ("e4m3", "e5m2")
    ):
        x = drawn(max(rows, 8), 2 * features, rows)[:rows]
        weight = torch.randn(rows, device="cuda") if is_weighted else None
        arguments: Any = (x, weight, f"{element}[1x128] fp32", cache)
        found = operators.KERNELS["swiglu_quantize_cached"](*arguments)
        for i, (a, b) in enumerate(zip(found, swiglu.swiglu_quantize_cached(*arguments), strict=True)):
            same(a, b, (rows, features, element, i))


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("is_weighted", (True, False))
def test_swiglu_backward(formats: tuple[str, ...], is_weighted: bool) -> None:
    cache = formats[0]
    for (rows, features), split in itertools.product(((1000, 256), (1000, 2048)), SPLITS):
        dh, pair = drawn(rows, features, 1), quantize.quantize(drawn(rows, 2 * features, 2), cache)
        weight = torch.randn(rows, device="cuda") if is_weighted else None
        arguments: Any = (dh, *pair, weight, ends_of(split), *formats)
        found = operators.KERNELS["swiglu_backward_quantize"](*arguments)
        expected = swiglu.swiglu_backward_quantize(*arguments)
        covered = 1000 if split is None else (split or [0])[-1]
        for i, (a, b) in enumerate(zip(found[:6], expected[:6], strict=True)):
            same(a, b, (rows, features, split, i, covered))
        if not is_weighted:
            continue
        # The same terms, F of them, added in another order: each side is off by at most F * 2^-24 of the sum of magnitudes.
        a, b = found[6], expected[6]
        assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
        gate, up = torch.ops.fp8c.dequantize(*pair, cache, torch.bfloat16).chunk(2, -1)
        product = (gate.float() * gate.float().sigmoid()).bfloat16() * up  # but for a last bit, hence the 1.01
        magnitudes = (dh.double() * product.double()).abs().sum(1, keepdim=True)
        bound = 2 * 1.01 * features * 2.0**-24 * magnitudes
        ordinary = a.isfinite() & b.isfinite() & bound.isfinite()
        assert ordinary.sum() >= covered * 0.9 and ((a.double() - b.double()).abs() <= bound)[ordinary].all()


def test_swiglu_backward_is_the_same_every_time() -> None:
    formats, rows, features = FORMATS[0], 8192, 2048
    dh, pair = drawn(rows, features, 1), quantize.quantize(drawn(rows, 2 * features, 2), formats[0])
    weight, ends = torch.randn(rows, device="cuda"), ends_of([100, 3000, 8000])
    arguments: Any = (dh, *pair, weight, ends, *formats)
    first = operators.KERNELS["swiglu_backward_quantize"](*arguments)
    for _ in range(20):
        for i, (a, b) in enumerate(zip(operators.KERNELS["swiglu_backward_quantize"](*arguments), first, strict=True)):
            same(a, b, i)


@pytest.mark.parametrize("fmt", ("e4m3[1x128] fp32", "e4m3[1x128] pow2", "e5m2[1x128] e8m0"))
def test_rms_norm(fmt: str) -> None:
    for rows, cols in ((1000, 7168), (9, 128), (300, 1536), (64, 8192), (33, 16384), (50, 640)):
        x, weight = drawn(max(rows, 9), cols + 64, cols)[:rows, :cols], torch.randn(cols).bfloat16().cuda()
        q, s, factor = operators.KERNELS["rms_norm_quantize"](x, weight, 1e-6, fmt)
        expected = norm.rms_norm_quantize(x, weight, 1e-6, fmt)[2]
        assert torch.equal(factor.isnan(), expected.isnan())
        finite = ~expected.isnan()
        assert ((factor - expected).abs()[finite] <= (2.0**-20 * expected)[finite]).all()
        # What comes after the factor is exact.
        y = weight * (x.float() * factor).to(x.dtype)
        for i, (a, b) in enumerate(zip((q, s), quantize.quantize(y, fmt), strict=True)):
            same(a, b, (rows, cols, i))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizers_are_content_with_fused_kernels(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    program = [sys.executable, "-m", "tests.backends.cuda.fused_cases"]
    command = [sanitizer, "--tool", tool, "--kernel-name", "kernel_substring=fp8c_", "--error-exitcode", "9", *program]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_registered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.ops.fp8c` calls them where they serve, and Triton's where they don't."""
    import fp8c.backends.triton  # noqa: F401

    launched: list[str] = []

    def cubin(config: build.Instance) -> bytes:
        launched.append(config.kernel)
        return build.cubin(config)

    monkeypatch.setattr("fp8c.backends.cuda.launch.cubin", cubin)
    fmt = "e5m2[1x128] pow2"
    torch.ops.fp8c.rms_norm_quantize(
        drawn(130, 192, 3), torch.ones(192).bfloat16().cuda(), 1e-6, fmt
    )  # no whole groups
    assert not launched
    torch.ops.fp8c.rms_norm_quantize(drawn(130, 2688, 3), torch.ones(2688).bfloat16().cuda(), 1e-6, fmt)
    assert launched == ["fp8c_rms_norm"]
