"""The plain-tensor form inside a compiler: symbolic sizes, data-dependent sizes, and Inductor's code on the CPU.

That it equals the reference in eager mode is tested in tests/backends/reference/.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fp8c.backends.reference  # noqa: F401  registers the CPU kernels
from fp8c import ops
from fp8c.ops import decompositions

FORMATS = (
    "e4m3[1x128] fp32",
    "e4m3[1x128] pow2",
    "e4m3[128x1] fp32",
    "e4m3[128x128] pow2",
    "e4m3[tensor] fp32",
    "e5m2[row] pow2",
    "e5m6[1x128] pow2",
)
Pair = tuple[Tensor, Tensor]


def quantize_all(x: Tensor) -> list[Pair]:
    return [decompositions.quantize(x, fmt) for fmt in FORMATS]


def same_bits(a: Pair, b: Pair) -> bool:
    return all(
        x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b)
    )


def spread(rows: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, cols, generator=generator)
    return (x * torch.exp2(torch.randint(-9, 9, (rows, cols), generator=generator))).bfloat16()


def test_symbolic_trace_is_right_at_other_sizes() -> None:
    formats = ("e4m3[1x128] pow2", "e4m3[128x1] fp32", "e4m3[128x128] fp32")

    def quantize_some(x: Tensor) -> list[Pair]:
        return [decompositions.quantize(x, fmt) for fmt in formats]

    traced = make_fx(quantize_some, tracing_mode="symbolic")(spread(256, 384))
    for rows, cols in ((384, 256), (129, 200), (3, 640)):
        x = spread(rows, cols)
        for fmt, pair in zip(formats, traced(x)):
            assert same_bits(pair, ops.QUANTIZE(x, fmt)), (fmt, rows, cols)


def test_data_dependent_rows_raise_no_guard() -> None:
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        x = torch.empty(env.create_unbacked_symint(), 256, dtype=torch.bfloat16)
        for fmt in ("e4m3[1x128] fp32", "e4m3[row] pow2", "e5m6[1x128] pow2"):
            q, s = decompositions.quantize(x, fmt)
            assert decompositions.dequantize(q, s, fmt, torch.bfloat16, None, 256).shape[1] == 256
        offs = torch.empty(4, dtype=torch.int32)
        q, s = decompositions.quantize(x, "e4m3[128x1] pow2", offs)
        assert decompositions.dequantize(q, s, "e4m3[128x1] pow2", torch.float32).shape[1] == 256
    assert not env.guards


@pytest.mark.slow
@pytest.mark.parametrize("rows_are_dynamic", [False, True])
def test_inductor_on_the_cpu_keeps_every_bit(rows_are_dynamic: bool) -> None:
    """Token counts vary, feature counts do not."""
    torch._dynamo.reset()
    compiled = torch.compile(quantize_all, fullgraph=True, dynamic=False if not rows_are_dynamic else None)
    for rows in (129, 384, 256) if rows_are_dynamic else (129,):
        x = spread(rows, 200)
        if rows_are_dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        for fmt, pair in zip(FORMATS, compiled(x)):
            assert same_bits(pair, ops.QUANTIZE(x, fmt)), (fmt, rows)
