"""`fp8c::stored`: the same values in memory of their own, so that whoever reads them does not compute them again.

A compiler that fuses element by element computes a small table anew for every element that reads it. Behind this operator
the table is read. Exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8c.ops import KERNEL_TAGS

_LIBRARY = torch.library.Library("fp8c", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("stored(Tensor x) -> Tensor", tags=KERNEL_TAGS)  # type: ignore[no-untyped-call]


def stored(x: Tensor) -> Tensor:
    return x.clone()


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_LIBRARY.impl("stored", stored, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("fp8c::stored", _fake, lib=_LIBRARY)

STORED = torch.ops.fp8c.stored.default
"""The overload, for rewrites that build nodes."""
