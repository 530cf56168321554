"""Resolve a spec on one model: role records in, a plan with a reason for every decision out. No torch here.

Rules of one spec commute: two that give the same field of the same use different values are an error unless one says
`override`. Overrides apply in source order after the plain rules; a spec that extends another is a layer above it, and
changes a value of the layers below by `override` only. All problems are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Severity, Span
from fp8c.formats import BF16, WHOLE, Format
from fp8c.roles import OPERANDS, Op, OpUse
from fp8c.specs import ast
from fp8c.specs.load import Layer, Spec
from fp8c.specs.plan import Decision, PrecisionPlan, Reason, UsePlan, Value
from fp8c.specs.select import Selection, compare, indices
from fp8c.target_record import TargetRecord

_OPERAND_FIELDS = tuple(f"{gemm}.{operand}" for gemm, operands in OPERANDS.items() for operand in operands)
_CACHE_OF = {Op.LINEAR: ("x",), Op.GROUPED_MM: ("x",), Op.BMM: ("x",), Op.SWIGLU: ("gate", "up"), Op.NORM: ("x",)}
#: The size that a GEMM sums over, and for each operand which axis of its group lies along it.
REDUCTION = {"fprop": "k", "dgrad": "n", "wgrad": "m"}
_REDUCTION_AXIS = {"fprop.x": 1, "fprop.w": 1, "dgrad.dy": 1, "dgrad.w": 0, "wgrad.x": 0, "wgrad.dy": 0}


@dataclass(frozen=True)
class _Given:
    """A decision with what is needed to judge the next one. One object serves every use that a rule decides alike."""

    decision: Decision
    field: ast.Field
    layer: int
    is_override: bool
    is_final: bool
    rule: str


def resolve(spec: Spec, uses: Sequence[OpUse], target: TargetRecord, *, partial: bool = False) -> PrecisionPlan:
    """Decide every field of every use.

    partial: the uses are those of a part of a model (one compiled layer, one graph of several), so what matches nothing
             here may match elsewhere: unmatched rules and `expect` are not reported

    Raises DiagnosticError listing all problems; its exit code is TARGET when only the target is at fault, else SPEC.
    Warnings and remarks are in the plan's `diagnostics`.
    """
    resolver = _Resolver(spec, uses, target, partial)
    plan = resolver.run()
    errors = [d for d in resolver.diagnostics if d.severity is Severity.ERROR]
    if errors:
        is_target = all(d.code.startswith("E04") for d in errors)
        raise DiagnosticError(resolver.diagnostics, ExitCode.TARGET if is_target else ExitCode.SPEC)
    return plan


def resolve_sections(spec: Spec) -> tuple[dict[str, dict[str, Decision]], list[Diagnostic]]:
    """The sections of a chain of specs, merged key by key. Needs no model, so `spec check` calls it too."""
    diagnostics: list[Diagnostic] = []
    given: dict[tuple[str, str], _Given] = {}
    for level, layer in enumerate(spec.layers):
        for section in layer.sections:
            for field in section.fields:
                key = (section.name, field.name)
                new = _given(field, layer, level, section.name, section.modifiers, section.because)
                merged = _merge(given.get(key), new)
                if isinstance(merged, Diagnostic):
                    diagnostics.append(merged)
                else:
                    given[key] = merged
    sections: dict[str, dict[str, Decision]] = {}
    for (name, field_name), cell in given.items():
        sections.setdefault(name, {})[field_name] = cell.decision
    return sections, diagnostics


def _given(field: ast.Field, layer: Layer, level: int, rule: str, modifiers: ast.Modifiers, because: str) -> _Given:
    assert not isinstance(field.value, ast.FormatRef), "names are written out when a spec is loaded"
    reason = Reason(rule, layer.name, layer.file, field.span.line, because)
    return _Given(Decision(field.value, reason), field, level, modifiers.override, modifiers.final, rule)


def _merge(old: _Given | None, new: _Given) -> _Given | Diagnostic:
    """The decision after `new`, or the conflict."""
    if old is None:
        return new
    if old.decision.value == new.decision.value and not new.is_override:
        # Both say it; name one of them independently of their order.
        keep = old if (old.layer, old.rule) <= (new.layer, new.rule) or old.is_override else new
        return replace(keep, is_final=old.is_final or new.is_final)
    if old.is_final and old.decision.value != new.decision.value:
        return Diagnostic(
            "E0204",
            f"`{new.field.name}` was made final by `{old.rule}`, and `{new.rule}` changes it",
            new.field.span,
            related=(("made final here", old.field.span),),
            help="leave these uses out of the rule, or take `final` away",
        )
    if not new.is_override:
        return Diagnostic(
            "E0203",
            f"`{new.rule}` and `{old.rule}` give `{new.field.name}` different values: "
            f"{_text(new.decision.value)} and {_text(old.decision.value)}",
            new.field.span,
            related=((f"`{old.rule}` says", old.field.span),),
            help="narrow one of the two, or write `override` before the one that should win",
        )
    overrode = ((old.decision.value, old.decision.reason), *old.decision.overrode)
    decision = Decision(new.decision.value, new.decision.reason, overrode)
    return replace(new, decision=decision, is_final=old.is_final or new.is_final)


def _text(value: Value) -> str:
    if isinstance(value, Format):
        return value.text
    if isinstance(value, tuple):
        return f"retile [{value[0]}]{' exact' if value[1] else ''}" if value[0] else "no retile"
    return str(value)


def _and_more(paths: Sequence[str]) -> str:
    more = len(paths) - 1
    return f"{paths[0]}" + (f" (and {more} more use{'s' if more > 1 else ''})" if more else "")


class _Resolver:
    def __init__(self, spec: Spec, uses: Sequence[OpUse], target: TargetRecord, partial: bool) -> None:
        self.spec, self.uses, self.target, self.partial = spec, uses, target, partial
        self.selection = Selection(uses)
        self.diagnostics: list[Diagnostic] = []
        self.given: list[dict[str, _Given]] = [{} for _ in uses]
        self.sections: dict[str, dict[str, Decision]] = {}

    def report(
        self,
        code: str,
        message: str,
        span: Span | None,
        help: str = "",
        severity: Severity = Severity.ERROR,
        notes: tuple[str, ...] = (),
        related: tuple[tuple[str, Span], ...] = (),
    ) -> None:
        self.diagnostics.append(Diagnostic(code, message, span, severity, notes, help, related))

    def setting(self, section: str, name: str, default: str | int) -> str | int:
        decision = self.sections.get(section, {}).get(name)
        value = decision.value if decision else default
        assert isinstance(value, (str, int))
        return value

    def run(self) -> PrecisionPlan:
        self.sections, problems = resolve_sections(self.spec)
        self.diagnostics += problems
        self.check_architecture()
        for level, layer in enumerate(self.spec.layers):
            self.apply(layer, level)
            for expect in () if self.partial else layer.expects:
                self.check_expectation(expect)
        self.diagnostics += self.selection.diagnostics
        if not any(d.severity is Severity.ERROR for d in self.diagnostics):
            self.check_uses()
            self.check_payloads()
        uses = {
            use.key: UsePlan(use, {name: cell.decision for name, cell in cells.items()})
            for use, cells in zip(self.uses, self.given)
        }
        target = self.target.name
        plan = PrecisionPlan(self.spec.name, self.spec.digest, target, uses, self.sections)
        return replace(plan, diagnostics=tuple(self.diagnostics))

    def check_architecture(self) -> None:
        wanted = self.spec.target
        if wanted is None or self.target.architecture == "cpu":
            return  # the CPU reference stands in for any architecture
        names = [a.text for a in wanted.architectures]
        if self.target.architecture not in names:
            self.report(
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
        known = {(d.code, d.span, d.message) for d in self.diagnostics}
        for d in found:
            if severity is Severity.WARNING:
                d = replace(d, severity=severity, code="W" + d.code[1:])
            if (d.code, d.span, d.message) not in known:
                self.diagnostics.append(d)

    def give(self, rule: ast.Rule, layer: Layer, level: int, mask: int) -> None:
        """Put the rule's fields on every use of `mask`; conflicts are reported once for each pair of places."""
        expanded: dict[Op, list[_Given]] = {}
        merged: dict[tuple[int, int], _Given | Diagnostic] = {}
        conflicts: dict[tuple[int, int], tuple[Diagnostic, list[str]]] = {}
        misfits: dict[str, tuple[ast.Field, list[str]]] = {}
        for i in indices(mask):
            use = self.uses[i]
            if use.op not in expanded:
                fields = _expand(rule.fields, use)
                expanded[use.op] = [_given(f, layer, level, rule.name, rule.modifiers, rule.because) for f in fields]
            cells = self.given[i]
            for new in expanded[use.op]:
                if not _fits(new.field.name, use):
                    misfits.setdefault(new.field.name, (new.field, []))[1].append(use.key)
                    continue
                old = cells.get(new.field.name)
                if old is None:
                    cells[new.field.name] = new
                    continue
                pair = (id(old), id(new))
                result = merged.get(pair)
                if result is None:
                    result = merged[pair] = _merge(old, new)
                if isinstance(result, Diagnostic):
                    conflicts.setdefault(pair, (result, []))[1].append(use.key)
                else:
                    cells[new.field.name] = result
        seen: set[tuple[str, Span | None, Span]] = set()
        for conflict, keys in conflicts.values():
            place = (conflict.code, conflict.span, conflict.related[0][1])
            if place not in seen:
                seen.add(place)
                self.diagnostics.append(replace(conflict, notes=(f"on {_and_more(keys)}",)))
        for field, keys in misfits.values():
            self.report(
                "E0305",
                f"`{field.name}` does not fit {_and_more(keys)}",
                field.span,
                help=_misfit_help(field.name),
            )

    def check_expectation(self, expect: ast.Expect) -> None:
        count = self.selection.mask(expect.selector).bit_count()
        if not compare(count, expect.compare, expect.count):
            self.report(
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
                for gemm in _gemms(use)
                for operand in OPERANDS[gemm]
                if f"{gemm}.{operand}" not in cells and "precision" not in cells
            ]
            if len(missing) == sum(len(OPERANDS[gemm]) for gemm in _gemms(use)) and missing:
                undecided += keys
                continue
            if missing:
                rule = next(iter(cells.values()))
                self.report(
                    "E0303",
                    f"`{rule.rule}` decides {use.key} in part: no rule gives {', '.join(missing)}",
                    rule.field.span,
                    help="give every operand of fprop, dgrad and wgrad a format, or write `precision = bf16;`",
                )
                continue
            changed = self.check_gemms(use, cells, keys)
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
        examples = [_and_more(alike) for alike in by_shape.values()]
        is_error = policy == "error"
        self.report(
            "E0303" if is_error else "W0303",
            f"no rule decides {len(keys)} GEMM{'s' if len(keys) > 1 else ''}"
            + ("" if is_error else ": they stay in bf16"),
            None,
            notes=tuple(examples[:8]) + ((f"and {len(examples) - 8} more kinds",) if len(examples) > 8 else ()),
            help="write a rule for them, for example `rule rest for op(bmm) { precision = bf16; }`, "
            "or `defaults { undecided_gemm = bf16; }`",
            severity=Severity.ERROR if is_error else Severity.WARNING,
        )

    def check_gemms(self, use: OpUse, cells: dict[str, _Given], keys: list[str]) -> dict[str, _Given]:
        """Check the GEMMs of one use; the result is its fields without those that decide nothing any more."""
        cells = dict(cells)
        for gemm in _gemms(use):
            names = tuple(f"{gemm}.{operand}" for operand in OPERANDS[gemm])
            a, b = (cells.get(name, cells.get("precision")) for name in names)
            assert a is not None and b is not None
            formats = (_format(a), _format(b))
            if formats[0].is_quantized != formats[1].is_quantized:
                self.mixed(gemm, names, (a, b), keys)
                continue
            if formats[0].is_quantized:
                if not self.check_fp8(gemm, names, (a, b), cells, keys):
                    continue
                kept = self.check_divisible(use, gemm, names, (a, b), keys)
                if kept is not None:
                    for name in names:
                        cells[name] = kept
                    if gemm == "wgrad" and "cache.x" in cells:
                        off = ast.Field("cache.x", "off", kept.field.span)
                        cells["cache.x"] = replace(kept, decision=replace(kept.decision, value="off"), field=off)
                else:
                    continue
            for name in (f"{gemm}.accumulate", f"{gemm}.promote_every"):
                cells.pop(name, None)  # a BF16 GEMM has neither
        self.check_cache(use, cells, keys)
        return cells

    def mixed(self, gemm: str, names: tuple[str, ...], pair: tuple[_Given, _Given], keys: list[str]) -> None:
        first, second = pair if _format(pair[0]).is_quantized else pair[::-1]
        fp8_name, other = names if first is pair[0] else names[::-1]
        self.report(
            "E0505",
            f"{gemm} of {_and_more(keys)} mixes formats: {fp8_name} is {_format(first).text}, {other} is {_format(second).text}",
            first.field.span,
            related=((f"{other} comes from", second.field.span),),
            help=f"give both operands of {gemm} an FP8 format, or both `bf16`",
        )

    def check_fp8(
        self,
        gemm: str,
        names: tuple[str, ...],
        pair: tuple[_Given, _Given],
        cells: Mapping[str, _Given],
        keys: list[str],
    ) -> bool:
        """Formats, groups, scales and promotion against the target and each other."""
        before = len(self.diagnostics)
        along: list[int] = []
        for name, cell in zip(names, pair):
            format_ = _format(cell)
            self.check_on_target(name, format_, cell.field.span, keys)
            assert format_.group is not None
            group = format_.group[_REDUCTION_AXIS[name]]
            across = format_.group[1 - _REDUCTION_AXIS[name]]
            if group == 1 and across != 1:
                self.report(
                    "E0508",
                    f"groups of {name} run across the sum: {gemm} adds up along "
                    f"{'columns' if _REDUCTION_AXIS[name] else 'rows'}, where [{format_.group_text}] changes its scale at every element",
                    cell.field.span,
                    notes=(f"on {_and_more(keys)}",),
                    help=f"write [{format_.transposed.group_text}]",
                )
            along.append(group)
        if len(self.diagnostics) == before and WHOLE not in along and along[0] != along[1]:
            self.report(
                "E0508",
                f"groups of {gemm} of {_and_more(keys)} end at different places: {along[0]} elements in {names[0]}, "
                f"{along[1]} in {names[1]}",
                pair[0].field.span,
                related=((f"{names[1]} comes from", pair[1].field.span),),
                help="groups of both operands need the same length along the summed axis",
            )
        self.check_promotion(gemm, pair, cells, along)
        return not any(d.severity is Severity.ERROR for d in self.diagnostics[before:])

    def check_on_target(self, name: str, format_: Format, span: Span, keys: list[str]) -> None:
        target = self.target
        assert format_.scale is not None
        checks = (
            ("E0404", "element", format_.element.value, target.elements, "elements"),
            ("E0401", "group", format_.group_text, target.groups, "groups"),
            ("E0403", "scale", format_.scale.value, target.scales, "scales"),
        )
        for code, what, value, supported, plural in checks:
            if value not in supported:
                shown = f"[{value}]" if what == "group" else value
                self.report(
                    code,
                    f"target {target.name} ({target.architecture}) has no {shown} {plural}, found on {name} of {_and_more(keys)}",
                    span,
                    help=f"it has {', '.join(sorted(supported))}",
                )

    def check_promotion(
        self, gemm: str, pair: tuple[_Given, _Given], cells: Mapping[str, _Given], along: list[int]
    ) -> None:
        cell = cells.get(f"{gemm}.promote_every")
        every = cell.decision.value if cell else 0
        assert isinstance(every, int)
        step = self.target.promotion_step
        if not every:
            is_native = any(_format(c).text in self.target.native_scaling for c in pair)
            if self.target.is_truncating and not is_native:
                self.once(
                    Diagnostic(
                        "W0410",
                        f"{gemm} is not promoted: {self.target.name}'s tensor core keeps "
                        f"{self.target.accumulator_fraction_bits} fraction bits of a sum",
                        (cell or pair[0]).field.span,
                        Severity.WARNING,
                        help="write `promote_every = 128;`",
                    )
                )
            return
        assert cell is not None
        group = min((g for g in along if g != WHOLE), default=0)
        if step == 0 or every % step:
            has = f"promotes in steps of {step}" if step else "has no promotion"
            self.once(Diagnostic("E0405", f"promote_every = {every}: target {self.target.name} {has}", cell.field.span))
        elif group and group % every:
            self.once(
                Diagnostic(
                    "E0405",
                    f"promote_every = {every} does not divide the group of {group}: scales change inside a partial sum",
                    cell.field.span,
                    help=f"write {group}, or a divisor of it",
                )
            )

    def once(self, diagnostic: Diagnostic) -> None:
        if diagnostic not in self.diagnostics:
            self.diagnostics.append(diagnostic)

    def check_divisible(
        self, use: OpUse, gemm: str, names: tuple[str, ...], pair: tuple[_Given, _Given], keys: list[str]
    ) -> _Given | None:
        """Sizes against groups. The result is None, or the decision that keeps this GEMM in BF16 (`partial_group = keep`)."""
        sizes = {"m": use.m, "n": use.n, "k": use.k}
        tokens_to = self.setting("pad", "tokens_to", 1)
        assert isinstance(tokens_to, int)
        requires = self.spec.target.requires if self.spec.target else None
        if requires is not None and not self.meets(requires, use, gemm):
            self.report(
                "E0402",
                f"{gemm} of {_and_more(keys)} does not meet what the spec's target requires "
                f"(m {use.m}, n {use.n}, k {use.k}; {gemm} adds up along {REDUCTION[gemm]})",
                requires.span,
                help="keep it in bf16 with a rule, or change the model's size",
            )
            return None
        axes = {"x": ("m", "k"), "dy": ("m", "n"), "w": ("n", "k")}
        for name, cell in zip(names, pair):
            format_ = _format(cell)
            assert format_.group is not None
            for axis, group in zip(axes[name.partition(".")[2]], format_.group):
                size = sizes[axis]
                is_padded = axis == "m" and tokens_to % max(group, 1) == 0
                if group in (1, WHOLE) or size is None or size % group == 0 or is_padded:
                    continue
                policy = self.sections.get("pad", {}).get("partial_group")
                if policy is None:
                    self.report(
                        "E0402",
                        f"{axis} = {size} is not a multiple of {group}, found on {name} ({format_.text}) of {_and_more(keys)}",
                        cell.field.span,
                        help="write `pad { partial_group = pad; }` for a shorter last group with a scale of its own, "
                        "or `partial_group = keep;` to leave such GEMMs in bf16",
                    )
                    return None
                if policy.value == "keep":
                    self.report(
                        "R0402",
                        f"{gemm} of {_and_more(keys)} stays in bf16: {axis} = {size} is not a multiple of {group}",
                        cell.field.span,
                        severity=Severity.REMARK,
                    )
                    overrode = ((cell.decision.value, cell.decision.reason), *cell.decision.overrode)
                    return replace(cell, decision=Decision(BF16, policy.reason, overrode))
        return None

    def meets(self, condition: ast.Condition, use: OpUse, gemm: str) -> bool:
        """Whether a GEMM's own sizes meet `requires`; `k` there is the axis that the GEMM sums over."""
        turned = {
            "fprop": use,
            "dgrad": replace(use, n=use.k, k=use.n),
            "wgrad": replace(use, m=use.n, n=use.k, k=use.m),
        }[gemm]
        sizes = {"m": turned.m, "n": turned.n, "k": turned.k, "experts": turned.experts}
        known = [
            [
                compare(size % t.modulo if t.modulo else size, t.compare, t.number)
                for t in terms
                if (size := sizes[t.variable]) is not None
            ]
            for terms in condition.any_of
        ]
        return any(all(results) for results in known)

    def check_cache(self, use: OpUse, cells: dict[str, _Given], keys: list[str]) -> None:
        cached, wgrad = cells.get("cache.x"), cells.get("wgrad.x", cells.get("precision"))
        retile = cells.get("retile.x")
        if retile is not None and (retile.decision.value == ("", False) or cached is None or not _is_format(cached)):
            del cells["retile.x"]
            retile = None
        if cached is None or not _is_format(cached) or wgrad is None or "wgrad" not in _gemms(use):
            return
        kept, read = _format(cached), _format(wgrad)
        if kept.is_quantized and not read.is_quantized and cached.rule != wgrad.rule:
            self.once(
                Diagnostic(
                    "W0509",
                    f"wgrad of {_and_more(keys)} reads {read.text}, but backward keeps {kept.text}: it would read a rounded copy",
                    wgrad.field.span,
                    Severity.WARNING,
                    related=(("cached by", cached.field.span),),
                    help="write `cache x off;` beside it",
                )
            )
        if not (kept.is_quantized and read.is_quantized):
            return
        group = retile.decision.value[0] if retile and isinstance(retile.decision.value, tuple) else ""
        if kept.group != read.group and group != read.group_text:
            found = f"the copy is retiled to [{group}]" if group else f"the copy has [{kept.group_text}] groups"
            self.once(
                Diagnostic(
                    "E0506",
                    f"wgrad.x reads [{read.group_text}] groups, but {found}",
                    (retile or cached).field.span,
                    notes=(f"on {_and_more(keys)}",),
                    related=(("wgrad.x comes from", wgrad.field.span),),
                    help=f"write `cache x as ... retile [{read.group_text}];`: it is one more rounding, unless it is exact",
                )
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
                is_error = _format(cell).is_quantized
                self.once(
                    Diagnostic(
                        "E0507" if is_error else "W0507",
                        f"{section} sends {payload.value.text}, but {name} of {role} is {_format(cell).text}"
                        + (": it would be quantized twice" if is_error else ": it would read a rounded copy"),
                        cell.field.span,
                        Severity.ERROR if is_error else Severity.WARNING,
                        notes=(f"payload decided by {payload.reason.file}:{payload.reason.line}",),
                        help=f"give {name} the payload's format",
                    )
                )


def _gemms(use: OpUse) -> tuple[str, ...]:
    """The GEMMs that exist for a use."""
    return tuple(g for g in OPERANDS if not (g == "dgrad" and use.no_dgrad) and not (g == "wgrad" and use.no_wgrad))


def _format(cell: _Given) -> Format:
    assert isinstance(cell.decision.value, Format)
    return cell.decision.value


def _is_format(cell: _Given) -> bool:
    return isinstance(cell.decision.value, Format)


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
