"""Merge what several rules say: plain rules commute, `override` replaces, `final` forbids. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fp8c.diagnostics import Diagnostic
from fp8c.formats import Format
from fp8c.specs import ast
from fp8c.specs.load import Layer, Spec
from fp8c.specs.plan import Decision, Reason, Value


@dataclass(frozen=True)
class Given:
    """A decision with what is needed to judge the next one. One object serves every use that a rule decides alike."""

    decision: Decision
    field: ast.Field
    layer: int
    is_override: bool
    is_final: bool
    rule: str


def given_by(field: ast.Field, layer: Layer, level: int, rule: str, modifiers: ast.Modifiers, because: str) -> Given:
    assert not isinstance(field.value, ast.FormatRef), "names are written out when a spec is loaded"
    reason = Reason(rule, layer.name, layer.file, field.span.line, because)
    return Given(Decision(field.value, reason), field, level, modifiers.override, modifiers.final, rule)


def merge(old: Given | None, new: Given) -> Given | Diagnostic:
    """The decision after `new`, or the conflict."""
    if old is None:
        return new
    if old.decision.value == new.decision.value and not new.is_override:
        # Both say it; name one of them independently of their order.
        keep = old if (old.layer, old.rule) <= (new.layer, new.rule) or old.is_override else new
        return replace(keep, is_final=old.is_final or new.is_final)
    # Plain rules of one spec conflict whichever is final: which is read first must not matter.
    is_later = new.is_override or new.layer != old.layer
    if old.is_final and is_later and old.decision.value != new.decision.value:
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
            f"{value_text(new.decision.value)} and {value_text(old.decision.value)}",
            new.field.span,
            related=((f"`{old.rule}` says", old.field.span),),
            help="narrow one of the two, or write `override` before the one that should win",
        )
    overrode = ((old.decision.value, old.decision.reason), *old.decision.overrode)
    decision = Decision(new.decision.value, new.decision.reason, overrode)
    return replace(new, decision=decision, is_final=old.is_final or new.is_final)


def value_text(value: Value) -> str:
    """A value as a message shows it."""
    if isinstance(value, Format):
        return value.text
    if isinstance(value, tuple):
        return f"retile [{value[0]}]{' exact' if value[1] else ''}" if value[0] else "no retile"
    return str(value)


def merge_sections(spec: Spec) -> tuple[dict[str, dict[str, Decision]], list[Diagnostic]]:
    """The sections of a chain of specs, merged key by key, and the conflicts. Needs no model: `spec check` calls it too."""
    diagnostics: list[Diagnostic] = []
    given: dict[tuple[str, str], Given] = {}
    for level, layer in enumerate(spec.layers):
        for section in layer.sections:
            for field in section.fields:
                key = (section.name, field.name)
                new = given_by(field, layer, level, section.name, section.modifiers, section.because)
                merged = merge(given.get(key), new)
                if isinstance(merged, Diagnostic):
                    diagnostics.append(merged)
                else:
                    given[key] = merged
    sections: dict[str, dict[str, Decision]] = {}
    for (name, field_name), cell in given.items():
        sections.setdefault(name, {})[field_name] = cell.decision
    return sections, diagnostics
