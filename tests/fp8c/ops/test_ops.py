"""Schemas and fakes: what torch.library promises about the operators, for real, symbolic and data-dependent sizes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

import fp8c.backends.reference  # noqa: F401  registers the CPU kernels
from fp8c import ops
from fp8c.diagnostics import DiagnosticError
from fp8c.formats import Format
from fp8c.ops import decompositions

ROW, COLUMN, BLOCK = "e4m3[1x128] pow2", "e4m3[128x1] pow2", "e4m3[128x128] fp32"
CACHE = "e5m6[1x128] e8m0"
Args = tuple[Any, ...]


def gemm_operands() -> tuple[Tensor, ...]:
    x, w = torch.randn(200, 130), torch.randn(2, 60, 130)
    offs = torch.tensor([70, 190], dtype=torch.int32)
    column, dy_column = ops.QUANTIZE(x, COLUMN, offs), ops.QUANTIZE(torch.randn(200, 60), COLUMN, offs)
    return (*ops.QUANTIZE(x, ROW), *ops.QUANTIZE(w, BLOCK), *dy_column, *column, offs)


def mutating_cases() -> dict[str, tuple[Any, Any, Args]]:
    """Name -> the operator, the one whose FP32 product it adds to its first argument, and that one's arguments."""
    *_, dyc, dyc_scale, xc, xc_scale, offs = gemm_operands()
    dense = (dyc.t(), dyc_scale.t(), xc.t(), xc_scale.t(), ROW, ROW, 128)
    grouped = (dyc.t(), dyc_scale.t(), xc.t(), xc_scale.t(), offs, ROW, ROW, 128)
    return {
        "scaled_mm_add_": (ops.SCALED_MM_ADD_, ops.SCALED_MM, dense),
        "scaled_grouped_wgrad_add_": (ops.SCALED_GROUPED_WGRAD_ADD_, ops.SCALED_GROUPED_WGRAD, grouped),
    }


@pytest.mark.parametrize("name", list(mutating_cases()))
def test_add_forms_add_the_product_and_change_nothing_else(name: str) -> None:
    op, product_op, args = mutating_cases()[name]
    product = product_op(*args, torch.float32)
    before = torch.randn_like(product)
    acc, operands = before.clone(), [a for a in args if isinstance(a, Tensor)]
    bits = [storage_bytes(t) for t in operands]
    assert op(acc, *args) is None
    assert torch.equal(acc, before + product)
    assert [storage_bytes(t) for t in operands] == bits
    portable = before.clone()
    getattr(decompositions, name)(portable, *args)
    torch.testing.assert_close(portable, acc)
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (before.clone(), *args), test_utils=utils)


@pytest.mark.parametrize("name", list(mutating_cases()))
def test_add_forms_refuse_another_accumulator(name: str) -> None:
    op, product_op, args = mutating_cases()[name]
    product = product_op(*args, torch.float32)
    for acc in (product.bfloat16(), product[..., None], product[..., :1]):
        with pytest.raises(DiagnosticError, match="E0520"):
            op(acc, *args)


def attention_operands() -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 9, 24), torch.randn(2, 2, 7, 24), torch.randn(2, 2, 7, 16)


def cases() -> dict[str, tuple[Any, Args]]:
    x = torch.randn(200, 130)
    offs = torch.tensor([70, 190], dtype=torch.int32)
    xq, xs, wq, ws, dyc, dyc_scale, xc, xc_scale, _ = gemm_operands()
    cached = ops.QUANTIZE(x, CACHE)
    q, k, v = attention_operands()
    out, lse = ops.ATTENTION(q, k, v, None, True, None, True)
    mask = torch.randn(1, 1, 9, 7)
    return {
        "quantize": (ops.QUANTIZE, (x, ROW)),
        "quantize with experts": (ops.QUANTIZE, (x, COLUMN, offs)),
        "quantize to the cache format": (ops.QUANTIZE, (x.bfloat16(), CACHE)),
        "quantize stacked weights": (ops.QUANTIZE, (torch.randn(2, 60, 130), BLOCK)),
        "quantize a transposed view": (ops.QUANTIZE, (x.t(), "e4m3[tensor] fp32")),
        "dequantize": (ops.DEQUANTIZE, (xq, xs, ROW, torch.bfloat16)),
        "dequantize the cache format": (ops.DEQUANTIZE, (*cached, CACHE, torch.float32, None, 130)),
        "dequantize with experts": (ops.DEQUANTIZE, (xc, xc_scale, COLUMN, torch.float32)),
        "requantize": (ops.REQUANTIZE, (xq, xs, ROW, COLUMN)),
        "requantize the cache format with experts": (ops.REQUANTIZE, (*cached, CACHE, COLUMN, offs, 130)),
        "scaled_mm": (ops.SCALED_MM, (xq, xs, wq[0], ws[0], ROW, BLOCK, 128, torch.bfloat16)),
        "scaled_mm of views": (
            ops.SCALED_MM,
            (dyc.t(), dyc_scale.t(), xc.t(), xc_scale.t(), ROW, ROW, 128, torch.float32),
        ),
        "scaled_grouped_mm": (ops.SCALED_GROUPED_MM, (xq, xs, wq, ws, offs, ROW, BLOCK, 128, torch.bfloat16)),
        "scaled_grouped_wgrad": (
            ops.SCALED_GROUPED_WGRAD,
            (dyc.t(), dyc_scale.t(), xc.t(), xc_scale.t(), offs, ROW, ROW, 128, torch.float32),
        ),
        "attention": (ops.ATTENTION, (q, k, v, None, True, None, True)),
        "attention with a mask": (ops.ATTENTION, (q, k, v, mask, False, 0.3, True)),
        "attention that trains": (
            ops.ATTENTION,
            (*(t.clone().requires_grad_() for t in (q, k, v)), mask > 0, False, None, True),
        ),
        "attention_backward": (
            ops.ATTENTION_BACKWARD,
            (torch.randn_like(out), q, k, v, out, lse, None, True, None, True),
        ),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_opcheck(name: str) -> None:
    """Autograd registration, fake against real, AOT dispatch with static and dynamic shapes."""
    op, args = cases()[name]
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, args, test_utils=utils)


def storage_bytes(t: Tensor) -> bytes:
    return bytes(t.detach().untyped_storage())


@pytest.mark.parametrize("name", list(cases()))
def test_schema_tells_the_truth(name: str) -> None:
    """No operand is changed and no result shares memory with one. (opcheck's own test compares, which FP8 cannot.)"""
    op, args = cases()[name]
    operands = [a for a in args if isinstance(a, Tensor)]
    before = [storage_bytes(t) for t in operands]
    results = op(*args)
    assert [storage_bytes(t) for t in operands] == before
    held = {t.untyped_storage().data_ptr() for t in operands}
    outs = [results] if isinstance(results, Tensor) else list(results)
    pointers = [t.untyped_storage().data_ptr() for t in outs]
    assert not held & set(pointers) and len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("name", list(cases()))
def test_fake_has_the_strides_of_the_kernel(name: str) -> None:
    op, args = cases()[name]
    real = op(*args)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    pairs = zip(*((r,) if isinstance(r, Tensor) else r for r in (real, fake)))
    for expected, found in pairs:
        assert found.shape == expected.shape and found.stride() == expected.stride() and found.dtype == expected.dtype


def unbacked(mode: FakeTensorMode) -> Any:
    assert mode.shape_env is not None
    return mode.shape_env.create_unbacked_symint()


def test_data_dependent_token_counts_raise_no_guard() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        tokens = unbacked(mode)
        x, dy = torch.empty(tokens, 256, dtype=torch.bfloat16), torch.empty(tokens, 96, dtype=torch.bfloat16)
        offs = torch.empty(8, dtype=torch.int32)
        w = ops.QUANTIZE(torch.empty(8, 96, 256), BLOCK)
        row = ops.QUANTIZE(x, ROW)
        y = ops.SCALED_GROUPED_MM(*row, *w, offs, ROW, BLOCK, 128, torch.bfloat16)
        assert free_unbacked_symbols(y) and y.shape[1] == 96
        cached = ops.QUANTIZE(x, CACHE)
        column = ops.REQUANTIZE(*cached, CACHE, COLUMN, offs, 256)
        dy_column = ops.QUANTIZE(dy, COLUMN, offs)
        assert str(column[1].shape[0]) == str(tokens // 128 + 8)
        views = (t.t() for pair in (dy_column, column) for t in pair)
        assert ops.SCALED_GROUPED_WGRAD(*views, offs, ROW, ROW, 128, torch.float32).shape == (8, 96, 256)
        back = ops.DEQUANTIZE(*cached, CACHE, torch.bfloat16, None, 256)
        assert back.shape[0] == tokens and back.shape[1] == 256
        assert ops.SCALED_MM(*row, w[0][0], w[1][0], ROW, BLOCK, 128, torch.float32).shape[1] == 96
    assert mode.shape_env is not None and not mode.shape_env.guards


def test_attention_is_two_opaque_operators_in_a_traced_step() -> None:
    """With 192/128-wide heads on meta, where PyTorch's own attention falls apart into products."""
    q = torch.empty(1, 4, 8, 192, device="meta", requires_grad=True)
    k = torch.empty(1, 2, 8, 192, device="meta", requires_grad=True)
    v = torch.empty(1, 2, 8, 128, device="meta", requires_grad=True)
    seen: list[list[str]] = []

    def record(gm: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        seen.append([str(n.target) for n in gm.graph.nodes if n.op == "call_function" and "fp8c" in str(n.target)])
        return gm

    from functorch.compile import aot_function, make_boxed_func  # type: ignore[import-untyped]

    step = aot_function(
        lambda *t: ops.ATTENTION(*t, None, True, None, True)[0], fw_compiler=lambda g, i: make_boxed_func(record(g, i))
    )
    step(q, k, v).sum().backward()
    assert seen == [["fp8c.attention.default"], ["fp8c.attention_backward.default"]]
    assert q.grad is not None and q.grad.shape == q.shape


def test_a_mask_that_wants_a_gradient_is_refused() -> None:
    q, k, v = attention_operands()
    mask = torch.zeros(9, 7, requires_grad=True)
    with pytest.raises(DiagnosticError, match="E0522"):
        ops.ATTENTION(q, k, v, mask, False, None, True)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda q, k, v: (q[0], k, v, None, False), "4-D tensor"),
        (lambda q, k, v: (q, k.bfloat16(), v, None, False), "expected one dtype"),
        (lambda q, k, v: (q, k, v, torch.ones(9, 7), True), "exclude each other"),
        (lambda q, k, v: (q, k, v, torch.ones(9, 7, dtype=torch.int32), False), "bool or floating mask"),
    ],
)
def test_attention_operands_that_do_not_fit_are_refused(change: Callable[..., Args], message: str) -> None:
    with pytest.raises(DiagnosticError, match=f"E0520.*{message}"):
        ops.ATTENTION(*change(*attention_operands()), None, True)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v = attention_operands()
    with pytest.raises(DiagnosticError, match="E0520.*4 query heads do not share 2 key"):
        ops.ATTENTION(q, k, v, None, False, None, False)


def test_cache_format_needs_its_column_count() -> None:
    q, s = ops.QUANTIZE(torch.ones(2, 8), CACHE)
    with pytest.raises(DiagnosticError, match="E0520.*how many columns"):
        ops.DEQUANTIZE(q, s, CACHE, torch.float32)


def test_scale_rows_of_experts_are_bounded_and_distinct() -> None:
    """The claim of `scale_shape`, for every split of 40 rows among 3 experts with groups of 4 rows."""
    rows, experts, height = 40, 3, 4
    bound = ops.scale_shape((rows, 8), Format.parse("e4m3[4x1] fp32"), experts)[0]
    for first in range(rows + 1):
        for second in range(first, rows + 1):
            owner: dict[int, tuple[int, int]] = {}
            for e, (start, end) in enumerate(zip((0, first, second), (first, second, rows))):
                for t in range(start, end):
                    scale_row = start // height + e + (t - start) // height
                    assert scale_row < bound
                    assert owner.setdefault(scale_row, (e, (t - start) // height)) == (e, (t - start) // height)


def test_an_operator_without_a_kernel_says_what_to_import() -> None:
    script = """if True:
        import importlib.util, re
        import torch
        from fp8c import ops
        from fp8c.diagnostics import DiagnosticError
        try:
            ops.QUANTIZE(torch.ones(2, 2), "e4m3[1x128] fp32")
        except DiagnosticError as error:
            assert "error[E0420]: no kernel is registered for fp8c::quantize on device 'cpu'" in str(error)
            named = re.findall(r"fp8c(?:[.][a-z_]+)+", error.diagnostics[0].help)
            assert len(named) == 2 and all(importlib.util.find_spec(name) for name in named), named
        else:
            raise AssertionError("no error")
        import fp8c.ops.decompositions
        q, _ = ops.QUANTIZE(torch.ones(2, 2), "e4m3[1x128] fp32")
        assert (q.float() == 448).all()
    """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3], timeout=120)
