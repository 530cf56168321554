"""Operators that do several of `fp8c.ops`' steps in one reading of memory; passes put them in where a backend has them.

Each has a plain form, written with the operators it joins: on a device without a kernel that is what runs, on the CPU it
is therefore as exact as the reference, and it is what a kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8c.diagnostics import fail
from fp8c.ops import (
    KERNEL_TAGS,
    check_quantize_input,
    empty_quantized,
    empty_scale,
    norm,
    quantized_format,
    restarts,
    swiglu,
)

_SCHEMAS = {
    "quantize_both": "(Tensor x, str fmt, str fmt_t, Tensor? offs=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "quantize_weight": "(Tensor w, str fmt) -> (Tensor, Tensor, Tensor)",
    "quantize_transposed": "(Tensor w, str fmt) -> (Tensor, Tensor)",
    "gather_quantize": "(Tensor x, Tensor rows, str fmt, Tensor? offs=None) -> (Tensor, Tensor)",
    "gather_quantized": "(Tensor q, Tensor s, Tensor rows, str fmt) -> (Tensor, Tensor)",
    "gather_requantized": (
        "(Tensor q, Tensor s, Tensor rows, str src, str dst, Tensor? offs=None) -> (Tensor, Tensor)"
    ),
    **swiglu.SCHEMAS,
    **norm.SCHEMAS,
}

_LIBRARY = torch.library.Library("fp8c", "FRAGMENT")  # type: ignore[no-untyped-call]


# Plain forms --------------------------------------------------------------------------------------------------------


def quantize_both(x: Tensor, fmt: str, fmt_t: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize(x, fmt)` and `quantize(x, fmt_t, offs)`; offsets apply to the formats whose groups are taller than a row.

    Shapes: x f32|bf16|f16 [T, C], offs int32 [E] -> data, scale in `fmt`, data, scale in `fmt_t`.
    """
    first, second = (torch.ops.fp8c.quantize(x, text, restarts(quantized_format(text), offs)) for text in (fmt, fmt_t))
    return (*first, *second)


def quantize_weight(w: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """A weight quantized for fprop and for dgrad: the data, the data transposed (contiguous), and the scale of both.

    Shapes: w f32|bf16|f16 [.., N, K] -> e4m3 [.., N, K], e4m3 [.., K, N], f32|e8m0 [.., N/g0, K/g1].
    """
    data, scale = torch.ops.fp8c.quantize(w, fmt)
    return data, data.mT.contiguous(), scale


def quantize_transposed(w: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """A weight quantized for dgrad alone: the data transposed (contiguous), and the scale as `quantize` makes it."""
    _, data, scale = quantize_weight(w, fmt)
    return data, scale


def gather_quantize(x: Tensor, rows: Tensor, fmt: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize(x[rows], fmt, offs)`: the tokens of each expert in groups along the tokens.

    Shapes: x f32|bf16|f16 [T, C], rows i64|i32 [R] within 0..T, offs int32 [E] -> a pair [R, C].
    """
    return torch.ops.fp8c.quantize(x[rows], fmt, offs)  # type: ignore[no-any-return]


def gather_quantized(q: Tensor, s: Tensor, rows: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Rows of a pair in groups of one row: data[rows] and scale[rows], in the layout of a quantized tensor.

    Shapes: q [T, C'], s [T, C/g], rows i64|i32 [R] within 0..T -> [R, C'], [R, C/g].
    """
    parsed = quantized_format(fmt)
    scale = s[rows]
    # FP8 has no gather everywhere; bytes have.
    data = q.view(torch.uint8)[rows].view(q.dtype)
    return data, empty_scale(scale, scale.shape, parsed).copy_(scale)


def gather_requantized(
    q: Tensor, s: Tensor, rows: Tensor, src: str, dst: str, offs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`requantize` of gathered rows: what wgrad reads of a token that went to several experts.

    Shapes: q [T, C], s [T, C/128], rows i64|i32 [R], offs int32 [E] -> a pair [R, C] in `dst`.
    """
    data, scale = gather_quantized(q, s, rows, src)
    return torch.ops.fp8c.requantize(data, scale, src, dst, offs)  # type: ignore[no-any-return]


# Fakes --------------------------------------------------------------------------------------------------------------


def _fake_quantize_both(
    x: Tensor, fmt: str, fmt_t: str, offs: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_quantize_input(x)
    formats = quantized_format(fmt), quantized_format(fmt_t)
    first, second = (empty_quantized(x, x.shape, f, restarts(f, offs)) for f in formats)
    return (*first, *second)


def _fake_quantize_weight(w: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    check_quantize_input(w)
    parsed = quantized_format(fmt)
    data, scale = empty_quantized(w, w.shape, parsed)
    if data.shape != w.shape:
        raise fail("E0520", f"fp8c::quantize_weight: '{fmt}' packs several values in a byte, so it has no transpose")
    *leading, rows, cols = w.shape
    return data, data.new_empty([*leading, cols, rows]), scale


def _fake_quantize_transposed(w: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    _, data, scale = _fake_quantize_weight(w, fmt)
    return data, scale


def _fake_gather_quantize(x: Tensor, rows: Tensor, fmt: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check_quantize_input(x)
    return empty_quantized(x, [rows.shape[0], x.shape[1]], quantized_format(fmt), offs)


def _fake_gather_quantized(q: Tensor, s: Tensor, rows: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    parsed = quantized_format(fmt)
    scale = empty_scale(s, [rows.shape[0], s.shape[1]], parsed)
    return q.new_empty([rows.shape[0], q.shape[1]]), scale


def _fake_gather_requantized(
    q: Tensor, s: Tensor, rows: Tensor, src: str, dst: str, offs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    new = quantized_format(dst)
    return empty_quantized(q, [rows.shape[0], q.shape[1]], new, restarts(new, offs))


_PLAIN: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_both": (quantize_both, _fake_quantize_both),
    "quantize_weight": (quantize_weight, _fake_quantize_weight),
    "quantize_transposed": (quantize_transposed, _fake_quantize_transposed),
    "gather_quantize": (gather_quantize, _fake_gather_quantize),
    "gather_quantized": (gather_quantized, _fake_gather_quantized),
    "gather_requantized": (gather_requantized, _fake_gather_requantized),
    "swiglu_quantize": (swiglu.swiglu_quantize, swiglu.fake_swiglu_quantize),
    "swiglu_quantize_cached": (swiglu.swiglu_quantize_cached, swiglu.fake_swiglu_quantize_cached),
    "swiglu_backward_quantize": (swiglu.swiglu_backward_quantize, swiglu.fake_swiglu_backward_quantize),
    "rms_norm_quantize": (norm.rms_norm_quantize, norm.fake_rms_norm_quantize),
}
for _name, (_plain, _fake) in _PLAIN.items():
    _LIBRARY.define(_name + _SCHEMAS[_name], tags=KERNEL_TAGS)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fp8c::{_name}", _fake, lib=_LIBRARY)


def plain(name: str) -> Callable[..., Any]:
    """The plain form of operator `name`, for a kernel that can't take its operands."""
    return _PLAIN[name][0]


QUANTIZE_BOTH = torch.ops.fp8c.quantize_both.default
QUANTIZE_WEIGHT = torch.ops.fp8c.quantize_weight.default
QUANTIZE_TRANSPOSED = torch.ops.fp8c.quantize_transposed.default
GATHER_QUANTIZE = torch.ops.fp8c.gather_quantize.default
GATHER_QUANTIZED = torch.ops.fp8c.gather_quantized.default
GATHER_REQUANTIZED = torch.ops.fp8c.gather_requantized.default
SWIGLU_QUANTIZE = torch.ops.fp8c.swiglu_quantize.default
SWIGLU_QUANTIZE_CACHED = torch.ops.fp8c.swiglu_quantize_cached.default
SWIGLU_BACKWARD_QUANTIZE = torch.ops.fp8c.swiglu_backward_quantize.default
RMS_NORM_QUANTIZE = torch.ops.fp8c.rms_norm_quantize.default


@dataclass(frozen=True)
class Made:
    """One result of an operator that quantizes, for the verifier: `format` is the index of its format among the arguments.

    pair: results of one pair have the same number; `is_transposed`: the data of the format, transposed
    """

    part: str
    format: int
    pair: int = 0
    is_transposed: bool = False


_DATA, _SCALE = Made("data", 1), Made("scale", 1)

#: What the operators make of values that aren't quantized yet, result by result (None: not quantized).
MAKES: dict[Any, tuple[Made | None, ...]] = {
    torch.ops.fp8c.quantize.default: (_DATA, _SCALE),
    torch.ops.fp8c.quantize_delayed.default: (_DATA, _SCALE),
    torch.ops.fp8c.requantize.default: (Made("data", 3), Made("scale", 3)),
    QUANTIZE_BOTH: (_DATA, _SCALE, Made("data", 2, 1), Made("scale", 2, 1)),
    QUANTIZE_WEIGHT: (_DATA, Made("data", 1, is_transposed=True), _SCALE),
    QUANTIZE_TRANSPOSED: (Made("data", 1, is_transposed=True), _SCALE),
    GATHER_QUANTIZE: (Made("data", 2), Made("scale", 2)),
    GATHER_REQUANTIZED: (Made("data", 4), Made("scale", 4)),
    RMS_NORM_QUANTIZE: (Made("data", 3), Made("scale", 3), None),
    SWIGLU_QUANTIZE: (Made("data", 3), Made("scale", 3)),
    SWIGLU_QUANTIZE_CACHED: (Made("data", 2), Made("scale", 2), Made("data", 3, 1), Made("scale", 3, 1)),
    SWIGLU_BACKWARD_QUANTIZE: (
        *(Made("data", 6), Made("scale", 6)),
        *(Made("data", 7, 1), Made("scale", 7, 1)),
        *(Made("data", 8, 2), Made("scale", 8, 2)),
        None,
    ),
}

#: Operators that read one pair: where its data stands among the arguments (its scale follows), and where its format.
READS: dict[Any, tuple[int, int]] = {
    torch.ops.fp8c.dequantize.default: (0, 2),
    torch.ops.fp8c.requantize.default: (0, 2),
    GATHER_QUANTIZED: (0, 3),
    GATHER_REQUANTIZED: (0, 3),
    SWIGLU_BACKWARD_QUANTIZE: (1, 5),
}
