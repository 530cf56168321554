"""`fp8c::embedding_gradient`: the gradient of an embedding table in the table's own type, as PyTorch's operator makes it.

Shapes:  dy bf16|f16|f32 [.., H], indices i64|i32 [..] within 0..V -> [V, H] of dy's type.
Meaning: row v is the sum of dy where indices is v, added in FP32 and rounded once; 0 for padding_idx.

Opaque, so that Inductor does not add into an FP32 table first and cast it behind: at 129,280 words of 7168 features that
table is 3.5 GiB, made when every other gradient is there already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor

from fp8c.ops import KERNEL_TAGS

_LIBRARY = torch.library.Library("fp8c", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "embedding_gradient(Tensor dy, Tensor indices, SymInt words, SymInt padding_idx, bool scale_by_freq) -> Tensor",
    tags=KERNEL_TAGS,
)


def embedding_gradient(dy: Tensor, indices: Tensor, words: int, padding_idx: int, scale_by_freq: bool) -> Tensor:
    """The plain form: PyTorch's kernel, which sorts the indices and waits for nothing."""
    return torch.ops.aten.embedding_dense_backward(dy, indices, words, padding_idx, scale_by_freq)  # type: ignore[no-any-return]


def _fake(dy: Tensor, indices: Tensor, words: int | SymInt, padding_idx: int, scale_by_freq: bool) -> Tensor:
    return dy.new_empty([words, dy.shape[-1]])


_LIBRARY.impl("embedding_gradient", embedding_gradient, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("fp8c::embedding_gradient", _fake, lib=_LIBRARY)


def decomposition(fallback: Any) -> Any:
    """For Inductor's table: tables in 16 bits by the operator above, others as before."""

    def decomposed(dy: Tensor, indices: Tensor, words: int, padding_idx: int, scale_by_freq: bool) -> Any:
        if dy.dtype not in (torch.bfloat16, torch.float16):
            return fallback(dy, indices, words, padding_idx, scale_by_freq)
        return torch.ops.fp8c.embedding_gradient(dy, indices, words, padding_idx, scale_by_freq)

    return decomposed
