"""`fp8c opt MODEL --passes a,b`: load a model, run named passes on its captured step, give back the graph's text."""

from __future__ import annotations

from fp8c import driver
from fp8c.diagnostics import DiagnosticError, ExitCode
from fp8c.models import load_model
from fp8c.prepare import prepare
from fp8c.tools import opt
from fp8c.tools.compile_command import Request, check_batch
from fp8c.tools.ir_printing import check_pass


def rewritten_text(request: Request, names: tuple[str, ...]) -> str:
    """Canonical text of the joint graph after `names`, or of both halves once `partition` is among them.

    Raises: DiagnosticError E0701 for a name that is no pass, E0702 for a pass whose requirements do not hold (usage).
    """
    for name in names:
        if name != opt.PARTITION:
            check_pass(name)
    session = driver.new_session(request.spec, request.target)
    loaded = load_model(
        request.model, weights=request.weights, overrides=request.overrides, batch=request.batch, seq=request.seq
    )
    check_batch(loaded)
    prepare(loaded.module, loaded.example_inputs)
    step = opt.capture_joint(loaded.step(), loaded.example_inputs)
    try:
        return opt.run_passes(step, session.spec, names, target=session.target, partial=False).text(loaded.name)
    except DiagnosticError as error:  # passes in an order that can't be: the caller's mistake here
        if error.diagnostics[0].code != "E0702":
            raise
        raise DiagnosticError(error.diagnostics, ExitCode.USAGE) from None
