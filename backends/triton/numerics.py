"""What every kernel here computes with: scales, exact quotients, codes. Bit for bit as `backends/reference/quantize.py`.

Legend: `bits` int32 is an FP32 number's representation; a tile is rows x 128 columns in FP32.

Division. The payload is the FP32 quotient x / scale, rounded correctly, then to the element. A division per element costs
more than memory leaves time for, so a group's reciprocal is made once.

Where x has at most 11 significant bits (BF16, FP16), the reciprocal is a sum: 1 / s = hi + lo, hi a few units below it, and
each element takes q = RN(x hi + RN(x lo)). Its code is the code of the correctly rounded quotient: q can differ from that
one only in its last bit, which matters only beside a number half way between two codes, and a quotient comes near one only
where 2^k x is an odd multiple of amax: all those pairs, for each element, were compared with a division (a test does BF16).

For wider x, q = RN(x r) with r = RN(1 / s), then two corrections q' = RN(q + (x - q s) r) with an exact remainder: the first
makes q faithful, the second correct (Markstein, "Computation of elementary functions on the IBM RISC System/6000", 1990).
Scales below 2^-64 are lifted together with x, so no remainder underflows.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# Elements and scale kinds as the kernels know them.
E4M3 = tl.constexpr(0)
E5M2 = tl.constexpr(1)
E5M6 = tl.constexpr(2)
FP32 = tl.constexpr(0)
POW2 = tl.constexpr(1)
E8M0 = tl.constexpr(2)

_SMALLEST_SCALE = tl.constexpr(2.0**-126)  # FP32's smallest normal number; why: backends/reference/quantize.py
_SMALL = tl.constexpr(2.0**-64)
_LIFT = tl.constexpr(2.0**64)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_E5M6_SMALLEST_NORMAL = tl.constexpr(2.0**-14)


@triton.jit
def magnitude_bits(x):
    """|x| as bits: integers order like the numbers, and NaN is above infinity, so a maximum can't lose it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def larger_magnitude(a, b):
    """The larger magnitude of two FP32 numbers, NaN above all, with a sign that means nothing: one instruction."""
    return tl.inline_asm_elementwise("max.NaN.xorsign.abs.f32 $0, $1, $2;", "=r,r,r", [a, b], tl.float32, True, 1)


@triton.jit
def largest_bits(x, AXIS: tl.constexpr):
    """The maximum of `magnitude_bits` along an axis, without an instruction for each element's sign."""
    return magnitude_bits(tl.reduce(x, AXIS, larger_magnitude))


@triton.jit
def scale_of(amax_bits, ELEMENT: tl.constexpr, KIND: tl.constexpr):
    """The FP32 scale of groups whose largest magnitude has these bits: 1 for zero, NaN for an infinity or NaN."""
    largest: tl.constexpr = 448.0 if ELEMENT == 0 else (57344.0 if ELEMENT == 1 else 65024.0)
    # amax / largest, rounded correctly: compared with a division for every significand of amax and each of the three.
    negated = amax_bits.to(tl.float32, bitcast=True) * -1.0
    q = negated * (-1.0 / largest)
    scale = tl.fma(tl.fma(q, largest, negated), -1.0 / largest, q)
    bits = tl.maximum(scale, _SMALLEST_SCALE).to(tl.int32, bitcast=True)
    if KIND != 0:
        bits = (bits + 0x007FFFFF) & 0x7F800000  # up to the next power of two
    bits = tl.where(amax_bits == 0, 0x3F800000, bits)
    bits = tl.where(amax_bits >= _INFINITY_BITS, _NAN_BITS, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def store_scale(pointers, scale, mask, KIND: tl.constexpr):
    """E8M0 keeps the exponent, which is 0xFF for NaN."""
    if KIND == 2:
        tl.store(pointers, ((scale.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8), mask=mask)
    else:
        tl.store(pointers, scale, mask=mask)


@triton.jit
def load_scale(pointers, mask, KIND: tl.constexpr):
    """As FP32; 0 where masked."""
    if KIND == 2:
        exponent = tl.load(pointers, mask=mask, other=0).to(tl.int32)
        bits = tl.where(exponent == 0xFF, _NAN_BITS, tl.where(exponent == 0, 0x00400000, exponent << 23))
        scale = tl.where(mask, bits.to(tl.float32, bitcast=True), 0.0)
    else:
        scale = tl.load(pointers, mask=mask, other=0.0)
    return scale


@triton.jit
def approximate_reciprocal(x):
    """1 / x within one unit in the last place, for results that are normal numbers; 0 beyond them."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


@triton.jit
def reciprocal(scale, KIND: tl.constexpr, WIDE: tl.constexpr):
    """What `quotient` needs of each group: three tensors like scale (fewer instructions where WIDE is not set)."""
    if KIND != 0:  # 1 / 2^n: the exponent of 2^-n is 254 less that of 2^n; NaN stays one
        bits = scale.to(tl.int32, bitcast=True)
        inverse = tl.where(bits >= _INFINITY_BITS, bits, 0x7F000000 - bits) | -0x80000000
        return scale, scale, inverse.to(tl.float32, bitcast=True)
    if not WIDE:
        # The approximation is within one unit, so four units less make lo positive: -0 / s must stay -0.
        high = (approximate_reciprocal(scale).to(tl.int32, bitcast=True) - 4).to(tl.float32, bitcast=True)
        low = tl.fma(high * -1.0, scale, 1.0) * high
        return high, low, low
    lift = tl.where(scale < _SMALL, _LIFT, 1.0)
    lifted = scale * lift
    # One Newton step from the approximate division is RN(1 / s), or next to it where that changes no quotient (every s and
    # every x of 11 bits were tried); only for a significand of all ones it is always one too small, and that counts.
    inverse = approximate_reciprocal(lifted)
    inverse = tl.fma(tl.fma(inverse * -1.0, lifted, 1.0), inverse, inverse)
    is_ones = (lifted.to(tl.int32, bitcast=True) & 0x007FFFFF) == 0x007FFFFF
    inverse = (inverse.to(tl.int32, bitcast=True) + is_ones.to(tl.int32)).to(tl.float32, bitcast=True)
    return lift * -1.0, lifted, inverse * -1.0


@triton.jit
def quotient(x, first, second, third, KIND: tl.constexpr, WIDE: tl.constexpr):
    """x / scale, to be rounded to the element at once; the rest is `reciprocal`'s. WIDE: x has more than 11 significant bits.

    WIDE computes with -x, -1 / s and the negated remainder, which is +0 where q is exact, so that -0 stays -0.
    """
    if KIND != 0:
        q = (x * -1.0) * third
    elif not WIDE:
        q = tl.fma(x, first, x * second)
    else:
        negated = x * first
        q = negated * third
        q = tl.fma(tl.fma(q, second, negated), third, q)
        q = tl.fma(tl.fma(q, second, negated), third, q)
    return q


@triton.jit
def fp8_codes(x, ELEMENT: tl.constexpr):
    """E4M3 or E5M2 codes in uint8. The cast saturates (cvt.rn.satfinite)."""
    if ELEMENT == 0:
        codes = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    return codes


@triton.jit
def fp8_values(codes, ELEMENT: tl.constexpr):
    if ELEMENT == 0:
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        values = codes.to(tl.float8e5, bitcast=True).to(tl.float32)
    return values


@triton.jit
def e5m6_codes(x):
    """12-bit codes in int32, rounded to nearest even (`decompositions._encode_e5m6`)."""
    bits = magnitude_bits(x)
    is_nan = bits > _INFINITY_BITS
    magnitude = tl.minimum(bits, 0x477E0000).to(tl.float32, bitcast=True)  # 65024
    kept = magnitude.to(tl.int32, bitcast=True)
    normal = ((kept + 0xFFFF + ((kept >> 17) & 1)) >> 17) - ((127 - 15) << 6)
    subnormal = (magnitude + 8.0).to(tl.int32, bitcast=True) - 0x41000000
    code = tl.where(magnitude < _E5M6_SMALLEST_NORMAL, subnormal, normal)
    sign = (x.to(tl.int32, bitcast=True) >> 20) & 0x800
    return tl.where(is_nan, 0x7E0, code | sign)


@triton.jit
def e5m6_values(codes):
    """FP32 values of codes in int32: an FP16 number with four more zero bits."""
    return (codes << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e5m6_words(codes, ROWS: tl.constexpr):
    """Pack [ROWS, 128] codes into three int32 [ROWS, 16]: words 3i, 3i+1, 3i+2 of a row, bytes in memory order."""
    c_even, c_odd = tl.split(tl.reshape(codes, (ROWS, 16, 2, 2, 2)))
    c04, c26 = tl.split(c_even)
    c15, c37 = tl.split(c_odd)
    c0, c4 = tl.split(c04)
    c2, c6 = tl.split(c26)
    c1, c5 = tl.split(c15)
    c3, c7 = tl.split(c37)
    first = (c0 >> 4) | ((c0 & 0xF) << 12) | (c1 & 0xF00) | ((c1 & 0xFF) << 16) | ((c2 >> 4) << 24)
    second = ((c2 & 0xF) << 4) | (c3 >> 8) | ((c3 & 0xFF) << 8) | ((c4 >> 4) << 16) | ((c4 & 0xF) << 28)
    second = second | ((c5 >> 8) << 24)
    third = (c5 & 0xFF) | ((c6 >> 4) << 8) | ((c6 & 0xF) << 20) | ((c7 >> 8) << 16) | ((c7 & 0xFF) << 24)
    return first, second, third


@triton.jit
def e5m6_unpacked(first, second, third, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The inverse of `e5m6_words`, for COLS columns: int32 [ROWS, COLS]."""
    c0 = ((first & 0xFF) << 4) | ((first >> 12) & 0xF)
    c1 = (first & 0xF00) | ((first >> 16) & 0xFF)
    c2 = (((first >> 24) & 0xFF) << 4) | ((second >> 4) & 0xF)
    c3 = ((second & 0xF) << 8) | ((second >> 8) & 0xFF)
    c4 = (((second >> 16) & 0xFF) << 4) | ((second >> 28) & 0xF)
    c5 = (((second >> 24) & 0xF) << 8) | (third & 0xFF)
    c6 = (((third >> 8) & 0xFF) << 4) | ((third >> 20) & 0xF)
    c7 = (((third >> 16) & 0xF) << 8) | ((third >> 24) & 0xFF)
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    return tl.reshape(tl.join(even, odd), (ROWS, COLS))
