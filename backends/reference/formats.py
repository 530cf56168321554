"""Exact codecs: FP32 values to the codes of E4M3, E5M2, E5M6 and E8M0, and back. Round to nearest even, always.

| format | bits | bias | largest | smallest normal | smallest subnormal | specials |
| E4M3 | 8 | 7 | 448 | 2**-6 | 2**-9 | no infinity, NaN = S.1111.111 |
| E5M2 | 8 | 15 | 57344 | 2**-14 | 2**-16 | as IEEE |
| E5M6 | 12 | 15 | 65024 | 2**-14 | 2**-20 | as IEEE; FP16 with 6 of its 10 mantissa bits |
| E8M0 | 8 | 127 | 2**127 | - | - | a power of two; 0xFF = NaN |

Values are clamped to the largest finite value before the cast: torch 2.11 casts anything above 464 to NaN, torch 2.13
saturates. NaN stays NaN; its sign bit is not part of the contract (it differs between processors).

E5M6 here is a true round to nearest even, subnormals included. TileKernels, the other public definition, converts
FP32 to FP16 toward zero and then rounds on the 17 low FP32 bits, which for subnormal results are not the dropped bits.
Its packing (first code in the top bits) is the same; it stores 32-bit words where this module stores bytes, so on a
little-endian machine the bytes of each group of four come in the opposite order.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fp8c.formats import MANTISSA_BITS, MAX, MIN_NORMAL_EXPONENT, Element, ScaleKind
from fp8c.ops import DATA_DTYPE, E5M6_BYTES, E5M6_CODES

_FP32_BIAS = 127


def encode(x: Tensor, element: Element) -> Tensor:
    """Round FP32 values to the element's codes, saturating; E5M6 comes back packed.

    Shapes: x f32 [..., C] -> e4m3 or e5m2 [..., C], or uint8 [..., ceil(C/8)*12].
    """
    if element is Element.E5M6:
        return pack_e5m6(encode_e5m6(x))
    return x.clamp(-MAX[element], MAX[element]).to(DATA_DTYPE[element])


def decode(data: Tensor, element: Element, cols: int | None = None) -> Tensor:
    """The FP32 values of codes. `cols`: how many columns packed E5M6 data holds.

    Shapes: e4m3 or e5m2 [..., C], or uint8 [..., ceil(C/8)*12] -> f32 [..., C].
    """
    if element is Element.E5M6:
        assert cols is not None
        return decode_e5m6(unpack_e5m6(data, cols))
    # A table look-up is several times faster than torch's cast on the CPU.
    return _table(element).index_select(0, data.view(torch.uint8).flatten().int()).view(data.shape)


@cache
def _table(element: Element) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(DATA_DTYPE[element]).float()


def encode_e5m6(x: Tensor) -> Tensor:
    """FP32 -> E5M6 codes in int32, one for each value."""
    largest, mantissa = MAX[Element.E5M6], MANTISSA_BITS[Element.E5M6]
    x = x.float().clamp(-largest, largest)
    exponent = (x.view(torch.int32) >> 23) & 0xFF
    # The distance of neighbouring codes at x, a power of two; dividing by it and multiplying with it are exact.
    quantum_exponent = exponent.clamp_min(_FP32_BIAS + MIN_NORMAL_EXPONENT[Element.E5M6]) - mantissa
    quantum = (quantum_exponent << 23).view(torch.float32)
    rounded = torch.round(x / quantum) * quantum
    # Seven significant bits and a quantum of at least 2**-20 fit FP16 exactly, whose top 12 bits are the code.
    return (rounded.to(torch.float16).view(torch.int16).int() >> 4) & 0xFFF


def decode_e5m6(codes: Tensor) -> Tensor:
    """E5M6 codes in int32 -> FP32."""
    return (codes << 4).to(torch.int16).view(torch.float16).float()


def pack_e5m6(codes: Tensor) -> Tensor:
    """Eight 12-bit codes into twelve bytes, the most significant bits first; the last group is padded with zeros.

    Shapes: codes int32 [..., C] -> uint8 [..., ceil(C/8)*12].
    """
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % E5M6_CODES))
    first, second = _fold(codes, 2)
    three = torch.stack((first >> 4, ((first & 0xF) << 4) | (second >> 8), second & 0xFF), dim=-1)
    return three.flatten(-2).to(torch.uint8)


def _fold(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """Every width-th column, starting at 0, 1, ..., width - 1."""
    return tuple(x[..., first::width] for first in range(width))


def unpack_e5m6(packed: Tensor, cols: int) -> Tensor:
    """The inverse of `pack_e5m6`. Shapes: uint8 [..., ceil(cols/8)*12] -> int32 [..., cols]."""
    assert packed.shape[-1] % E5M6_BYTES == 0
    high, middle, low = _fold(packed.int(), 3)
    pair = torch.stack(((high << 4) | (middle >> 4), ((middle & 0xF) << 8) | low), dim=-1)
    return pair.flatten(-2)[..., :cols]


def round_up_to_pow2(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below `scale`, by carrying its mantissa into the exponent.

    `scale` is a positive normal FP32 number of at most 2**127; NaN stays NaN.
    """
    bits = (scale.view(torch.int32) + 0x007F_FFFF) & 0x7F80_0000
    return torch.where(scale.isnan(), scale, bits.view(torch.float32))


def encode_scale(scale: Tensor, kind: ScaleKind) -> Tensor:
    """Store FP32 scales as the scale kind asks. E8M0 keeps the exponent of a power of two; NaN becomes 0xFF."""
    if kind is not ScaleKind.E8M0:
        return scale
    exponent = (scale.view(torch.int32) >> 23) & 0xFF
    # 0xFF, FP32's exponent of NaN, is E8M0's NaN as well, and both biases are 127.
    return exponent.to(torch.uint8).view(torch.float8_e8m0fnu)


def decode_scale(scale: Tensor) -> Tensor:
    """Scales as FP32. E8M0's code 0 is 2**-127, an FP32 subnormal; `encode_scale` never makes it."""
    return scale.float()
