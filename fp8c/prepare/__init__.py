"""What has to happen to a module before its step is captured: see `prepare`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity, Span
from fp8c.models import StepModule
from fp8c.prepare.check import Call, can_check, compare, recorded_calls
from fp8c.prepare.hf import is_hf_experts, prepare_hf
from fp8c.prepare.loops import Rewrite, rewrite_loops
from fp8c.user_code import user_code


def prepare(module: nn.Module, example_inputs: Any = None) -> list[Diagnostic]:
    """Make a model capturable as one graph, in place, and say what was done.

    Experts of transformers models use fp8c's grouped GEMMs; loops over experts in any other module are rewritten to
    grouped GEMMs. Parameters, state_dict and results stay the same: only the code that computes them changes. A second
    call finds nothing to do.

    example_inputs: one batch (dict, tuple or single argument); with it every rewrite is compared with the original
    Returns: remarks, one per kind of change
    Raises:  DiagnosticError E0820 for a loop that can't be rewritten, E0821 for a rewrite that disagrees with the
             original; the module is then as before, except for transformers' setting. Exit code MODEL.
    """
    remarks = prepare_hf(module)
    rewrites: dict[str, list[Rewrite]] = {}
    errors: dict[object, Diagnostic] = {}
    for name, part in module.named_modules():
        if is_hf_experts(part):
            continue
        found, wrong = rewrite_loops(part)
        if found:
            rewrites[name] = found
        for error in wrong:
            errors.setdefault((error.span, error.message), error)
    if errors:
        raise DiagnosticError(errors.values(), ExitCode.MODEL)
    if not rewrites:
        return remarks
    checked = _check(module, rewrites, example_inputs)
    remarks += _remarks(rewrites, checked)
    for group in rewrites.values():
        for rewrite in group:
            rewrite.install()
    return remarks


def _check(module: nn.Module, rewrites: dict[str, list[Rewrite]], example_inputs: Any) -> dict[object, str]:
    """Compare one module of each kind with its original; how each kind was checked, by its functions' code.

    Raises: DiagnosticError E0821 for every kind that disagrees.
    """
    kinds: dict[object, str] = {}
    for name, group in rewrites.items():
        kinds.setdefault(_kind(group), name)
    parts = {name: module.get_submodule(name) for name in kinds.values()}
    is_meta = any(p.is_meta for p in module.parameters())
    calls: dict[nn.Module, Call] = {}
    if example_inputs is not None and not is_meta:
        calls = _first_calls(module, list(parts.values()), example_inputs)
    checked: dict[object, str] = {}
    errors = []
    for kind, name in kinds.items():
        part, group = parts[name], rewrites[name]
        if part not in calls:
            reason = "it has no weights" if is_meta else "no example inputs" if example_inputs is None else "not called"
            checked[kind] = f"not compared with the original: {reason}"
            continue
        if not can_check(part):
            checked[kind] = "not compared with the original: too large for a copy in FP64"
            continue
        message = ""
        try:
            difference = compare(part, group, calls[part])
            if difference.is_equal:
                checked[kind] = f"same outputs and gradients within {max(difference.error, 2**-53):.0e}"
                continue
            message = (
                f"the {difference.what} differs from the loop's by {difference.error:.1e} relative, "
                f"expected at most {difference.bound:.1e}"
            )
        except Exception as error:  # noqa: BLE001 - the rewritten code runs the model's own operations
            message = f"it fails with {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        errors.append(
            Diagnostic(
                "E0821",
                f"the loop over experts rewritten to grouped GEMMs disagrees with the loop: {message}",
                group[0].loops[0][0],
                notes=(f"in {type(part).__name__} '{name}'; nothing was changed",),
                help="choose every token's experts once, without drops: each entry of the routing decision must be "
                "one of the experts' indices",
            )
        )
    if errors:
        raise DiagnosticError(errors, ExitCode.MODEL)
    return checked


def _first_calls(module: nn.Module, parts: list[nn.Module], example_inputs: Any) -> dict[nn.Module, Call]:
    """The arguments each part gets in one forward of the unchanged model; its buffers stay as they were."""
    saved = {name: buffer.clone() for name, buffer in module.named_buffers()}
    file = type(module).__module__
    try:
        with (
            recorded_calls(parts) as calls,
            torch.no_grad(),
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            user_code("the forward pass on the example inputs", file),
        ):
            step = module if isinstance(module, StepModule) else StepModule(module, lambda outputs, batch: outputs)
            step.call(example_inputs)
    finally:
        for name, buffer in module.named_buffers():
            if name in saved:
                buffer.data.copy_(saved[name])
    return calls


def _kind(group: list[Rewrite]) -> object:
    """Modules of one kind run the same code on the same kind of experts."""
    first = group[0].module
    shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in first.named_parameters())
    return (type(first), tuple((r.method, r.function.__code__, r.loops) for r in group), shapes)


def _remarks(rewrites: dict[str, list[Rewrite]], checked: dict[object, str]) -> list[Diagnostic]:
    """One remark per loop in the source, however many modules run it."""
    places: dict[tuple[Span, int, str], list[str]] = {}
    for name, group in rewrites.items():
        for rewrite in group:
            for span, experts in rewrite.loops:
                key = (span, experts, checked[_kind(group)])
                places.setdefault(key, []).append(name or type(rewrite.module).__name__)
    return [
        Diagnostic(
            "R0820",
            f"this loop over {experts} experts runs as grouped GEMMs in "
            + (f"{len(names)} modules" if len(names) > 1 else f"'{names[0]}'"),
            span,
            Severity.REMARK,
            notes=(how,),
        )
        for (span, experts, how), names in places.items()
    ]


__all__ = ["prepare"]
