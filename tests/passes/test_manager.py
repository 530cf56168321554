"""The pass manager: what it demands of a pass, what it checks after one, and what it shows around a failure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx

from fp8c import graph as g
from fp8c import verifier
from fp8c.diagnostics import DiagnosticError, ExitCode
from fp8c.pass_manager import PassContext, PassManager, PassResult
from fp8c.passes import ROLES
from fp8c.passes.insert_quantize import InsertQuantize
from fp8c.tools import opt
from tests.passes.steps import linear

NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Lies:
    """Renames nothing, says it did; or erases a node and says it did not."""

    edits: bool
    says: int
    name: ClassVar[str] = "lies"
    requires: ClassVar[frozenset[str]] = NONE
    ensures: ClassVar[frozenset[str]] = NONE
    invalidates: ClassVar[frozenset[str]] = NONE

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        if self.edits:
            output = g.output_node(graph)
            with graph.inserting_before(output):
                graph.call_function(torch.ops.aten.detach.default, (next(iter(graph.nodes)),))
        return PassResult(graph, self.says)


@dataclass(frozen=True)
class Drops:
    """Invalidates the roles: a pass behind it that needs them must not run."""

    name: ClassVar[str] = "drops-roles"
    requires: ClassVar[frozenset[str]] = NONE
    ensures: ClassVar[frozenset[str]] = NONE
    invalidates: ClassVar[frozenset[str]] = frozenset({"roles"})

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        return PassResult(graph, 0)


@dataclass(frozen=True)
class Breaks:
    """Swaps the scale of one operand for that of the other."""

    name: ClassVar[str] = "breaks-scales"
    requires: ClassVar[frozenset[str]] = NONE
    ensures: ClassVar[frozenset[str]] = NONE
    invalidates: ClassVar[frozenset[str]] = NONE

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        gemm = next(g.calls(graph, {torch.ops.fp8c.scaled_mm.default}))
        gemm.args = (gemm.args[0], gemm.args[3], *gemm.args[2:])
        return PassResult(graph, 1)


def codes(caught: pytest.ExceptionInfo[DiagnosticError]) -> list[str]:
    return [d.code for d in caught.value.diagnostics]


@pytest.mark.parametrize(("edits", "says"), [(False, 1), (True, 0)])
def test_a_pass_that_lies_about_its_changes_is_rejected(edits: bool, says: int) -> None:
    step = linear()
    with pytest.raises(DiagnosticError) as caught:
        PassManager(verifier.INVARIANTS).run(step.joint.graph, [Lies(edits, says)], PassContext())
    assert codes(caught) == ["E0704"] and caught.value.exit_code is ExitCode.BUG
    assert f"reports {says} rewrites" in caught.value.diagnostics[0].message


def test_an_honest_pass_is_accepted() -> None:
    step = linear()
    manager = PassManager(verifier.INVARIANTS)
    after = manager.run(step.joint.graph, [Lies(True, 1), Lies(False, 0)], PassContext())
    assert len(after.nodes) == len(step.joint.graph.nodes) + 1
    assert [(r.name, r.changed) for r in manager.records] == [("lies", 1), ("lies", 0)]


def test_the_callers_graph_is_left_as_it_is() -> None:
    step = linear()
    opt.run_passes(step, passes=["assign-roles"])  # names the inputs
    before = g.graph_text(step.joint.graph, "model", provenance=False)
    opt.run_passes(step)
    assert g.graph_text(step.joint.graph, "model", provenance=False) == before


def test_a_missing_requirement_names_the_pass_that_ensures_it() -> None:
    step = linear()
    with pytest.raises(DiagnosticError) as caught:
        PassManager(verifier.INVARIANTS).run(step.joint.graph, [InsertQuantize(), ROLES], PassContext())
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "E0702"
    assert "insert-quantize" in diagnostic.message and "roles" in diagnostic.message
    assert diagnostic.help == "run assign-roles first"


def test_an_invalidated_invariant_no_longer_holds() -> None:
    step = linear()
    result = opt.run_passes(step, passes=["assign-roles"])
    with pytest.raises(DiagnosticError) as caught:
        PassManager(verifier.INVARIANTS).run(result.graph, [Drops(), InsertQuantize()], result.ctx, {"roles"})
    assert codes(caught) == ["E0702"]


def test_the_text_around_a_broken_invariant_is_shown() -> None:
    step = linear()
    result = opt.run_passes(step, passes=["assign-roles", "insert-quantize"])
    manager = PassManager(verifier.INVARIANTS)
    with pytest.raises(DiagnosticError) as caught:
        manager.run(result.graph, [Breaks()], result.ctx, {"roles", "scales-paired"})
    summary, *found = caught.value.diagnostics
    assert summary.code == "E0705" and "after pass 'breaks-scales' (1 of 1)" in summary.message
    wrong = next(d for d in found if d.code == "E0706")
    assert "is not the scale of" in wrong.message
    marked = [note for note in wrong.notes if note.startswith(">")]
    assert len(marked) == 1 and "fp8c.scaled_mm(" in marked[0]
    assert 1 < len(wrong.notes) <= 8  # some nodes around it, not the whole graph


def test_without_verification_nothing_is_checked() -> None:
    step = linear()
    manager = PassManager(verifier.INVARIANTS, verify_each=False)
    manager.run(step.joint.graph, [Lies(True, 0)], PassContext())
    assert manager.records[0].changed == 0


def test_observers_see_every_pass_before_and_after() -> None:
    seen: list[tuple[str, int, str]] = []
    texts: dict[str, str] = {}

    def observe(event: str, index: int, name: str, graph: fx.Graph) -> None:
        seen.append((event, index, name))
        texts[event] = g.graph_text(graph, "model")

    opt.run_passes(linear(), passes=["assign-roles", "insert-quantize"], observers=(observe,))
    assert [(e, n) for e, _, n in seen] == [
        ("before", "assign-roles"),
        ("after", "assign-roles"),
        ("before", "insert-quantize"),
        ("after", "insert-quantize"),
    ]
    assert "aten.mm" in texts["before"] and "fp8c.scaled_mm" in texts["after"]


def test_an_unknown_pass_suggests_a_name() -> None:
    with pytest.raises(DiagnosticError) as caught:
        opt.run_passes(linear(), passes=["insert-quantise"])
    assert codes(caught) == ["E0701"] and "insert-quantize" in caught.value.diagnostics[0].help
