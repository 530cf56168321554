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
