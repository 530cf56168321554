"""AdamW on lists of tensors in PyTorch's own operators: the CPU's implementation, and what the fused kernel is tested
with.

Arithmetic is FP32 whatever the states are kept in; each result is rounded once, to nearest even, when it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Bucket:
    """Tensors of one device and one set of types that are updated together. All lists have the same length.

    params:  the model's, BF16, FP16 or FP32 (of a sharded parameter the local part)
    grads:   of the same sizes and strides as the parameters
    masters: None where the parameter is its own master
    first, second: the moments; steps: FP32 scalars, the steps taken so far
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    masters: Sequence[Tensor] | None
    first: Sequence[Tensor]
    second: Sequence[Tensor]
    steps: Sequence[Tensor]

    def rows(self) -> tuple[Sequence[Tensor], ...]:
        return (self.params, self.grads, self.masters or self.params, self.first, self.second, self.steps)


def square_sum(bucket: Bucket) -> Tensor:
    """Sum of squares of the bucket's gradients, FP32 []."""
    norms = torch._foreach_norm([g.float() for g in bucket.grads])
    return torch.stack(list(norms)).square().sum()


def decide(
    steps: Sequence[Tensor], total: Tensor, control: Tensor, scale: float, max_norm: float, checked: bool
) -> None:
    """From the sum of squares of all gradients: write `control`, and count the step.

    control: FP32 [4] = factor of the gradients, 1 to take the step (0: leave everything as it is), norm, steps left out
    scale:   what the gradients are multiplied with, before the norm is compared with `max_norm`
    checked: a norm that is not finite leaves the step out
    """
    norm = total.sqrt() * scale
    finite = norm.isfinite().float() if checked else torch.ones_like(norm)
    factor = torch.where(norm > max_norm, max_norm / (norm + 1e-6), torch.ones_like(norm))
    control.copy_(torch.stack([factor * scale, finite, norm, control[3] + (1.0 - finite)]))
    torch._foreach_add_(list(steps), finite)


def update(
    bucket: Bucket,
    control: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clears: bool = False,
) -> None:
    """One AdamW step of the bucket, under `control`.

        m = lerp(m, g, 1 - beta1)        v = beta2 v + (1 - beta2) g^2        g scaled by control[0]
        w = (1 - lr weight_decay) w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    m and v enter w before they are rounded. clears: the gradients become 0, also where the step is left out.
    Source: Loshchilov and Hutter, arXiv:1711.05101, in the order of torch.optim.AdamW.
    """
    factor, takes = float(control[0]), bool(control[1])
    if takes and bucket.params:
        grads = list(torch._foreach_mul([g.float() for g in bucket.grads], factor))
        first, second = [m.float() for m in bucket.first], [v.float() for v in bucket.second]
        masters = [w.float() for w in bucket.masters or bucket.params]
        torch._foreach_lerp_(first, grads, 1.0 - betas[0])
        torch._foreach_mul_(second, betas[1])
        torch._foreach_addcmul_(second, grads, grads, 1.0 - betas[1])
        counts = [float(step) for step in bucket.steps]
        roots = [(1.0 - betas[1] ** t) ** 0.5 for t in counts]
        sizes = [-lr / (1.0 - betas[0] ** t) for t in counts]
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, roots)
        torch._foreach_add_(denominators, eps)
        torch._foreach_mul_(masters, 1.0 - lr * weight_decay)
        torch._foreach_addcdiv_(masters, first, denominators, sizes)
        torch._foreach_copy_(list(bucket.first), first)
        torch._foreach_copy_(list(bucket.second), second)
        if bucket.masters is not None:
            torch._foreach_copy_(list(bucket.masters), masters)
            masters = list(bucket.masters)
        torch._foreach_copy_(list(bucket.params), masters)
    if clears:
        torch._foreach_zero_(list(bucket.grads))
