"""Experts as grouped GEMMs: the few functions that prepared models call in place of a loop over experts.

Everything is plain PyTorch, differentiable, of static shape and without a host synchronization, so a step that uses it
captures as one graph.

Shapes: T tokens, K choices per token, R = T * K rows, E experts. A *row* is one (token, choice) pair; rows are sorted by
expert, and inside one expert they keep the order of the loop they replace.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: grouped_mm wants rows of 16-byte multiples: 8 values of BF16. Zeros are padded where a width is no multiple.
ALIGNED_WIDTH = 8


class Rows(NamedTuple):
    """The rows of a routing decision, sorted by expert.

    order:   i64 [R], position of each row in the flattened decision
    expert:  i64 [R], the expert of each row
    ends:    i32 [E], how many rows belong to this expert and those before it (`offs` of `grouped_mm`)
    shape:   of the decision, e.g. (T, K)
    """

    order: Tensor
    expert: Tensor
    ends: Tensor
    shape: tuple[int, ...]


def route(decision: Tensor, experts: int) -> Rows:
    """Sort the entries of an integer tensor (the chosen expert of every (token, choice)) by expert, stably.

    Entries must be in [0, experts).
    """
    expert, order = torch.sort(decision.reshape(-1), stable=True)
    # The number of rows up to and including each expert, without a histogram's detour through floats.
    ends = torch.searchsorted(
        expert, torch.arange(experts, device=expert.device, dtype=expert.dtype), right=True, out_int32=True
    )
    return Rows(order, expert, ends, tuple(decision.shape))


def counted(counts: Tensor, like: Tensor) -> Rows:
    """Rows that are sorted by expert already: `counts` i64 [E] says how many each expert has, `like` [R, ...] is one."""
    ends = counts.cumsum(0).int()
    order = torch.arange(like.shape[0], device=like.device)
    return Rows(order, torch.searchsorted(ends, order.int(), right=True), ends, (like.shape[0],))


def histogram(decision: Tensor, experts: int) -> Tensor:
    """`torch.bincount(decision, minlength=experts)` for entries in [0, experts), in a shape known beforehand: i64 [E]."""
    return F.one_hot(decision.reshape(-1), experts).sum(0)


def positions(rows: Rows) -> tuple[Tensor, ...]:
    """`torch.where(decision == e)` of every expert e, concatenated: one i64 [R] tensor per axis of the decision."""
    found: list[Tensor] = []
    rest = rows.order
    for size in reversed(rows.shape[1:]):
        found.append(rest % size)
        rest = rest // size
    return (rest, *reversed(found))


def unsorted(values: Tensor, rows: Rows) -> Tensor:
    """Rows back in the order of the decision: [R, ...] sorted by expert -> [*shape, ...]."""
    back = torch.empty_like(rows.order).scatter(0, rows.order, torch.arange(len(rows.order), device=values.device))
    return values[back].view(*rows.shape, *values.shape[1:])


def total(values: Tensor, rows: Rows, axes: tuple[int, ...] | None, like: Tensor) -> Tensor:
    """What `target[where(decision == e)[axes]] += values` of all experts e adds to a target shaped and typed `like`.

    axes: which of the decision's axes index the target; None for all of them, () for all but the last
    """
    rank = len(rows.shape)
    used = axes
    if axes is None or axes == ():
        used = tuple(range(rank if axes is None else rank - 1))
    left = [axis for axis in range(rank) if axis not in (used or ())]
    added = unsorted(values, rows)
    if len(left) > 1:
        raise ValueError(f"the target is indexed by axes {used} of a routing decision with {rank} axes")
    if left:
        # torch.sum accumulates BF16 in FP32 and rounds once, where a loop of `+=` rounds once per choice.
        added = added.sum(left[0], dtype=torch.promote_types(values.dtype, like.dtype))
    return added.to(like.dtype).reshape(like.shape)


def assigned(values: Tensor, rows: Rows, axes: tuple[int, ...] | None, like: Tensor) -> Tensor:
    """What `target[where(decision == e)[axes]] = values` of all experts e leaves: together they write every entry."""
    if axes not in (None, tuple(range(len(rows.shape)))):
        raise ValueError("an entry is written once per choice, and the loop's order decides which value stays")
    return unsorted(values, rows).reshape(like.shape).to(like.dtype)


def table(rows: Rows) -> Tensor:
    """`(decision == e).nonzero()` of every expert e, concatenated: i64 [R, axes]."""
    return torch.stack(positions(rows), 1)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One parameter per expert as a single tensor [E, ...]."""
    return torch.stack(list(tensors))


def linear(x: Tensor, modules: Sequence[nn.Linear], rows: Rows) -> Tensor:
    """Every row through its own expert's `nn.Linear`: [R, in] -> [R, out]."""
    bias = stacked([m.bias for m in modules]) if modules[0].bias is not None else None
    return matmul(x, stacked([m.weight for m in modules]).transpose(-2, -1), rows, bias)


def matmul(x: Tensor, weight: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
    """x [R, in] times its expert's weight [E, in, out], plus its bias [E, out].

    Under autocast both sides are cast to the autocast type, as `nn.Linear` would do: `grouped_mm` itself is not
    autocast-enabled, and computes in FP32 (or fails to capture) on FP32 parameters.
    """
    dtype = _autocast_dtype(x.device)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    if x.dtype is torch.float64 and not torch.compiler.is_compiling():
        y = _matmul_f64(x, weight, rows)  # grouped_mm has no FP64; checks and tests want one
    else:
        k, n = -x.shape[-1] % ALIGNED_WIDTH, -weight.shape[-1] % ALIGNED_WIDTH
        if k or n:  # narrow adapters
            x, weight = F.pad(x, (0, k)), F.pad(weight, (0, n, 0, k))
        y = F.grouped_mm(x, weight, offs=rows.ends)
        y = y[:, : y.shape[1] - n] if n else y
    if bias is not None:
        y = y + bias[rows.expert]
    return y.reshape(*shape[:-1], y.shape[-1])


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast is set to, if it is; a model without weights may be captured for any device."""
    for kind in ("cuda", "cpu") if device.type == "meta" else (device.type,):
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return None


def _matmul_f64(x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    ends = [0, *rows.ends.tolist()]
    return torch.cat([x[a:b] @ weight[e] for e, (a, b) in enumerate(itertools.pairwise(ends))])
