"""Experts as grouped GEMMs: the few functions that prepared models call in place of a loop over experts.

Everything is plain PyTorch, differentiable, of static shape and without a host synchronization, so a step that uses it
captures as one graph.

Shapes: T tokens, K choices per token, R = T * K rows, E experts. A *row* is one (token, choice) pair; rows are sorted by
expert, and inside one expert they keep the order of the loop they replace.

Rows have a home, the rank of their tokens, and with expert parallelism another place, the rank of their experts. `sent`
takes values of rows from home to their experts, `total` and `assigned` bring them back (`returned`); on one device both
are the same place and nothing moves.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fp8c.ops import exchange
from fp8c.ops.exchange import Ranks, Travel

#: grouped_mm wants rows of 16-byte multiples: 8 values of BF16. Zeros are padded where a width is no multiple.
ALIGNED_WIDTH = 8


class Rows(NamedTuple):
    """The rows of a routing decision, sorted by expert.

    order:   i64 [R], position of each row in the flattened decision
    expert:  i64 [R], the expert of each row
    ends:    i32 [E], how many rows belong to this expert and those before it (`offs` of `grouped_mm`)
    shape:   of the decision, e.g. (T, K)
    travel:  how they reach experts of other ranks; `ends` then counts the rows that arrive for each expert here
    """

    order: Tensor
    expert: Tensor
    ends: Tensor
    shape: tuple[int, ...]
    travel: Travel | None = None


def route(decision: Tensor, experts: int, ranks: Ranks | None = None) -> Rows:
    """Sort the entries of an integer tensor (the chosen expert of every (token, choice)) by expert, stably.

    Entries must be in [0, experts). `ranks`: who owns the experts, where they are spread over ranks.
    """
    expert, order = torch.sort(decision.reshape(-1), stable=True)
    # The number of rows up to and including each expert, without a histogram's detour through floats.
    ends = torch.searchsorted(
        expert, torch.arange(experts, device=expert.device, dtype=expert.dtype), right=True, out_int32=True
    )
    return _travelling(Rows(order, expert, ends, tuple(decision.shape)), ranks)


def counted(counts: Tensor, like: Tensor, ranks: Ranks | None = None) -> Rows:
    """Rows that are sorted by expert already: `counts` i64 [E] says how many each expert has, `like` [R, ...] is one."""
    ends = counts.cumsum(0).int()
    order = torch.arange(like.shape[0], device=like.device)
    rows = Rows(order, torch.searchsorted(ends, order.int(), right=True), ends, (like.shape[0],))
    return _travelling(rows, ranks)


def _travelling(rows: Rows, ranks: Ranks | None) -> Rows:
    if ranks is None:
        return rows
    travel, ends = exchange.plan_travel(rows.ends, rows.order.shape[0], ranks)
    return rows._replace(ends=ends, travel=travel)


def sent(values: Tensor, rows: Rows) -> Tensor:
    """Values of rows at home, [R, ...], where their experts are: [n, ...]."""
    return values if rows.travel is None else exchange.dispatch(values, rows.travel)


def returned(values: Tensor, rows: Rows) -> Tensor:
    """Values of rows where their experts are, [n, ...], at home again: [R, ...]."""
    return values if rows.travel is None else exchange.combine(values, rows.travel)


def numbers(rows: Rows) -> Tensor:
    """The expert of each row where the experts are: i64 [n]."""
    return rows.expert if rows.travel is None else rows.travel.expert + rows.travel.first


def entries(table: Tensor, rows: Rows) -> Tensor:
    """Each row's entry of a table over experts, [E, ...] -> [n, ...], where the experts are."""
    if rows.travel is not None and isinstance(table, DTensor):
        return exchange.local(table)[rows.travel.expert]
    return table[numbers(rows)]


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
    ordered: Tensor = torch.ops.fp8c.permute_rows(values, back, rows.order)
    return ordered.view(*rows.shape, *values.shape[1:])


def total(values: Tensor, rows: Rows, axes: tuple[int, ...] | None, like: Tensor) -> Tensor:
    """What `target[where(decision == e)[axes]] += values` of all experts e adds to a target shaped and typed `like`.

    values: of rows where their experts are

    axes: which of the decision's axes index the target; None for all of them, () for all but the last
    """
    rank = len(rows.shape)
    used = axes
    if axes is None or axes == ():
        used = tuple(range(rank if axes is None else rank - 1))
    left = [axis for axis in range(rank) if axis not in (used or ())]
    added = unsorted(returned(values, rows), rows)
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
    return unsorted(returned(values, rows), rows).reshape(like.shape).to(like.dtype)


def table(rows: Rows) -> Tensor:
    """`(decision == e).nonzero()` of every expert e, concatenated: i64 [R, axes]."""
    return torch.stack(positions(rows), 1)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One parameter per expert as a single tensor [E, ...]; sharded experts have theirs stacked already."""
    if isinstance(tensors[0], DTensor):
        return tensors[0]
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
    weight = exchange.local(weight)
    dtype = _autocast_dtype(x.device)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    shape = x.shape
    if x.ndim != 2:
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
        y = y + entries(bias, rows)
    return y.reshape(*shape[:-1], y.shape[-1]) if len(shape) != 2 else y


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast is set to, if it is; a model without weights may be captured for any device."""
    for kind in ("cuda", "cpu") if device.type == "meta" else (device.type,):
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return None


def _matmul_f64(x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
    ends = [0, *rows.ends.tolist()]
    return torch.cat([x[a:b] @ weight[e] for e, (a, b) in enumerate(itertools.pairwise(ends))])
