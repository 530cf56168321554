"""Run named passes on one model's training step and print the graph: `fp8c opt`, and what pass tests are built on.

    joint = capture_joint(module, batch)                          one joint graph, as both drivers get it
    result = run_passes(joint, "deepseek_v3", ["assign-roles", "insert-quantize"])
    print(result.text())

`partition` counts as a pass here: what comes after it (compress-saved) works on the two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fp8c import capture, driver, pipeline, verifier
from fp8c import graph as g
from fp8c.backends.fusions import fusions_of
from fp8c.backends.target import load_target
from fp8c.diagnostics import ExitCode, fail
from fp8c.partition import Halves, partition, trained_inputs
from fp8c.pass_manager import Pass, PassContext, PassManager, PassRecord
from fp8c.passes import HALF_PASSES, JOINT_PASSES, ROLES
from fp8c.specs.load import Spec, load
from fp8c.specs.resolve import resolve
from fp8c.target_record import TargetRecord
from fp8c.tools.ir_printing import check_pass

PARTITION = "partition"


@dataclass(frozen=True)
class JointStep:
    """One captured step. `inputs` are the fake values of the placeholders, `names` the FQN of each primal, "" for data."""

    joint: fx.GraphModule
    names: tuple[str, ...]
    num_fwd_outputs: int
    inputs: Any = None


@dataclass
class OptResult:
    """What the passes left: the joint graph, and the two halves once `partition` ran.

    changed: rewrites of each pass, in the order they ran
    """

    graph: fx.Graph
    ctx: PassContext
    halves: Halves | None = None
    changed: list[tuple[str, int]] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)

    def text(self, name: str = "model", *, provenance: bool = True) -> str:
        """The canonical text: the joint graph, or forward and backward after partition."""
        if self.halves is None:
            return g.graph_text(self.graph, name, provenance=provenance)
        parts = (("forward", self.halves.forward), ("backward", self.halves.backward))
        return "\n".join(g.graph_text(gm.graph, f"{name}.{half}", provenance=provenance) for half, gm in parts)


def pass_names() -> tuple[str, ...]:
    """Every name `run_passes` takes, in pipeline order."""
    return (ROLES.name, *(p.name for p in JOINT_PASSES), PARTITION, *(p.name for p in HALF_PASSES))


def capture_joint(call: Any, *args: Any, dynamic: bool | None = False, **kwargs: Any) -> JointStep:
    """The joint graph of `call(*args, **kwargs)`, a module or a function, without rewriting it.

    Raises: DiagnosticError for a graph break or a model that raises; E0832 for a step without a backward.
    """
    found: list[JointStep] = []

    class Recorder(driver.Session):
        def _partition(self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, names: Any, **_: Any) -> Any:
            found.append(JointStep(joint, names, num_fwd_outputs, inputs))
            raise driver.PlanningDone

    session = Recorder(load("bf16"), load_target("cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=driver.guarded(session), fullgraph=True, dynamic=dynamic)
    try:
        compiled(*args, **kwargs)  # type: ignore[no-untyped-call]
    except Exception as error:  # Dynamo wraps whatever a backend raises
        if not found:
            raise driver.explain_failure(error) from error
    if not found:
        raise fail(
            "E0832",
            "the step was captured without a backward: its result needs no gradient",
            help="make at least one parameter require gradients",
            exit_code=ExitCode.MODEL,
        )
    return found[-1]


def find_pass(name: str) -> Pass:
    """A pass on the joint graph by name. Raises: DiagnosticError E0701 for an unknown one."""
    check_pass(name)
    return next(item for item in (ROLES, *JOINT_PASSES) if item.name == name)


def run_passes(
    step: JointStep,
    spec: str | Path | Spec = "deepseek_v3",
    passes: Sequence[str] = pass_names(),
    *,
    target: str | TargetRecord = "cpu",
    partial: bool = True,
    observers: tuple[pipeline.Observer, ...] = (),
) -> OptResult:
    """Run the named passes in the order given, verified one by one. The step's own graph is not changed.

    partial: the graph may be a part of a model, so a rule that matches nothing in it is no error
    Raises:  DiagnosticError: an unknown pass (E0701), a missing requirement (E0702), whatever a pass finds
    """
    loaded = spec if isinstance(spec, Spec) else load(spec)
    record = target if isinstance(target, TargetRecord) else load_target(target)
    halves_names = {p.name for p in HALF_PASSES}
    ctx = PassContext(
        inputs=capture.joint_input_names(step.joint, step.names),
        trained=trained_inputs(step.joint, step.num_fwd_outputs),
        num_fwd_outputs=step.num_fwd_outputs,
        target=record,
        fusions=fusions_of(record),
    )
    manager = PassManager(verifier.INVARIANTS, True, observers, known=(ROLES, *JOINT_PASSES))
    held: set[str] = set()
    result = OptResult(step.joint.graph, ctx)
    for name in passes:
        if name == PARTITION:
            result.halves = partition(fx.GraphModule(step.joint, g.copy_graph(result.graph)), ctx)
            result.changed.append((name, 0))
        elif name in halves_names:
            if result.halves is None:
                raise fail("E0702", f"pass '{name}' requires the two halves", help=f"run {PARTITION} first")
            changed = next(p for p in HALF_PASSES if p.name == name).run(result.halves, ctx)
            pipeline.verify_halves(result.halves, ctx)
            result.changed.append((name, changed))
        else:
            result.graph = manager.run(result.graph, [find_pass(name)], ctx, held)
            result.changed.append((name, manager.records[-1].changed))
        if name == ROLES.name and ctx.plan is None:
            ctx.plan = resolve(loaded, list(ctx.uses.values()), record, partial=partial)
    result.records = manager.records
    return result
