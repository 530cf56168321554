"""Why two instructions are enough for a quotient of BF16 numbers: `backends/triton/numerics.py`, tried for every pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8c.backends.reference.formats import encode_e5m6

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.uint8: 65024.0}
BINADES = {torch.float8_e4m3fn: 20, torch.float8_e5m2: 34, torch.uint8: 38}  # below amax, down to codes of zero


def codes(x: Tensor, element: torch.dtype) -> Tensor:
    kept = x.clamp(max=LARGEST[element])
    return encode_e5m6(kept) if element is torch.uint8 else kept.to(element).view(torch.uint8)


@pytest.mark.parametrize("element", LARGEST, ids=("e4m3", "e5m2", "e5m6"))
@pytest.mark.parametrize("exponent", (0, -100, 120))
def test_every_pair_of_significands_has_the_code_of_its_quotient(element: torch.dtype, exponent: int) -> None:
    """All amax of a binade, all x below; FP64 holds each product and sum exactly, so one rounding is one rounding."""
    significands = torch.arange(128, 256).double()
    amax = significands * 2.0**exponent
    scale = (amax / LARGEST[element]).float()[:, None]
    x = torch.cat([significands * 2.0 ** (exponent - below) for below in range(BINADES[element])])
    is_in_group = x <= amax[:, None]
    for off in (-1, 0, 1):  # of the approximate reciprocal, in units of the last place
        nearest = (1.0 / scale.double()).float()
        high = (nearest.view(torch.int32) + off - 4).view(torch.float32)
        low = ((1.0 - high.double() * scale.double()).float().double() * high.double()).float()
        assert (low > 0).all()  # so that -0 stays -0
        exact = (x / scale.double()).float()
        rest = (x * low.double()).float()
        found = (x * high.double() + rest.double()).float()
        assert torch.equal(codes(found, element)[is_in_group], codes(exact, element)[is_in_group])
