"""Numbers of rows that change from step to step, or that nobody knows before the step, on their way to Inductor."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)

from fp8c import ops
from fp8c.backends import lowering
from fp8c.backends.lowering_sizes import mark_row_counts
from fp8c.graph import aten


def test_strides_of_scales_can_be_sorted_whatever_the_rows() -> None:
    """torch 2.11 asks whether 4 * ((rows + 3) // 4) is below 1 to sort the strides of a GEMM's operand."""
    environment = ShapeEnv()
    rows = environment.create_unbacked_symint()
    torch._check(rows >= 0)
    with FakeTensorMode(shape_env=environment):
        scale = torch.empty_strided((rows, 2), (1, (rows + 3) // 4 * 4), dtype=torch.float32)
    graph = fx.Graph()
    graph.placeholder("scale").meta["val"] = scale
    stride = scale.stride(1).node.expr  # type: ignore[attr-defined]
    with pytest.raises(GuardOnDataDependentSymNode):
        environment.evaluate_expr(stride < 2, size_oblivious=True)
    mark_row_counts(graph)
    assert not environment.evaluate_expr(stride < 1, size_oblivious=True)


def test_numbers_that_may_be_negative_stay_as_they_are() -> None:
    environment = ShapeEnv()
    offset = environment.create_unbacked_symint()
    graph = fx.Graph()
    graph.placeholder("offset").meta["val"] = offset
    mark_row_counts(graph)
    assert not environment.size_like


def test_rows_need_not_be_a_multiple_of_anything() -> None:
    """A graph made for 192 rows held for multiples of 16 above 128: whether padded operands are contiguous was asked,
    of what an operator gives and of what crosses from forward to backward."""
    environment = ShapeEnv()
    lowering.register_kernels("cpu")
    rows: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC]
    )
    mode = FakeTensorMode(shape_env=environment)
    x = mode.from_tensor(torch.empty(192, 256), source=ConstantSource("x"), symbolic_context=rows)
    with mode, environment.suppress_guards():
        saved, saved_scale = ops.QUANTIZE(x, "e4m3[128x1] fp32")
        graph = fx.Graph()
        values = [x, saved.T, saved_scale.T]
        given = [graph.placeholder(name) for name in ("x", "saved", "saved_scale")]
        for node, value in zip(given, values):
            node.meta["val"] = value
        pair = graph.call_function(ops.QUANTIZE, (given[0], "e4m3[128x1] fp32"))
        data, scale = (
            graph.call_function(aten.permute.default, (graph.call_function(operator.getitem, (pair, part)), [1, 0]))
            for part in range(2)
        )
        formats = ("e4m3[1x128] fp32", "e4m3[1x128] fp32", 128, torch.bfloat16)
        graph.output((graph.call_function(ops.SCALED_MM, (data, scale, *given[1:], *formats)), data, scale))
    with tracing(TracingContext(mode)):
        lowering.lower_inductor(fx.GraphModule({}, graph), values, is_inference=False)
    assert not environment.guards
