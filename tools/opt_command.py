"""`fp8c opt`: run named passes on the captured step, and give back the canonical text of what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fp8c import capture, driver, verifier
from fp8c import graph as g
from fp8c.diagnostics import DiagnosticError, ExitCode, fail
from fp8c.models import load_model
from fp8c.partition import partition, trained_inputs
from fp8c.pass_manager import PassContext, PassManager
from fp8c.passes import ALL_PASSES, HALF_PASSES, ROLES
from fp8c.prepare import prepare
from fp8c.tools.compile_command import Request, check_batch
from fp8c.tools.ir_printing import check_pass


def run_passes(request: Request, names: tuple[str, ...]) -> str:
    """Text of the joint graph after `names`, or of both halves when the last of them runs on halves.

    Raises: DiagnosticError E0720 (usage) for a name that is no pass, E0702 for a pass whose requirements do not hold.
    """
    for name in names:
        check_pass(name)
    base = driver.new_session(request.spec, request.target)
    loaded = load_model(
        request.model, weights=request.weights, overrides=request.overrides, batch=request.batch, seq=request.seq
    )
    check_batch(loaded)
    prepare(loaded.module, loaded.example_inputs)
    session = OptSession(base.spec, base.target, names=names)
    driver.trace_step(loaded.step(), loaded.example_inputs, session)
    return "".join(g.graph_text(graph, name) for name, graph in session.graphs)


@dataclass
class OptSession(driver.Session):
    """A session that runs the named passes instead of the pipeline, and keeps the graphs that come out."""

    names: tuple[str, ...] = ()
    graphs: list[tuple[str, fx.Graph]] = field(default_factory=list)

    def _partition(
        self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, names: tuple[str, ...], **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        ctx = PassContext(
            inputs=capture.joint_input_names(joint, names),
            trained=trained_inputs(joint, num_fwd_outputs),
            num_fwd_outputs=num_fwd_outputs,
            target=self.target,
        )
        self.graphs = run_named(self, joint, ctx)
        raise driver.PlanningDone


def run_named(session: OptSession, joint: fx.GraphModule, ctx: PassContext) -> list[tuple[str, fx.Graph]]:
    """The joint graph after the named passes, or both halves after those that run on halves."""
    manager = PassManager(verifier.INVARIANTS)
    held: set[str] = set()
    graph = joint.graph
    on_halves = {p.name for p in HALF_PASSES}
    by_name = {p.name: p for p in ALL_PASSES}
    for name in (n for n in session.names if n not in on_halves):
        try:
            graph = manager.run(graph, [by_name[name]], ctx, held)  # type: ignore[list-item]
        except DiagnosticError as error:  # a missing requirement is the caller's mistake here
            is_usage = error.diagnostics[0].code == "E0702"
            raise DiagnosticError(error.diagnostics, ExitCode.USAGE) if is_usage else error
        if name == ROLES.name:
            ctx.plan = session.resolve(list(ctx.uses.values()))
    wanted = [p for p in HALF_PASSES if p.name in session.names]
    if not wanted:
        return [("joint", graph)]
    if missing := {r for p in wanted for r in p.requires} - held:
        makers = sorted(p.name for p in ALL_PASSES if p.ensures & missing)
        raise fail(
            "E0702",
            f"pass '{wanted[0].name}' requires {', '.join(sorted(missing))}, which does not hold",
            help=f"run {' and '.join(makers)} first",
            exit_code=ExitCode.USAGE,
        )
    halves = partition(fx.GraphModule(joint, graph), ctx)
    for item in wanted:
        item.run(halves, ctx)
    return [("forward", halves.forward.graph), ("backward", halves.backward.graph)]
