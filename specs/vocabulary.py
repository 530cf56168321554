"""The words of the spec language and what may follow them: one table for checks, completion and documentation.

A word's meaning is in docs/spec_language.md. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fp8c.formats import Element, Rounding, ScaleKind
from fp8c.roles import KINDS, OPERANDS, ROLES, Op

VERSION = 1
MODIFIERS = ("override", "optional", "final")
TOP_LEVEL = ("version", "use", "format", "set", "spec")
PREDICATES = ("op", "kind", "role", "layers", "param", "shape")
PREDICATE_VALUES = {"op": frozenset(op.value for op in Op), "kind": KINDS, "role": ROLES}
SHAPE_VARIABLES = ("m", "n", "k", "experts")
COMPARISONS = ("==", "!=", "<=", ">=", "<", ">")
ELEMENTS = tuple(e.value for e in Element)
SCALES = tuple(s.value for s in ScaleKind)
ROUNDINGS = tuple(r.value for r in Rounding)
GROUP_WORDS = ("row", "col", "tensor")
ARCHITECTURES = ("sm89", "sm90", "sm100", "sm103", "sm120", "cpu")
DELAYED_ALGORITHMS = ("max", "most_recent")
#: Which values of a use backward may keep in a format of its own (`cache NAME as ...`).
CACHED_VALUES = ("x", "gate", "up")
RECOMPUTED_VALUES = ("out",)


@dataclass(frozen=True)
class FormatValue:
    """A format; `plain` admits only elements without scales, `or_off` also the word `off`."""

    plain: bool = False
    or_off: bool = False


@dataclass(frozen=True)
class Words:
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Integer:
    least: int
    most: int


Type = FormatValue | Words | Integer

_STORED = FormatValue(plain=True)
GEMM_FIELDS: dict[str, dict[str, Type]] = {
    gemm: {
        **{operand: FormatValue() for operand in operands},
        "accumulate": Words(("fp32",)),
        "promote_every": Integer(0, 1 << 20),
        "out": _STORED,
    }
    for gemm, operands in OPERANDS.items()
}
RULE_STATEMENTS = ("precision", *GEMM_FIELDS, "cache", "recompute", "because")

SECTIONS: dict[str, dict[str, Type]] = {
    "defaults": {
        "unmatched_rule": Words(("error", "warn")),
        "undecided_gemm": Words(("error", "warn", "bf16")),
    },
    "dispatch": {"payload": FormatValue()},
    "combine": {"payload": FormatValue()},
    "combine_grad": {"payload": FormatValue()},
    "dispatch_grad": {"payload": FormatValue()},
    "optimizer": {
        "master": _STORED,
        "grad": _STORED,
        "exp_avg": _STORED,
        "exp_avg_sq": _STORED,
        "ema": FormatValue(plain=True, or_off=True),
        "ema_device": Words(("cpu", "gpu")),
    },
    "schedule": {
        "pipeline": Words(("none", "1f1b", "zerobubble", "dualpipe", "dualpipev")),
        "microbatches": Integer(1, 1 << 20),
        "comm_sms": Integer(0, 1024),
        "comm_channels": Integer(0, 1024),
        "max_nodes_per_token": Integer(1, 1024),
        "backend": Words(("nccl", "deepep")),
    },
    "pad": {
        "tokens_to": Integer(1, 1 << 20),
        "empty_expert": Words(("skip", "pad")),
        "partial_group": Words(("pad", "keep")),
    },
}
SPEC_STATEMENTS = ("target", "rule", "expect", *SECTIONS)


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice spelt most like `word`, "" when none is close."""
    choices = list(choices)
    swapped = [c for c in choices if sorted(c) == sorted(word.lower()) and len(word) < 64]
    if swapped:  # `sa` for `as`: too short for a ratio to see
        return swapped[0]
    import difflib

    close = difflib.get_close_matches(word.lower()[:64], sorted(choices), 1, 0.55)
    return close[0] if close else ""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The help line for a word that is not among `choices`: the nearest one, or all of them where they are few."""
    known = sorted(choices)
    close = nearest(word, known)
    if close:
        return f"did you mean `{close}`?"
    return "write one of " + ", ".join(f"`{c}`" for c in known) if known and len(known) <= 12 else ""


#: What a word of the language means, in one line, for editors.
MEANINGS: dict[str, str] = {
    "version": "The version of the language; the first statement of a file.",
    "use": "Brings in the formats and sets of another file, and its spec for `extends`.",
    "format": "Names a number format: an element, a group and a scale.",
    "set": "Names a selector; `@name` uses it.",
    "spec": "In which format each part of a training step runs.",
    "extends": "A layer above the spec of a used file: inherits everything; changes need `override`.",
    "rule": "Gives values to every operator use that its selector matches. Rules commute.",
    "override": "Wins over plain rules, and over what the parent spec decided; overrides apply in source order.",
    "optional": "The rule may match nothing.",
    "final": "No later `override` may change what this decides.",
    "target": "The architectures the spec is written for, and what sizes must meet.",
    "expect": "Fails the compilation when the selector matches another number of uses.",
    "precision": "All operands of the use's three GEMMs, and no copy of its input in another format.",
    "fprop": "The forward GEMM: y = x w, sums over the input features k.",
    "dgrad": "The gradient of the input: dx = dy w, sums over the output features n.",
    "wgrad": "The gradient of the weight: dw = dy x, sums over the tokens m.",
    "cache": "What backward keeps of an input, when that is not the operand's format.",
    "recompute": "Compute the output again in backward instead of keeping it.",
    "retile": "Kept in one tiling, read in another: one more rounding, unless it is `exact`.",
    "exact": "The change of tiles must add no rounding: power-of-two scales.",
    "because": "The reason; reports and the lock carry it.",
    "accumulate": "What partial sums are added in.",
    "promote_every": "Elements of the summed axis after which partial sums go to FP32 registers.",
    "out": "The format that the GEMM writes.",
    "scale": "How a group's scale is stored: fp32, pow2 (rounded up to a power of two) or e8m0.",
    "online": "The scale is computed from the tensor at hand.",
    "delayed": "The scale is computed from the magnitudes of the last steps; one scale for a tensor.",
    "e4m3": "8 bits: 3 mantissa bits, largest value 448. What tensor cores read.",
    "e5m2": "8 bits: 2 mantissa bits, largest value 57344. What tensor cores read.",
    "e5m6": "12 bits: 6 mantissa bits. Kept for backward only.",
    "op": "Selects by what a use computes.",
    "kind": "Selects by the part of the model a use belongs to.",
    "role": "Selects by the place in the data flow.",
    "layers": "Selects by decoder layer: a range `3..60` or a list; negative numbers count from the last.",
    "param": "Selects by a pattern on the parameter's name.",
    "shape": "Selects by the sizes of a GEMM: m tokens, n outputs, k inputs, experts.",
    "all": "Every use.",
    "defaults": "What happens with rules that match nothing and GEMMs that no rule decides.",
    "dispatch": "Tokens on their way to experts (forward).",
    "combine": "Results on their way back from experts (forward).",
    "combine_grad": "The backward of combine: physically a dispatch of gradients.",
    "dispatch_grad": "The backward of dispatch: physically a combine of gradients.",
    "optimizer": "Formats of master weights, gradients, moments and the moving average.",
    "schedule": "Pipeline schedule and what communication gets.",
    "pad": "What happens where a size is not a multiple of its group.",
}
