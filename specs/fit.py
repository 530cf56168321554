"""Does what was decided for a GEMM fit together, its sizes, and the target? No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fp8c.diagnostics import Diagnostic, Severity, Span
from fp8c.formats import BF16, WHOLE, Format, ScaleKind
from fp8c.roles import OPERANDS, OpUse
from fp8c.specs import ast
from fp8c.specs.load import Spec
from fp8c.specs.merge import Given
from fp8c.specs.plan import Decision
from fp8c.specs.select import compare
from fp8c.target_record import TargetRecord

#: The size that a GEMM sums over, and for each operand which axis of its group lies along it.
REDUCTION = {"fprop": "k", "dgrad": "n", "wgrad": "m"}
_REDUCTION_AXIS = {"fprop.x": 1, "fprop.w": 1, "dgrad.dy": 1, "dgrad.w": 0, "wgrad.x": 0, "wgrad.dy": 0}


def and_more(paths: Sequence[str]) -> str:
    more = len(paths) - 1
    return f"{paths[0]}" + (f" (and {more} more use{'s' if more > 1 else ''})" if more else "")


def gemms_of(use: OpUse) -> tuple[str, ...]:
    """The GEMMs that exist for a use."""
    return tuple(g for g in OPERANDS if not (g == "dgrad" and use.no_dgrad) and not (g == "wgrad" and use.no_wgrad))


def format_of(cell: Given) -> Format:
    assert isinstance(cell.decision.value, Format)
    return cell.decision.value


def _is_format(cell: Given) -> bool:
    return isinstance(cell.decision.value, Format)


class Findings:
    """What a resolution has found so far. The same finding on several uses is one: `{uses}` in its text names the first
    use and counts the others."""

    def __init__(self) -> None:
        self._found: dict[Diagnostic, list[str]] = {}

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        return tuple(_with_uses(d, uses) if uses else d for d, uses in self._found.items())

    @property
    def has_error(self) -> bool:
        return any(d.severity is Severity.ERROR for d in self._found)

    def add(self, diagnostic: Diagnostic, uses: Sequence[str] = ()) -> None:
        self._found.setdefault(diagnostic, []).extend(uses)

    def report(
        self,
        code: str,
        message: str,
        span: Span | None,
        *,
        uses: Sequence[str] = (),
        help: str = "",
        severity: Severity = Severity.ERROR,
        notes: tuple[str, ...] = (),
        related: tuple[tuple[str, Span], ...] = (),
    ) -> None:
        self.add(Diagnostic(code, message, span, severity, notes, help, related), uses)


def _with_uses(diagnostic: Diagnostic, uses: Sequence[str]) -> Diagnostic:
    text = and_more(uses)
    message = diagnostic.message.replace("{uses}", text)
    return replace(diagnostic, message=message, notes=tuple(n.replace("{uses}", text) for n in diagnostic.notes))


class GemmFit:
    """Checks decided GEMMs and says what does not fit."""

    def __init__(
        self, spec: Spec, target: TargetRecord, sections: Mapping[str, Mapping[str, Decision]], findings: Findings
    ) -> None:
        self.spec, self.target, self.sections, self.findings = spec, target, sections, findings

    def check_gemms(self, use: OpUse, cells: dict[str, Given], keys: list[str]) -> dict[str, Given]:
        """Check the GEMMs of one use; the result is its fields without those that decide nothing any more."""
        cells = dict(cells)
        for gemm in gemms_of(use):
            names = tuple(f"{gemm}.{operand}" for operand in OPERANDS[gemm])
            a, b = (cells.get(name, cells.get("precision")) for name in names)
            assert a is not None and b is not None
            formats = (format_of(a), format_of(b))
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

    def mixed(self, gemm: str, names: tuple[str, ...], pair: tuple[Given, Given], keys: list[str]) -> None:
        first, second = pair if format_of(pair[0]).is_quantized else pair[::-1]
        fp8_name, other = names if first is pair[0] else names[::-1]
        self.findings.report(
            "E0505",
            f"{gemm} of {{uses}} mixes formats: {fp8_name} is {format_of(first).text}, {other} is {format_of(second).text}",
            first.field.span,
            uses=keys,
            related=((f"{other} comes from", second.field.span),),
            help=f"give both operands of {gemm} an FP8 format, or both `bf16`",
        )

    def check_fp8(
        self,
        gemm: str,
        names: tuple[str, ...],
        pair: tuple[Given, Given],
        cells: Mapping[str, Given],
        keys: list[str],
    ) -> bool:
        """Formats, groups, scales and promotion against the target and each other."""
        along: list[int] = []
        fits = True
        for name, cell in zip(names, pair):
            format_ = format_of(cell)
            fits &= self.check_on_target(name, format_, cell.field.span, keys)
            assert format_.group is not None
            group = format_.group[_REDUCTION_AXIS[name]]
            across = format_.group[1 - _REDUCTION_AXIS[name]]
            if group == 1 and across != 1:
                fits = False
                self.findings.report(
                    "E0508",
                    f"groups of {name} run across the sum: {gemm} adds up along "
                    f"{'columns' if _REDUCTION_AXIS[name] else 'rows'}, where [{format_.group_text}] changes its scale at every element",
                    cell.field.span,
                    notes=("on {uses}",),
                    uses=keys,
                    help=f"write [{format_.transposed.group_text}]",
                )
            along.append(group)
        if fits and WHOLE not in along and along[0] != along[1]:
            fits = False
            self.findings.report(
                "E0508",
                f"groups of {gemm} of {{uses}} end at different places: {along[0]} elements in {names[0]}, "
                f"{along[1]} in {names[1]}",
                pair[0].field.span,
                uses=keys,
                related=((f"{names[1]} comes from", pair[1].field.span),),
                help="groups of both operands need the same length along the summed axis",
            )
        if fits:
            self.check_promotion(gemm, pair, cells, along)
        return fits

    def check_on_target(self, name: str, format_: Format, span: Span, keys: list[str]) -> bool:
        target = self.target
        fits = True
        assert format_.scale is not None
        checks = (
            ("E0404", "element", format_.element.value, target.elements, "elements"),
            ("E0401", "group", format_.group_text, target.groups, "groups"),
            ("E0403", "scale", format_.scale.value, target.scales, "scales"),
        )
        for code, what, value, supported, plural in checks:
            if value not in supported:
                fits = False
                shown = f"[{value}]" if what == "group" else value
                self.findings.report(
                    code,
                    f"target {target.name} ({target.architecture}) has no {shown} {plural}, found on {name} of {{uses}}",
                    span,
                    uses=keys,
                    help=f"it has {', '.join(sorted(supported))}",
                )
        return fits

    def check_promotion(
        self, gemm: str, pair: tuple[Given, Given], cells: Mapping[str, Given], along: list[int]
    ) -> None:
        cell = cells.get(f"{gemm}.promote_every")
        every = cell.decision.value if cell else 0
        assert isinstance(every, int)
        step = self.target.promotion_step
        if not every:
            is_native = any(format_of(c).text in self.target.native_scaling for c in pair)
            if self.target.is_truncating and not is_native:
                self.findings.report(
                    "W0410",
                    f"{gemm} is not promoted: {self.target.name}'s tensor core keeps "
                    f"{self.target.accumulator_fraction_bits} fraction bits of a sum",
                    (cell or pair[0]).field.span,
                    severity=Severity.WARNING,
                    help="write `promote_every = 128;`",
                )
            return
        assert cell is not None
        group = min((g for g in along if g != WHOLE), default=0)
        if step == 0 or every % step:
            has = f"promotes in steps of {step}" if step else "has no promotion"
            self.findings.report("E0405", f"promote_every = {every}: target {self.target.name} {has}", cell.field.span)
        elif group and group % every:
            self.findings.report(
                "E0405",
                f"promote_every = {every} does not divide the group of {group}: scales change inside a partial sum",
                cell.field.span,
                help=f"write {group}, or a divisor of it",
            )

    def check_divisible(
        self, use: OpUse, gemm: str, names: tuple[str, ...], pair: tuple[Given, Given], keys: list[str]
    ) -> Given | None:
        """Sizes against groups. The result is None, or the decision that keeps this GEMM in BF16 (`partial_group = keep`)."""
        sizes = {"m": use.m, "n": use.n, "k": use.k}
        padded = self.sections.get("pad", {}).get("tokens_to")
        tokens_to = padded.value if padded else 1
        assert isinstance(tokens_to, int)
        requires = self.spec.target.requires if self.spec.target else None
        if requires is not None and not self.meets(requires, use, gemm):
            self.findings.report(
                "E0402",
                f"{gemm} of {{uses}} does not meet what the spec's target requires; its `k` is the model's {REDUCTION[gemm]}",
                requires.span,
                uses=keys,
                help="keep it in bf16 with a rule, or change the model's size",
            )
            return None
        axes = {"x": ("m", "k"), "dy": ("m", "n"), "w": ("n", "k")}
        for name, cell in zip(names, pair):
            format_ = format_of(cell)
            assert format_.group is not None
            for axis, group in zip(axes[name.partition(".")[2]], format_.group):
                size = sizes[axis]
                is_padded = axis == "m" and tokens_to % max(group, 1) == 0
                if group in (1, WHOLE) or size is None or size % group == 0 or is_padded:
                    continue
                policy = self.sections.get("pad", {}).get("partial_group")
                if policy is None:
                    self.findings.report(
                        "E0402",
                        f"{axis} = {size} is not a multiple of {group}, found on {name} ({format_.text}) of {{uses}}",
                        cell.field.span,
                        uses=keys,
                        help="write `pad { partial_group = pad; }` for a shorter last group with a scale of its own, "
                        "or `partial_group = keep;` to leave such GEMMs in bf16",
                    )
                    return None
                if policy.value == "keep":
                    self.findings.report(
                        "R0402",
                        f"{gemm} of {{uses}} stays in bf16: {axis} = {size} is not a multiple of {group}",
                        cell.field.span,
                        uses=keys,
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

    def check_cache(self, use: OpUse, cells: dict[str, Given], keys: list[str]) -> None:
        cached, wgrad = cells.get("cache.x"), cells.get("wgrad.x", cells.get("precision"))
        retile = cells.get("retile.x")
        if retile is not None and (retile.decision.value == ("", False) or cached is None or not _is_format(cached)):
            del cells["retile.x"]
            retile = None
        if cached is None or not _is_format(cached) or wgrad is None or "wgrad" not in gemms_of(use):
            return
        kept, read = format_of(cached), format_of(wgrad)
        if kept.is_quantized and not read.is_quantized and cached.rule != wgrad.rule:
            self.findings.report(
                "W0509",
                f"wgrad of {{uses}} reads {read.text}, but backward keeps {kept.text}: it would read a rounded copy",
                wgrad.field.span,
                uses=keys,
                severity=Severity.WARNING,
                related=(("cached by", cached.field.span),),
                help="write `cache x off;` beside it",
            )
        if not (kept.is_quantized and read.is_quantized):
            return
        is_exact = retile is not None and isinstance(retile.decision.value, tuple) and retile.decision.value[1]
        if is_exact and kept.element is read.element and read.scale is ScaleKind.FP32:
            assert retile is not None
            self.findings.report(
                "E0501",
                f"an exact retile cannot end in fp32 scales: wgrad.x of {{uses}} is {read.text}",
                retile.field.span,
                uses=keys,
                related=(("wgrad.x comes from", wgrad.field.span),),
                help=f"give wgrad.x the copy's scales: `{read.element.value} [{read.group_text}] scale pow2`",
            )
        group = retile.decision.value[0] if retile and isinstance(retile.decision.value, tuple) else ""
        if kept.group != read.group and group != read.group_text:
            found = f"the copy is retiled to [{group}]" if group else f"the copy has [{kept.group_text}] groups"
            self.findings.report(
                "E0506",
                f"wgrad.x reads [{read.group_text}] groups, but {found}",
                (retile or cached).field.span,
                notes=("on {uses}",),
                uses=keys,
                related=(("wgrad.x comes from", wgrad.field.span),),
                help=f"write `cache x as ... retile [{read.group_text}];`: it is one more rounding, unless it is exact",
            )
