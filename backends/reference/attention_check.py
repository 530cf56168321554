"""Attention and its gradients in FP64, with the error that the arithmetic of a correct kernel explains.

D and Dv are the head dimensions, Sk and Sq the numbers of keys and queries, u = 2**-24, and r the roundoff of the tensors'
dtype (2**-8 for BF16). The chain, with FP64 magnitudes at every step:

score   A dot product of D terms, times the scale, plus the mask: off by (D + 8) u * scale * sum |q||k| + 2 u |score|.
p       exp(score - lse): the argument is off by twice the largest error of a score in its row; the exponential and the
        sum of the row cost EXP_ROUNDINGS + Sk + 4 roundings more. Call the relative error eps. A fused GPU kernel then
        rounds p to the tensors' dtype before it meets v or dout: another r.
out     Off by (eps + Sk u) * sum p |v|; dv likewise, from sum p |dout|. One rounding r at the end.
ds      p * (dp - delta). dp is a dot product of Dv terms of dout and v. delta = sum dout * out is made from the stored
        `out` and inherits its error. A fused GPU kernel rounds ds to the tensors' dtype: another r.
dq, dk  Sums of ds * k over keys and of ds * q over queries, times the scale; one rounding r at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXP_ROUNDINGS = 40  # of one exponential: the vectorized ones on CPUs promise 20 units in the last place
_U = 2.0**-24
_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: _U}


@dataclass(frozen=True)
class AttentionEvaluation:
    """FP64 results and the bounds of their errors, in the order out, dq, dk, dv."""

    exact: tuple[Tensor, Tensor, Tensor, Tensor]
    bounds: tuple[Tensor, Tensor, Tensor, Tensor]

    def worst_ratios(self, *found: Tensor) -> tuple[float, ...]:
        """Largest error / bound of each result; above 1 it is wrong. NaN counts as infinitely wrong."""
        ratios = []
        for result, exact, bound in zip(found, self.exact, self.bounds):
            ratio = (result.cpu().double() - exact).abs() / bound
            ratios.append(ratio.nan_to_num(nan=math.inf).max().item() if ratio.numel() else 0.0)
        return tuple(ratios)


def evaluate_attention(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    *,
    rounds_probabilities: bool = False,
) -> AttentionEvaluation:
    """Evaluate attention by FP64 autograd on the CPU. `rounds_probabilities`: bound a fused GPU kernel.

    Shapes: q [B, H, Sq, D], k [B, G, Sk, D], v [B, G, Sk, Dv], dout [B, H, Sq, Dv]; masks as `fp8c::attention` takes them.
    """
    roundoff = _ROUNDOFF[q.dtype]
    inner_roundoff = roundoff if rounds_probabilities else 0.0
    groups, repeat = k.shape[1], q.shape[1] // k.shape[1]
    queries, keys, width, value_width = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    scale = width**-0.5 if scale is None else scale

    leaves = [t.detach().cpu().double().requires_grad_() for t in (q, k, v)]
    qd, kd, vd = leaves[0], *(t.repeat_interleave(repeat, 1) for t in leaves[1:])
    grad = dout.detach().cpu().double()
    scores = qd @ kd.mT * scale
    if is_causal:
        scores = scores.masked_fill(~torch.ones(queries, keys, dtype=torch.bool).tril(), -math.inf)
    elif mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask.cpu(), -math.inf)
    elif mask is not None:
        scores = scores + mask.cpu().double()
    lse = scores.logsumexp(-1, keepdim=True)
    sees_something = lse.isfinite()
    lse = lse.where(sees_something, 0.0)
    p = torch.exp(scores - lse).where(sees_something, 0.0)
    out = p @ vd
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)

    with torch.no_grad():

        def final(bound: Tensor, value: Tensor) -> Tensor:
            # Sums over the query heads of a group cost a few roundings of terms that the bound already holds.
            return bound * (1 + 2.0**-10) + roundoff * (value.abs() + bound) + 2.0**-126

        score_error = (width + 8) * _U * scale * (qd.abs() @ kd.abs().mT)
        score_error += 2 * _U * scores.where(scores.isfinite(), 0.0).abs()
        argument = 2 * score_error.amax(-1, keepdim=True) + 2 * _U * lse.abs()
        eps = torch.expm1(argument) + (EXP_ROUNDINGS + keys + 4) * _U
        rounded_eps = eps + inner_roundoff * (1 + eps)

        out_error = (rounded_eps + keys * _U) * (p @ vd.abs())
        delta_error = (grad.abs() * final(out_error, out)).sum(-1, keepdim=True)
        delta_error += (value_width + 2) * _U * (grad.abs() * out.abs()).sum(-1, keepdim=True)
        difference = (grad @ vd.mT - (grad * out).sum(-1, keepdim=True)).abs()
        dp_error = (value_width + 2) * _U * (grad.abs() @ vd.abs().mT)
        ds = p * difference
        ds_error = p * (1 + eps) * (eps * difference + dp_error + delta_error + 2 * _U * difference)
        ds_error += inner_roundoff * (ds + ds_error)
        dq_error = scale * (ds_error + (keys + 2) * _U * ds) @ kd.abs()
        dk_error = scale * (ds_error + (queries + 2) * _U * ds).mT @ qd.abs()
        dv_error = ((rounded_eps + (queries + 2) * _U) * p).mT @ grad.abs()
        dk_error, dv_error = (t.reshape(t.shape[0], groups, repeat, *t.shape[2:]).sum(2) for t in (dk_error, dv_error))
        bounds = (final(out_error, out), final(dq_error, dq), final(dk_error, dk), final(dv_error, dv))
    return AttentionEvaluation((out.detach(), dq, dk, dv), bounds)
