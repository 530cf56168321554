"""Attention on the CPU: softmax(q k^T * scale + mask) v with FP32 arithmetic, blocked over keys.

PyTorch's blocked CPU kernel does the work on FP32 copies: nothing of size Sq x Sk is ever stored. Head dimensions that
differ (192/128 in multi-head latent attention) are padded with zeros, which changes no score and no other output.

B batch, H query heads, G key heads (G divides H with enable_gqa, else G = H), Sq and Sk positions, D and Dv head dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp8c.diagnostics import fail
from fp8c.ops import check_attention, empty_heads_last

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    """FP32 inside, one rounding to q's dtype at the end.

    Shapes:  q [B, H, Sq, D], k [B, G, Sk, D], v [B, G, Sk, Dv], mask broadcastable to [B, H, Sq, Sk]
             -> out [B, H, Sq, Dv] stored as [B, Sq, H, Dv], lse f32 [B, H, Sq] (natural logarithm).
    Causal:  query i sees keys 0..i (aligned at the first position), also where Sq != Sk.
    Mask:    bool (True: attend) or additive. A query that sees no key gets 0; its lse has no meaning.
    scale:   None stands for D ** -0.5.
    """
    check_attention(q, k, v, mask, is_causal)
    out = empty_heads_last(q, (*q.shape[:3], v.shape[3]))
    if out.numel() == 0 or k.shape[2] == 0:  # the blocked kernel divides by these sizes
        return out.zero_(), q.new_zeros(q.shape[:3], dtype=torch.float32)
    queries, keys, values = _padded(q, k, v, enable_gqa)
    result, lse = _FORWARD(
        queries, keys, values, 0.0, is_causal, attn_mask=_additive(mask, q, k), scale=_scale(scale, q)
    )
    out.copy_(result[..., : v.shape[3]])
    return out, lse.contiguous()


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
    """Gradients of q, k and v from what the forward kept; FP32 inside, one rounding at the end.

    `out` enters in its own precision, through sum(dout * out) of each query: with a BF16 `out` that sum carries one
    rounding of BF16 for each of its Dv terms.
    """
    check_attention(q, k, v, mask, is_causal)
    grads = tuple(torch.empty_like(t) for t in (q, k, v))
    if out.numel() == 0 or k.shape[2] == 0:
        dq, dk, dv = (grad.zero_() for grad in grads)
        return dq, dk, dv
    queries, keys, values = _padded(q, k, v, enable_gqa)
    width = queries.shape[3] - v.shape[3]
    padded_dout, padded_out = (pad(t.float(), (0, width)) for t in (dout, out))
    results = _BACKWARD(
        padded_dout,
        queries,
        keys,
        values,
        padded_out,
        lse.transpose(1, 2).contiguous().transpose(1, 2),  # the layout in which the forward kernel made it
        0.0,
        is_causal,
        attn_mask=_additive(mask, q, k),
        scale=_scale(scale, q),
    )
    for grad, result in zip(grads, results):
        heads = grad.shape[1]
        # Each key head served H / G neighbouring query heads; their gradients add up.
        grad.copy_(result[..., : grad.shape[3]].unflatten(1, (heads, -1)).sum(2))
    dq, dk, dv = grads
    return dq, dk, dv


def _scale(scale: float | None, q: Tensor) -> float:
    # Explicit, because the kernel would take it from the padded head dimension.
    return 1.0 / math.sqrt(q.shape[3]) if scale is None else scale


def _padded(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """FP32 copies with one head dimension and one number of heads."""
    heads, groups = q.shape[1], k.shape[1]
    if groups != v.shape[1] or heads % groups or (heads != groups and not enable_gqa):
        raise fail(
            "E0520",
            f"fp8c::attention: {heads} query heads do not share {groups} key and {v.shape[1]} value heads",
            help="set enable_gqa when each key head serves several query heads",
        )
    width = max(q.shape[3], v.shape[3])
    queries, keys, values = (pad(t.float(), (0, width - t.shape[3])) for t in (q, k, v))
    repeat = heads // groups
    if repeat > 1:
        keys, values = (t.repeat_interleave(repeat, dim=1) for t in (keys, values))
    return queries, keys, values


def _additive(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as FP32 numbers to add to the scores, with four dimensions."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
    mask = mask.float()
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    # The kernel broadcasts the batch and the heads; the positions it wants at full size.
    return mask.expand(-1, -1, q.shape[2], k.shape[2])
