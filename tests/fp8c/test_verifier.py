"""Every invariant catches a graph broken by hand, and says where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fp8c import graph as g
from fp8c import pipeline, verifier
from fp8c.diagnostics import Diagnostic, DiagnosticError
from fp8c.tools import opt
from tests.passes import steps

ops = torch.ops.fp8c
aten = torch.ops.aten


@pytest.fixture
def rewritten() -> opt.OptResult:
    """A step up to choose-saved: free to be broken."""
    names = ["assign-roles", "insert-quantize", "requantize-for-wgrad", "fp8-dispatch", "choose-saved"]
    return opt.run_passes(steps.linear(), passes=names)


@pytest.fixture
def halves() -> opt.OptResult:
    return opt.run_passes(steps.experts())


def find(graph: fx.Graph, which: str, target: Any = ops.scaled_mm.default) -> fx.Node:
    """The GEMM of a role."""
    return next(n for n in g.calls(graph, {target}) if n.meta[g.ROLE].gemm == which)


def replace_argument(node: fx.Node, index: int, new: Any) -> None:
    node.args = (*node.args[:index], new, *node.args[index + 1 :])


def test_a_correct_graph_has_no_findings(rewritten: opt.OptResult) -> None:
    for group in verifier.INVARIANTS.values():
        for invariant in group:
            assert invariant(rewritten.graph, rewritten.ctx) == []


def swap_scales(graph: fx.Graph) -> None:
    gemm = find(graph, "fprop")
    a, b = gemm.args[1], gemm.args[3]
    replace_argument(gemm, 1, b)
    replace_argument(gemm, 3, a)


def scale_not_transposed(graph: fx.Graph) -> None:
    """dgrad reads the weight transposed and its scales as they are."""
    gemm = find(graph, "dgrad")
    assert isinstance(gemm.args[3], fx.Node)
    replace_argument(gemm, 3, gemm.args[3].args[0])


def data_not_quantized(graph: fx.Graph) -> None:
    gemm = find(graph, "fprop")
    assert isinstance(gemm.args[0], fx.Node)
    quantize = gemm.args[0].args[0]
    assert isinstance(quantize, fx.Node)
    replace_argument(gemm, 0, quantize.args[0])


def scale_of_another_value(graph: fx.Graph) -> None:
    """wgrad reads x's data with dy's scale."""
    gemm = find(graph, "wgrad")
    replace_argument(gemm, 3, gemm.args[1])


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (swap_scales, "is not the scale of"),
        (scale_not_transposed, "is not the scale of"),
        (data_not_quantized, "is no quantized value"),
        (scale_of_another_value, "is not the scale of"),
    ],
)
def test_scales_paired(rewritten: opt.OptResult, breaks: Callable[[fx.Graph], None], message: str) -> None:
    breaks(rewritten.graph)
    found = verifier.scales_paired(rewritten.graph, rewritten.ctx)
    assert found and {d.code for d in found} == {"E0706"} and message in found[0].message
    assert_points_at_the_model(found[0])


def test_a_gathered_payload_needs_its_scales_gathered_alike() -> None:
    names = ["assign-roles", "insert-quantize", "requantize-for-wgrad", "fp8-dispatch"]
    result = opt.run_passes(steps.experts(), passes=names)
    gemm = find(result.graph, "fprop", ops.scaled_grouped_mm.default)
    gathered_scale = gemm.args[1]
    assert isinstance(gathered_scale, fx.Node) and gathered_scale.target is aten.index.Tensor
    replace_argument(gemm, 1, gathered_scale.args[0])
    found = verifier.scales_paired(result.graph, result.ctx)
    assert [d.code for d in found] == ["E0706"]


def test_an_operator_that_expects_another_format(rewritten: opt.OptResult) -> None:
    gemm = find(rewritten.graph, "fprop")
    replace_argument(gemm, 4, "e4m3[1x128] pow2")
    (found,) = verifier.scales_paired(rewritten.graph, rewritten.ctx)
    assert found.code == "E0707"
    assert "is e4m3[1x128] fp32, but the operator expects e4m3[1x128] pow2" in found.message


def test_groups_on_reduction_axis(rewritten: opt.OptResult) -> None:
    gemm = find(rewritten.graph, "wgrad")
    replace_argument(gemm, 4, "e4m3[128x1] fp32")
    (found,) = verifier.groups_on_reduction_axis(rewritten.graph, rewritten.ctx)
    assert found.code == "E0708" and "operand a" in found.message and "128x1 across K" in found.message
    assert_points_at_the_model(found)


def test_fp8_never_accumulates(rewritten: opt.OptResult) -> None:
    gemm = find(rewritten.graph, "fprop")
    data = gemm.args[0]
    assert isinstance(data, fx.Node)
    with rewritten.graph.inserting_before(gemm):
        rewritten.graph.call_function(aten.add.Tensor, (data, data))
    (first, *_) = verifier.fp8_never_accumulates(rewritten.graph, rewritten.ctx)
    assert first.code == "E0709" and f"computes with FP8 data %{data.name}" in first.message


def test_a_gemm_left_in_bf16(rewritten: opt.OptResult) -> None:
    gemm = find(rewritten.graph, "fprop")
    step = steps.linear()
    original = next(g.calls(step.joint.graph, g.GEMMS))
    gemm.target = original.target  # aten.mm in the place of the scaled GEMM
    (found,) = verifier.gemms_as_planned(rewritten.graph, rewritten.ctx)
    assert found.code == "E0703" and "is not quantized, but the plan says FP8" in found.message


def test_a_kept_gemm_that_is_quantized(rewritten: opt.OptResult) -> None:
    kept = opt.run_passes(steps.linear(), "bf16", ["assign-roles"])
    rewritten.ctx.plan = kept.ctx.plan
    found = verifier.gemms_as_planned(rewritten.graph, rewritten.ctx)
    assert [d.code for d in found] == ["E0703"] * 3
    assert all("is quantized, but the plan keeps it" in d.message for d in found)


def test_well_typed(rewritten: opt.OptResult) -> None:
    gemm = find(rewritten.graph, "fprop")
    gemm.meta["val"] = gemm.meta["val"].to(torch.float32)
    (found,) = verifier.well_typed(rewritten.graph, rewritten.ctx)
    assert found.code == "E0710"
    assert "is bf16[256, 128], but its metadata says f32[256, 128]" in found.message


@pytest.mark.parametrize("which", ["fprop", "dgrad", "wgrad"])
def test_gemms_complete(rewritten: opt.OptResult, which: str) -> None:
    gemm = find(rewritten.graph, which)
    del gemm.meta[g.ROLE]
    (found,) = verifier.gemms_complete(rewritten.graph, rewritten.ctx)
    assert found.code == "E0711" and found.message == f"w has 0 {which} GEMMs, expected 1"
    assert_points_at_the_model(found)


def test_a_gemm_computed_twice(rewritten: opt.OptResult) -> None:
    gemm = find(rewritten.graph, "fprop")
    with rewritten.graph.inserting_before(gemm):
        twin = rewritten.graph.node_copy(gemm)
    twin.meta[g.ROLE] = gemm.meta[g.ROLE]
    (found,) = verifier.gemms_complete(rewritten.graph, rewritten.ctx)
    assert found.message == "w has 2 fprop GEMMs, expected 1"


def test_saved_is_planned(halves: opt.OptResult) -> None:
    assert halves.halves is not None
    assert verifier.saved_is_planned(halves.halves, halves.ctx) == []
    name = next(n.name for n in halves.halves.saved() if n.op != "placeholder")
    del halves.ctx.saved[name]
    found = verifier.saved_is_planned(halves.halves, halves.ctx)
    assert [d.code for d in found] == ["E0712"]
    assert found[0].message == f"%{name} crosses to backward, but the plan does not say so"


def test_a_pair_that_crosses_without_its_scale(halves: opt.OptResult) -> None:
    assert halves.halves is not None
    types = verifier.quantized_types(halves.halves.forward.graph)
    scale = next(n for n in halves.halves.saved() if n in types and types[n].part == "scale")
    output = g.output_node(halves.halves.forward.graph)
    output.args = (tuple(n for n in output.args[0] if n is not scale),)  # type: ignore[union-attr]
    found = verifier.saved_is_planned(halves.halves, halves.ctx)
    assert any(d.code == "E0706" and "crosses to backward without its scale" in d.message for d in found)


def test_backward_that_reads_another_scale(halves: opt.OptResult) -> None:
    assert halves.halves is not None
    graph = halves.halves.backward.graph
    dequantize = next(g.calls(graph, {ops.dequantize.default}))
    requantize = next(g.calls(graph, {ops.requantize.default}))
    replace_argument(dequantize, 1, requantize.args[1])
    with pytest.raises(DiagnosticError) as caught:
        pipeline.verify_halves(halves.halves, halves.ctx)
    assert "E0706" in [d.code for d in caught.value.diagnostics]


def test_every_invariant_is_run() -> None:
    """No invariant of the module is left out of the tables."""
    listed = {i for group in verifier.INVARIANTS.values() for i in group} | set(verifier.HALF_INVARIANTS)
    listed.add(verifier.saved_is_planned)  # type: ignore[arg-type]
    written = {
        f
        for name, f in vars(verifier).items()
        if callable(f) and getattr(f, "__annotations__", {}).get("return") == "list[Diagnostic]" and name[0] != "_"
    }
    assert written == listed


def assert_points_at_the_model(diagnostic: Diagnostic) -> None:
    assert diagnostic.span is not None and diagnostic.span.file.endswith("steps.py") and diagnostic.span.line > 0
