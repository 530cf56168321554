"""Which rules, modules and operands make the error: delta debugging over what a spec quantizes.

A part (one operand of one GEMM, or one copy kept for backward) is *switched off* by computing with its shadow, the value
it was quantized from. The question is which smallest set of parts has to be switched off for the error to fall below a
limit: a single defect is such a set, and so are the two operands that a model with outliers should keep in BF16.

Zeller's ddmin answers it in four rounds, each on what the one before left: rules, layers, modules, parts. Parts that lose
more than their format explains come first, the rest only where they do not explain the error. Either set is 1-minimal:
with any one of it switched on again the error is above the limit, or above what the set can reach.
Source: A. Zeller, R. Hildebrandt, Simplifying and Isolating Failure-Inducing Input, IEEE TSE 28(2), 2002, section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor

from fp8c.pipeline import Rewritten
from fp8c.tools.numerics.faults import Fault, broken
from fp8c.tools.numerics.measure import SLACK, Numerics, add_outputs, ideal_value
from fp8c.tools.numerics.step import CapturedStep, Part, Reading, RunResult

Metric = Literal["worst", "gradient", "loss"]
METRICS: dict[str, str] = {
    "worst": "largest error of an FP8 GEMM's output, in units of its tolerance",
    "gradient": "relative error of all gradients together",
    "loss": "relative error of the loss",
}

T = TypeVar("T", bound=Hashable)


def minimal_set(items: Sequence[T], holds: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """A 1-minimal subsequence on which `holds`, given that it holds on all of `items` (ddmin).

    Calls of `holds`: at most len(items)**2 + 3 len(items); about log2(len(items)) for each item of the answer.
    """
    kept, parts = tuple(items), 2
    if holds(()):
        return ()
    while len(kept) > 1:
        size = -(-len(kept) // parts)
        chunks = [kept[i : i + size] for i in range(0, len(kept), size)]
        smaller = next((chunk for chunk in chunks if len(chunk) < len(kept) and holds(chunk)), None)
        if smaller is not None:
            kept, parts = smaller, 2
            continue
        rests = (tuple(x for x in kept if x not in chunk) for chunk in chunks) if len(chunks) > 2 else iter(())
        rest = next((r for r in rests if holds(r)), None)
        if rest is not None:
            kept, parts = rest, max(parts - 1, 2)
        elif parts >= len(kept):
            break
        else:
            parts = min(2 * parts, len(kept))
    return kept


@dataclass
class Trials:
    """Runs of the step with some parts switched off; each set is run once.

    The tolerance of gradients is that of the whole spec, whatever is switched off.
    """

    step: CapturedStep
    rewritten: Rewritten
    batches: Sequence[Any]
    metric: Metric
    fault: Fault | None = None
    runs: int = 0
    _references: list[tuple[list[Any], RunResult, RunResult]] = field(default_factory=list)
    _known: dict[frozenset[Part], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for batch in self.batches:
            inputs = self.step.inputs(batch)
            bf16 = self.step.run_bf16(inputs)
            ideal = self.step.run(self.rewritten, inputs, ideal_value, bf16.routing)
            self._references.append((inputs, bf16, ideal))

    def numerics(self, off: frozenset[Part], rewritten: Rewritten | None = None) -> Numerics:
        def read(reading: Reading) -> Tensor | None:
            if reading.part in off:
                return reading.shadow
            return broken(reading, self.fault) if self.fault is not None else None

        found = Numerics("", "", "")
        for inputs, bf16, ideal in self._references:
            result = self.step.run(rewritten or self.rewritten, inputs, read, bf16.routing)
            add_outputs(found, bf16, result, ideal)
        self.runs += 1
        return found

    def error(self, off: Iterable[Part] = ()) -> float:
        """The metric with these parts switched off."""
        key = frozenset(off)
        if key not in self._known:
            self._known[key] = value_of(self.numerics(key), self.metric)
        return self._known[key]

    def error_of(self, rewritten: Rewritten) -> float:
        """The metric of the step under another spec."""
        return value_of(self.numerics(frozenset(), rewritten), self.metric)

    def tolerance(self) -> float:
        """The limit that the formats give the metric: what ideal rounding explains."""
        found = self.numerics(frozenset())
        match self.metric:
            case "worst":
                return 1.0
            case "gradient":
                return found.total_gradient.tolerance
            case "loss":  # BF16 can't say a difference below its own rounding
                return max(2.0**-8, *(math.sqrt(2) * abs(ideal / bf16 - 1) for bf16, _, ideal in found.losses))


def value_of(found: Numerics, metric: Metric) -> float:
    match metric:
        case "worst":
            outputs = [o for o in found.outputs.values() if o.is_quantized]
            return max((o.relative_error / o.tolerance for o in outputs), default=0.0)
        case "gradient":
            return found.total_gradient.relative_error
        case "loss":
            return max((abs(spec / bf16 - 1) for bf16, spec, _ in found.losses), default=0.0)


@dataclass(frozen=True)
class Blamed:
    """One part of the answer, with the rule that decided it and the metric if it alone is switched off."""

    part: Part
    format: str
    rule: str
    place: str  # file:line
    error_without: float
    excess: float  # its own error over ideal rounding's


@dataclass(frozen=True)
class Suspect:
    """A place in the model where operands lose more than their format explains, whatever the metric says."""

    place: str  # the longest module path they share
    parts: tuple[Part, ...]
    of: int  # how many FP8 operands are below that path
    worst_excess: float


def suspects_of(measured: Numerics) -> tuple[Suspect, ...]:
    """Operands outside their tolerance, together by layer."""
    by_layer: dict[Hashable, list[Part]] = {}
    for part, stats in measured.operands.items():
        if not stats.is_within:
            by_layer.setdefault(_layer_of(measured, part), []).append(part)
    found = []
    for parts in by_layer.values():
        paths = [part.use.partition("#")[0].partition(":")[0].split(".") for part in parts]
        shared = list(itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths)))
        place = ".".join(names[0] for names in shared)
        below = [p for p in measured.operands if f"{p.use}.".startswith(f"{place}.") or not place]
        worst = max(measured.operands[part].excess for part in parts)
        found.append(Suspect(place, tuple(parts), len(below), worst))
    return tuple(found)


@dataclass(frozen=True)
class Bisection:
    """What `--bisect` found. `blamed` is empty when the error is within the limit, or not due to any format."""

    metric: Metric
    limit: float
    error: float
    error_without: float  # with the answer switched off
    error_bf16: float  # with everything switched off
    rules: tuple[str, ...]
    blamed: tuple[Blamed, ...]
    suspects: tuple[Suspect, ...]
    runs: int

    @property
    def is_within(self) -> bool:
        return self.error <= self.limit

    @property
    def is_elsewhere(self) -> bool:
        """No format explains the error: it stays with everything switched off."""
        return not self.error_bf16 <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {
            **{
                name: getattr(self, name)
                for name in ("metric", "limit", "error", "error_without", "error_bf16", "runs")
            },
            "rules": list(self.rules),
            "suspects": [
                {"place": s.place, "operands": [str(p) for p in s.parts], "of": s.of, "worst_excess": s.worst_excess}
                for s in self.suspects
            ],
            "blamed": [
                {"use": b.part.use, "gemm": b.part.gemm, "operand": b.part.operand, "format": b.format}
                | {"rule": b.rule, "place": b.place, "error_without": b.error_without, "excess": b.excess}
                for b in self.blamed
            ],
        }

    def lines(self) -> list[str]:
        what = f"{METRICS[self.metric]}: {self.error:.4g}, limit {self.limit:.4g}"
        if self.is_within:
            lines = [f"bisect: within the limit ({what})"]
        elif self.is_elsewhere:
            still = f"with all of them switched off it is still {self.error_bf16:.4g}"
            lines = [f"bisect: no format makes the error ({what}; {still})"]
        else:
            lines = self._blamed_lines(what)
        for suspect in self.suspects:
            count = f"{len(suspect.parts)} of {suspect.of} FP8 operands"
            excess = f"up to {suspect.worst_excess:.2g} times ideal rounding's error"
            lines.append(f"  outside their tolerance: {count} of {suspect.place or 'the model'}, {excess}")
        return lines

    def _blamed_lines(self, what: str) -> list[str]:
        head = f"bisect: {len(self.blamed)} operand{'s' if len(self.blamed) > 1 else ''} of {', '.join(self.rules)}"
        lines = [f"{head} ({what}; {self.error_without:.4g} without; {self.runs} runs)"]
        width = max(len(str(b.part)) for b in self.blamed)
        for b in self.blamed:
            own = f"{b.excess:.2g} times ideal rounding's error, " if b.excess > math.sqrt(SLACK) else ""
            lines.append(f"  {b.part!s:<{width}}  {b.format}, by {b.rule} ({b.place})")
            lines.append(f"  {'':<{width}}  {own}{b.error_without:.4g} without it alone")
        return lines


def bisect(trials: Trials, measured: Numerics, limit: float | None = None) -> Bisection:
    """Name the smallest set of parts that has to be switched off for the error to be within the limit.

    measured: the same step and fault, measured: it lists the parts and their rules
    limit:    in the metric's unit; by default what the formats explain
    """
    parts = tuple(measured.operands)
    limit = trials.tolerance() if limit is None else limit
    error, bf16 = trials.error(), trials.error(parts)
    if error <= limit or not bf16 <= limit:
        return Bisection(trials.metric, limit, error, error, bf16, (), (), suspects_of(measured), trials.runs)
    suspects = tuple(part for part in parts if not measured.operands[part].is_within)
    kept: tuple[Part, ...] = ()
    if suspects:  # they lose more than their format explains: begin with them, whatever else there is
        kept = _smallest(trials, measured, suspects, (), max(limit, trials.error(suspects)))
    if trials.error(kept) > limit:
        rest = tuple(part for part in parts if part not in kept)
        kept += _smallest(trials, measured, rest, kept, limit)
    without = trials.error(kept)
    blamed = []
    for part in kept:
        reason = measured.reasons.get(part)
        place = f"{reason.file}:{reason.line}" if reason else "-"
        rule = reason.rule if reason else "-"
        stats = measured.operands[part]
        blamed.append(Blamed(part, stats.format, rule, place, trials.error((part,)), stats.excess))
    rules = tuple(dict.fromkeys(b.rule for b in blamed))
    return Bisection(
        trials.metric, limit, error, without, bf16, rules, tuple(blamed), suspects_of(measured), trials.runs
    )


def _smallest(
    trials: Trials, measured: Numerics, parts: tuple[Part, ...], also: tuple[Part, ...], limit: float
) -> tuple[Part, ...]:
    """A 1-minimal subset of `parts` that brings the error within `limit` when it is switched off together with `also`."""
    kept = parts
    for level in (_rule_of, _layer_of, _module_of, None):
        groups: dict[Hashable, list[Part]] = {}
        for part in kept:
            groups.setdefault(part if level is None else level(measured, part), []).append(part)

        def holds(chosen: tuple[Hashable, ...], groups: dict[Hashable, list[Part]] = groups) -> bool:
            return trials.error((*also, *(part for name in chosen for part in groups[name]))) <= limit

        kept = tuple(part for name in minimal_set(tuple(groups), holds) for part in groups[name])
    return kept


def _rule_of(measured: Numerics, part: Part) -> Hashable:
    reason = measured.reasons.get(part)
    return (reason.spec, reason.rule) if reason else ("", "")


def _layer_of(measured: Numerics, part: Part) -> Hashable:
    place = measured.places.get(part.use)
    return place.layer if place else None


def _module_of(measured: Numerics, part: Part) -> Hashable:
    return part.use
