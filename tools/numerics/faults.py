"""Injected faults: one operand broken on purpose, to see that `fp8c numerics --bisect` finds and names it.

    scale:layers.1.up:fprop.x      its scales read twice as large
    axis:layers.1.up:dgrad.dy      its payload read with the scales of groups along the other axis
    e5m2:layers.1                  every operand of the layer quantized to E5M2 instead of what the plan says

`MODULE` is a module path or a part of one that ends at a dot; without `:GEMM.OPERAND` all operands below it are broken.
This is a hook for tests: nothing but the numerics command reads it, and no build is made with a fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fp8c.backends.reference.formats import decode, decode_scale
from fp8c.backends.reference.quantize import apply_scale, dequantize_f32, quantize
from fp8c.diagnostics import ExitCode, fail
from fp8c.formats import Element, Format
from fp8c.roles import OPERANDS
from fp8c.tools.numerics.step import Part, Reading

KINDS = ("scale", "axis", "e5m2")


@dataclass(frozen=True)
class Fault:
    """kind: one of `KINDS`;  module: a path or the beginning of one;  gemm, operand: "" for all of them."""

    kind: str
    module: str
    gemm: str = ""
    operand: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.module}" + (f":{self.gemm}.{self.operand}" if self.gemm else "")

    def hits(self, part: Part) -> bool:
        path = part.use.partition("#")[0]
        is_below = path == self.module or path.startswith(self.module + ".") or part.use == self.module
        return is_below and part.gemm != "cache" and self.gemm in ("", part.gemm) and self.operand in ("", part.operand)


def parse_fault(text: str) -> Fault:
    """Read `KIND:MODULE[:GEMM.OPERAND]`. Raises: DiagnosticError E0845."""
    kind, _, rest = text.partition(":")
    module, _, where = rest.partition(":")
    gemm, _, operand = where.partition(".")
    if kind not in KINDS or not module or (where and operand not in OPERANDS.get(gemm, ())):
        raise fail(
            "E0845",
            f"'{text}' is no fault",
            help="write for example scale:layers.1.up:fprop.x, axis:layers.1.up:wgrad.dy or e5m2:layers.1",
            exit_code=ExitCode.USAGE,
        )
    return Fault(kind, module, gemm, operand)


def check_hits(fault: Fault, formats: Mapping[Part, str]) -> None:
    """Raises: DiagnosticError E0845 for a fault that no operand of the step has, or that changes none of them."""
    hit = [Format.parse(text) for part, text in formats.items() if fault.hits(part)]
    if not hit:
        names = sorted({part.use for part in formats})
        raise fail(
            "E0845",
            f"fault '{fault}' hits no quantized operand",
            help=f"modules with FP8 operands are for example {', '.join(names[:4])}" if names else "",
            exit_code=ExitCode.USAGE,
        )
    same: dict[str, Callable[[Format], bool]] = {
        "axis": lambda f: f.transposed.group == f.group,
        "e5m2": lambda f: f.element is Element.E5M2,
    }
    if fault.kind in same and all(same[fault.kind](fmt) for fmt in hit):
        raise fail(
            "E0845",
            f"fault '{fault}' changes nothing: the operand is {hit[0].text}",
            help="choose another operand, or the kind `scale`",
            exit_code=ExitCode.USAGE,
        )


def broken(reading: Reading, fault: Fault) -> Tensor | None:
    """The operand as the fault leaves it; None where the fault does not hit."""
    if not fault.hits(reading.part):
        return None
    fmt = reading.format
    if fault.kind == "scale":
        return reading.value * 2
    shadow = reading.shadow.contiguous()
    if fault.kind == "e5m2":
        other = dataclasses.replace(fmt, element=Element.E5M2, delayed=None)
        return dequantize_f32(*quantize(shadow, other.text), other)
    across = dataclasses.replace(fmt.transposed, delayed=None)
    _, scale = quantize(shadow, across.text)
    return apply_scale(decode(reading.payload, fmt.element), decode_scale(scale), across)
