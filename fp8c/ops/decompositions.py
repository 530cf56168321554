"""The operators of fp8c as ordinary tensor operations: visible to Inductor, on any device, without a host sync.

`quantize`, `dequantize` and `requantize` give the same bits as `backends.reference`, so a backend may put either form
into a graph. The GEMMs and attention are a fallback for devices without kernels: right, and slow.

Importing this module registers all of them for devices that have no kernel of their own (`fp8c.ops.register_portable`).
The code works with symbolic sizes; it branches on a size only where that is a plain number.

Trap: bit identity needs IEEE division. Inductor's GPU code divides approximately unless it is told otherwise
(`torch._inductor.config.eager_numerics.division_rounding`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import pad

from fp8c.delayed import active_scales
from fp8c.formats import MAX, WHOLE, Delayed, Element, Format, ScaleKind
from fp8c.ops import (
    DATA_DTYPE,
    E5M6_CODES,
    Size,
    check_accumulator,
    check_attention,
    check_delayed,
    check_no_offsets,
    check_quantize_input,
    empty_heads_last,
    experts_of,
    lay_out,
    original_shape,
    quantized_format,
    register_portable,
    restarts,
)
from fp8c.ops.operands import Operands, takes_operands

SMALLEST_SCALE = 2.0**-126  # FP32's smallest normal number; why: backends/reference/quantize.py

# Codecs -------------------------------------------------------------------------------------------------------------


def _encode(x: Tensor, element: Element) -> Tensor:
    if element is Element.E5M6:
        return _pack_e5m6(_encode_e5m6(x))
    # torch 2.11 casts values above the largest to NaN, later versions saturate: clamp for both.
    return x.clamp(-MAX[element], MAX[element]).to(DATA_DTYPE[element])


def _decode(data: Tensor, element: Element, cols: Size | None) -> Tensor:
    if element is Element.E5M6:
        assert cols is not None
        codes = _unpack_e5m6(data, cols)
        return (codes << 4).to(torch.int16).view(torch.float16).float()
    return data.float()


def _encode_e5m6(x: Tensor) -> Tensor:
    """FP32 -> 12-bit codes in int32, rounded to nearest even."""
    magnitude = x.abs().clamp_max(MAX[Element.E5M6])
    bits = magnitude.view(torch.int32)
    # Normal results keep 6 of 23 mantissa bits: add half of the dropped part, less one unless the kept part is odd.
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) >> 17) - ((127 - 15) << 6)
    # Subnormal results are multiples of 2**-20, which is the last bit of an FP32 number in [8, 16).
    subnormal = (magnitude + 8.0).view(torch.int32) - 0x41000000
    code = torch.where(magnitude < 2.0**-14, subnormal, normal)
    code = torch.where(x.isnan(), 0x7E0, code)
    return code | torch.where(x.signbit() & ~x.isnan(), 0x800, 0)


def _pack_e5m6(codes: Tensor) -> Tensor:
    codes = _pad_axis(codes, -1, E5M6_CODES)
    first, second = codes[..., 0::2], codes[..., 1::2]
    three = torch.stack((first >> 4, ((first & 0xF) << 4) | (second >> 8), second & 0xFF), dim=-1)
    return three.flatten(-2).to(torch.uint8)


def _unpack_e5m6(packed: Tensor, cols: Size) -> Tensor:
    high, middle, low = (packed[..., byte::3].int() for byte in range(3))
    pairs = torch.stack(((high << 4) | (middle >> 4), ((middle & 0xF) << 8) | low), dim=-1)
    return pairs.flatten(-2).narrow(-1, 0, cols)


def _scale_of(amax: Tensor, fmt: Format) -> Tensor:
    """The FP32 scale of groups with this largest magnitude: 1 for zero, NaN for an infinity or NaN."""
    # Divide by a tensor: CUDA multiplies by the reciprocal of a Python number, which rounds twice.
    scale = (amax / amax.new_full((), MAX[fmt.element])).clamp_min(SMALLEST_SCALE)
    if fmt.scale is not ScaleKind.FP32:
        # Up to the next power of two: carry the mantissa into the exponent.
        scale = ((scale.view(torch.int32) + 0x007F_FFFF) & 0x7F80_0000).view(torch.float32)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, math.nan)


def _store_scale(scale: Tensor, fmt: Format) -> Tensor:
    if fmt.scale is not ScaleKind.E8M0:
        return scale
    return ((scale.view(torch.int32) >> 23) & 0xFF).to(torch.uint8).view(torch.float8_e8m0fnu)


# Groups -------------------------------------------------------------------------------------------------------------


def _pad_axis(x: Tensor, axis: int, group: int) -> Tensor:
    """Zeros up to a whole number of groups along axis -1 or -2."""
    size = x.shape[axis]
    if group == 1 or statically_known_true(size % group == 0):
        return x
    return pad(x, (0, -size % group) if axis == -1 else (0, 0, 0, -size % group))


def _group_sizes(x: Tensor, fmt: Format) -> tuple[Tensor, int | Size, int | Size]:
    """x padded to whole groups, and the group's height and width."""
    assert fmt.group is not None
    sizes: list[Size] = []
    for axis, group in zip((-2, -1), fmt.group):
        if group == WHOLE:
            x = _pad_axis(x, axis, 1) if x.shape[axis] != 0 else pad(x, (0, 1) if axis == -1 else (0, 0, 0, 1))
            sizes.append(x.shape[axis])
        else:
            x = _pad_axis(x, axis, group)
            sizes.append(group)
    return x, sizes[0], sizes[1]


def _split(x: Tensor, fmt: Format) -> Tensor:
    """[..., R, C] -> [..., R/g0, g0, C/g1, g1]."""
    x, g0, g1 = _group_sizes(x, fmt)
    rows, cols = x.shape[-2:]
    return x.reshape(*x.shape[:-2], rows // g0, g0, cols // g1, g1)


def _join(groups: Tensor, rows: Size, cols: Size) -> Tensor:
    """The inverse of `_split`; drops the padding."""
    x = groups.flatten(-2).flatten(-3, -2)
    return x.narrow(-1, 0, cols).narrow(-2, 0, rows)


def _in_blocks(x: Tensor, offs: Tensor, group: int) -> Tensor:
    """The rows of each expert from the start of a group on, zeros between: [R, C] -> [g * (R//g + E), C]."""
    rows, experts = x.shape[0], offs.shape[0]
    if isinstance(rows, int) and rows == 0:
        return x.new_zeros((group * experts, x.shape[1]))
    starts = torch.cat((offs.new_zeros(1), offs[:-1])).long()
    first = starts // group + torch.arange(experts, device=offs.device)  # strictly increasing
    groups = torch.arange(rows // group + experts, device=offs.device)
    expert = torch.searchsorted(first, groups, right=True) - 1
    begin = starts[expert] + (groups - first[expert]) * group
    row = begin[:, None] + torch.arange(group, device=offs.device)
    is_owned = (row < offs.long()[expert][:, None]).flatten()
    return torch.where(is_owned[:, None], x[row.flatten().clamp_max(rows - 1)], 0.0)


# The operators ------------------------------------------------------------------------------------------------------


def quantize(x: Tensor, fmt: str, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fp8c::quantize` as tensor operations, bit for bit."""
    parsed = quantized_format(fmt)
    check_quantize_input(x)
    rows, cols = x.shape[-2:]
    x = x.float()
    if experts_of(parsed, offs, x.dim()) is not None:
        assert offs is not None and parsed.group is not None
        x = _in_blocks(x, offs, parsed.group[0])
        rows = x.shape[0]
    groups = _split(x, parsed)
    scale = _scale_of(groups.abs().amax((-3, -1)), parsed)
    payload = _join(groups / scale[..., :, None, :, None], rows, cols)
    return lay_out(_encode(payload, parsed.element), _store_scale(scale, parsed), parsed)


def quantize_delayed(
    x: Tensor, fmt: str, history: int, algo: str, margin: int, site: str, replay: bool
) -> tuple[Tensor, Tensor]:
    """`quantize` with the scale of `site` in the histories in force (`fp8c.delayed`), on every device.

    Shapes: x f32|bf16|f16 [R, C] or [E, N, K] -> data alike, scale f32|e8m0 [1, 1] or [E, 1, 1].
    Larger values than the history knew are clamped to the element's largest.
    """
    parsed = check_delayed(fmt)
    check_quantize_input(x)
    x = x.float()
    amax = x.abs().amax((-2, -1)) if x.numel() else x.new_zeros(x.shape[:-2])
    how = Delayed(history, algo, margin)
    scale = active_scales().scale(site, amax, how, lambda m: _scale_of(m, parsed), replay=replay)[..., None, None]
    return _encode(x / scale, parsed.element), _store_scale(scale, parsed)


def dequantize(
    q: Tensor, s: Tensor, fmt: str, dtype: torch.dtype, offs: Tensor | None = None, cols: Size | None = None
) -> Tensor:
    """`fp8c::dequantize` as tensor operations, bit for bit."""
    check_no_offsets("dequantize", offs)
    return _dequantize(q, s, quantized_format(fmt), cols).to(dtype).contiguous()


def _dequantize(q: Tensor, s: Tensor, fmt: Format, cols: Size | None = None) -> Tensor:
    shape = original_shape(q, fmt, cols)
    groups = _split(_decode(q, fmt.element, cols), fmt)
    return _join(groups * s.float()[..., :, None, :, None], shape[-2], shape[-1])


def requantize(
    q: Tensor, s: Tensor, src: str, dst: str, offs: Tensor | None = None, cols: Size | None = None
) -> tuple[Tensor, Tensor]:
    """`fp8c::requantize` as tensor operations, bit for bit."""
    old, new = quantized_format(src), quantized_format(dst)
    check_no_offsets("requantize of groups of several rows", restarts(old, offs))
    return quantize(_dequantize(q, s, old, cols), dst, restarts(new, offs))


@takes_operands
def scaled_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """Dequantize to FP32 and multiply in FP32; `promote_every` has no meaning here."""
    left, right = _dequantized(x, torch.float32)
    return (left @ right.T).to(out_dtype)


@takes_operands
def scaled_grouped_mm(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """On CUDA `torch._grouped_mm` of operands dequantized to BF16 (exact for power-of-two scales, else one rounding each).

    Elsewhere, and where sizes don't allow that, every expert multiplies every row in FP32 and its own rows are taken.
    """
    rows, experts, offs = x.a.shape[0], x.b.shape[0], x.ends
    owner = torch.searchsorted(offs, torch.arange(rows, device=offs.device), right=True)[:, None]
    if _grouped_mm_applies(x.a, x.b):
        left, right = _dequantized(x, torch.bfloat16)
        product = torch._grouped_mm(left, right.mT, offs=offs)
        return torch.where(owner < experts, product, 0.0).to(out_dtype)
    left, right = _dequantized(x, torch.float32)
    out = left.new_zeros((rows, x.b.shape[1]))
    for expert in range(experts):
        out = torch.where(owner == expert, left @ right[expert].T, out)
    return out.to(out_dtype)


@takes_operands
def scaled_grouped_wgrad(x: Operands, out_dtype: torch.dtype) -> Tensor:
    """On CUDA `torch._grouped_mm` of operands dequantized to BF16; its result is BF16, also where FP32 is asked for.

    Elsewhere, and where sizes don't allow that, one FP32 product for each expert with the other experts' columns zeroed.
    """
    left_fmt, right_fmt = quantized_format(x.a_fmt).transposed, quantized_format(x.b_fmt).transposed
    left = _dequantize(x.a.T, x.a_scale.T, left_fmt)  # [T', N], zero where no expert's token is
    right = _dequantize(x.b.T, x.b_scale.T, right_fmt)  # [T', K]
    assert left_fmt.group is not None
    group, experts, offs = left_fmt.group[0], x.ends.shape[0], x.ends
    following = torch.arange(1, experts + 1, device=offs.device)
    ends = ((offs // group + following) * group).to(torch.int32)  # where the next expert's blocks start
    if _grouped_mm_applies(x.a.T, x.b.T):
        return torch._grouped_mm(left.bfloat16().T, right.bfloat16(), offs=ends).to(out_dtype)
    owner = torch.searchsorted(ends, torch.arange(x.a.shape[1], device=offs.device), right=True)
    products = [torch.where((owner == expert)[:, None], left, 0.0).T @ right for expert in range(int(experts))]
    return torch.stack(products).to(out_dtype)


def scaled_mm_add_(acc: Tensor, *operands: Any) -> None:
    check_accumulator("scaled_mm_add_", acc, 2)
    acc.add_(scaled_mm(*operands, torch.float32))


def scaled_grouped_wgrad_add_(acc: Tensor, *operands: Any) -> None:
    check_accumulator("scaled_grouped_wgrad_add_", acc, 3)
    acc.add_(scaled_grouped_wgrad(*operands, torch.float32))


def _dequantized(x: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dequantize(x.a, x.a_scale, x.a_fmt, dtype), dequantize(x.b, x.b_scale, x.b_fmt, dtype)


def _grouped_mm_applies(*operands: Tensor) -> bool:
    """Whether `torch._grouped_mm` takes BF16 operands with these last axes: rows of a multiple of 16 bytes, on CUDA."""
    return all(t.is_cuda and t.shape[-1] % 8 == 0 for t in operands)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    """Softmax attention with all its scores in memory, in FP32; a query that sees no key gets 0."""
    check_attention(q, k, v, mask, is_causal)
    scores = _scores(q, k, mask, is_causal, scale)
    lse = scores.logsumexp(-1)
    out = _probabilities(scores, lse) @ _per_query_head(v, q)
    return empty_heads_last(q, out.shape).copy_(out), lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` from what its forward kept."""
    p = _probabilities(_scores(q, k, mask, is_causal, scale), lse)
    grad = dout.float()
    dv = p.mT @ grad
    delta = (grad * out.float()).sum(-1, keepdim=True)
    dscores = p * (grad @ _per_query_head(v, q).mT - delta) * _scale_or_default(scale, q)
    dq, dk = dscores @ _per_query_head(k, q), dscores.mT @ q.float()
    results = []
    for like, result in ((q, dq), (k, dk), (v, dv)):
        batch, heads, *rest = like.shape
        summed = result.reshape(batch, heads, -1, *rest).sum(2)  # over the query heads that share a key head
        results.append(torch.empty_like(like).copy_(summed))
    return results[0], results[1], results[2]


def _scale_or_default(scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[3]) if scale is None else scale


def _per_query_head(t: Tensor, q: Tensor) -> Tensor:
    return t.float().repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    scores = q.float() @ _per_query_head(k, q).mT * _scale_or_default(scale, q)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return scores
    return scores.where(mask, -math.inf) if mask.dtype is torch.bool else scores + mask.float()


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return torch.where(lse.isfinite()[..., None], (scores - lse[..., None]).exp(), 0.0)


for _implementation in (
    quantize,
    dequantize,
    requantize,
    scaled_mm,
    scaled_grouped_mm,
    scaled_grouped_wgrad,
    scaled_mm_add_,
    scaled_grouped_wgrad_add_,
    attention,
    attention_backward,
    quantize_delayed,
):
    register_portable(_implementation.__name__, _implementation)
