"""`fp8c::gather_sum`: the rows that experts made of each token, gathered and added up: an MoE layer's combine.

Shapes:  x f32|bf16|f16 [R, N], rows i64|i32 [T * k] within 0..R, added [T, N] of x's type or None -> x's type [T, N].
Meaning: token t gets sum over j < k of x[rows[t * k + j]], added in FP32 in the order of j and rounded once to x's type;
         then `added` plus that, rounded once more, as the model's own operators round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8c.ops import KERNEL_TAGS

_LIBRARY = torch.library.Library("fp8c", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "gather_sum(Tensor x, Tensor rows, int k, Tensor? added=None) -> Tensor", tags=KERNEL_TAGS
)


def gather_sum(x: Tensor, rows: Tensor, k: int, added: Tensor | None = None) -> Tensor:
    """The plain form."""
    of_token = rows.view(-1, k)
    total = x[of_token[:, 0]].float()
    for j in range(1, k):
        total = total + x[of_token[:, j]].float()
    result = total.to(x.dtype)
    return result if added is None else added + result


def _fake(x: Tensor, rows: Tensor, k: int, added: Tensor | None = None) -> Tensor:
    return x.new_empty([rows.shape[0] // k, x.shape[1]])


_LIBRARY.impl("gather_sum", gather_sum, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("fp8c::gather_sum", _fake, lib=_LIBRARY)

GATHER_SUM = torch.ops.fp8c.gather_sum.default
