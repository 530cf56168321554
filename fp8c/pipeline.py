"""The pipeline both drivers run: joint graph in, forward and backward graph out.

At run time it is the `partition_fn` of fp8c's AOTAutograd backend; ahead of time the same function gets a joint graph
over meta tensors. Nothing works in one driver only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fp8c import capture, verifier
from fp8c import graph as g
from fp8c.backends.fusions import fusions_of
from fp8c.cost_model import Machine
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode
from fp8c.main_grad import mark_gradients
from fp8c.ops.head_loss import LINEAR_CROSS_ENTROPY, gemms_of
from fp8c.partition import Halves, partition, trained_inputs
from fp8c.pass_manager import PassContext, PassManager, PassRecord
from fp8c.passes import HALF_PASSES, JOINT_PASSES, ROLES
from fp8c.roles import Op
from fp8c.specs.plan import PrecisionPlan

Observer = Callable[[str, int, str, fx.Graph], None]
#: Passes that have something to do without a backward.
INFERENCE = frozenset({"causal-attention", "fuse-head-loss", "insert-quantize", "fp8-dispatch"})

Resolver = Callable[[list[Any]], PrecisionPlan]


@dataclass
class Rewritten:
    """The result for one graph. `joint_before` is the captured graph, untouched."""

    halves: Halves
    plan: PrecisionPlan
    ctx: PassContext
    joint_before: fx.GraphModule
    records: list[PassRecord] = field(default_factory=list)


def rewrite_and_partition(
    joint: fx.GraphModule,
    names: tuple[str, ...],
    num_fwd_outputs: int,
    resolve: Resolver,
    *,
    target: Any = None,
    machine: Machine | None = None,
    observers: tuple[Observer, ...] = (),
    verify_each: bool = True,
    without: frozenset[str] = frozenset(),
    partial: bool = False,
) -> Rewritten:
    """Assign roles, resolve the plan on them, rewrite, partition, compress. The given graph is not changed.

    without: optional passes to leave out
    partial: the graph may be a part of a step, whose GEMMs need no gradient while something else in it does

    Raises: DiagnosticError for whatever the spec, the model or a pass can't do.
    """
    ctx = PassContext(
        inputs=capture.joint_input_names(joint, names),
        trained=trained_inputs(joint, num_fwd_outputs),
        num_fwd_outputs=num_fwd_outputs,
        target=target,
        machine=machine,
        fusions=fusions_of(target),
    )
    manager = PassManager(verifier.INVARIANTS, verify_each, observers)
    held: set[str] = set()
    graph = manager.run(joint.graph, [ROLES], ctx, held)
    if not partial:
        require_backward(graph, ctx)
    ctx.plan = resolve(list(ctx.uses.values()))
    graph = manager.run(graph, [p for p in JOINT_PASSES if p.name not in without], ctx, held)
    halves = partition(fx.GraphModule(joint, graph), ctx)
    for item in [p for p in HALF_PASSES if p.name not in without]:
        index = len(manager.records)
        for observe in observers:  # forward first, then backward
            observe("before", index, item.name, halves.forward.graph)
            observe("before", index, item.name, halves.backward.graph)
        started = time.perf_counter()
        changed = item.run(halves, ctx)
        manager.records.append(PassRecord(item.name, changed, time.perf_counter() - started, 0.0))
        for observe in observers:
            observe("after", index, item.name, halves.forward.graph)
            observe("after", index, item.name, halves.backward.graph)
    if verify_each:
        verify_halves(halves, ctx)
    primals = [n.name for n in joint.graph.find_nodes(op="placeholder") if not str(n.target).startswith("tangents")]
    mark_gradients(halves.backward.graph, primals, ctx.inputs)
    return Rewritten(halves, ctx.plan, ctx, joint, manager.records)


def rewrite_inference(
    forward: fx.GraphModule,
    names: tuple[str, ...],
    resolve: Resolver,
    *,
    target: Any = None,
    observers: tuple[Observer, ...] = (),
    without: frozenset[str] = frozenset(),
) -> fx.GraphModule:
    """The forward alone, for `torch.no_grad()`: the same formats as in training, nothing is saved."""
    ctx = PassContext(inputs=capture.joint_input_names(forward, names), training=False, target=target)
    manager = PassManager(verifier.INVARIANTS, True, observers)
    held: set[str] = set()
    graph = manager.run(forward.graph, [ROLES], ctx, held)
    ctx.plan = resolve(list(ctx.uses.values()))
    passes = [p for p in JOINT_PASSES if p.name in INFERENCE and p.name not in without]
    graph = manager.run(graph, passes, ctx, held)
    return fx.GraphModule(forward, graph)


def require_backward(graph: fx.Graph, ctx: PassContext) -> None:
    """A training step whose joint graph has no backward GEMM at all was captured wrongly: never go on with it."""
    gemms = [u for u in ctx.uses.values() if u.op in (Op.LINEAR, Op.GROUPED_MM)]
    if gemms and all(u.no_wgrad and u.no_dgrad for u in gemms) and ctx.trained:
        if not any(g.is_backward(n) for n in g.calls(graph, g.GEMMS)):
            raise DiagnosticError(
                [
                    Diagnostic(
                        "E0832",
                        f"the captured step has {len(gemms)} forward GEMMs and no backward GEMM",
                        help="make the loss depend on the model's output without detach() or torch.no_grad()",
                    )
                ],
                ExitCode.MODEL,
            )


def verify_halves(halves: Halves, ctx: PassContext) -> None:
    found = [
        d for i in verifier.HALF_INVARIANTS for half in (halves.forward, halves.backward) for d in i(half.graph, ctx)
    ]
    found += verifier.saved_is_planned(halves, ctx)
    if found:
        summary = Diagnostic("E0705", "IR is invalid after the passes on the halves")
        raise DiagnosticError([summary, *found], ExitCode.BUG)


def count_gemms(rewritten: Rewritten) -> dict[str, dict[str, int]]:
    """GEMMs of the lowered step: per kind the total, those in FP8 and those kept, each use counted once.

    A forward GEMM that backward computes again appears in both halves; it is one GEMM of the step.
    """
    counts = {which: {"total": 0, "fp8": 0, "kept": 0} for which in ("fprop", "dgrad", "wgrad")}
    seen: set[tuple[str, str]] = set()
    for half in (rewritten.halves.forward, rewritten.halves.backward):
        for node in half.graph.nodes:
            role = node.meta.get(g.ROLE)
            if role is None or not role.gemm or (role.use, role.gemm) in seen:
                continue
            is_fp8 = node.target in verifier.SCALED
            is_head = node.target is LINEAR_CROSS_ENTROPY
            if is_fp8 or is_head or node.target in g.GEMMS:
                for which in gemms_of(node.args) if is_head else (role.gemm,):
                    seen.add((role.use, which))
                    counts[which]["total"] += 1
                    counts[which]["fp8" if is_fp8 else "kept"] += 1
    return counts
