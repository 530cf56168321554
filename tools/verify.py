"""`--verify`: run the step for real, in BF16 and compiled, and check what the plan promised.

Four questions, each with its own figure: how far are loss and gradients from BF16; did exactly the planned GEMMs run in
FP8, forward and backward; is every one of them within the derived bound of its FP64 value on the same quantized
operands; are the graphs at run time those that were planned ahead of time.
"""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import fp8c.backends.reference  # noqa: F401  (registers the CPU kernels)
from fp8c import driver
from fp8c import graph as g
from fp8c.backends.reference.check import check_gemm
from fp8c.diagnostics import ExitCode, fail
from fp8c.models import LoadedModel
from fp8c.pipeline import Rewritten
from fp8c.specs.plan import PrecisionPlan
from fp8c.user_code import user_code
from fp8c.verifier import SCALED

#: (use, gemm): one GEMM of the step, however often it runs.
GemmKey = tuple[str, str]


@dataclass(frozen=True)
class StepResult:
    """Loss and gradients of one step. A parameter without a gradient is left out."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Verification:
    """What `--verify` found. `fp64_worst_ratio`: the largest error of any GEMM, in units of its derived bound."""

    loss_bf16: float
    loss_fp8c: float
    gradient_errors: dict[str, float]  # per parameter: |g - g_bf16| / |g_bf16|, Frobenius norms
    planned: int  # GEMMs the plan quantizes
    ran: int  # of those, how many ran in FP8
    missing: tuple[GemmKey, ...]
    unplanned: tuple[GemmKey, ...]
    calls: int  # operator calls, with what backward computes again
    gemms_checked: int
    fp64_worst_ratio: float
    fp64_worst: str
    fp64_relative_error: float
    same_graphs: bool
    missing_gradients: tuple[str, ...] = ()

    @property
    def loss_rel_err(self) -> float:
        return abs(self.loss_fp8c - self.loss_bf16) / abs(self.loss_bf16) if self.loss_bf16 else 0.0

    @property
    def grad_rel_err_median(self) -> float:
        return statistics.median(self.gradient_errors.values()) if self.gradient_errors else 0.0

    @property
    def grad_rel_err_max(self) -> float:
        return max(self.gradient_errors.values(), default=0.0)

    @property
    def ok(self) -> bool:
        as_planned = not self.missing and not self.unplanned and not self.missing_gradients
        return as_planned and self.fp64_worst_ratio <= 1.0 and self.same_graphs

    def to_json(self) -> dict[str, Any]:
        worst = sorted(self.gradient_errors.items(), key=lambda item: -item[1])[:10]
        return {
            "ok": self.ok,
            "loss_bf16": self.loss_bf16,
            "loss_fp8c": self.loss_fp8c,
            "loss_rel_err": self.loss_rel_err,
            "grad_rel_err_median": self.grad_rel_err_median,
            "grad_rel_err_max": self.grad_rel_err_max,
            "grad_rel_err_worst": [{"parameter": name, "rel_err": error} for name, error in worst],
            "missing_gradients": list(self.missing_gradients),
            "gemms_planned": self.planned,
            "gemms_ran": self.ran,
            "gemms_missing": [" ".join(reversed(key)) for key in self.missing],
            "gemms_unplanned": [" ".join(reversed(key)) for key in self.unplanned],
            "gemm_calls": self.calls,
            "gemms_checked": self.gemms_checked,
            "fp64_worst_ratio": self.fp64_worst_ratio,
            "fp64_worst_gemm": self.fp64_worst,
            "fp64_rel_err_max": self.fp64_relative_error,
            "same_graphs": self.same_graphs,
        }

    def _gradients_line(self) -> str:
        figures = f"median {self.grad_rel_err_median:.2e}, max {self.grad_rel_err_max:.2e}"
        return f"  gradients  relative error against BF16: {figures} over {len(self.gradient_errors)} parameters"

    def lines(self) -> list[str]:
        lines = [
            f"verify: {'ok' if self.ok else 'FAILED'}",
            f"  loss       {self.loss_fp8c:.5f}, BF16 {self.loss_bf16:.5f}, relative error {self.loss_rel_err:.2e}",
            self._gradients_line(),
            f"  GEMMs      {self.ran} of {self.planned} planned ran in FP8, in {self.calls} calls",
        ]
        worst = f"{self.fp64_worst_ratio:.3f} of its bound ({self.fp64_worst})"
        lines += [f"  FP64       {self.gemms_checked} GEMMs checked, largest error {worst}"]
        lines += [f"  planned, but did not run in FP8: {gemm} of {use}" for use, gemm in self.missing[:5]]
        lines += [f"  ran in FP8, but is not planned: {gemm} of {use}" for use, gemm in self.unplanned[:5]]
        lines += [f"  no gradient: {name}" for name in self.missing_gradients[:5]]
        if not self.same_graphs:
            lines.append("  the graphs at run time are not those planned ahead of time")
        return lines


def require_weights(loaded: LoadedModel) -> None:
    """Raises: DiagnosticError E0840 for a model without values."""
    if loaded.weights == "meta":
        help = (
            "take fewer layers, for example -a num_hidden_layers=2"
            if loaded.source.startswith("hf:")
            else "use --weights random"
        )
        raise fail(
            "E0840",
            f"--verify runs the step, and '{loaded.source}' is built without weights",
            help=help,
            exit_code=ExitCode.MODEL,
        )


def run_eager(loaded: LoadedModel) -> StepResult:
    """The step as the user wrote it. Parameters, buffers and the random state are as before afterwards."""
    return run(loaded, loaded.step(), "the step on example_inputs()")


def run(loaded: LoadedModel, step: Callable[[Any], Tensor], what: str) -> StepResult:
    module = loaded.module
    state = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    module.zero_grad(set_to_none=True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with user_code(what, loaded.source):
                loss = step(loaded.example_inputs)
                loss.backward()  # type: ignore[no-untyped-call]
        gradients = {n: p.grad.detach().clone() for n, p in module.named_parameters() if p.grad is not None}
        return StepResult(float(loss.detach()), gradients)
    finally:
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in state:
                    buffer.copy_(state[name])


@dataclass
class GemmLog:
    """What ran: calls and the worst FP64 check."""

    calls: Counter[GemmKey] = field(default_factory=Counter)
    checked: int = 0
    worst_ratio: float = 0.0
    worst: str = ""
    relative_error: float = 0.0

    def record(self, node: fx.Node, args: Sequence[Any], out: Tensor) -> None:
        role = node.meta.get(g.ROLE)
        key = (role.use, role.gemm) if role is not None else (node.name, "")
        self.calls[key] += 1
        assert isinstance(node.target, torch._ops.OpOverload)
        found = check_gemm(node.target._opname, args, out)
        self.checked += 1
        self.relative_error = max(self.relative_error, found.relative_error)
        if not found.worst_ratio <= self.worst_ratio or not self.worst:
            self.worst_ratio, self.worst = found.worst_ratio, " ".join(reversed(key))


class CheckingInterpreter(fx.Interpreter):
    """Runs a half operator by operator and checks every scaled GEMM on the operands it really got."""

    def __init__(self, gm: fx.GraphModule, log: GemmLog) -> None:
        super().__init__(gm)
        self.log = log

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.op == "call_function" and n.target in SCALED:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.log.record(n, args, out)
        return out


@dataclass
class CheckingSession(driver.Session):
    """A session whose halves run under the checking interpreter."""

    log: GemmLog = field(default_factory=GemmLog)

    def _lower(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        return make_boxed_func(CheckingInterpreter(gm, self.log).run)  # type: ignore[no-any-return]


def verify(loaded: LoadedModel, eager: StepResult, session: driver.Session, planned: Rewritten) -> Verification:
    """Run the prepared model's step compiled and compare it with `eager` and with the plan."""
    checking = CheckingSession(
        session.spec, session.target, lowering="reference", verify_each=session.verify_each, without=session.without
    )
    torch._dynamo.reset()
    step = copy.copy(loaded.step())
    step.compile(backend=driver.guarded(checking), fullgraph=True, dynamic=False)
    compiled = run(loaded, step, "the compiled step")
    wanted = planned_gemms(planned.plan)
    ran = set(checking.log.calls)
    common = [n for n in eager.gradients if n in compiled.gradients]
    return Verification(
        loss_bf16=eager.loss,
        loss_fp8c=compiled.loss,
        gradient_errors={n: relative_error(compiled.gradients[n], eager.gradients[n]) for n in common},
        planned=len(wanted),
        ran=len(wanted & ran),
        missing=tuple(sorted(wanted - ran)),
        unplanned=tuple(sorted(ran - wanted)),
        calls=checking.log.calls.total(),
        gemms_checked=checking.log.checked,
        fp64_worst_ratio=checking.log.worst_ratio,
        fp64_worst=checking.log.worst,
        fp64_relative_error=checking.log.relative_error,
        same_graphs=same_graphs(checking.steps[-1], planned),
        missing_gradients=tuple(n for n in eager.gradients if n not in compiled.gradients),
    )


def planned_gemms(plan: PrecisionPlan) -> set[GemmKey]:
    """Every GEMM the plan quantizes and the step has."""
    found = set()
    for key, use in plan.uses.items():
        if not use.use.is_gemm:
            continue
        missing = {"fprop": "", "dgrad": use.use.no_dgrad, "wgrad": use.use.no_wgrad}
        found |= {(key, which) for which, why in missing.items() if not why and use.gemm(which).is_fp8}
    return found


def same_graphs(a: Rewritten, b: Rewritten) -> bool:
    pairs = ((a.halves.forward, b.halves.forward), (a.halves.backward, b.halves.backward))
    return all(g.structural_hash(x.graph) == g.structural_hash(y.graph) for x, y in pairs)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; 0 when both are zero."""
    difference = (found.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))
