"""Resolve a spec on one model: role records in, a plan with a reason for every decision out. No torch here.

Rules of one spec commute: two that give the same field of the same use different values are an error unless one says
`override`. Overrides apply in source order after the plain rules; a spec that extends another is a layer above it, and
changes a value of the layers below by `override` only. All problems are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity, Span
from fp8c.formats import Format
from fp8c.roles import OPERANDS, Op, OpUse
from fp8c.specs import ast
from fp8c.specs.fit import Findings, GemmFit, and_more, format_of, gemms_of
from fp8c.specs.load import Layer, Spec
from fp8c.specs.merge import Given, given_by, merge, merge_sections
from fp8c.specs.plan import PrecisionPlan, UsePlan
from fp8c.specs.select import Selection, compare, indices
from fp8c.target_record import TargetRecord

_OPERAND_FIELDS = tuple(f"{gemm}.{operand}" for gemm, operands in OPERANDS.items() for operand in operands)
#: Which values of a use backward may keep in a format of their own.
_CACHE_OF = {Op.LINEAR: ("x",), Op.GROUPED_MM: ("x",), Op.BMM: ("x",), Op.SWIGLU: ("gate", "up"), Op.NORM: ("x",)}


def resolve(spec: Spec, uses: Sequence[OpUse], target: TargetRecord, *, partial: bool = False) -> PrecisionPlan:
    """Decide every field of every use.

    partial: the uses are those of a part of a model (one compiled layer, one graph of several), so what matches nothing
             here may match elsewhere: unmatched rules and `expect` are not reported

    Raises DiagnosticError listing all problems; its exit code is TARGET when only the target is at fault, else SPEC.
    Warnings and remarks are in the plan's `diagnostics`.
    """
    resolver = _Resolver(spec, uses, target, partial)
    plan = resolver.run()
    found = resolver.findings
    if found.has_error:
        is_target = all(d.code.startswith("E04") for d in found.diagnostics if d.severity is Severity.ERROR)
        raise DiagnosticError(found.diagnostics, ExitCode.TARGET if is_target else ExitCode.SPEC)
    return plan


class _Resolver:
    def __init__(self, spec: Spec, uses: Sequence[OpUse], target: TargetRecord, partial: bool) -> None:
        self.spec, self.uses, self.target, self.partial = spec, uses, target, partial
        self.selection = Selection(uses)
        self.findings = Findings()
        self.given: list[dict[str, Given]] = [{} for _ in uses]
        self.sections, conflicts = merge_sections(spec)
        for conflict in conflicts:
            self.findings.add(conflict)
        self.fit = GemmFit(spec, target, self.sections, self.findings)

    def setting(self, section: str, name: str, default: str | int) -> str | int:
        decision = self.sections.get(section, {}).get(name)
        value = decision.value if decision else default
        assert isinstance(value, (str, int))
        return value

    def run(self) -> PrecisionPlan:
        self.check_architecture()
        for level, layer in enumerate(self.spec.layers):
            self.apply(layer, level)
            for expect in () if self.partial else layer.expects:
                self.check_expectation(expect)
        for found in self.selection.diagnostics:
            self.findings.add(found)
        if not self.findings.has_error:
            self.check_uses()
            self.check_payloads()
        uses = {
            use.key: UsePlan(use, {name: cell.decision for name, cell in cells.items()})
            for use, cells in zip(self.uses, self.given)
        }
        target = self.target.name
        plan = PrecisionPlan(self.spec.name, self.spec.digest, target, uses, self.sections)
        return replace(plan, diagnostics=self.findings.diagnostics)

    def check_architecture(self) -> None:
        wanted = self.spec.target
        if wanted is None or self.target.architecture == "cpu":
            return  # the CPU reference stands in for any architecture
        names = [a.text for a in wanted.architectures]
        if self.target.architecture not in names:
            self.findings.report(
                "E0407",
                f"spec `{self.spec.name}` is for {', '.join(names)}; target {self.target.name} is {self.target.architecture}",
                wanted.span,
                help=f"choose another spec, or write your own that extends it and has `target {self.target.architecture};`",
            )

    # -- rules ---------------------------------------------------------------------------------------------------------

    def apply(self, layer: Layer, level: int) -> None:
        """Plain rules, in any order, then overrides in source order."""
        plain = [rule for rule in layer.rules if not rule.modifiers.override]
        overrides = [rule for rule in layer.rules if rule.modifiers.override]
        for rule in (*plain, *overrides):
            mask = self.selection.mask(rule.selector)
            self.check_matches(rule, mask)
            self.give(rule, layer, level, mask)

    def check_matches(self, rule: ast.Rule, mask: int) -> None:
        if rule.modifiers.optional or self.partial:
            return
        severity = Severity.WARNING if self.setting("defaults", "unmatched_rule", "error") == "warn" else Severity.ERROR
        found = list(self.selection.unmatched(rule.selector))
        if not mask and not found and not self.selection.may_be_empty(rule.selector):
            found = [
                Diagnostic(
                    "E0301",
                    f"rule `{rule.name}` matches nothing",
                    rule.selector.span,
                    help="each part of it matches something, all of them together do not; "
                    "write `optional rule` if that is meant",
                )
            ]
        for d in found:
            self.findings.add(d if severity is Severity.ERROR else replace(d, severity=severity, code="W" + d.code[1:]))

    def give(self, rule: ast.Rule, layer: Layer, level: int, mask: int) -> None:
        """Put the rule's fields on every use of `mask`; conflicts are reported once for each pair of places."""
        expanded: dict[Op, list[Given]] = {}
        merged: dict[tuple[int, int], Given | Diagnostic] = {}
        conflicts: dict[tuple[int, int], tuple[Diagnostic, list[str]]] = {}
        misfits: dict[Span, tuple[ast.Field, list[str]]] = {}  # by what was written: `cache` gives two fields
        for i in indices(mask):
            use = self.uses[i]
            if use.op not in expanded:
                fields = _expand(rule.fields, use)
                expanded[use.op] = [given_by(f, layer, level, rule.name, rule.modifiers, rule.because) for f in fields]
            cells = self.given[i]
            for new in expanded[use.op]:
                if not _fits(new.field.name, use):
                    field, keys = misfits.setdefault(new.field.span, (new.field, []))
                    if field.name == new.field.name:
                        keys.append(use.key)
                    continue
                old = cells.get(new.field.name)
                if old is None:
                    cells[new.field.name] = new
                    continue
                pair = (id(old), id(new))
                result = merged.get(pair)
                if result is None:
                    result = merged[pair] = merge(old, new)
                if isinstance(result, Diagnostic):
                    conflicts.setdefault(pair, (result, []))[1].append(use.key)
                else:
                    cells[new.field.name] = result
        by_place: dict[tuple[Span | None, Span], tuple[Diagnostic, list[str]]] = {}
        for conflict, keys in conflicts.values():  # `precision` gives seven fields from one place: one conflict
            by_place.setdefault((conflict.span, conflict.related[0][1]), (conflict, keys))
        for conflict, keys in by_place.values():
            self.findings.add(replace(conflict, notes=("on {uses}",)), keys)
        for field, keys in misfits.values():
            self.findings.report(
                "E0305",
                f"`{field.name}` does not fit {{uses}}",
                field.span,
                uses=keys,
                help=_misfit_help(field.name),
            )

    def check_expectation(self, expect: ast.Expect) -> None:
        count = self.selection.mask(expect.selector).bit_count()
        if not compare(count, expect.compare, expect.count):
            self.findings.report(
                "E0304",
                f"expected {expect.compare} {expect.count} uses, found {count}",
                expect.span,
                notes=tuple(
                    f"for example {self.uses[i].key}" for i in list(indices(self.selection.mask(expect.selector)))[:3]
                ),
            )

    # -- one use -------------------------------------------------------------------------------------------------------

    def check_uses(self) -> None:
        """Checks on decided uses. Uses decided alike and of one shape are checked once."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, (use, cells) in enumerate(zip(self.uses, self.given)):
            if use.is_gemm:
                decided = tuple(sorted((name, id(cell)) for name, cell in cells.items()))
                key = (use.op, use.m, use.n, use.k, bool(use.no_dgrad), bool(use.no_wgrad), decided)
                groups.setdefault(key, []).append(i)
        undecided: list[str] = []
        for members in groups.values():
            use, cells = self.uses[members[0]], self.given[members[0]]
            keys = [self.uses[i].key for i in members]
            missing = [
                f"{gemm}.{operand}"
                for gemm in gemms_of(use)
                for operand in OPERANDS[gemm]
                if f"{gemm}.{operand}" not in cells and "precision" not in cells
            ]
            if len(missing) == sum(len(OPERANDS[gemm]) for gemm in gemms_of(use)) and missing:
                undecided += keys
                continue
            if missing:
                rule = next(iter(cells.values()))
                self.findings.report(
                    "E0303",
                    f"`{rule.rule}` decides {{uses}} in part: no rule gives {', '.join(missing)}",
                    rule.field.span,
                    uses=keys,
                    help="give every operand of fprop, dgrad and wgrad a format, or write `precision = bf16;`",
                )
                continue
            changed = self.fit.check_gemms(use, cells, keys)
            for i in members:
                self.given[i] = {**changed}
        self.report_undecided(undecided)

    def report_undecided(self, keys: list[str]) -> None:
        if not keys:
            return
        policy = self.setting("defaults", "undecided_gemm", "error")
        if policy == "bf16":
            return
        by_shape: dict[str, list[str]] = {}
        for key in keys:
            by_shape.setdefault("".join("#" if c.isdigit() else c for c in key), []).append(key)
        examples = [and_more(alike) for alike in by_shape.values()]
        is_error = policy == "error"
        self.findings.report(
            "E0303" if is_error else "W0303",
            f"no rule decides {len(keys)} GEMM{'s' if len(keys) > 1 else ''}"
            + ("" if is_error else ": they stay in bf16"),
            None,
            notes=tuple(examples[:8]) + ((f"and {len(examples) - 8} more kinds",) if len(examples) > 8 else ()),
            help="write a rule for them, for example `rule rest for op(bmm) { precision = bf16; }`, "
            "or `defaults { undecided_gemm = bf16; }`",
            severity=Severity.ERROR if is_error else Severity.WARNING,
        )

    # -- payloads ------------------------------------------------------------------------------------------------------

    def check_payloads(self) -> None:
        """What arrives quantized is read as it is: a second format would mean a second quantization."""
        for section, role, name in (("dispatch", "moe_up", "fprop.x"), ("combine_grad", "moe_down", "dgrad.dy")):
            payload = self.sections.get(section, {}).get("payload")
            if payload is None or not isinstance(payload.value, Format) or not payload.value.is_quantized:
                continue
            for use, cells in zip(self.uses, self.given):
                cell = cells.get(name, cells.get("precision"))
                if role not in use.roles or cell is None or cell.decision.value == payload.value:
                    continue
                is_error = format_of(cell).is_quantized
                self.findings.report(
                    "E0507" if is_error else "W0507",
                    f"{section} sends {payload.value.text}, but {name} of {role} is {format_of(cell).text}"
                    + (": it would be quantized twice" if is_error else ": it would read a rounded copy"),
                    cell.field.span,
                    uses=[use.key],
                    severity=Severity.ERROR if is_error else Severity.WARNING,
                    notes=("on {uses}", f"payload decided by {payload.reason.file}:{payload.reason.line}"),
                    help=f"give {name} the payload's format",
                )


def _expand(fields: Iterable[ast.Field], use: OpUse) -> list[ast.Field]:
    """Write out what a rule says in short: `precision` sets every operand and keeps no copy, `cache` without `retile`
    takes an earlier retile away."""
    given = {field.name: field for field in fields}
    expanded = dict(given)
    precision = given.get("precision")
    if precision is not None and use.is_gemm:
        for name in _OPERAND_FIELDS:
            expanded.setdefault(name, ast.Field(name, precision.value, precision.span))
        expanded.setdefault("cache.x", ast.Field("cache.x", "off", precision.span))
    for name, field in list(expanded.items()):
        if name.startswith("cache."):
            retile = "retile." + name.partition(".")[2]
            if retile == "retile.x":
                expanded.setdefault(retile, ast.Field(retile, ("", False), field.span))
    return list(expanded.values())


def _fits(name: str, use: OpUse) -> bool:
    head, _, tail = name.partition(".")
    if head in OPERANDS:
        return use.is_gemm
    if head in ("cache", "retile"):
        return tail in _CACHE_OF.get(use.op, ())
    return True


def _misfit_help(name: str) -> str:
    head, _, tail = name.partition(".")
    if head in OPERANDS:
        return "only op(linear), op(grouped_mm) and op(bmm) are GEMMs: narrow the rule"
    owners = [op.value for op, values in _CACHE_OF.items() if tail in values]
    return f"`cache {tail}` is for " + ", ".join(f"op({o})" for o in owners)
