"""Nodes in their modules, the captured graph cut in two, identical layers found, and only those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp8c.build import read_build
from fp8c.tools.viewer import build_graphs as bg
from fp8c.tools.viewer.graph_reader import Node


def node(name: str, inputs: str = "", where: str = "", op: str = "aten.add") -> Node:
    return Node(name, op, "", "bf16[1]", "", where, "m.py:1", tuple(inputs.split()))


def test_a_node_without_a_module_goes_where_its_inputs_come_from() -> None:
    nodes = [
        node("gate", where="model.layers.0.mlp.gate"),
        node("up", where="model.layers.0.mlp.up"),
        node("both", "gate up"),
        node("norm", where="model.layers.0.norm"),
        node("residual", "both norm"),
        node("next", "residual other", where="model.layers.1.norm"),
        node("across", "residual next"),
        node("logits", where="lm_head"),
        node("loss", "logits"),
        node("scaled", "loss"),
    ]
    placed = bg.place_nodes(nodes, {}, {})
    assert placed["both"] == "model.layers.0.mlp"
    assert placed["residual"] == "model.layers.0"
    assert placed["across"] == "model.layers.1"  # sums of two layers stay in the later one, not between them
    assert placed["loss"] == placed["scaled"] == ""


def test_a_node_between_two_of_one_module_stays_in_it() -> None:
    nodes = [node("a", where="norm"), node("sum", "a a"), node("b", "sum", where="norm")]
    assert bg.place_nodes(nodes, {}, {})["sum"] == "norm"


def test_what_reads_only_values_from_outside_goes_to_their_module() -> None:
    nodes = [node("grad", "saved_q"), node("later", "x"), node("reader", "later", where="model.mlp")]
    placed = bg.place_nodes(nodes, {}, {"saved_q": "model.attn.o_proj"})
    assert placed["grad"] == "model.attn"
    assert placed["later"] == "model.mlp"


def test_uses_stand_for_their_modules() -> None:
    uses = {"model.mlp:swiglu": {"path": "model.mlp"}}
    assert bg.module_of("model.mlp:swiglu", uses) == "model.mlp"
    assert bg.module_of("model.mlp.up#2", {}) == "model.mlp.up"


def read(path: Path) -> tuple[bg.BuildGraphs, dict[str, Any]]:
    build = read_build(path)
    uses = build.json("plan.lock.json")["uses"]
    return bg.read_graphs(build, uses), uses


def test_the_captured_graph_is_cut_at_the_first_gradient(small_build: Path) -> None:
    graphs, _ = read(small_build)
    before = graphs.half("before", "forward"), graphs.half("before", "backward")
    assert before[0].nodes[-1].op == "aten.mean"
    assert "tangents_1" in before[1].nodes[0].inputs
    assert {n.gemm for n in before[0].nodes} == {"", "fprop"}
    assert {n.gemm for n in before[1].nodes} == {"", "dgrad", "wgrad"}


def test_saved_values_are_those_that_cross(small_build: Path) -> None:
    graphs, _ = read(small_build)
    forward = graphs.half("after", "forward")
    assert forward.saved and forward.saved <= {n.name for n in forward.nodes}
    assert set(graphs.notes["saved"]) == set(forward.saved)


def test_layers_that_hold_the_same_are_one_run(small_build: Path) -> None:
    graphs, _ = read(small_build)
    runs = bg.identical_siblings(graphs, {})
    assert ["model.layers.0", "model.layers.1", "model.layers.2"] in runs


@pytest.mark.parametrize("path", ["model.layers.1", "model.layers.1.mlp.gate"])
def test_a_layer_decided_otherwise_is_not_folded(small_build: Path, path: str) -> None:
    graphs, _ = read(small_build)
    assert bg.identical_siblings(graphs, {path: "another rule"}) == []


def test_a_layer_with_one_other_operator_is_not_folded(small_build: Path) -> None:
    graphs, _ = read(small_build)
    halves = list(graphs.halves)
    changed = tuple(
        Node(n.name, "aten.div.Tensor", *(n.args, n.type, n.gemm, n.where, n.place, n.inputs))
        if halves[3].modules[n.name] == "model.layers.2.mlp.experts.down" and n.op.startswith("aten.mul")
        else n
        for n in halves[3].nodes
    )
    assert changed != halves[3].nodes
    halves[3] = bg.Half("after", "backward", changed, halves[3].modules, halves[3].types)
    other = bg.BuildGraphs(tuple(halves), graphs.inputs, graphs.notes)
    assert ["model.layers.0", "model.layers.1"] in bg.identical_siblings(other, {})


def test_a_build_without_notes_is_read_too(small_build: Path) -> None:
    build = read_build(small_build)
    manifest = {**build.manifest, "files": {k: v for k, v in build.manifest["files"].items() if "notes" not in k}}
    graphs = bg.read_graphs(type(build)(build.path, manifest), build.json("plan.lock.json")["uses"])
    assert graphs.notes == {}
    assert {n.gemm for n in graphs.half("before", "forward").nodes} == {""}
