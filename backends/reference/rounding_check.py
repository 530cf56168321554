"""Compare quantized pairs of values that went through `exp`, where a kernel's last bits differ from the reference's.

A GPU takes exp from `ex2.approx` and divides approximately: FP32 results a few units in the last place away, which
tensors of 8 significant bits hide unless a BF16 rounding goes the other way. At a relative error of 2**-20 that happens
to one rounding in 2**12 at most. What it does:

* SwiGLU rounds at most three times between exp and the quantizer (silu, its product, the router's weight), so a value
  moves by three units of BF16 at most, 3 * 2**-7 of itself; so does the largest of a group, and with it an FP32 scale.
  A power-of-two scale may land on the neighbouring power.
* a payload moves by one step: 2**-3 of a normal E4M3 value, and 2**-9 scales, twice that next to a doubled scale, of a
  subnormal one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8c.formats import ScaleKind
from fp8c.ops import quantized_format

_DRIFT = 3 * 2.0**-7
_SHARE = 0.01  # of the payloads, and of the scales, may move; 2**-12 of each rounding is what is expected


def disagreement(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], fmt: str) -> str:
    """How the pair `found` (any device) disagrees with the oracle's beyond what exp explains; "" where it does not."""
    for part, a, b in zip(("data", "scale"), found, expected):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{part} is {a.dtype} {tuple(a.shape)}, expected {b.dtype} {tuple(b.shape)}"
        # Before a copy to the CPU, which keeps no padding between rows.
        if strides(a) != strides(b):
            return f"{part} has strides {a.stride()}, expected {b.stride()}"
    q, s = (t.cpu() for t in found)
    scales = _floats(s), _floats(expected[1])
    values, reference = (
        torch.ops.fp8c.dequantize(*pair, fmt, torch.float32) for pair in ((q, s), (expected[0], expected[1]))
    )
    if not torch.equal(values.isnan(), reference.isnan()):
        return "NaN stands elsewhere"
    moved = (scales[0] != scales[1]) & ~scales[1].isnan()
    ratio = torch.maximum(scales[0], scales[1]) / torch.minimum(scales[0], scales[1])
    largest = 1 + _DRIFT if quantized_format(fmt).scale is ScaleKind.FP32 else 2.0
    if (ratio[moved] > largest).any():
        return f"a scale is off by a factor of {float(ratio[moved].max()):.4g}"
    if int(moved.sum()) > max(1.0, _SHARE * moved.numel()):
        return f"{int(moved.sum())} of {moved.numel()} scales differ"
    ones = torch.ones(q.shape).to(q.dtype)
    scale_of_each = torch.ops.fp8c.dequantize(ones, expected[1], fmt, torch.float32)
    same_scale = torch.ops.fp8c.dequantize(ones, s, fmt, torch.float32) == scale_of_each
    bound = (2.0**-3 + _DRIFT) * reference.abs() + 2.0**-8 * scale_of_each
    finite = ~reference.isnan()
    wrong = ((values - reference).abs() > bound) & finite
    if wrong.any():
        return f"{int(wrong.sum())} of {wrong.numel()} values are off by more than a step"
    steps = (values != reference) & finite & same_scale
    if int(steps.sum()) > max(1.0, _SHARE * steps.numel()):
        return f"{int(steps.sum())} of {steps.numel()} values differ"
    return ""


def strides(t: Tensor) -> list[int]:
    """Of the axes along which there is something to step over."""
    return [n for n, size in zip(t.stride(), t.shape) if size > 1]


def _floats(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).contiguous()
