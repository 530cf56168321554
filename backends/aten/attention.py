"""`fp8c::attention` on CUDA by PyTorch's fused kernels: cuDNN, FlashAttention, or the memory-efficient kernel.

All three take BF16 or FP16 (the last one FP32 too), keep scores and sums in FP32, round probabilities to the input's
dtype before they meet v, and return the natural logarithm of the softmax sums; so forward and backward may use different
ones. PyTorch's own checks (`torch.backends.cuda.can_use_*`) say which applies; where none does, the plain form in
`fp8c.ops.decompositions` runs.

B batch, H query heads, G key heads, Sq and Sk positions, D and Dv head dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from functools import cache

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.functional import pad

from fp8c.ops import check_attention, decompositions

_ALIGNMENT = 8  # elements: the fused kernels read 16 bytes at a time
_LSE_ALIGNMENT = 32  # the memory-efficient kernel pads its softmax sums to this many queries
_BIAS_ALIGNMENT = 16  # and wants rows of the bias to start at multiples of this
#: PyTorch keeps cuDNN's backward plans by the sizes and strides of q, k and v and by the dropout, not by the strides of `out`
#: and `dout`, which a plan fixes as well (MHACacheKeyWrapper in ATen/native/cudnn/MHA.cpp, torch 2.11, as its source reads).
#: So that attention run eagerly in another layout can't lend us its plan, nor take ours, the sign of this zero makes ours a
#: key of their own. Wrong dq and dk were seen beside eager attention once; that this was their cause is not confirmed.
_NO_DROPOUT_KEY = -0.0


#: Compute capabilities whose tensor cores FlashAttention 2, PyTorch's own, does not use in full: cuDNN comes first there, as
#: in PyTorch (check_prefer_cudnn_attention in ATen/native/transformers/cuda/sdp_utils.cpp).
_CUDNN_FIRST = (9, 10)


class Kernel(Enum):
    FLASH = "flash"
    CUDNN = "cudnn"
    EFFICIENT = "efficient"
    PLAIN = "plain"


def choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> Kernel:
    """The kernel for these operands: cuDNN's or FlashAttention (equal head dimensions and no mask), in the order that suits
    the GPU, else the memory-efficient one. Only kernels that also have a backward are taken.
    """
    if q.numel() == 0 or k.shape[2] == 0 or any(t.shape[3] % _ALIGNMENT for t in (q, v)):
        return Kernel.PLAIN
    # Checks for training are made only for operands that require a gradient.
    queries, keys, values = (t.detach().requires_grad_() for t in (q, k, v))
    bias = _bias(mask, q, k)
    usable = {
        Kernel.FLASH: lambda: (
            mask is None
            and q.shape[3] == v.shape[3]
            and can_use_flash_attention(SDPAParams(queries, keys, values, None, 0.0, is_causal, enable_gqa))
        ),
        Kernel.CUDNN: lambda: can_use_cudnn_attention(
            SDPAParams(queries, keys, values, bias, 0.0, is_causal, enable_gqa)
        ),
    }
    order = (Kernel.CUDNN, Kernel.FLASH) if _major(q.device) in _CUDNN_FIRST else (Kernel.FLASH, Kernel.CUDNN)
    for kernel in order:
        if usable[kernel]():
            return kernel
    # This kernel wants a key head for each query head; a view of that shape is enough to ask.
    keys, values = (t[:, :1].expand(-1, q.shape[1], -1, -1).detach().requires_grad_() for t in (k, v))
    if can_use_efficient_attention(SDPAParams(queries, keys, values, bias, 0.0, is_causal, False)):
        return Kernel.EFFICIENT
    return Kernel.PLAIN


@cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    """Contract as `backends.reference.attention.attention`; probabilities are rounded to q's dtype inside."""
    check_attention(q, k, v, mask, is_causal)
    q, k, v = (_unit_stride(t) for t in (q, k, v))
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    match choose(q, k, v, mask, is_causal, enable_gqa):
        case Kernel.FLASH:
            forward = torch.ops.aten._scaled_dot_product_flash_attention.default
            out, lse, *_ = forward(q, k, v, 0.0, is_causal, False, scale=scale)
        case Kernel.CUDNN:
            forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
            out, lse, *_ = forward(q, k, v, _bias(mask, q, k), True, 0.0, is_causal, False, scale=scale)
        case Kernel.EFFICIENT:
            keys, values = _per_query_head(k, q), _per_query_head(v, q)
            forward = torch.ops.aten._scaled_dot_product_efficient_attention.default
            out, lse, *_ = forward(q, keys, values, _bias(mask, q, k), True, 0.0, is_causal, scale=scale)
            lse = lse[..., : q.shape[2]]
        case Kernel.PLAIN:
            return decompositions.attention(q, k, v, mask, is_causal, scale, enable_gqa)
    return _heads_last(out), lse.reshape(q.shape[:3]).contiguous()


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contract as `backends.reference.attention.attention_backward`."""
    check_attention(q, k, v, mask, is_causal)
    q, k, v = (_unit_stride(t) for t in (q, k, v))
    # One layout whatever the caller's: a cuDNN plan made for another would be taken for this one as well.
    dout, out = _heads_last(dout), _heads_last(out)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    # Seeds and offsets of the dropout that does not happen.
    seed, offset = q.new_zeros((), dtype=torch.int64), q.new_zeros((), dtype=torch.int64)
    backward: Callable[..., tuple[Tensor, ...]]
    match choose(q, k, v, mask, is_causal, enable_gqa):
        case Kernel.FLASH:
            backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
            rng_state, unused = q.new_zeros(2, dtype=torch.uint64), q.new_zeros(0, dtype=torch.uint64)
            sizes = (None, None, q.shape[2], k.shape[2])
            grads = backward(dout, q, k, v, out, lse, *sizes, 0.0, is_causal, rng_state, unused, scale=scale)
        case Kernel.CUDNN:
            backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
            sizes = (None, None, q.shape[2], k.shape[2])
            kept = (out, lse[..., None].contiguous(), seed, offset, _bias(mask, q, k))
            grads = backward(dout, q, k, v, *kept, *sizes, _NO_DROPOUT_KEY, is_causal, scale=scale)
        case Kernel.EFFICIENT:
            keys, values = _per_query_head(k, q), _per_query_head(v, q)
            padded_lse = pad(lse, (0, -lse.shape[2] % _LSE_ALIGNMENT), value=math.inf)
            backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
            needed = [True, True, True, False]
            bias = _bias(mask, q, k)
            grads = backward(
                dout, q, keys, values, bias, out, padded_lse, seed, offset, 0.0, needed, is_causal, scale=scale
            )
        case Kernel.PLAIN:
            return decompositions.attention_backward(dout, q, k, v, out, lse, mask, is_causal, scale, enable_gqa)
    dq, dk, dv = (_summed_over_queries(grad, like) for grad, like in zip(grads, (q, k, v)))
    return dq, dk, dv


def _unit_stride(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 else _heads_last(t)


def _heads_last(t: Tensor) -> Tensor:
    """The same values stored as [B, S, H, D]; no copy where they already are."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _per_query_head(t: Tensor, q: Tensor) -> Tensor:
    repeat = q.shape[1] // t.shape[1]
    return t if repeat == 1 else t.repeat_interleave(repeat, dim=1)


def _summed_over_queries(grad: Tensor, like: Tensor) -> Tensor:
    """Add the gradients of the query heads that share a key head, in FP32 with one rounding."""
    if grad.shape[1] == like.shape[1]:
        wanted = torch.empty_like(like, device="meta").stride()
        return grad if grad.stride() == wanted else torch.empty_like(like).copy_(grad)
    batch, heads, *rest = like.shape
    summed = grad.reshape(batch, heads, -1, *rest).sum(2, dtype=torch.float32)
    return torch.empty_like(like).copy_(summed)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as numbers to add to the scores, [B, H, Sq, Sk] by strides, rows aligned."""
    if mask is None:
        return None
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    mask = mask.to(q.dtype)
    mask = mask.expand(*mask.shape[:-1], shape[3]) if mask.shape[-1] != shape[3] else mask
    aligned = pad(mask, (0, -shape[3] % _BIAS_ALIGNMENT))[..., : shape[3]]
    return aligned.expand(shape)
