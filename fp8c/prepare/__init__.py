"""What has to happen to a module before its step is captured: see `prepare`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity
from fp8c.models import StepModule
from fp8c.prepare.check import Call, can_check, compare, recorded_calls
from fp8c.prepare.expert_parallel import expert_mesh, shard_experts
from fp8c.prepare.hf import is_hf_experts, prepare_hf
from fp8c.prepare.loops import Loop, Rewrite, original_class, rewrite_loops, rewritten_loops
from fp8c.user_code import user_code


def prepare(
    module: nn.Module, example_inputs: Any = None, mesh: DeviceMesh | None = None, *, may_break: bool = False
) -> list[Diagnostic]:
    """Make a model capturable as one graph, in place, and say what was done.

    Experts of transformers models use fp8c's grouped GEMMs; loops over experts in any other module are rewritten to
    grouped GEMMs. Parameters, state_dict and results stay the same: only the code that computes them changes. A second
    call finds nothing to do.

    example_inputs: one batch (dict, tuple or single argument); with it every rewrite is compared with the original.
                    Without, `compare_rewrites` can do so once there is a batch
    mesh: spread the routed experts over its dimension "ep", after everything else
    may_break: graphs may break, so a loop that can't be rewritten stays, with a remark R0823 instead of E0820
    Returns: remarks, one per kind of change
    Raises:  DiagnosticError E0820 for a loop that can't be rewritten, E0821 for a rewrite that disagrees with the
             original; the module is then as before, except for transformers' setting. Exit code MODEL.
    """
    remarks = _grouped_experts(module, example_inputs, may_break and mesh is None)  # a loop's experts can't be spread
    return remarks if mesh is None else remarks + shard_experts(module, mesh)


def _grouped_experts(module: nn.Module, example_inputs: Any, may_break: bool) -> list[Diagnostic]:
    remarks = prepare_hf(module)
    rewrites: list[Rewrite] = []
    errors: dict[object, Diagnostic] = {}
    for part in module.modules():
        if is_hf_experts(part):
            continue
        found, wrong = rewrite_loops(part)
        rewrites += found
        for error in wrong:
            errors.setdefault((error.span, error.message), error)
    if errors and not may_break:
        raise DiagnosticError(errors.values(), ExitCode.MODEL)
    note = "it runs as it is written, with a graph break for every expert that has tokens"
    remarks += [
        replace(error, code="R0823", severity=Severity.REMARK, notes=(*error.notes, note)) for error in errors.values()
    ]
    if not rewrites:
        return remarks
    for rewrite in rewrites:
        rewrite.install()
    changed = {rewrite.module for rewrite in rewrites}
    if example_inputs is None:
        return remarks + _remarks(module, changed, dict.fromkeys(changed, "there are no example inputs"))
    step = module if isinstance(module, StepModule) else StepModule(module, lambda outputs, batch: outputs)
    return remarks + _compared(module, changed, lambda: step.call(example_inputs))


def needs_comparison(module: nn.Module) -> bool:
    """Whether the model has rewritten loops that were not compared with their originals yet."""
    return any(part not in _COMPARED and rewritten_loops(part) for part in module.modules())


def compare_rewrites(module: nn.Module, *args: Any, **kwargs: Any) -> list[Diagnostic]:
    """Compare rewritten loops with their originals on the arguments of one call of the model.

    Returns: remarks that replace those of `prepare`;  Raises: DiagnosticError E0821, with all loops as they were written
    """
    changed = {part for part in module.modules() if part not in _COMPARED and rewritten_loops(part)}
    # Like a call, with hooks, but never a compiled one.
    return _compared(module, changed, lambda: module._call_impl(*args, **kwargs))  # type: ignore[no-untyped-call]


#: Modules whose rewritten loops agree with their originals, or can't be compared.
_COMPARED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _compared(module: nn.Module, changed: set[nn.Module], run: Callable[[], object]) -> list[Diagnostic]:
    """Compare one changed module of each kind with its original, on what it gets when the original model runs."""
    reason = ""
    if any(p.is_meta for p in module.parameters()):
        reason = "it has no weights"
    elif any(hasattr(p, "device_mesh") for p in module.parameters()):
        reason = "its parameters are sharded"
    if reason:
        _COMPARED.update(changed)
        return _remarks(module, changed, dict.fromkeys(changed, reason))
    classes = {part: type(part) for part in changed}
    kinds = {part: (classes[part], tuple((tuple(p.shape), p.dtype) for p in part.parameters())) for part in changed}
    loops = {part: rewritten_loops(part) for part in changed}
    try:
        for part in changed:
            part.__class__ = original_class(part)
        calls = _first_calls(module, changed, run)
        errors: list[Diagnostic] = []
        results: dict[object, str] = {}
        for name, part in module.named_modules():
            if part in changed and kinds[part] not in results:
                results[kinds[part]], error = _compared_one(name, part, classes[part], loops[part], calls.get(part))
                errors += error
        if errors:
            classes = {part: original_class(part) for part in changed}
            raise DiagnosticError(errors, ExitCode.MODEL)
    finally:
        for part, cls in classes.items():
            part.__class__ = cls
    _COMPARED.update(changed)
    return _remarks(module, changed, {part: results[kinds[part]] for part in changed})


def _compared_one(
    name: str, part: nn.Module, rewritten: type[nn.Module], loops: tuple[Loop, ...], call: Call | None
) -> tuple[str, list[Diagnostic]]:
    """How one module compares: words for the remark, and an error when it disagrees."""
    if call is None:
        return "not called with the example inputs", []
    if not can_check(part):
        return "too large for a copy in FP64", []
    try:
        difference = compare(part, rewritten, call)
        if difference.is_equal:
            return f"{_SAME} within {max(difference.error, 2**-53):.0e}", []
        message = (
            f"the {difference.what} differs from the loop's by {difference.error:.1e} relative, "
            f"expected at most {difference.bound:.1e}"
        )
    except Exception as error:  # noqa: BLE001 - the rewritten code runs the model's own operations
        message = f"it fails with {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return "", [
        Diagnostic(
            "E0821",
            f"the loop over experts rewritten to grouped GEMMs disagrees with the loop: {message}",
            loops[0].span,
            notes=(f"in {type(part).__name__} '{name}'; nothing was changed",),
            help="choose every token's experts once, without drops: each entry of the routing decision must be "
            "one of the experts' indices",
        )
    ]


_SAME = "same outputs and gradients"


def _first_calls(module: nn.Module, parts: set[nn.Module], run: Callable[[], object]) -> dict[nn.Module, Call]:
    """The arguments each part gets in one forward of the model; its buffers stay as they were."""
    saved = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with (
            recorded_calls(list(parts)) as calls,
            torch.no_grad(),
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            user_code("the forward pass on the example inputs", type(module).__module__),
        ):
            run()
    finally:
        for name, buffer in module.named_buffers():
            if name in saved:
                buffer.data.copy_(saved[name])
    return calls


def _remarks(module: nn.Module, changed: set[nn.Module], how: dict[nn.Module, str]) -> list[Diagnostic]:
    """One remark per loop in the source, however many modules run it."""
    places: dict[tuple[Loop, str], list[str]] = {}
    half = {p for p in changed if any(q.dtype not in (torch.bfloat16, torch.float64) for q in p.parameters())}
    for name, part in module.named_modules():
        if part in changed:
            for loop in rewritten_loops(part):
                places.setdefault((loop, how[part]), []).append(name or type(part).__name__)
    notes = ("its parameters are not BF16: run the step under autocast",) if half else ()
    return [
        Diagnostic(
            "R0820",
            f"this loop over {loop.experts} experts runs as grouped GEMMs in "
            + (f"{len(names)} modules" if len(names) > 1 else f"'{names[0]}'"),
            loop.span,
            Severity.REMARK,
            notes=(words if words.startswith(_SAME) else f"not compared with the original: {words}", *notes),
        )
        for (loop, words), names in places.items()
    ]


__all__ = ["compare_rewrites", "expert_mesh", "needs_comparison", "prepare"]
