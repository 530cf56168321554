"""What two plans decide differently. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fp8c.specs.merge import value_text
from fp8c.specs.plan import Decision, PrecisionPlan


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


def diff_text(differences: Sequence[Difference]) -> str:
    lines = []
    for d in differences:
        more = f" and {len(d.uses) - 1} more" if len(d.uses) > 1 else ""
        lines += [f"{d.field}: {d.old} -> {d.new}", f"    {d.uses[0]}{more}; {d.reason}"]
    return "\n".join(lines)
