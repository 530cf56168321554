"""The output head joined with the cross-entropy loss: the operator that `fuse-head-loss` puts in.

    fp8c.linear_cross_entropy(x, w, target, ...) -> loss, dx, dw       gradients of the loss by x and by w

Logits are made once, in the type the model gives them, and their gradient takes their place in memory: no FP32 logits, no
second copy. Gradients are computed in forward, where the logits are, so the head still costs three GEMMs; backward
multiplies them by the gradient of the loss.

Logits are stored [V, T], one row for each word. So the weight's gradient, whose rows are words too, can be written from
the front of the same memory into rows of logits that were read already: one allocation of about max(V T, V H) elements
serves both. Where T is much larger than H, tokens come in blocks, and the weight's gradient is added up in FP32.

Legend: T tokens, V words, H hidden features.
Source: gradients in forward and blocks of tokens as Liger Kernel's fused linear cross-entropy (arXiv:2410.10989); memory
        shared by logits and gradient is fp8c's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fp8c.diagnostics import fail
from fp8c.ops import KERNEL_TAGS

#: (logits [V, T], target [T], is_counted [T], scale) -> FP32 losses [T], 0 where not counted. Logits become their gradient,
#: or stay where scale is None.
ToGradient = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

SLICES = 16  # parts of the weight's gradient; one of them is the space between reading and writing
BLOCKS_FROM = 2  # tokens come in blocks where there are more than this many times H
SPARE = 1.25  # the gradient stays in memory up to this many times its size, else it is copied out of it
ALIGNMENT = 8  # elements: 16 bytes of BF16, which GEMMs want rows to start at
PLAIN_TOKENS = 1024  # that the plain form holds in FP32 at once
EVALUATED = 2048  # tokens of a block where no gradient is needed

_SCHEMA = (
    "linear_cross_entropy(Tensor x, Tensor w, Tensor target, int ignore_index, bool is_mean, bool needs_dx, "
    "bool needs_dw) -> (Tensor, Tensor, Tensor)"
)


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    ignore_index: int,
    is_mean: bool,
    needs_dx: bool,
    needs_dw: bool,
    to_gradient: ToGradient | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy((x @ w.T).float(), target)` with its gradients, logits and both products rounded to x's type.

    Shapes:  x f32|bf16|f16 [T, H], w [V, H] of the same type, target i64 [T] within 0..V or ignore_index
             -> loss f32 [], dx [T, H], dw [V, H] (empty where not needed)
    Meaning: the mean over targets that are not ignored, or their sum; NaN where a mean has nothing to count.
    """
    to_gradient = to_gradient or to_gradient_plain
    is_counted = target != ignore_index
    count = is_counted.sum().float()
    scale = None
    if needs_dx or needs_dw:
        scale = 1.0 / count if is_mean else torch.ones_like(count)
    words = torch.where(is_counted, target, 0)
    block = EVALUATED if scale is None else block_tokens(x.shape[0], x.shape[1])
    if block >= x.shape[0]:
        losses, dx, dw = in_one_block(x, w, words, is_counted, scale, needs_dx, needs_dw, to_gradient)
    else:
        losses, dx, dw = in_blocks(x, w, words, is_counted, scale, needs_dx, needs_dw, to_gradient, block)
    total = losses.sum()
    return total / count if is_mean else total, dx, dw


def block_tokens(tokens: int, hidden: int) -> int:
    """Tokens of a block: all of them up to 2 H; else blocks of about H tokens, equal but for rounding to 128."""
    if tokens <= BLOCKS_FROM * hidden:
        return max(tokens, 1)
    blocks = -(-tokens // max(hidden, 128))
    return -(-tokens // (blocks * 128)) * 128


def in_one_block(
    x: Tensor,
    w: Tensor,
    words: Tensor,
    is_counted: Tensor,
    scale: Tensor | None,
    needs_dx: bool,
    needs_dw: bool,
    to_gradient: ToGradient,
) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens at once; the weight's gradient is written over logits that were read.

    Slice i of dw ends at word (i + 1) n, n words each, and must end in front of slice i of the logits, which begin at
    `start`: (i + 1) n H <= start + i n T for the first and for the last i, hence for all.
    """
    (tokens, hidden), vocabulary = x.shape, w.shape[0]
    pitch = -(-tokens // ALIGNMENT) * ALIGNMENT
    step = max(-(-vocabulary // SLICES), 1)
    start = max(step * hidden, vocabulary * hidden - (vocabulary - 1) // step * step * pitch) if needs_dw else 0
    start = -(-start // 64) * 64
    memory = x.new_empty(start + vocabulary * pitch)
    logits = memory[start:].view(vocabulary, pitch)[:, :tokens]
    torch.mm(w, x.t(), out=logits)
    losses = to_gradient(logits, words, is_counted, scale)
    dx = torch.mm(logits.t(), w) if needs_dx else x.new_empty(0)
    if not needs_dw:
        return losses, dx, x.new_empty(0)
    dw = memory[: vocabulary * hidden].view(vocabulary, hidden)
    for first in range(0, vocabulary, step):
        torch.mm(logits[first : first + step], x, out=dw[first : first + step])
    return losses, dx, dw if memory.numel() <= SPARE * dw.numel() else dw.clone()


def in_blocks(
    x: Tensor,
    w: Tensor,
    words: Tensor,
    is_counted: Tensor,
    scale: Tensor | None,
    needs_dx: bool,
    needs_dw: bool,
    to_gradient: ToGradient,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of tokens; the weight's gradient is added up in FP32 and rounded once."""
    tokens, vocabulary = x.shape[0], w.shape[0]
    memory = x.new_empty((vocabulary, block))
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    total = w.new_zeros(w.shape if needs_dw else 0, dtype=torch.float32)
    losses = []
    for first in range(0, tokens, block):
        part = slice(first, min(first + block, tokens))
        rows = x[part]
        logits = memory[:, : rows.shape[0]]
        torch.mm(w, rows.t(), out=logits)
        losses.append(to_gradient(logits, words[part], is_counted[part], scale))
        if needs_dx:
            torch.mm(logits.t(), w, out=dx[part])
        if needs_dw:
            add_product(total, logits, rows)
    del memory, logits
    return torch.cat(losses), dx, total.to(w.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in FP32, without a rounding of the product."""
    if a.is_cuda and a.dtype is not torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def to_gradient_plain(logits: Tensor, words: Tensor, is_counted: Tensor, scale: Tensor | None) -> Tensor:
    """`ToGradient` in tensor operations, in the order of PyTorch's log_softmax and nll_loss and of their gradients."""
    losses = []
    for first in range(0, logits.shape[1], PLAIN_TOKENS):
        part = slice(first, first + PLAIN_TOKENS)
        index, counted = words[part][None, :], is_counted[part]
        logs = torch.log_softmax(logits[:, part].float(), 0)
        losses.append(torch.where(counted, -logs.gather(0, index)[0], 0.0))
        if scale is None:
            continue
        gradient = logs.exp_().mul_(scale)
        gradient.scatter_add_(0, index, -scale.expand_as(index))
        logits[:, part] = torch.where(counted, gradient, 0.0).to(logits.dtype)
    return torch.cat(losses) if losses else logits.new_zeros(0, dtype=torch.float32)


def _fake(
    x: Tensor, w: Tensor, target: Tensor, ignore_index: int, is_mean: bool, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dim() != 2 or w.dim() != 2 or target.dim() != 1 or x.dtype != w.dtype:
        raise fail("E0520", "fp8c::linear_cross_entropy takes x [T, H], w [V, H] of one type and target [T]")
    dx = x.new_empty(x.shape if needs_dx else (0,))
    dw = w.new_empty(w.shape if needs_dw else (0,))
    return x.new_empty((), dtype=torch.float32), dx, dw


_LIBRARY = torch.library.Library("fp8c", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(_SCHEMA, tags=KERNEL_TAGS)  # type: ignore[no-untyped-call]
_LIBRARY.impl("linear_cross_entropy", linear_cross_entropy, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("fp8c::linear_cross_entropy", _fake, lib=_LIBRARY)

LINEAR_CROSS_ENTROPY: Any = torch.ops.fp8c.linear_cross_entropy.default


def gemms_of(arguments: tuple[Any, ...]) -> tuple[str, ...]:
    """Which of a Linear's three GEMMs a call stands for, by its arguments."""
    return ("fprop", *(("dgrad",) if arguments[5] else ()), *(("wgrad",) if arguments[6] else ()))
