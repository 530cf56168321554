"""Why one multiplication is enough for most quotients of BF16 numbers: `backends/cuda/factors.cuh`, tried for every pair."""

from __future__ import annotations

import re
from pathlib import Path

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
