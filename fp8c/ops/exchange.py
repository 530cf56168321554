"""Rows to the ranks that own their experts, and back: the operators and functions of expert parallelism.

Everything is plain PyTorch with functional collectives, so dispatch, combine and their backward are visible in the
captured graph. Two operators carry the rows; both decompose into ATen and `_c10d_functional` where they are traced:

    fp8c::exchange(x [n, ...], received, sent, group) -> [sum(received), ...]     backward: the same with the splits swapped
    fp8c::permute_rows(x [n, ...], order i64 [n], inverse i64 [n]) -> x[order]    backward: dy[inverse]

Host synchronization: `all_to_all_single` takes how many rows each rank sends as numbers of the host, so the counts are
read once per routing decision (`Travel`), forward only. Nothing else waits for the device.

Legend: R rows of this rank's decision, n rows that arrive, E experts in all, W ranks of the group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

c10d = torch.ops._c10d_functional

_LIBRARY = torch.library.Library("fp8c", "FRAGMENT")  # type: ignore[no-untyped-call]


class Ranks(NamedTuple):
    """The ranks that share the experts of one module.

    group: name of the process group;  rank: this process in it;  owned: experts of every rank, in order
    control: name of a second group of the same ranks, for counts: they must not queue behind payloads
    planned: there are no other ranks, only a plan is made: rows are taken to be spread evenly
    """

    group: str
    control: str
    rank: int
    owned: tuple[int, ...]
    planned: bool = False


class Travel(NamedTuple):
    """How the rows of one routing decision travel.

    sent, received: rows to and from every rank
    order:          i64 [n], arrived row of each row when they are sorted by expert; inside an expert, by the sender's rank
    inverse:        i64 [n], its inverse
    expert:         i64 [n], the expert of each sorted row, counted from this rank's first
    """

    ranks: Ranks
    sent: list[int]
    received: list[int]
    order: Tensor
    inverse: Tensor
    expert: Tensor

    @property
    def first(self) -> int:
        """This rank's first expert."""
        return sum(self.ranks.owned[: self.ranks.rank])


# Operators ----------------------------------------------------------------------------------------------------------


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    """Rows to every rank of the group, without a gradient of its own."""
    moved: Tensor = c10d.wait_tensor(c10d.all_to_all_single(x.contiguous(), received, sent, group))
    return moved


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(dy, ctx.sent, ctx.received, ctx.group), None, None, None


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        # A gather again, where autograd's own would add rows up one by one.
        return dy[inverse], None, None


def _exchange(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    result: Tensor = _Exchange.apply(x, received, sent, group)  # type: ignore[no-untyped-call]
    return result


def _permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    result: Tensor = _PermuteRows.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return result


for _name, _schema, _impl in (
    ("exchange", "(Tensor x, SymInt[] received, SymInt[] sent, str group) -> Tensor", _exchange),
    ("permute_rows", "(Tensor x, Tensor order, Tensor inverse) -> Tensor", _permute_rows),
):
    _LIBRARY.define(_name + _schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _impl, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


# Journeys -----------------------------------------------------------------------------------------------------------


def chunks(experts: int, ranks: int) -> tuple[int, ...]:
    """Experts of every rank, as DTensor's `Shard(0)` cuts them: chunks of ceil(E / W), the last ones shorter or empty."""
    each = -(-experts // ranks)
    return tuple(max(0, min(each, experts - rank * each)) for rank in range(ranks))


def rows_of_ranks(counts: Tensor, owned: tuple[int, ...]) -> Tensor:
    """i32 [E] rows of every expert -> i32 [W] of every rank, which owns so many experts (`chunks`).

    Differences of the cumulative counts, read at `min(each * (rank + 1), E) - 1`, would do as well, but Inductor on a GPU
    gives up on that Min once it has joined the read with a concatenation (seen with torch 2.11 and 2.13).
    """
    missing = len(owned) * owned[0] - counts.shape[0]
    return F.pad(counts, (0, missing)).view(len(owned), owned[0]).sum(1, dtype=torch.int32)


def plan_travel(ends: Tensor, rows: int, ranks: Ranks) -> tuple[Travel, Tensor]:
    """Exchange the counts of a decision of so many rows, i32 [E] cumulative, and read them on the host once.

    Returns: the journey, and `ends` i32 [owned experts] of the rows that arrive.
    """
    world, mine = len(ranks.owned), ranks.owned[ranks.rank]
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    arriving = all_to_all(counts, [mine] * world, list(ranks.owned), ranks.control).view(world, mine)
    per_rank = rows_of_ranks(counts, ranks.owned)
    # One copy to the host for both directions.
    both = torch.cat([per_rank, arriving.sum(1, dtype=torch.int32)]).cpu()
    if ranks.planned:
        even = [rows // world + (rank < rows % world) for rank in range(world)]
        numbers = even + even
    else:
        numbers = both.tolist()
        for number in numbers:
            torch._check(number >= 0)  # type: ignore[no-untyped-call]
    sent, received = numbers[:world], numbers[world:]
    # Rows arrive by rank, and by expert from each; a stable sort puts them as one device would have them.
    total = received[0]
    for number in received[1:]:
        total = total + number
    position = torch.arange(total, device=ends.device, dtype=torch.int32)
    block = torch.searchsorted(arriving.reshape(-1).cumsum(0, dtype=torch.int32), position, right=True)
    expert, order = torch.sort(block % mine, stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(total, device=ends.device))
    local_ends = arriving.sum(0).cumsum(0, dtype=torch.int32)
    return Travel(ranks, sent, received, order, inverse, expert), local_ends


def dispatch(x: Tensor, travel: Travel) -> Tensor:
    """Rows [R, ...] sorted by expert to the ranks that own the experts: [n, ...], sorted by expert there."""
    arrived = torch.ops.fp8c.exchange(x, travel.received, travel.sent, travel.ranks.group)
    sorted_rows: Tensor = torch.ops.fp8c.permute_rows(arrived, travel.order, travel.inverse)
    return sorted_rows


def combine(y: Tensor, travel: Travel) -> Tensor:
    """The way back: [n, ...] on the experts' ranks -> [R, ...] on the tokens', in the order they left."""
    ordered = torch.ops.fp8c.permute_rows(y, travel.inverse, travel.order)
    back: Tensor = torch.ops.fp8c.exchange(ordered, travel.sent, travel.received, travel.ranks.group)
    return back


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded parameter; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
