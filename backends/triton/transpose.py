"""`fp8c::transposed` in Triton: one program moves a tile of bytes through registers.

Legend: E matrices of N rows and K columns, stored densely; a program reads BLOCK_N x BLOCK_K and writes it transposed.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8c.ops import transpose

BLOCK_N, BLOCK_K = 128, 128


@triton.jit
def transpose_kernel(
    q_ENK,
    out_EKN,
    N,
    K,
    tiles_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = (tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (n[:, None] < N) & (k[None, :] < K)
    start = matrix * N * K
    values = tl.load(q_ENK + start + n[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0)
    turned = tl.trans(values)
    tl.store(out_EKN + start + k[:, None].to(tl.int64) * N + n[None, :], turned, mask=tl.trans(inside))


def transposed(q: Tensor) -> Tensor:
    """Contract as `fp8c.ops.transpose.transposed`. Anything but contiguous bytes goes the plain way."""
    if not q.is_contiguous() or q.element_size() != 1 or q.dim() not in (2, 3) or q.numel() == 0:
        return transpose.transposed(q)
    *leading, rows, cols = q.shape
    out = q.new_empty([*leading, cols, rows])
    tiles_k = triton.cdiv(cols, BLOCK_K)
    grid = (triton.cdiv(rows, BLOCK_N) * tiles_k, leading[0] if leading else 1)
    transpose_kernel[grid](
        q.view(torch.uint8), out.view(torch.uint8), rows, cols, tiles_k, BLOCK_N, BLOCK_K, num_warps=8
    )
    return out
