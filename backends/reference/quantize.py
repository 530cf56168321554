"""Quantize, dequantize and requantize on the CPU: the specification that every other kernel is tested against.

Meaning:  x ~= data.float() * scale, one scale for each group.
Scale:    amax / MAX in FP32 with one rounding (MAX: the element's largest finite value). POW2 and E8M0 round it up to
          a power of two, so amax / scale never exceeds MAX by more than the rounding of that division.
Payload:  the FP32 quotient x / scale (a division: multiplying with the reciprocal gives other bits), clamped to MAX,
          rounded to nearest even.
Zero:     an all-zero group has scale 1.0 and payload 0.
Tiny:     there is no epsilon. A scale below 2**-126 is set to 2**-126, FP32's smallest normal number, because amax / MAX
          would lose its own bits there or vanish. Nothing of BF16 is lost: its subnormals are multiples of 2**-133, so
          their payloads are multiples of 2**-7, and E4M3, the coarsest element near zero, has the quantum 2**-9.
          Of FP32, values below 2**-136 become 0 and the others keep an absolute error of at most 2**-136.
Special:  a group that holds NaN or an infinity has scale NaN and payload NaN.

Other conventions: DeepGEMM clamps amax to 1e-4 and multiplies with 1/scale; TransformerEngine stores MAX/amax, rounded
down to a power of two, and gives groups with NaN or infinity the scale 1; transformers stores the reciprocal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp8c.backends.reference.formats import decode, decode_scale, encode, encode_scale, round_up_to_pow2
from fp8c.diagnostics import fail
from fp8c.formats import MAX, WHOLE, Element, Format, ScaleKind
from fp8c.ops import (
    check_no_offsets,
    check_quantize_input,
    experts_of,
    lay_out,
    original_shape,
    quantized_format,
    restarts,
    scale_shape,
)

SMALLEST_SCALE = 2.0**-126


def scale_of(amax: Tensor, element: Element, kind: ScaleKind) -> Tensor:
    """The FP32 scale of groups whose largest magnitude is `amax`."""
    scale = (amax / MAX[element]).clamp_min(SMALLEST_SCALE)
    if kind is not ScaleKind.FP32:
        scale = round_up_to_pow2(scale)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)


def expert_ranges(offs: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, one past the last row) of each expert.

    Raises: E0520 unless offs is non-decreasing and stays within `rows`.
    """
    ends = offs.tolist()
    if any(a > b for a, b in zip([0, *ends], [*ends, rows])):
        raise fail("E0520", f"offs must not decrease and must stay within {rows} rows, found {ends}")
    yield from ((e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends)))


def expert_blocks(offs: Tensor, size: int, stored: int) -> Iterator[tuple[int, slice, slice]]:
    """(expert, its stored rows, its groups) where groups of `size` rows restart at each expert; `stored` is the number of all groups.

    Raises: E0520 unless offs is non-decreasing and its blocks fit.
    """
    rows = (stored - offs.shape[0]) * size + size - 1  # at most: R // size + E groups are stored
    for expert, start, end in expert_ranges(offs, rows):
        first = start // size + expert
        rows_of_expert = slice(first * size, first * size + end - start)
        yield expert, rows_of_expert, slice(first, first + -(-(end - start) // size))


def quantize(x: Tensor, fmt: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each group of x with its own scale; see the module's text for the rules.

    Shapes:  x f32|bf16|f16 [R, C] or [E, N, K] -> data of the same shape (E5M6: uint8 [..., ceil(C/8)*12]),
             scale f32|e8m0 [..., ceil(R/g0), ceil(C/g1)]; with offs: see `fp8c.ops.scale_shape`.
    Partial: the last group of an axis may be short; it counts as padded with zeros.
    Offsets: groups restart at each expert's first row, so data rows move (`fp8c.ops.data_shape`); rows past offs[-1]
             are dropped.
    """
    parsed = quantized_format(fmt)
    check_quantize_input(x)
    assert parsed.group is not None and parsed.scale is not None
    if experts_of(parsed, offs, x.dim()) is not None:
        assert offs is not None
        x = in_blocks(x, offs, parsed.group[0])
    return lay_out(*_quantize_block(x.float(), parsed), parsed)


def in_blocks(x: Tensor, offs: Tensor, size: int) -> Tensor:
    """Each expert's rows from its first group on, zeros behind them (`fp8c.ops.data_shape`)."""
    stored = x.new_zeros((size * (x.shape[0] // size + offs.shape[0]), x.shape[1]))
    for expert, start, end in expert_ranges(offs, x.shape[0]):
        first = (start // size + expert) * size
        stored[first : first + end - start] = x[start:end]
    return stored


def _quantize_block(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    assert fmt.scale is not None
    groups = _split_groups(x, fmt)
    scale = scale_of(groups.abs().amax((-3, -1)), fmt.element, fmt.scale)
    payload = _join_groups(groups / scale[..., :, None, :, None], x.shape)
    return encode(payload, fmt.element), encode_scale(scale, fmt.scale)


def _split_groups(x: Tensor, fmt: Format) -> Tensor:
    """[..., R, C] -> [..., R/g0, g0, C/g1, g1], padded with zeros to whole groups; no group and no axis is empty."""
    assert fmt.group is not None
    rows, cols = x.shape[-2:]
    g0, g1 = (max(size, 1) if g == WHOLE else g for g, size in zip(fmt.group, (rows, cols)))
    missing_rows = g0 if fmt.group[0] == WHOLE and rows == 0 else -rows % g0
    missing_cols = g1 if fmt.group[1] == WHOLE and cols == 0 else -cols % g1
    if missing_rows or missing_cols:
        x = pad(x, (0, missing_cols, 0, missing_rows))
    rows, cols = x.shape[-2:]
    return x.reshape(*x.shape[:-2], rows // g0, g0, cols // g1, g1)


def _join_groups(groups: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_split_groups`: drop the padding."""
    whole = groups.flatten(-2).flatten(-3, -2)
    return whole[..., : shape[-2], : shape[-1]]


def dequantize(
    q: Tensor, s: Tensor, fmt: str, dtype: torch.dtype, offs: Tensor | None = None, cols: int | None = None
) -> Tensor:
    """data.float() * scale in FP32, rounded once to `dtype`. `cols`: the column count that packed E5M6 data had.

    Shapes: as `quantize`, backwards. The blocks of experts are ordinary groups, so there are no offsets.
    """
    parsed = quantized_format(fmt)
    check_no_offsets("dequantize", offs)
    return dequantize_f32(q, s, parsed, cols).to(dtype).contiguous()


def dequantize_f32(q: Tensor, s: Tensor, fmt: Format, cols: int | None = None) -> Tensor:
    """`dequantize` to FP32, for q in any strides."""
    if fmt.element is not Element.E5M6 and q.stride(-1) != 1 and q.stride(-2) == 1:
        # A permuted view: work in the order of its memory.
        return dequantize_f32(q.mT, s.mT, fmt.transposed).mT
    shape = original_shape(q, fmt, cols)
    expected = scale_shape(shape, fmt)
    if list(s.shape) != expected:
        raise fail("E0520", f"format '{fmt.text}' of a tensor {shape} has scales {expected}, found {list(s.shape)}")
    return apply_scale(decode(q, fmt.element, cols), decode_scale(s), fmt)


def apply_scale(values: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    groups = _split_groups(values, fmt)
    return _join_groups(groups * scale[..., :, None, :, None], values.shape)


def requantize(
    q: Tensor, s: Tensor, src: str, dst: str, offs: Tensor | None = None, cols: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize again, in another format or along the other axis: quantize(dequantize in FP32, dst).

    Exact: with power-of-two scales a payload keeps its mantissa and its exponent shifts by log2(old / new scale), so the
    value is unchanged whenever the shifted payload is a number of dst: its lowest set bit is at or above dst's smallest
    subnormal (2**-9 for E4M3). With FP32 scales it is a second rounding.
    Offsets: apply to the formats whose groups are taller than one row; 1x128 groups cross no expert.
    """
    old, new = quantized_format(src), quantized_format(dst)
    check_no_offsets("requantize of groups of several rows", restarts(old, offs))
    values = dequantize_f32(q, s, old, cols)
    return quantize(values, dst, restarts(new, offs))
