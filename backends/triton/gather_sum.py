"""`fp8c::gather_sum` in Triton: every row is read once, a token's rows side by side in flight.

Legend: T tokens, k rows of each, N columns; one program makes COLS columns of one token. FP32 sums, in the order of j.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8c.backends.triton.quantize import readable
from fp8c.ops import combine

COLS, WARPS = 1024, 8
MOST_ROWS = 32  # of a token: their loads are unrolled


@triton.jit
def gather_sum_kernel(
    x_ptr, rows_ptr, added_ptr, out_ptr, N, tiles, x_row, added_row,
    K: tl.constexpr, COLS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    pid = tl.program_id(0)
    token = (pid // tiles).to(tl.int64)
    cols = (pid % tiles) * COLS + tl.arange(0, COLS)
    inside = cols < N
    total = tl.zeros((COLS,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(rows_ptr + token * K + j).to(tl.int64)
        part = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
        # 0 + x would turn a first -0 into +0
        total = part if j == 0 else total + part
    result = total.to(dtype)
    if ADDED:
        other = tl.load(added_ptr + token * added_row + cols, mask=inside, other=0.0).to(tl.float32)
        result = (other + result.to(tl.float32)).to(dtype)
    tl.store(out_ptr + token * N + cols, result, mask=inside)


def gather_sum(x: Tensor, rows: Tensor, k: int, added: Tensor | None = None) -> Tensor:
    """`fp8c::gather_sum`."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or rows.numel() == 0 or k > MOST_ROWS:
        return combine.gather_sum(x, rows, k, added)
    x = readable(x)
    tokens, width = rows.shape[0] // k, x.shape[1]
    out = x.new_empty((tokens, width))
    other = out if added is None else readable(added)
    tiles = triton.cdiv(width, COLS)
    gather_sum_kernel[(tokens * tiles,)](
        x, rows.contiguous(), other, out, width, tiles, x.stride(0), other.stride(0),
        K=k, COLS=COLS, ADDED=added is not None, num_warps=WARPS,
    )  # fmt: skip
    return out
