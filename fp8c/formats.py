"""Number formats as values: element, group, scale. No torch here, so the spec language can use it.

A group is written rows x columns of the tensor as it is stored: for activations x [T, K], 1x128 is one token by 128
channels and 128x1 is 128 tokens of one channel; for weights w [N, K], 128x128 is a block. `WHOLE` (-1) stands for the
whole axis, so (1, -1) is one scale per row and (-1, -1) one per tensor.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from functools import cache

WHOLE = -1


class Element(enum.Enum):
    """Element types. E5M6 (12 bits) is a cache format only: no tensor core reads it."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"
    E5M6 = "e5m6"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class ScaleKind(enum.Enum):
    """How a scale is rounded and stored: FP32 as computed, FP32 rounded up to 2^n, or the 8-bit exponent alone."""

    FP32 = "fp32"
    POW2 = "pow2"
    E8M0 = "e8m0"


class Rounding(enum.Enum):
    RNE = "rne"
    STOCHASTIC = "stochastic"


@dataclass(frozen=True)
class Delayed:
    """Scales from a history of amax values (Transformer Engine's DelayedScaling) instead of the tensor at hand."""

    history: int = 1024
    algo: str = "max"
    margin: int = 0


BITS = {
    Element.E4M3: 8,
    Element.E5M2: 8,
    Element.E5M6: 12,
    Element.BF16: 16,
    Element.FP16: 16,
    Element.FP32: 32,
}
MAX = {Element.E4M3: 448.0, Element.E5M2: 57344.0, Element.E5M6: 65024.0}  # largest finite values
MANTISSA_BITS = {Element.E4M3: 3, Element.E5M2: 2, Element.E5M6: 6, Element.BF16: 7, Element.FP16: 10, Element.FP32: 23}
MIN_NORMAL_EXPONENT = {Element.E4M3: -6, Element.E5M2: -14, Element.E5M6: -14}

_TEXT = re.compile(
    r"(?P<element>e4m3|e5m2|e5m6|bf16|fp16|fp32)"
    r"(?:\[(?P<group>\d+x\d+|row|col|tensor)\] (?P<scale>fp32|pow2|e8m0)"
    r"(?P<stochastic> stochastic)?(?: delayed\((?P<history>\d+),(?P<algo>\w+),(?P<margin>\d+)\))?)?"
)
_GROUP_WORDS = {"tensor": (WHOLE, WHOLE), "row": (1, WHOLE), "col": (WHOLE, 1)}


@dataclass(frozen=True)
class Format:
    """One tensor's format. `group` and `scale` are None exactly when the element is not quantized.

    `text` is the canonical spelling (`e4m3[1x128] fp32`) that graphs and locks carry; `Format.parse` reads it back.
    """

    element: Element
    group: tuple[int, int] | None = None
    scale: ScaleKind | None = None
    rounding: Rounding = Rounding.RNE
    delayed: Delayed | None = None

    def __post_init__(self) -> None:
        if (self.group is None) != (self.scale is None):
            raise ValueError(f"format {self.element.value}: group and scale come together")
        if self.is_quantized != (self.group is not None):
            raise ValueError(f"format {self.element.value}: only E4M3, E5M2 and E5M6 carry scales")

    @property
    def is_quantized(self) -> bool:
        return self.element in MAX

    @property
    def bits(self) -> int:
        return BITS[self.element]

    @property
    def group_text(self) -> str:
        assert self.group is not None
        for word, group in _GROUP_WORDS.items():
            if self.group == group:
                return word
        return f"{self.group[0]}x{self.group[1]}"

    @property
    def text(self) -> str:
        if not self.is_quantized:
            return self.element.value
        assert self.scale is not None
        text = f"{self.element.value}[{self.group_text}] {self.scale.value}"
        if self.rounding is Rounding.STOCHASTIC:
            text += " stochastic"
        if self.delayed is not None:
            text += f" delayed({self.delayed.history},{self.delayed.algo},{self.delayed.margin})"
        return text

    @property
    def online(self) -> Format:
        """What a pair has that was quantized in this format: the scale is a number, wherever it came from."""
        return replace(self, delayed=None)

    @property
    def transposed(self) -> Format:
        """The format of the transposed tensor: rows and columns of the group change places."""
        return self if self.group is None else replace(self, group=(self.group[1], self.group[0]))

    def size_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a [rows, cols] tensor in this format, scales included, partial groups counted whole."""
        data = (rows * cols * self.bits + 7) // 8
        if self.group is None or self.scale is None:
            return data
        scale_bytes = 1 if self.scale is ScaleKind.E8M0 else 4
        per_axis = [1 if g == WHOLE else -(-n // g) for n, g in zip((rows, cols), self.group)]
        return data + per_axis[0] * per_axis[1] * scale_bytes

    @staticmethod
    def parse(text: str) -> Format:
        """Read the canonical spelling. Raises ValueError for anything else."""
        return _parse(text)


@cache
def _parse(text: str) -> Format:
    m = _TEXT.fullmatch(text)
    if m is None:
        raise ValueError(f"not a format: {text!r}; write for example 'e4m3[1x128] fp32' or 'bf16'")
    group: tuple[int, int] | None = None
    if m["group"]:
        if m["group"] in _GROUP_WORDS:
            group = _GROUP_WORDS[m["group"]]
        else:
            rows, cols = m["group"].split("x")
            group = (int(rows), int(cols))
    delayed = Delayed(int(m["history"]), m["algo"], int(m["margin"])) if m["history"] else None
    return Format(
        Element(m["element"]),
        group,
        ScaleKind(m["scale"]) if m["scale"] else None,
        Rounding.STOCHASTIC if m["stochastic"] else Rounding.RNE,
        delayed,
    )


BF16 = Format(Element.BF16)
FP32 = Format(Element.FP32)
