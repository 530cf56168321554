"""`fp8c spec check --model`, `spec lock` and `spec diff`: specs on a real model, planned but not compiled.

The model is captured once, its operator uses are found, and the spec is resolved on them: what each rule matches, which
GEMMs run in which formats, and everything that does not fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fp8c import driver
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, diagnostic_json
from fp8c.models import load_model
from fp8c.prepare import prepare
from fp8c.roles import OpUse
from fp8c.specs.load import Spec
from fp8c.specs.plan import PrecisionPlan
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


def diff_on_model(request: Request, other: Spec) -> tuple[OnModel, OnModel]:
    """Two specs on one model, captured once: `request.spec`, then `other`."""
    uses, session = find_uses(request)
    return (
        check_on_uses(session.spec, uses, session.target, request.model),
        check_on_uses(other, uses, session.target, request.model),
    )
