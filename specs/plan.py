"""The precision plan: a spec resolved on one model. Every value carries the rule that decided it. No torch here.

`specs/resolve.py` makes it from role records, the passes read it through the typed accessors, `plan.lock.json` is its
JSON. A plan never refers to graph nodes: keys are `OpUse.key`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fp8c.diagnostics import Diagnostic, Span
from fp8c.formats import BF16, Format
from fp8c.roles import OPERANDS, Op, OpUse

Value = Format | str | int | float | bool | tuple[Any, ...]


@dataclass(frozen=True)
class Reason:
    """Which rule gave a value: rule name, spec, place, and the rule's `because` text."""

    rule: str
    spec: str
    file: str
    line: int
    because: str = ""


@dataclass(frozen=True)
class Decision:
    """A value, why it holds, and what it overrode (nearest first)."""

    value: Value
    reason: Reason
    overrode: tuple[tuple[Value, Reason], ...] = ()


@dataclass(frozen=True)
class GemmFormats:
    """What one GEMM of a use reads and writes. Operand order: fprop (x, w), dgrad (dy, w), wgrad (x, dy)."""

    a: Format
    b: Format
    accumulate: str = "fp32"
    promote_every: int = 0  # elements of K between promotions to FP32 registers; 0: the hardware's own accumulation
    out: Format = BF16

    @property
    def is_fp8(self) -> bool:
        return self.a.is_quantized and self.b.is_quantized


@dataclass(frozen=True)
class UsePlan:
    """All decisions for one use. Field names are dotted, as the language writes them:

    `precision`, `fprop.x`, `fprop.w`, `fprop.accumulate`, `fprop.promote_every`, `fprop.out`, likewise `dgrad.*` and
    `wgrad.*`; `cache.<operand>` (a Format, or "off"), `retile.<operand>` (a tuple: group text, exact?);
    `recompute.<value>` (True).
    """

    use: OpUse
    fields: Mapping[str, Decision] = field(default_factory=dict)

    def value(self, name: str, default: Value | None = None) -> Value | None:
        decision = self.fields.get(name)
        return default if decision is None else decision.value

    def reason(self, name: str) -> Reason | None:
        decision = self.fields.get(name)
        return None if decision is None else decision.reason

    def gemm(self, which: str) -> GemmFormats:
        """The formats of `fprop`, `dgrad` or `wgrad`; an operand nobody quantized stays at `precision`."""
        precision = self.value("precision", BF16)
        assert isinstance(precision, Format)
        a, b = (self.value(f"{which}.{operand}", precision) for operand in OPERANDS[which])
        out = self.value(f"{which}.out", precision)
        assert isinstance(a, Format) and isinstance(b, Format) and isinstance(out, Format)
        return GemmFormats(
            a,
            b,
            str(self.value(f"{which}.accumulate", "fp32")),
            int(self.value(f"{which}.promote_every", 0) or 0),  # type: ignore[arg-type]
            out,
        )

    def cache(self, operand: str) -> Format | None:
        """The format in which backward keeps `operand` (x, gate, up, ...); None: no rule, or `cache ... off`."""
        value = self.value(f"cache.{operand}")
        return value if isinstance(value, Format) else None

    def recomputes(self, name: str = "out") -> bool:
        return bool(self.value(f"recompute.{name}", False))


@dataclass(frozen=True)
class PrecisionPlan:
    """Every decision of one spec on one model and target.

    sections: `dispatch`, `combine`, `combine_grad`, `dispatch_grad`, `optimizer`, `schedule`, `pad`
    diagnostics: warnings and remarks of the resolver; they are no part of the lock
    """

    spec: str
    spec_hash: str
    target: str
    uses: Mapping[str, UsePlan] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Decision]] = field(default_factory=dict)
    diagnostics: tuple[Diagnostic, ...] = field(default=(), compare=False)

    def section(self, name: str, key: str, default: Value | None = None) -> Value | None:
        decision = self.sections.get(name, {}).get(key)
        return default if decision is None else decision.value

    def to_json(self) -> dict[str, Any]:
        """The lock file: plain JSON, stable order, every decision with its reason."""
        return {
            "schema": "fp8c.plan/1",
            "spec": self.spec,
            "spec_hash": self.spec_hash,
            "target": self.target,
            "uses": {
                key: {
                    "op": plan.use.op.value,
                    "path": plan.use.path,
                    "param": plan.use.param,
                    "kinds": sorted(plan.use.kinds),
                    "roles": sorted(plan.use.roles),
                    "shape": {"m": plan.use.m, "n": plan.use.n, "k": plan.use.k, "experts": plan.use.experts},
                    "no_dgrad": plan.use.no_dgrad,
                    "no_wgrad": plan.use.no_wgrad,
                    "source": str(plan.use.source) if plan.use.source else None,
                    "fields": {name: _decision_json(plan.fields[name]) for name in sorted(plan.fields)},
                }
                for key, plan in sorted(self.uses.items())
            },
            "sections": {
                name: {key: _decision_json(values[key]) for key in sorted(values)}
                for name, values in sorted(self.sections.items())
            },
        }

    def digest(self) -> str:
        """SHA-256 of the lock's text: two builds with the same digest decided the same for the same reasons."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _value_json(value: Value) -> Any:
    if isinstance(value, Format):
        return value.text
    if isinstance(value, tuple):
        return [_value_json(v) for v in value]
    return value


def _decision_json(decision: Decision) -> dict[str, Any]:
    return {
        "value": _value_json(decision.value),
        "reason": dict(vars(decision.reason)),
        "overrode": [{"value": _value_json(v), "reason": dict(vars(r))} for v, r in decision.overrode],
    }


# --- reading a lock ---------------------------------------------------------------------------------------------------


def plan_from_json(document: Mapping[str, Any]) -> PrecisionPlan:
    """The plan of a lock file, with everything the lock has.

    Raises: KeyError, TypeError or ValueError for what is no lock.
    """
    uses = {
        key: UsePlan(use, {name: _decision(name, d) for name, d in document["uses"][key]["fields"].items()})
        for key, use in uses_from_json(document).items()
    }
    sections = {
        name: {key: _decision(key, d) for key, d in values.items()} for name, values in document["sections"].items()
    }
    return PrecisionPlan(document["spec"], document["spec_hash"], document["target"], uses, sections)


def uses_from_json(document: Mapping[str, Any]) -> dict[str, OpUse]:
    """The role records of a lock file. Layers are found in the paths, as roles find them."""
    counts: dict[str, int] = {}
    layers = {key: _layer_of(str(use["path"])) for key, use in document["uses"].items()}
    for layer, prefix in layers.values():
        if layer is not None:
            counts[prefix] = max(counts.get(prefix, 0), layer + 1)
    uses = {}
    for key, use in document["uses"].items():
        layer, prefix = layers[key]
        shape = use["shape"]
        file, _, line = str(use["source"] or "").rpartition(":")
        uses[key] = OpUse(
            key,
            Op(use["op"]),
            use["path"],
            kinds=frozenset(use["kinds"]),
            roles=frozenset(use["roles"]),
            layer=layer,
            layer_count=counts.get(prefix, 0),
            param=use["param"],
            m=shape["m"],
            n=shape["n"],
            k=shape["k"],
            experts=shape["experts"],
            no_dgrad=use["no_dgrad"],
            no_wgrad=use["no_wgrad"],
            source=Span(file, int(line)) if line.isdecimal() else None,
        )
    return uses


def _layer_of(path: str) -> tuple[int | None, str]:
    """Index of the decoder layer, the first whole-number segment of the path, and the list it indexes."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return (None, "") if at is None else (int(parts[at]), ".".join(parts[:at]))


def _decision(name: str, document: Mapping[str, Any]) -> Decision:
    overrode = tuple((_value(name, o["value"]), Reason(**o["reason"])) for o in document["overrode"])
    return Decision(_value(name, document["value"]), Reason(**document["reason"]), overrode)


def _value(name: str, value: Any) -> Value:
    if isinstance(value, list):
        return tuple(_value(name, v) for v in value)
    if isinstance(value, str):
        if name.endswith(".accumulate"):
            return value  # a word, though it reads like a format
        try:
            return Format.parse(value)
        except ValueError:
            return value
    if not isinstance(value, (int, float)):
        raise TypeError(f"no value of {name}: {value!r}")
    return value
