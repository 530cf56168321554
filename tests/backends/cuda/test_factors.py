"""Why quotients take as few instructions as they do in CUDA C++: tried for every pair that could tell."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8c.backends.cuda import build

LARGEST, BINADES = 448.0, 20  # below amax, down to codes of zero
SOURCE = (Path(build.__file__).parent / "factors.cuh").read_text()
ENTRIES = torch.tensor([int(x, 16) for x in re.findall(r"0x4[0-9a-f]{7}\b|0xc[0-9a-f]{7}\b", SOURCE)])
UNITS_BELOW = 8


def float_of(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32).double()


def codes(x: Tensor) -> Tensor:
    return x.clamp(max=LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def toward_zero(x: Tensor) -> Tensor:
    nearest = x.float()
    return torch.where(nearest.double() > x, torch.nextafter(nearest, torch.zeros(())), nearest)


@pytest.mark.parametrize("exponent", (0, 1, -100, 120, 127, *range(-126, -114)))
def test_every_pair_of_significands_has_the_code_of_its_quotient(exponent: int) -> None:
    """All amax of a binade, all x below; FP64 holds each product exactly, so one rounding is one rounding."""
    assert len(ENTRIES) == 128 and f"UNITS_BELOW = {UNITS_BELOW}" in SOURCE
    significands = torch.arange(128, 256).double() / 128
    amax = significands * 2.0**exponent
    scale = (amax / LARGEST).clamp(min=2.0**-126).float().double()
    x = torch.cat([significands * 2.0 ** (exponent - below) for below in range(BINADES)])
    is_in_group = x <= amax[:, None]
    exact = codes((x / scale[:, None]).float())

    takes_both = ENTRIES >> 31 == 1
    assert takes_both.sum() == 3
    bits = (ENTRIES & 0x7FFFFFFF) - ((exponent + 127) << 23) + 0x3F800000
    is_smallest = scale == 2.0**-126
    bits, takes_both = torch.where(is_smallest, 0x7E800000, bits), takes_both & ~is_smallest
    one = codes(toward_zero(x * float_of(bits)[:, None]))
    assert torch.equal(one[~takes_both][is_in_group[~takes_both]], exact[~takes_both][is_in_group[~takes_both]])
    if exponent == 0:  # none of the three could do without
        assert all((one[i] != exact[i])[is_in_group[i]].any() for i in takes_both.nonzero().flatten().tolist())

    high = float_of(bits - UNITS_BELOW)
    low = ((1.0 - high * scale).float().double() * high).float().double()
    assert (low > 0).all()  # so that -0 stays -0
    rest = (x * low[:, None]).float().double()
    assert torch.equal(codes((x * high[:, None] + rest).float())[is_in_group], exact[is_in_group])


def nearest(x: Fraction) -> Fraction:
    """FP32 without its limits of range."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > abs(x)
    unit = Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit


@pytest.mark.slow
def test_what_requantizing_divides_with_is_exact_enough_for_codes() -> None:
    """`requantize_columns.cu`, x of 24 significant bits: both quotients are off by less than 2^-42 before they are rounded. That
    changes a code only where x / scale is as near to the middle of an FP32 number half way between two codes (17 to 31
    sixteenths, or a power of two) and its neighbour. All those pairs of significands are tried: a quotient from two parts of
    the inverse, and one that is corrected once, which serves the scales whose last 20 bits are set (three of them need it)."""
    scale = np.arange(2**23, 2**24, dtype=np.int64)
    tried = corrected = 0
    for half_way, side in itertools.product(range(16, 32), (1, -1)):
        middle = (half_way << 21) + (2 if side > 0 else -1 if half_way == 16 else -2)  # 26 bits
        product = middle * scale
        for shift in (25, 26, 27):
            x = (product + (1 << (shift - 1))) >> shift
            is_near = np.abs(product - (x << shift)) <= product * 2.0**-42
            for a, b in zip(x[is_near].tolist(), scale[is_near].tolist(), strict=True):
                if not 2**23 <= a < 2**24:
                    continue
                tried += 1
                if b & 0xFFFFF == 0xFFFFF:
                    q, inverse = nearest(Fraction(a, b)), nearest(Fraction(1, b))
                    once = nearest(a * inverse)
                    assert nearest(once - nearest(once * b - a) * inverse) == q
                    corrected += 1
                else:
                    assert quotient_of_two_parts(a, b) == nearest(Fraction(a, b))
    assert tried == 1468 and corrected >= 3


def quotient_of_two_parts(a: int, b: int) -> Fraction:
    high = nearest(Fraction(1, b))
    if 1 - high * b < 0:
        high -= Fraction(1, 2**47)  # its last place: 2^-24 < high <= 2^-23
    rest = nearest(1 - high * b)
    low = nearest(nearest(rest * rest + rest) * high)
    assert low >= 0
    return nearest(a * high + nearest(a * low))
