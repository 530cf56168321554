"""The scaled GEMMs against FP64 on the same operands, within the derived bound, for every layout the passes make."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fp8c.backends.reference  # noqa: F401  registers the CPU kernels
from fp8c.backends.reference import accumulator
from fp8c.backends.reference.check import GEMMS, check_gemm
from fp8c.backends.reference.gemm import Accumulator
from fp8c.diagnostics import DiagnosticError
from fp8c.ops import decompositions

ACCUMULATORS: tuple[Accumulator, ...] = ("fp32", "hopper")
ROW, COLUMN, BLOCK, TENSOR = (f"e4m3[{g}] fp32" for g in ("1x128", "128x1", "128x128", "tensor"))


def quantized(x: Tensor, fmt: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, s = torch.ops.fp8c.quantize(x, fmt, offs)
    return q, s


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    # Rows of very different magnitude, so that scales matter.
    return torch.randn(shape, generator=generator) * torch.exp2(torch.arange(shape[-2]) % 7)[:, None]


def run(op: str, args: tuple[Any, ...], name: Accumulator = "fp32") -> Tensor:
    """Run the operator and assert that it stays within its bound."""
    with accumulator(name):
        out = getattr(torch.ops.fp8c, op)(*args)
    check = check_gemm(op, args, out, name)
    assert check.is_within_bound, check
    assert check.nonfinite == 0
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ACCUMULATORS)
@pytest.mark.parametrize("m,n,k", [(1, 1, 1), (129, 127, 129), (64, 130, 384), (5, 3, 31), (0, 4, 128), (4, 0, 128)])
def test_scaled_mm_of_any_size(m: int, n: int, k: int, name: Accumulator, out_dtype: torch.dtype) -> None:
    args = (*quantized(normal(m, k), ROW), *quantized(normal(n, k), BLOCK), ROW, BLOCK, 128, out_dtype)
    out = run("scaled_mm", args, name)
    assert out.shape == (m, n) and out.dtype is out_dtype and out.is_contiguous()
    check = check_gemm("scaled_mm", args, decompositions.scaled_mm(*args))
    assert check.is_within_bound, check


def test_scaled_mm_without_a_reduction_axis_is_zero() -> None:
    args = (*quantized(torch.ones(3, 0), ROW), *quantized(torch.ones(2, 0), BLOCK), ROW, BLOCK, 128, torch.float32)
    for name in ACCUMULATORS:
        assert torch.equal(run("scaled_mm", args, name), torch.zeros(3, 2))


@pytest.mark.parametrize("name", ACCUMULATORS)
@pytest.mark.parametrize("a_group", ["1x128", "tensor", "row", "1x32"])
@pytest.mark.parametrize("b_group", ["128x128", "1x128", "row"])
def test_scaled_mm_of_any_groups(a_group: str, b_group: str, name: Accumulator) -> None:
    a_fmt, b_fmt = f"e4m3[{a_group}] pow2", f"e5m2[{b_group}] e8m0"
    args = (*quantized(normal(70, 300), a_fmt), *quantized(normal(40, 300), b_fmt), a_fmt, b_fmt, 128, torch.float32)
    run("scaled_mm", args, name)


def test_dgrad_reads_the_weight_transposed() -> None:
    """w is quantized once; dgrad passes views of its data and scales."""
    w, dy = normal(130, 200), normal(70, 130)
    (wq, ws), (dq, ds) = quantized(w, BLOCK), quantized(dy, ROW)
    args = (dq, ds, wq.t(), ws.t(), ROW, BLOCK, 128, torch.float32)
    for name in ACCUMULATORS:
        out = run("scaled_mm", args, name)
        contiguous = (dq, ds, wq.t().contiguous(), ws.t().contiguous(), *args[4:])
        assert torch.equal(run("scaled_mm", contiguous, name), out)


def test_wgrad_reads_both_operands_transposed() -> None:
    x, dy = normal(260, 72), normal(260, 130)
    (xq, xs), (dq, ds) = quantized(x, COLUMN), quantized(dy, COLUMN)
    args = (dq.t(), ds.t(), xq.t(), xs.t(), ROW, ROW, 128, torch.float32)
    for name in ACCUMULATORS:
        out = run("scaled_mm", args, name)
        # Each operand is off by at most half a unit in E4M3's last place, or half its smallest subnormal.
        dy_error, x_error = (
            torch.maximum(2.0**-4 * t.abs(), 2.0**-10 * s.repeat_interleave(128, dim=0)[:260])
            for t, s in ((dy, ds), (x, xs))
        )
        bound = dy_error.T @ x.abs() + dy.T.abs() @ x_error + dy_error.T @ x_error
        # The FP32 arithmetic of test and operator: 260 roundings each.
        bound += 2 * 264 * 2.0**-24 * (dy.T.abs() @ x.abs())
        assert ((out - dy.T @ x).abs() <= bound).all()


OFFSETS = {
    "ragged": [1, 130, 257, 299],
    "empty experts": [0, 0, 131, 290],
    "all empty": [0, 0, 0, 0],
    "full": [64, 128, 200, 300],
}


@pytest.mark.parametrize("ends", OFFSETS.values(), ids=list(OFFSETS))
@pytest.mark.parametrize("name", ACCUMULATORS)
def test_grouped_gemms_are_the_experts_one_by_one(ends: list[int], name: Accumulator) -> None:
    rows, n, k, experts = 300, 40, 136, len(ends)
    offs = torch.tensor(ends, dtype=torch.int32)
    x, w, dy = normal(rows, k), normal(experts, n, k), normal(rows, n)
    xq, xs = quantized(x, ROW)
    wq, ws = quantized(w, BLOCK)
    dq, ds = quantized(dy, ROW)
    x_column, dy_column = quantized(x, COLUMN, offs), quantized(dy, COLUMN, offs)

    fprop = (xq, xs, wq, ws, offs, ROW, BLOCK, 128, torch.float32)
    dgrad = (dq, ds, wq.permute(0, 2, 1), ws.permute(0, 2, 1), offs, ROW, BLOCK, 128, torch.float32)
    wgrad = (*(t.t() for t in dy_column), *(t.t() for t in x_column), offs, ROW, ROW, 128, torch.float32)
    y, dx = run("scaled_grouped_mm", fprop, name), run("scaled_grouped_mm", dgrad, name)
    dw = run("scaled_grouped_wgrad", wgrad, name)
    assert dw.shape == w.shape and y.shape == dy.shape and dx.shape == x.shape

    assert not y[ends[-1] :].any() and not dx[ends[-1] :].any()
    with accumulator(name):
        for expert, (start, end) in enumerate(zip([0, *ends], ends)):
            part = slice(start, end)
            one = (xq[part], xs[part], wq[expert], ws[expert], ROW, BLOCK, 128, torch.float32)
            assert torch.equal(y[part], torch.ops.fp8c.scaled_mm(*one))
            alone = [quantized(t[part], COLUMN) for t in (dy, x)]
            columns = (t.t() for pair in alone for t in pair)
            assert torch.equal(dw[expert], torch.ops.fp8c.scaled_mm(*columns, ROW, ROW, 128, torch.float32))
    gemms: list[tuple[str, tuple[Any, ...]]] = [
        ("scaled_grouped_mm", fprop),
        ("scaled_grouped_mm", dgrad),
        ("scaled_grouped_wgrad", wgrad),
    ]
    for op, args in gemms:
        check = check_gemm(op, args, getattr(decompositions, op)(*args))
        assert check.is_within_bound, (op, check)


def test_nan_of_one_expert_does_not_reach_the_others() -> None:
    offs = torch.tensor([130, 260], dtype=torch.int32)
    x, dy = normal(300, 128), normal(300, 64)
    x[140:260] = torch.nan
    x[260:] = torch.nan  # rows that no expert owns
    args = (*quantized(x, ROW), *quantized(normal(2, 64, 128), BLOCK), offs, ROW, BLOCK, 128, torch.bfloat16)
    x_column, dy_column = quantized(x, COLUMN, offs), quantized(dy, COLUMN, offs)
    wgrad = (*(t.t() for t in dy_column), *(t.t() for t in x_column), offs, ROW, ROW, 128, torch.float32)
    for name in ACCUMULATORS:
        with accumulator(name):
            y, dw = torch.ops.fp8c.scaled_grouped_mm(*args), torch.ops.fp8c.scaled_grouped_wgrad(*wgrad)
        assert y[:140].isfinite().all() and y[140:260].isnan().all() and not y[260:].any()
        assert dw[0].isfinite().all() and dw[1].isnan().all()
        assert check_gemm("scaled_grouped_mm", args, y, name).is_within_bound


def test_the_check_finds_wrong_results() -> None:
    args = (*quantized(normal(64, 256), ROW), *quantized(normal(64, 256), BLOCK), ROW, BLOCK, 128, torch.float32)
    out = run("scaled_mm", args)
    one_off = out.clone()
    magnitude = normal(64, 256)[3].abs() @ normal(64, 256)[5].abs()
    one_off[3, 5] += 1e-3 * magnitude
    assert not check_gemm("scaled_mm", args, one_off).is_within_bound
    lost = out.clone()
    lost[0, 0] = torch.nan
    assert not check_gemm("scaled_mm", args, lost).is_within_bound
    other_scales = (args[0], args[1] * 2, *args[2:])
    assert not check_gemm("scaled_mm", other_scales, out).is_within_bound
    # A finite number where an operand is NaN is wrong as well.
    poisoned = (args[0], args[1].index_fill(0, torch.tensor([7]), torch.nan), *args[2:])
    assert check_gemm("scaled_mm", poisoned, out).worst_ratio == torch.inf


def test_bf16_output_is_one_rounding_of_the_fp32_output() -> None:
    operands = (*quantized(normal(64, 256), ROW), *quantized(normal(64, 256), BLOCK), ROW, BLOCK, 128)
    for name in ACCUMULATORS:
        with accumulator(name):
            wide = torch.ops.fp8c.scaled_mm(*operands, torch.float32)
            assert torch.equal(torch.ops.fp8c.scaled_mm(*operands, torch.bfloat16), wide.bfloat16())


def test_the_accumulator_holds_in_backward() -> None:
    """Autograd runs CPU backward passes in the thread that asked, so the choice reaches the GEMMs there."""
    args = (*quantized(normal(8, 512), ROW), *quantized(normal(8, 512), BLOCK), ROW, BLOCK, 128, torch.float32)
    results = {}

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            product: Tensor = torch.ops.fp8c.scaled_mm(*args)
            return product

    for name in ACCUMULATORS:
        x = torch.zeros(8, 8, requires_grad=True)
        with accumulator(name):
            Product.apply(x).sum().backward()  # type: ignore[no-untyped-call]
            assert x.grad is not None
            results[name] = x.grad
            assert torch.equal(x.grad, torch.ops.fp8c.scaled_mm(*args))
    assert not torch.equal(results["fp32"], results["hopper"])


def test_misuse_is_refused() -> None:
    (q, s), (wq, ws) = quantized(normal(4, 128), ROW), quantized(normal(2, 8, 128), BLOCK)
    offs = torch.tensor([2, 4], dtype=torch.int32)
    ops = torch.ops.fp8c
    with pytest.raises(DiagnosticError, match="E0520.*last axes differ"):
        ops.scaled_mm(q, s, wq[0][:, :64], ws[0], ROW, BLOCK, 128, torch.float32)
    with pytest.raises(DiagnosticError, match="E0520.*expected FP8 operands"):
        ops.scaled_mm(q.float(), s, wq[0], ws[0], ROW, BLOCK, 128, torch.float32)
    with pytest.raises(DiagnosticError, match="E0520.*one row high"):
        ops.scaled_grouped_mm(q, s, wq, ws, offs, BLOCK, BLOCK, 128, torch.float32)
    with pytest.raises(DiagnosticError, match="E0520.*2 entries for 1 experts"):
        ops.scaled_grouped_mm(q, s, wq[:1], ws[:1], offs, ROW, BLOCK, 128, torch.float32)
    with pytest.raises(DiagnosticError, match="E0520.*must run along T"):
        ops.scaled_grouped_wgrad(q, s, q, s, offs, COLUMN, COLUMN, 128, torch.float32)
    with pytest.raises(DiagnosticError, match="E0520.*expected scales"):
        ops.scaled_grouped_wgrad(q, s, q, s, offs, ROW, ROW, 128, torch.float32)
    with pytest.raises(ValueError, match="unknown accumulator"), accumulator("fp16"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="not a scaled GEMM"):
        check_gemm("mm", (), torch.ones(1))
    assert set(GEMMS) <= set(dir(torch.ops.fp8c))
