# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""The softmax of the fused output head (`fp8c/ops/head_loss.py`): losses of all tokens, and their gradient over the logits.

Two kernels: one reads the logits once and leaves, for each token and each part of the vocabulary, the logarithm of its
part of the denominator; the other reads them again and writes the gradient in their place. The parts are joined between
the two, a few values for each token.

Legend: T tokens, V words; logits [V, T], tokens side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8c.ops import head_loss

TOKENS, WORDS, WARPS = 128, 32, 4  # of a tile
STAGES = 4  # tiles on their way while one is added up
LOWEST = tl.constexpr(-3.0e38)  # below any logit; finite, so that -inf - LOWEST is no NaN
PARTS = 16  # of the vocabulary: enough programs for every SM at 8192 tokens


@triton.jit
def denominator_kernel(
    logits_ptr, parts_ptr, T, V, pitch, words_each,
    TOKENS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS tokens by one part of the vocabulary; log of the sum of exp over the part."""
    tiles = tl.cdiv(T, TOKENS)
    pid = tl.program_id(0)
    part = pid // tiles
    tokens = (pid % tiles) * TOKENS + tl.arange(0, TOKENS)
    token_ok = tokens < T
    first = part * words_each
    end = tl.minimum(first + words_each, V)
    # Every place of the tile has its own maximum and sum, one exp for each logit; they are joined once, at the end.
    top = tl.full((WORDS, TOKENS), LOWEST, tl.float32)
    total = tl.zeros((WORDS, TOKENS), tl.float32)
    for start in tl.range(first, end, WORDS, num_stages=STAGES):
        words = start + tl.arange(0, WORDS)
        mask = (words < end)[:, None] & token_ok[None, :]
        pointers = logits_ptr + words.to(tl.int64)[:, None] * pitch + tokens[None, :]
        x = tl.load(pointers, mask=mask, other=float("-inf")).to(tl.float32)
        factor = tl.exp(0.0 - tl.abs(x - top))
        total = tl.where(x > top, total * factor + 1.0, total + factor)
        top = tl.maximum(top, x)
    highest = tl.max(top, 0)
    joined = tl.sum(total * tl.exp(top - highest[None, :]), 0)
    tl.store(parts_ptr + part.to(tl.int64) * T + tokens, tl.log(joined) + highest, mask=token_ok)


@triton.jit
def gradient_kernel(
    logits_ptr, log_total_ptr, target_ptr, counted_ptr, scale_ptr, T, V, pitch,
    TOKENS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of WORDS words by TOKENS tokens."""
    tiles = tl.cdiv(T, TOKENS)
    pid = tl.program_id(0)
    tokens = (pid % tiles) * TOKENS + tl.arange(0, TOKENS)
    token_ok = tokens < T
    words = (pid // tiles) * WORDS + tl.arange(0, WORDS)
    mask = (words < V)[:, None] & token_ok[None, :]
    pointers = logits_ptr + words.to(tl.int64)[:, None] * pitch + tokens[None, :]
    x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    log_total = tl.load(log_total_ptr + tokens, mask=token_ok, other=0.0)
    target = tl.load(target_ptr + tokens, mask=token_ok, other=0)
    counted = tl.load(counted_ptr + tokens, mask=token_ok, other=0) != 0
    scale = tl.load(scale_ptr)
    gradient = tl.exp(x - log_total[None, :]) * scale
    gradient = tl.where(words[:, None] == target[None, :], gradient - scale, gradient)
    gradient = tl.where(counted[None, :], gradient, 0.0)
    tl.store(pointers, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


def to_gradient(logits: Tensor, words: Tensor, is_counted: Tensor, scale: Tensor | None) -> Tensor:
    """`fp8c.ops.head_loss.ToGradient`."""
    vocabulary, tokens = logits.shape
    if logits.numel() == 0 or logits.stride(1) != 1:
        return head_loss.to_gradient_plain(logits, words, is_counted, scale)
    tiles, parts = triton.cdiv(tokens, TOKENS), min(PARTS, triton.cdiv(vocabulary, WORDS))
    words_each = triton.cdiv(triton.cdiv(vocabulary, parts), WORDS) * WORDS
    logs = logits.new_empty((triton.cdiv(vocabulary, words_each), tokens), dtype=torch.float32)
    pitch = logits.stride(0)
    denominator_kernel[(tiles * logs.shape[0],)](
        logits, logs, tokens, vocabulary, pitch, words_each,
        TOKENS=TOKENS, WORDS=WORDS, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    log_total = torch.logsumexp(logs, 0)
    log_total = log_total + (log_total - log_total)  # infinite logits: NaN for the token, as log_softmax has it
    losses = torch.where(is_counted, log_total - logits.gather(0, words[None, :])[0].float(), 0.0)
    if scale is None:
        return losses
    gradient_kernel[(tiles * triton.cdiv(vocabulary, WORDS),)](
        logits, log_total, words, is_counted.view(torch.uint8), scale, tokens, vocabulary, pitch,
        TOKENS=TOKENS, WORDS=WORDS, num_warps=WARPS,
    )  # fmt: skip
    return losses


def linear_cross_entropy(
    x: Tensor, w: Tensor, target: Tensor, ignore_index: int, is_mean: bool, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fp8c::linear_cross_entropy`."""
    return head_loss.linear_cross_entropy(x, w, target, ignore_index, is_mean, needs_dx, needs_dw, to_gradient)
