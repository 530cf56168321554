"""The pass manager: run passes in the order given, each on its own copy, and verify after each.

A pass is a frozen dataclass with a contract (`name`, `requires`, `ensures`, `invalidates`) and `run(graph, ctx)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import fx

from fp8c import graph as g
from fp8c.cost_model import Machine
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity
from fp8c.formats import Format
from fp8c.roles import OpUse
from fp8c.schedule import Schedule
from fp8c.specs.plan import PrecisionPlan, Reason


@dataclass(frozen=True)
class SavedValue:
    """A value that crosses from forward to backward. `format` is None where it crosses as it is."""

    name: str
    format: Format | None
    why: str
    reason: Reason | None = None


@dataclass
class PassContext:
    """All a pass may know besides the graph.

    machine: the cost model's view of the target; None where it has no cost sheet
    inputs:  name of every graph input by placeholder name: a parameter's or buffer's FQN, or "" for data
    trained: placeholders whose gradient the step returns
    schedules: what schedule-overlap chose, by half; empty for a step without collectives
    fusions: operators of `fp8c.ops.fused` that the backend has in one kernel, by name
    """

    plan: PrecisionPlan | None = None
    target: Any = None
    machine: Machine | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    training: bool = True
    num_fwd_outputs: int = 0
    uses: dict[str, OpUse] = field(default_factory=dict)
    saved: dict[str, SavedValue] = field(default_factory=dict)
    recomputed: set[str] = field(default_factory=set)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    fusions: frozenset[str] = frozenset()
    remarks: list[Diagnostic] = field(default_factory=list)

    @property
    def has_backward(self) -> bool:
        return bool(self.trained)

    def is_parameter(self, node: fx.Node) -> bool:
        return bool(self.inputs.get(node.name))

    def is_trained(self, node: fx.Node) -> bool:
        return node.name in self.trained

    def input_name(self, node: fx.Node) -> str:
        return self.inputs.get(node.name) or node.name

    def remark(self, code: str, message: str, node: fx.Node | None = None) -> None:
        """Say something the user should know; the same remark is said once."""
        remark = Diagnostic(code, message, g.source_span(node) if node is not None else None, Severity.REMARK)
        if remark not in self.remarks:
            self.remarks.append(remark)


@dataclass(frozen=True)
class PassResult:
    graph: fx.Graph
    changed: int  # number of rewrites


class Pass(Protocol):
    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    ensures: ClassVar[frozenset[str]]
    invalidates: ClassVar[frozenset[str]]

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult: ...


Invariant = Callable[[fx.Graph, PassContext], list[Diagnostic]]


@dataclass
class PassRecord:
    name: str
    changed: int
    pass_s: float
    verify_s: float


@dataclass
class PassManager:
    """Runs passes and the invariants that hold after each.

    observers are called with (event, index, pass, graph), event "before" or "after": printing, dumping, reproducers.
    known are passes beside those that run, one of which may ensure what one of them misses.
    """

    invariants: dict[str, tuple[Invariant, ...]]
    verify_each: bool = True
    observers: Sequence[Callable[[str, int, str, fx.Graph], None]] = ()
    records: list[PassRecord] = field(default_factory=list)
    known: Sequence[Pass] = ()

    def run(self, graph: fx.Graph, passes: Iterable[Pass], ctx: PassContext, held: set[str] | None = None) -> fx.Graph:
        """Apply the passes; the input graph is left as it is. `held` starts with the invariants that already hold."""
        held = set() if held is None else held
        ordered = list(passes)
        before_hash = g.structural_hash(graph) if self.verify_each else ""
        for index, item in enumerate(ordered):
            missing = item.requires - held
            if missing:
                makers = {p.name for p in (*ordered, *self.known) if p.ensures & missing}
                raise DiagnosticError(
                    [
                        Diagnostic(
                            "E0702",
                            f"pass '{item.name}' requires {', '.join(sorted(missing))}, which does not hold",
                            help=f"run {' and '.join(sorted(makers)) or 'the pass that ensures it'} first",
                        )
                    ],
                    ExitCode.BUG,
                )
            for observe in self.observers:
                observe("before", index, item.name, graph)
            started = time.perf_counter()
            result = item.run(g.copy_graph(graph), ctx)
            ran = time.perf_counter()
            held -= item.invalidates
            held |= item.ensures
            if self.verify_each:
                before_hash = self._verify(item, index, len(ordered), before_hash, result, ctx, held)
            self.records.append(PassRecord(item.name, result.changed, ran - started, time.perf_counter() - ran))
            graph = result.graph
            for observe in self.observers:
                observe("after", index, item.name, graph)
        return graph

    def _verify(
        self, item: Pass, index: int, count: int, before: str, result: PassResult, ctx: PassContext, held: set[str]
    ) -> str:
        result.graph.lint()
        after = g.structural_hash(result.graph)
        if (before != after) != (result.changed > 0):
            said, did = f"{result.changed} rewrites", "the graph changed" if before != after else "nothing changed"
            raise DiagnosticError([Diagnostic("E0704", f"pass '{item.name}' reports {said}, but {did}")], ExitCode.BUG)
        found = [
            d for name in ("always", *sorted(held)) for i in self.invariants.get(name, ()) for d in i(result.graph, ctx)
        ]
        if found:
            summary = Diagnostic("E0705", f"IR is invalid after pass '{item.name}' ({index + 1} of {count})")
            raise DiagnosticError([summary, *found], ExitCode.BUG)
        return after
