"""Numbers of rows that nobody knows before the step, on their way to Inductor."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from fp8c.backends.lowering import mark_row_counts


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
