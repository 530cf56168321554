"""The cheapest spec within an error budget: what of a spec's FP8 a model can afford, as a spec that extends it.

Choices are groups of uses that the language can name (by operator, kind and role), GEMM by GEMM. Rounding errors of
different operands are independent, so their energies add: what a group costs in error is measured once, by switching it
off alone, and groups are kept in BF16 in the order of error saved per time lost until the budget is met. Then every
choice that is not needed any more is taken back, the most expensive first. The result is written as a spec, loaded,
compiled and measured again: what counts is the error of the spec that was written.

Time is that of the GEMMs at the target's peak rates; what casting and moving costs is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8c.diagnostics import ExitCode, fail
from fp8c.files import write_file
from fp8c.roles import OPERANDS, OpUse
from fp8c.specs.fit import gemms_of
from fp8c.specs.formatter import format_source
from fp8c.specs.load import Spec, load, loads, shipped
from fp8c.specs.parser import source_of
from fp8c.target_record import TargetRecord
from fp8c.tools.numerics.bisect import METRICS, Metric, Trials
from fp8c.tools.numerics.measure import Numerics
from fp8c.tools.numerics.step import Part

#: BF16's time over FP8's where a target has no rates: twice as many operations per second on every FP8 tensor core.
_DEFAULT_SPEEDUP = 2.0


@dataclass(frozen=True)
class Choice:
    """One GEMM (or the kept copies, `cache`) of every use that a selector matches."""

    selector: str
    gemm: str
    parts: frozenset[Part]
    flops: float
    roles: frozenset[str]


@dataclass(frozen=True)
class Proposal:
    """A spec within the budget. `time` is that of its GEMMs, BF16 throughout being 1."""

    name: str
    text: str
    metric: Metric
    budget: float
    error: float
    base_error: float
    time: float
    base_time: float
    kept: tuple[str, ...]
    runs: int
    path: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "kept": list(self.kept)}

    def lines(self) -> list[str]:
        lines = [
            f"search: {METRICS[self.metric]} {self.error:.4g}, budget {self.budget:.4g} (as given {self.base_error:.4g}; "
            f"{self.runs} runs)",
            f"  GEMM time {self.time:.3f} of BF16's, as given {self.base_time:.3f}",
        ]
        lines += [f"  kept in BF16: {kept}" for kept in self.kept] or ["  nothing needs BF16: the spec as it is"]
        return [*lines, f"  written to {self.path}"] if self.path else lines


def speedup(target: TargetRecord) -> float:
    return target.fp8_tflops / target.bf16_tflops if target.bf16_tflops else _DEFAULT_SPEEDUP


def choices_of(measured: Numerics, uses: Sequence[OpUse]) -> list[Choice]:
    """What can be kept in BF16: uses alike in operator, kinds and roles, GEMM by GEMM."""
    groups: dict[tuple[str, str], list[OpUse]] = {}
    by_gemm: dict[tuple[str, str], set[Part]] = {}
    for part in measured.operands:
        by_gemm.setdefault((part.use, part.gemm), set()).add(part)
    for use in uses:
        for gemm in OPERANDS:
            if (use.key, gemm) in by_gemm:
                groups.setdefault((selector_of(use, uses), gemm), []).append(use)
    found = []
    for (selector, gemm), members in groups.items():
        parts = frozenset().union(*(by_gemm[use.key, gemm] for use in members))
        flops = sum(2.0 * (use.m or 1) * (use.n or 1) * (use.k or 1) for use in members)
        found.append(Choice(selector, gemm, parts, flops, frozenset().union(*(use.roles for use in members))))
    return found


def selector_of(use: OpUse, uses: Sequence[OpUse]) -> str:
    """The selector of uses like this one, by what they are and by what only others are; by path where nothing tells."""
    if not use.kinds and not use.roles:
        return f'"{use.path}"'
    wider = [u for u in uses if u.op is use.op and u.kinds >= use.kinds and u.roles >= use.roles]
    terms = [f"op({use.op.value})"]
    terms += [f"kind({kind})" for kind in sorted(use.kinds)]
    terms += [f"role({role})" for role in sorted(use.roles)]
    terms += [f"!kind({kind})" for kind in sorted({k for u in wider for k in u.kinds - use.kinds})]
    terms += [f"!role({role})" for role in sorted({r for u in wider for r in u.roles - use.roles})]
    return " & ".join(terms)


def search(
    trials: Trials, measured: Numerics, spec: Spec, budget: float, name: str, base: str, out: Path | None
) -> Proposal:
    """Propose a spec whose error is within `budget`, in the metric's unit.

    base: the spec as it was asked for, a shipped one's name or a file;  out: where the result will lie
    Raises: DiagnosticError E0846 when no choice of formats reaches the budget
    """
    target = load_target_of(trials)
    uses = [plan.use for plan in trials.rewritten.plan.uses.values()]
    choices = choices_of(measured, uses)
    total = sum(_flops(use) * len(gemms_of(use)) for use in uses if use.is_gemm)
    base_error = trials.error()
    used, kept = base_reference(base, out), list[Choice]()
    cheapest = sorted(choices, key=lambda c: _error_saved(trials, base_error, c) / max(c.flops, 1.0), reverse=True)
    floor = trials.error(part for choice in choices for part in choice.parts)
    if base_error > budget and floor > budget:
        raise fail(
            "E0846",
            f"no choice of formats brings the error within {budget:.4g}: without any FP8 GEMM it is {floor:.4g}",
            help="raise --budget",
            exit_code=ExitCode.CHECK_FAILED,
        )
    waiting = iter(cheapest)
    while _error(trials, kept) > budget:
        kept.append(next(waiting))
    for choice in sorted(kept, key=lambda c: -c.flops):
        fewer = [c for c in kept if c is not choice]
        if _error(trials, fewer) <= budget:
            kept = fewer
    while True:
        text = spec_text(name, used, base, kept, budget, trials.metric)
        error = trials.error_of(trials.step.rewrite(loads(text, f"{name}.fp8", _root(base, out)), target))
        if error <= budget:
            break
        more = next((c for c in cheapest if c not in kept), None)
        if more is None:
            raise fail("E0846", f"no choice of formats brings the error within {budget:.4g}: it is {error:.4g}")
        kept.append(more)
    saved = 1 - 1 / speedup(target)
    fp8 = sum(c.flops for c in choices)
    slow = sum(c.flops for c in kept)
    times = [1 - saved * share / total for share in (fp8 - slow, fp8)]
    described = tuple(f"{c.gemm} of {c.selector}" for c in kept)
    path = str(out) if out else ""
    return Proposal(
        name, text, trials.metric, budget, error, base_error, times[0], times[1], described, trials.runs, path
    )


def load_target_of(trials: Trials) -> TargetRecord:
    target = trials.rewritten.ctx.target
    assert isinstance(target, TargetRecord)
    return target


def _flops(use: OpUse) -> float:
    return 2.0 * (use.m or 1) * (use.n or 1) * (use.k or 1)


def _error(trials: Trials, kept: Sequence[Choice]) -> float:
    return trials.error(part for choice in kept for part in choice.parts)


def _error_saved(trials: Trials, base: float, choice: Choice) -> float:
    """Error energy that the choice saves, alone."""
    return base**2 - trials.error(choice.parts) ** 2


def base_reference(base: str, out: Path | None) -> str:
    """How the new spec names the one it extends. Raises: DiagnosticError E0601 where it could not reach it."""
    name = base.removeprefix("std:")
    if name in shipped():
        return f"std:{name}"
    folder = (out.resolve() if out else Path(base).resolve()).parent
    file = Path(base).resolve()
    if not file.is_relative_to(folder):
        raise fail(
            "E0601",
            f"the new spec cannot use '{base}': it lies outside of {folder.name}/",
            help="write it beside the spec that it extends",
            exit_code=ExitCode.USAGE,
        )
    return os.path.relpath(file, folder)


def _root(base: str, out: Path | None) -> Path | None:
    if base.removeprefix("std:") in shipped():
        return None
    return (out.resolve() if out else Path(base).resolve()).parent


def spec_text(name: str, used: str, base: str, kept: Sequence[Choice], budget: float, metric: Metric) -> str:
    """The spec that keeps these choices in BF16, formatted."""
    reason = f"fp8c numerics --search: {METRICS[metric]} within {budget:g}"
    doc = f"## {base} with what it needs in BF16 for an error within {budget:g} ({METRICS[metric]})."
    lines = ["version 1;", f'use "{used}" as base;', "", doc, f"spec {name} extends base {{"]
    by_selector: dict[str, list[Choice]] = {}
    for choice in kept:
        by_selector.setdefault(choice.selector, []).append(choice)
    for number, (selector, choices) in enumerate(by_selector.items(), 1):
        lines.append(f"override rule keep_{number} for {selector} {{")
        lines += list(_statements({c.gemm for c in choices}))
        lines += [f'because "{reason}";', "}"]
    payloads = {(role, c.gemm) for c in kept for role in c.roles}
    if ("moe_up", "fprop") in payloads:
        lines.append("override dispatch { payload = bf16; }")
    if ("moe_down", "dgrad") in payloads:
        lines.append("override combine_grad { payload = bf16; }")
    return format_source(source_of("\n".join([*lines, "}"]) + "\n"))


def _statements(gemms: set[str]) -> Iterator[str]:
    if gemms == set(OPERANDS):
        yield "precision = bf16;"
        return
    for gemm in (g for g in OPERANDS if g in gemms):
        a, b = OPERANDS[gemm]
        yield f"{gemm} {{ {a} = bf16; {b} = bf16; }}"
    if "wgrad" in gemms:
        yield "cache x off;"


def write_spec(proposal: Proposal, out: Path) -> Spec:
    """Write the spec and load it from where it lies."""
    write_file(out, proposal.text)
    return load(out)
