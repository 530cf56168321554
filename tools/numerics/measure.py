"""`fp8c numerics`: BF16 and FP8 side by side, operand by operand, and the first layer that loses more than its formats explain.

Three runs of one batch: BF16; the spec; and the spec with *ideal rounding*, in which every operand is rounded to its
element's mantissa and nothing else: no range, no shared scale, no underflow. What the ideal run loses is what the
element alone costs this model, so it is the measure of everything: a value is within tolerance when its error is at
most `SLACK` (half a bit, 3 dB) above the ideal run's. An operand that leaves the tolerance loses bits to its groups, its
scales or a defect; an output that does stands behind one.

Error energies of several batches are added before ratios are taken.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp8c.backends.reference.quantize import expert_blocks
from fp8c.formats import MANTISSA_BITS, MAX, Format
from fp8c.pipeline import Rewritten
from fp8c.specs.plan import Reason
from fp8c.tools.numerics.faults import Fault, broken
from fp8c.tools.numerics.step import CapturedStep, Part, Reading, RunResult

SCHEMA = "fp8c.numerics/1"

#: Error energy within tolerance, in units of ideal rounding's: half a bit of the mantissa.
SLACK = 2.0
#: Multiples of a scale at which ideal rounding is evaluated for FP32 scales: where in its binade a value falls is
#: chance then, and 1, 3/2 or 1/4 would otherwise round without an error.
_PHASES = (1.0, 2**0.25, 2**0.5, 2**0.75)


def round_mantissa(x: Tensor, bits: int) -> Tensor:
    """x in FP32 rounded to nearest even with `bits` mantissa bits behind the leading one, exponents without limits."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2.0 ** (bits + 1)) * 2.0 ** -(bits + 1), exponent)


def ideal_value(reading: Reading) -> Tensor:
    """What the operand would be if its element's mantissa were all that rounded it, as often as it was rounded."""
    bits = MANTISSA_BITS[reading.format.element]
    value = reading.shadow
    for phase in range(reading.roundings):  # a second rounding at the same phase would do nothing
        value = round_mantissa(value * _PHASES[phase % 4], bits) / _PHASES[phase % 4]
    return value


def ideal_noise(reading: Reading) -> float:
    """Error energy of ideal rounding; each further rounding adds its own."""
    bits, x = MANTISSA_BITS[reading.format.element], reading.shadow
    has_free_scales = reading.format.scale is not None and reading.format.scale.value == "fp32"
    phases = _PHASES if has_free_scales else _PHASES[:1]
    energies = [_energy(round_mantissa(x * p, bits) / p - x) for p in phases]
    return reading.roundings * sum(energies) / len(energies)


def _energy(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))


def decibel(ratio: float) -> float:
    """10 log10, with the infinities that belong to 0 and x/0; NaN stays NaN."""
    if math.isnan(ratio):
        return math.nan
    return 10 * math.log10(ratio) if 0 < ratio < math.inf else (-math.inf if ratio <= 0 else math.inf)


def _ratio(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 1.0)


@dataclass
class OperandStats:
    """Sums over all values of one part. `noise`: against its own shadow; `drift`: against the BF16 run's operand."""

    format: str
    roundings: int
    signal: float = 0.0
    noise: float = 0.0
    ideal: float = 0.0
    drift: float = 0.0
    drift_signal: float = 0.0
    count: int = 0
    nonzero: int = 0
    underflow: int = 0
    saturated: int = 0
    scales: Counter[int] = field(default_factory=Counter)  # floor(log2(scale)) -> how many scales

    def add(self, reading: Reading, value: Tensor, bf16: Tensor | None) -> None:
        """`value`: what the GEMM computes with."""
        shadow = reading.shadow
        self.signal += _energy(shadow)
        self.noise += _energy(value - shadow)
        self.ideal += ideal_noise(reading)
        if bf16 is not None and bf16.shape == value.shape:
            self.drift += _energy(value - bf16.float())
            self.drift_signal += _energy(bf16)
        self.count += shadow.numel()
        self.nonzero += int((shadow != 0).sum())
        self.underflow += int(((shadow != 0) & (value == 0)).sum())
        self.saturated += int(_saturated(reading).sum())
        self.scales.update(_scale_exponents(reading))

    @property
    def sqnr_db(self) -> float:
        return decibel(_ratio(self.signal, self.noise))

    @property
    def tolerance_db(self) -> float:
        return decibel(_ratio(self.signal, SLACK * self.ideal))

    @property
    def bf16_db(self) -> float:
        """Against the operand of the BF16 run: with everything that went wrong in front of it."""
        return decibel(_ratio(self.drift_signal, self.drift)) if self.drift_signal else math.nan

    @property
    def excess(self) -> float:
        """Error over ideal rounding's, as a factor on the amplitude; NaN errors count as infinite."""
        if math.isnan(self.noise):
            return math.inf
        return math.sqrt(_ratio(self.noise, self.ideal)) if self.noise > 1e-12 * self.signal else 0.0

    @property
    def is_within(self) -> bool:
        return self.excess <= math.sqrt(SLACK)

    @property
    def underflow_share(self) -> float:
        return self.underflow / self.nonzero if self.nonzero else 0.0

    @property
    def saturated_share(self) -> float:
        return self.saturated / self.count if self.count else 0.0


def _saturated(reading: Reading) -> Tensor:
    """Values cut off at the element's largest: they lost more than roundings can take."""
    largest, unit = MAX[reading.format.element], 2.0 ** -(MANTISSA_BITS[reading.format.element] + 1)
    if reading.payload.dtype == torch.uint8:  # packed E5M6: ask the values
        return torch.zeros(1)
    at_limit = reading.payload.float().abs() == largest
    return at_limit & (reading.shadow.abs() > reading.value.abs() * (1 + reading.roundings * unit))


def _scale_exponents(reading: Reading) -> Counter[int]:
    """Exponents of the scales that some value uses."""
    scale = reading.scale.float()
    if reading.offs is not None:  # [N, T/g + E]: scales that no expert owns hold 1
        group = reading.format.group
        assert group is not None
        owned = torch.zeros(scale.shape[-1], dtype=torch.bool)
        for _, _, groups in expert_blocks(reading.offs, group[1], scale.shape[-1]):
            owned[groups] = True
        scale = scale[..., owned]
    finite = scale[scale.isfinite() & (scale > 0)]
    exponents, counts = torch.frexp(finite)[1].sub(1).unique(return_counts=True)  # type: ignore[no-untyped-call]
    return Counter(dict(zip(exponents.tolist(), counts.tolist())))


@dataclass
class ErrorStats:
    """A tensor of the spec's run, and of the ideal run, against BF16's."""

    signal: float = 0.0
    noise: float = 0.0
    ideal: float = 0.0
    dot: float = 0.0
    energy: float = 0.0
    is_quantized: bool = False  # the GEMM that made it reads quantized operands

    def add(self, bf16: Tensor, found: Tensor, ideal: Tensor) -> None:
        reference = bf16.float()
        self.signal += _energy(reference)
        self.noise += _energy(found.float() - reference)
        self.ideal += _energy(ideal.float() - reference)
        self.dot += float((reference * found.float()).sum(dtype=torch.float64))
        self.energy += _energy(found)

    @property
    def relative_error(self) -> float:
        if math.isnan(self.noise):
            return math.inf
        return math.sqrt(_ratio(self.noise, self.signal)) if self.noise else 0.0

    @property
    def tolerance(self) -> float:
        """Relative error that the formats explain; never below BF16's own rounding."""
        return max(math.sqrt(SLACK * _ratio(self.ideal, self.signal)) if self.ideal else 0.0, 2.0**-8)

    @property
    def cosine(self) -> float:
        norms = math.sqrt(self.signal * self.energy)
        return self.dot / norms if norms else 1.0

    @property
    def is_within(self) -> bool:
        return self.relative_error <= self.tolerance


@dataclass(frozen=True)
class Place:
    """Where in the model a use stands."""

    layer: int | None
    roles: str
    reason: Reason | None = None

    @property
    def layer_text(self) -> str:
        return "-" if self.layer is None else str(self.layer)


@dataclass
class Numerics:
    """What `fp8c numerics` found. Operands and outputs are in the order in which they were first read or made."""

    model: str
    spec: str
    target: str
    batches: int = 0
    losses: list[tuple[float, float, float]] = field(default_factory=list)  # BF16, the spec, ideal rounding
    operands: dict[Part, OperandStats] = field(default_factory=dict)
    outputs: dict[tuple[str, str], ErrorStats] = field(default_factory=dict)
    gradients: dict[str, ErrorStats] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    reasons: dict[Part, Reason] = field(default_factory=dict)
    rerouted: float = 0.0
    fault: str = ""

    @property
    def loss_error(self) -> float:
        """Mean over batches of the relative difference of the losses, with its sign."""
        return sum(b / a - 1 for a, b, _ in self.losses) / max(1, len(self.losses))

    @property
    def total_gradient(self) -> ErrorStats:
        """All gradients as one vector. A parameter that BF16 gives no gradient counts with its error alone."""
        total = ErrorStats()
        for one in self.gradients.values():
            for name in ("signal", "noise", "ideal", "dot", "energy"):
                setattr(total, name, getattr(total, name) + getattr(one, name))
        return total

    def leaving(self) -> Iterator[tuple[str, str, float, float]]:
        """(what, which, error over ideal rounding's, the limit of that) for everything outside its tolerance."""
        limit = math.sqrt(SLACK)
        for part, stats in self.operands.items():
            if not stats.is_within:
                yield "operand", str(part), stats.excess, limit
        for (use, gemm), output in self.outputs.items():
            if not output.is_within:
                yield "output", f"{use} {gemm}", output.relative_error / output.tolerance * limit, limit
        for name, gradient in self.gradients.items():
            if not gradient.is_within:
                yield "gradient", name, gradient.relative_error / gradient.tolerance * limit, limit

    def first_leaving(self) -> tuple[str, str] | None:
        """The first part, in the order the step runs, that leaves the tolerance: (its name, what it is of)."""
        ranks = {use: i for i, use in enumerate(dict.fromkeys((*(p.use for p in self.operands), *self.places)))}
        found: list[tuple[int, int, str, str]] = []
        order = {part: i for i, part in enumerate(self.operands)}
        for part, stats in self.operands.items():
            if not stats.is_within:
                found.append((order[part], 0, str(part), part.use))
        for i, ((use, gemm), output) in enumerate(self.outputs.items()):
            if not output.is_within:  # after the operands it was made of
                behind = max(
                    (order[p] for p in self.operands if p.use == use and p.gemm == gemm), default=ranks.get(use, i)
                )
                found.append((behind, 1, f"{use} {gemm} output", use))
        return min(found)[2:] if found else None

    @property
    def is_within(self) -> bool:
        return next(self.leaving(), None) is None


def measure(
    step: CapturedStep,
    rewritten: Rewritten,
    batches: Sequence[Any],
    fault: Fault | None = None,
    *,
    model: str = "",
) -> Numerics:
    """Run every batch three times and add up what is found. Raises: DiagnosticError for a fault that fits nothing."""
    plan = rewritten.plan
    found = Numerics(model, plan.spec, plan.target, fault=str(fault or ""))
    for key, use_plan in plan.uses.items():
        use = use_plan.use
        found.places[key] = Place(use.layer, " ".join(sorted(use.roles)) or " ".join(sorted(use.kinds)))
    shares = []
    for batch in batches:
        inputs = step.inputs(batch)
        bf16 = step.run_bf16(inputs)
        spec = step.run(rewritten, inputs, _measuring(found, rewritten, bf16, fault), bf16.routing)
        ideal = step.run(rewritten, inputs, ideal_value, bf16.routing)
        add_outputs(found, bf16, spec, ideal)
        shares.append(spec.rerouted)
        found.batches += 1
    found.rerouted = sum(shares) / max(1, len(shares))
    return found


def _measuring(found: Numerics, rewritten: Rewritten, bf16: RunResult, fault: Fault | None) -> Any:
    def read(reading: Reading) -> Tensor | None:
        replaced = broken(reading, fault) if fault is not None else None
        if reading.part not in found.operands:
            found.operands[reading.part] = OperandStats(reading.format.text, reading.roundings)
            reason = reason_of(rewritten, reading.part)
            if reason is not None:
                found.reasons[reading.part] = reason
        value = reading.value if replaced is None else replaced
        found.operands[reading.part].add(reading, value, bf16.operands.get(reading.part))
        return replaced

    return read


def reason_of(rewritten: Rewritten, part: Part) -> Reason | None:
    """The rule that decided a part's format."""
    if part.gemm == "cache":
        planned = [v for v in rewritten.ctx.saved.values() if v.reason is not None and v.name.endswith("_q")]
        role = {n.name: n.meta.get("fp8c_role") for n in rewritten.halves.saved()}
        return next((v.reason for v in planned if getattr(role.get(v.name), "use", v.name) == part.use), None)
    plan = rewritten.plan.uses[part.use]
    return plan.reason(f"{part.gemm}.{part.operand}") or plan.reason("precision")


def add_outputs(found: Numerics, bf16: RunResult, spec: RunResult, ideal: RunResult) -> None:
    found.losses.append((bf16.loss, spec.loss, ideal.loss))
    for key, value in spec.outputs.items():
        if key in bf16.outputs and bf16.outputs[key].shape == value.shape:
            stats = found.outputs.setdefault(key, ErrorStats(is_quantized=key in spec.quantized))
            stats.add(bf16.outputs[key], value, ideal.outputs[key])
    for name, value in spec.gradients.items():
        if name in bf16.gradients:
            found.gradients.setdefault(name, ErrorStats()).add(bf16.gradients[name], value, ideal.gradients[name])


def by_layer(found: Numerics) -> Mapping[int | None, list[Part]]:
    """Parts of each layer, layers in the order in which the step meets them."""
    layers: dict[int | None, list[Part]] = {}
    for part in found.operands:
        place = found.places.get(part.use)
        layers.setdefault(place.layer if place else None, []).append(part)
    return layers


def format_of(found: Numerics, part: Part) -> Format:
    return Format.parse(found.operands[part].format)
