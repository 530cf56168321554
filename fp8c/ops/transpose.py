"""`fp8c::transposed`: a quantized weight's data with its last two axes exchanged and stored so, for dgrad's GEMM.

Shapes: q e4m3|e5m2 [.., N, K] -> [.., K, N], contiguous. A copy of bytes: exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fp8c", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "transposed(Tensor q) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
)  # type: ignore[no-untyped-call]


def transposed(q: Tensor) -> Tensor:
    """The plain form."""
    return q.mT.contiguous()


def _fake(q: Tensor) -> Tensor:
    return q.new_empty([*q.shape[:-2], q.shape[-1], q.shape[-2]])


_LIBRARY.impl("transposed", transposed, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("fp8c::transposed", _fake, lib=_LIBRARY)

TRANSPOSED = torch.ops.fp8c.transposed.default
