"""The Triton GEMMs against FP64 with a derived bound: in the interpreter (`python triton_gemm_cases.py`) or on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreter  # type: ignore[import-not-found]  # noqa: F401  (first: it sets the environment)

import torch
from torch import Tensor

import fp8c.backends.reference  # noqa: F401  (quantizes the operands)
from fp8c.backends.reference.check import check_gemm
from fp8c.backends.triton import gemm as kernels
from fp8c.formats import Format

Case = Callable[[str], None]
quantize = torch.ops.fp8c.quantize
gemm: Any = kernels  # called with operands in tuples, as the operators are

ROW, BLOCK, TENSOR = "e4m3[1x128] fp32", "e4m3[128x128] fp32", "e4m3[tensor] fp32"
WHOLE_ROW, E5M2_ROW, POW2, MX = "e4m3[row] fp32", "e5m2[1x128] pow2", "e4m3[1x128] e8m0", "e4m3[1x32] e8m0"
MIXED = ((TENSOR, WHOLE_ROW), (ROW, TENSOR), (BLOCK, ROW), (BLOCK, BLOCK), (POW2, BLOCK), (E5M2_ROW, BLOCK), (MX, MX))
SPLITS = ([0, 40, 41, 131], [17], [0, 0, 129, 129], [131, 131], [5, 70])


def filled(*shape: int, seed: int = 0) -> Tensor:
    """Rows of different magnitude, some of them zero."""
    generator = torch.Generator().manual_seed(seed * 1009 + sum(shape))
    x = torch.randn(*shape, generator=generator) * torch.exp2(
        torch.randint(-6, 6, (*shape[:-1], 1), generator=generator)
    )
    x[..., ::7, :] *= 0.0 if shape[-2] > 7 else 1.0
    return x


def on(device: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies on a device with their strides."""
    return tuple(
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t) if device != "cpu" else t
        for t in tensors
    )


def accept(op: str, arguments: tuple[object, ...], out: Tensor, device: str) -> None:
    """On a GPU the tensor core's accumulator cuts partial sums off; `check_gemm` knows what that explains."""
    result = check_gemm(op, arguments, out, "fp32" if device == "cpu" else "hopper")
    assert result.is_within_bound, result


def dense(m: int, n: int, k: int, a_fmt: str, b_fmt: str, dtype: torch.dtype, promote: int = 128) -> Case:
    def case(device: str) -> None:
        tensors = on(device, *quantize(filled(m, k), a_fmt), *quantize(filled(n, k, seed=1), b_fmt))
        out = gemm.scaled_mm(*tensors, a_fmt, b_fmt, promote, dtype)
        assert out.shape == (m, n) and out.dtype is dtype
        accept("scaled_mm", (*tensors, a_fmt, b_fmt, promote, dtype), out, device)

    return case


def transposed_operands(device: str) -> None:
    """The reduction is the outer axis of both operands, as in views of data that lies the other way round."""
    a, b = quantize(filled(70, 200), ROW), quantize(filled(90, 200, seed=1), BLOCK)
    wanted = gemm.scaled_mm(*on(device, *a, *b), ROW, BLOCK, 128, torch.float32)
    views = (t.to(device).t().contiguous().t() for t in (*a, *b))
    assert torch.equal(gemm.scaled_mm(*views, ROW, BLOCK, 128, torch.float32), wanted)


def rows(splits: list[int], b_fmt: str, a_fmt: str = ROW, n: int = 40, k: int = 200, tokens: int = 131) -> Case:
    def case(device: str) -> None:
        offs = torch.tensor(splits, dtype=torch.int32)
        tensors = on(
            device, *quantize(filled(tokens, k), a_fmt), *quantize(filled(len(splits), n, k, seed=2), b_fmt), offs
        )
        arguments = (*tensors, a_fmt, b_fmt, 128, torch.bfloat16)
        out = gemm.scaled_grouped_mm(*arguments)
        accept("scaled_grouped_mm", arguments, out, device)
        assert not out[splits[-1] :].any()

    return case


def reduction(splits: list[int], fmt: str, n: int = 66, k: int = 40, tokens: int = 131) -> Case:
    def case(device: str) -> None:
        offs = torch.tensor(splits, dtype=torch.int32)
        columns = Format.parse(fmt).transposed.text
        left, right = quantize(filled(tokens, n), columns, offs), quantize(filled(tokens, k, seed=3), columns, offs)
        operands = tuple(t.t() for t in (*on(device, *left), *on(device, *right)))
        arguments = (*operands, offs.to(device), fmt, fmt, 128)
        out = gemm.scaled_grouped_wgrad(*arguments, torch.float32)
        accept("scaled_grouped_wgrad", (*arguments, torch.float32), out, device)
        before = filled(*out.shape, seed=4).to(device)
        total = before.clone()
        gemm.scaled_grouped_wgrad_add_(total, *arguments)
        assert torch.equal(total, before + out)

    return case


def added(device: str) -> None:
    tensors = on(device, *quantize(filled(70, 200), ROW), *quantize(filled(90, 200, seed=1), ROW))
    product = gemm.scaled_mm(*tensors, ROW, ROW, 128, torch.float32)
    wide = torch.randn(70, 96, device=device)
    total = wide.clone()
    gemm.scaled_mm_add_(total[:, :90], *tensors, ROW, ROW, 128)
    assert torch.equal(total[:, :90], wide[:, :90] + product) and torch.equal(total[:, 90:], wide[:, 90:])


def not_a_number(device: str) -> None:
    """A NaN reaches its row of the result and no other."""
    x = filled(40, 256)
    x[3, 200] = torch.nan
    x[9, 0] = torch.inf
    tensors = on(device, *quantize(x, ROW), *quantize(filled(50, 256, seed=1), BLOCK))
    out = gemm.scaled_mm(*tensors, ROW, BLOCK, 128, torch.bfloat16)
    expected = torch.zeros(40, dtype=torch.bool, device=device)
    expected[[3, 9]] = True
    assert torch.equal(out.isnan().all(1), expected) and torch.equal(out.isnan().any(1), expected)


def nothing(device: str) -> None:
    """No rows, no columns, no reduction."""
    for m, n, k in ((0, 8, 128), (8, 0, 128), (8, 8, 0)):
        tensors = on(device, *quantize(filled(m, k), ROW), *quantize(filled(n, k), BLOCK))
        out = gemm.scaled_mm(*tensors, ROW, BLOCK, 128, torch.float32)
        assert out.shape == (m, n) and not out.any()


def cases() -> Iterator[tuple[str, Case]]:
    for m, n, k in ((1, 1, 1), (64, 128, 128), (200, 130, 257)):
        for b_fmt in (BLOCK, ROW):
            yield f"{m}x{n}x{k} {b_fmt}", dense(m, n, k, ROW, b_fmt, torch.bfloat16)
    for a_fmt, b_fmt in (*MIXED, (TENSOR, TENSOR), (WHOLE_ROW, WHOLE_ROW)):
        yield f"{a_fmt} by {b_fmt}", dense(66, 140, 300, a_fmt, b_fmt, torch.float32)
    yield "no promotion asked", dense(70, 140, 300, TENSOR, TENSOR, torch.float32, 0)
    yield "promotion every 64", dense(70, 140, 300, ROW, BLOCK, torch.float32, 64)
    yield "reduction outside", transposed_operands
    for splits in SPLITS:
        yield f"rows of experts {splits}", rows(splits, BLOCK)
    yield "rows of experts, few", rows([1, 2, 2, 3], BLOCK, tokens=3)
    yield "rows of experts, 1x128 weights", rows(SPLITS[0], ROW)
    yield "rows of experts, a scale a row", rows(SPLITS[0], WHOLE_ROW, WHOLE_ROW)
    yield "rows of experts, mx", rows(SPLITS[4], MX, MX)
    for splits in (SPLITS[0], SPLITS[2], SPLITS[4]):
        yield f"tokens of experts {splits}", reduction(splits, ROW)
    yield "tokens of experts, mx", reduction(SPLITS[0], MX)
    yield "added", added
    yield "NaN", not_a_number
    yield "nothing", nothing


def main() -> int:
    failed = 0
    for name, case in cases():
        try:
            case("cpu")
        except Exception as error:  # noqa: BLE001 - every case is tried
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
    print(f"{failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
