"""`fp8c spec check --model`, `spec lock` and `spec diff`: specs on a real model, planned but not compiled.

The model is captured once, its operator uses are found, and the spec is resolved on them: what each rule matches, which
GEMMs run in which formats, and everything that does not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fp8c import driver
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, diagnostic_json
from fp8c.models import load_model
from fp8c.prepare import prepare
from fp8c.roles import OpUse
from fp8c.specs.load import Spec
from fp8c.specs.merge import value_text
from fp8c.specs.plan import Decision, PrecisionPlan
from fp8c.specs.resolve import resolve
from fp8c.specs.select import Selection
from fp8c.target_record import TargetRecord
from fp8c.tools.compile_command import Request, check_batch


@dataclass
class RolesSession(driver.Session):
    """A session that stops as soon as it knows the operator uses of the step."""

    uses: tuple[OpUse, ...] = ()

    def resolve(self, uses: Sequence[Any]) -> NoReturn:
        self.uses = tuple(uses)
        raise driver.PlanningDone


def find_uses(request: Request) -> tuple[tuple[OpUse, ...], RolesSession]:
    """The operator uses of a model's step. Raises DiagnosticError for what the model cannot do."""
    base = driver.new_session(request.spec, request.target)
    session = RolesSession(base.spec, base.target)
    loaded = load_model(
        request.model, weights=request.weights, overrides=request.overrides, batch=request.batch, seq=request.seq
    )
    check_batch(loaded)
    prepare(loaded.module, loaded.example_inputs)
    driver.trace_step(loaded.step(), loaded.example_inputs, session)
    return session.uses, session


@dataclass(frozen=True)
class RuleMatch:
    """How many uses a rule's selector matches; `kept` counts those where it still decides something in the end."""

    rule: str
    spec: str
    matched: int
    kept: int


@dataclass(frozen=True)
class OnModel:
    """A spec resolved on a model. `plan` is None when `diagnostics` has an error."""

    model: str
    target: str
    uses: int
    rules: tuple[RuleMatch, ...]
    gemms: dict[str, int]  # "fprop e4m3[1x128] fp32 x e4m3[128x128] fp32" -> how many
    diagnostics: tuple[Diagnostic, ...]
    exit_code: ExitCode
    plan: PrecisionPlan | None = field(repr=False, default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "target": self.target,
            "uses": self.uses,
            "rules": [vars(rule) for rule in self.rules],
            "gemms": self.gemms,
            "diagnostics": [diagnostic_json(d) for d in self.diagnostics],
        }

    def text(self) -> str:
        """The table that the command prints."""
        lines = [f"on {self.model} for {self.target}: {self.uses} operator uses"]
        width = max((len(f"{r.spec}.{r.rule}") for r in self.rules), default=0)
        lines.append(f"  {'rule':<{width}}  matches  decides")
        lines += [f"  {f'{r.spec}.{r.rule}':<{width}}  {r.matched:7}  {r.kept:7}" for r in self.rules]
        lines.append(f"  {'GEMMs':<{width}}")
        lines += [f"  {count:7}  {text}" for text, count in self.gemms.items()]
        return "\n".join(lines)


def check_on_model(request: Request) -> OnModel:
    """Resolve a spec on a model; what is wrong with the spec is in the result.

    Raises: DiagnosticError for what is wrong with the model.
    """
    uses, session = find_uses(request)
    return check_on_uses(session.spec, uses, session.target, request.model)


def check_on_uses(spec: Spec, uses: Sequence[OpUse], target: TargetRecord, model: str) -> OnModel:
    """As `check_on_model`, on role records."""
    selection = Selection(uses)
    matched = [
        (layer.name, rule.name, selection.mask(rule.selector).bit_count())
        for layer in spec.layers
        for rule in layer.rules
    ]
    try:
        plan = resolve(spec, uses, target)
    except DiagnosticError as e:
        rules = tuple(RuleMatch(rule, name, count, 0) for name, rule, count in matched)
        return OnModel(model, target.name, len(uses), rules, {}, e.diagnostics, e.exit_code)
    kept: Counter[tuple[str, str]] = Counter()
    gemms: Counter[str] = Counter()
    for use_plan in plan.uses.values():
        kept.update({(d.reason.spec, d.reason.rule) for d in use_plan.fields.values()})
        if use_plan.use.is_gemm:
            gemms.update(_gemms(plan, use_plan.use))
    rules = tuple(RuleMatch(rule, name, count, kept[name, rule]) for name, rule, count in matched)
    ordered = dict(sorted(gemms.items(), key=lambda item: (item[0].split()[0], -item[1], item[0])))
    return OnModel(model, target.name, len(uses), rules, ordered, plan.diagnostics, ExitCode.OK, plan)


def _gemms(plan: PrecisionPlan, use: OpUse) -> list[str]:
    missing = {"dgrad": use.no_dgrad, "wgrad": use.no_wgrad}
    formats = [(name, plan.uses[use.key].gemm(name)) for name in ("fprop", "dgrad", "wgrad") if not missing.get(name)]
    return [f"{name} {chosen.a.text} x {chosen.b.text} -> {chosen.out.text}" for name, chosen in formats]


@dataclass(frozen=True)
class Difference:
    """A field that two plans decide differently, with every use where they do so in the same way.

    `old` and `new` are values as messages show them, "-" where a plan decides nothing; `reason` is the rule and line
    that gave the new value (the old one where there is none).
    """

    field: str
    old: str
    new: str
    reason: str
    uses: tuple[str, ...]


def diff_plans(old: PrecisionPlan, new: PrecisionPlan) -> tuple[Difference, ...]:
    """Decisions that differ, the most frequent first. A section's keys are fields such as `dispatch.payload`."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for key, prefix, before, after in _paired(old, new):
        for name in sorted({*before, *after}):
            a, b = before.get(name), after.get(name)
            if a is not None and b is not None and a.value == b.value:
                continue
            left, right = ("-" if d is None else value_text(d.value) for d in (a, b))
            reason = (b or a).reason  # type: ignore[union-attr]
            how = (prefix + name, left, right, f"{reason.rule} ({reason.file}:{reason.line})")
            found.setdefault(how, []).append(key)
    differences = (Difference(*how, tuple(keys)) for how, keys in found.items())
    return tuple(sorted(differences, key=lambda d: (-len(d.uses), d.field, d.old, d.new, d.reason)))


_Decisions = Mapping[str, Decision]


def _paired(old: PrecisionPlan, new: PrecisionPlan) -> Iterator[tuple[str, str, _Decisions, _Decisions]]:
    """Uses and sections of either plan: key, what goes before a field's name, decisions of both."""
    nothing: _Decisions = {}
    for key in dict.fromkeys((*old.uses, *new.uses)):
        before, after = (p.uses[key].fields if key in p.uses else nothing for p in (old, new))
        yield key, "", before, after
    for name in sorted({*old.sections, *new.sections}):
        yield name, f"{name}.", old.sections.get(name, nothing), new.sections.get(name, nothing)


def diff_on_model(request: Request, other: Spec) -> tuple[OnModel, OnModel]:
    """Two specs on one model, captured once: `request.spec`, then `other`."""
    uses, session = find_uses(request)
    return (
        check_on_uses(session.spec, uses, session.target, request.model),
        check_on_uses(other, uses, session.target, request.model),
    )


def diff_text(differences: Sequence[Difference]) -> str:
    lines = []
    for d in differences:
        more = f" and {len(d.uses) - 1} more" if len(d.uses) > 1 else ""
        lines += [f"{d.field}: {d.old} -> {d.new}", f"    {d.uses[0]}{more}; {d.reason}"]
    return "\n".join(lines)
