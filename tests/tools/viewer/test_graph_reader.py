"""Graph texts read back: what a line says, what its types weigh, what its precision is."""

from __future__ import annotations

import pytest

from fp8c.diagnostics import DiagnosticError
from fp8c.tools.viewer import graph_reader as r

TEXT = """graph forward
  %primals_1 = input(model.a.weight) : bf16[256, 128]
  %x = input() : bf16[64, 128]
  %quantize = fp8c.quantize(%x, 'e4m3[1x128] pow2') : (e4m3[64, 128], f32[64, 1])   # fprop model.a  m.py:7
  %getitem = getitem(%quantize, 0) : e4m3[64, 128]   # fprop model.a  m.py:7
  %swiglu = aten.mul.Tensor(%getitem, %getitem) : bf16[64, 128]   # model.mlp:swiglu  m.py:9
  %add = aten.add.Tensor(%swiglu, 1) : bf16[s0, 128]   # m.py:12
  %bare = aten.foo([%x, %add], k=(1, 2))
  return (%bare, %getitem)
"""


def test_lines_are_read_in_full() -> None:
    graph = r.read_graph(TEXT, "forward")
    assert graph.outputs == ("bare", "getitem")
    weight, _, quantize, item, swiglu, add, bare = graph.nodes
    assert (weight.op, weight.args, weight.inputs) == ("input", "model.a.weight", ())
    assert quantize == r.Node(
        "quantize",
        "fp8c.quantize",
        "%x, 'e4m3[1x128] pow2'",
        "(e4m3[64, 128], f32[64, 1])",
        "fprop",
        "model.a",
        "m.py:7",
        ("x",),
    )
    assert item.inputs == ("quantize",)
    assert (swiglu.gemm, swiglu.where, swiglu.inputs) == ("", "model.mlp:swiglu", ("getitem", "getitem"))
    assert (add.where, add.place) == ("", "m.py:12")
    assert (bare.args, bare.type, bare.inputs) == ("[%x, %add], k=(1, 2)", "", ("x", "add"))


@pytest.mark.parametrize("line", ["  nonsense", "  %a == b", "x = aten.mm(%a)"])
def test_a_line_that_is_none_is_named(line: str) -> None:
    with pytest.raises(DiagnosticError, match=r"E0612.*line 2 of the forward graph"):
        r.read_graph(f"graph forward\n{line}\n", "forward")


def test_text_that_is_no_graph_is_refused() -> None:
    with pytest.raises(DiagnosticError, match="E0612"):
        r.read_graph("", "forward")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bf16[256, 128]", 65536),
        ("(e4m3[64, 128], f32[64, 1])", 64 * 128 + 64 * 4),
        ("f32[]", 4),
        ("bf16[s0, 128]", 256),
        ("", 0),
    ],
)
def test_bytes_of_types(text: str, size: int) -> None:
    assert r.type_bytes(text) == size


def test_precision_is_of_operands_casts_and_results() -> None:
    graph = r.read_graph(TEXT, "forward")
    assert [r.precision(n) for n in graph.nodes[2:5]] == ["e4m3[1x128] pow2", "e4m3", "bf16"]
    gemm = r.Node("m", "fp8c.scaled_mm", "%a, 'e4m3[1x128] fp32', 'e5m2[row] pow2', 128", "bf16[1, 1]", "", "", "", ())
    assert r.precision(gemm) == "e4m3[1x128] fp32 × e5m2[row] pow2"


def test_traffic_counts_each_input_once_and_no_views() -> None:
    graph = r.read_graph(TEXT, "forward")
    types = {n.name: n.type for n in graph.nodes}
    by_name = {n.name: n for n in graph.nodes}
    assert r.bytes_moved(by_name["getitem"], types) == 0
    assert r.bytes_moved(by_name["swiglu"], types) == 64 * 128 * 2 + 64 * 128  # the result, and the input once


@pytest.mark.parametrize(
    ("op", "family"),
    [
        ("fp8c.scaled_mm", "FP8 GEMMs"),
        ("fp8c.scaled_grouped_wgrad", "FP8 GEMMs"),
        ("aten._grouped_mm", "other GEMMs"),
        ("fp8c.quantize_both", "FP8 casts"),
        ("fp8c.gather_requantized", "FP8 casts"),
        ("fp8c.attention_backward", "attention"),
        ("_c10d_functional.all_to_all_single", "collectives"),
        ("fp8c.exchange", "collectives"),
        ("_c10d_functional.wait_tensor", "views"),
        ("aten.permute", "views"),
        ("aten.mul.Tensor", "everything else"),
        ("aten.comm", "everything else"),
    ],
)
def test_operators_belong_to_families(op: str, family: str) -> None:
    assert r.family(op) == family


def test_every_operator_that_quantizes_is_a_cast() -> None:
    """Fused operators too: a name that says so is how they are known."""
    from fp8c import ops
    from fp8c.ops import fused

    names = {n for module in (ops, fused) for n in vars(module)["_SCHEMAS"]}
    casts = {n for n in names if r.is_cast(f"fp8c.{n}")}
    gemms = {n for n in names if r.is_fp8_gemm(f"fp8c.{n}")}
    assert {"quantize", "dequantize", "requantize", "quantize_both", "gather_quantize"} <= casts
    assert {"scaled_mm", "scaled_grouped_mm", "scaled_grouped_wgrad"} <= gemms
    assert not casts & gemms
