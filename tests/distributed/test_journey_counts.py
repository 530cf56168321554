"""Rows of each rank, as numbers and as Inductor compiles them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor import config, scheduler

from fp8c.ops.exchange import chunks, rows_of_ranks


def test_rows_of_ranks() -> None:
    for experts in range(1, 20):
        counts = torch.randint(0, 9, (experts,), dtype=torch.int32)
        for ranks in range(1, 8):
            owned = chunks(experts, ranks)
            found = rows_of_ranks(counts, owned)
            assert found.dtype == torch.int32
            assert found.tolist() == [int(part.sum()) for part in counts.split(list(owned))]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What Inductor does on GPUs alone: concatenations in one loop, and loops reordered to share more data."""
    inner, seen = scheduler.Scheduler.shared_data_after_reordering_loop, list[object]()

    def reordered(self: scheduler.Scheduler, first: object, second: object) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(scheduler.BaseSchedulerNode, "is_cpu", lambda node: False)
            inner(self, first, second)  # type: ignore[arg-type]
        seen.append((first, second))
        return -1  # the CPU's code generation does without

    monkeypatch.setattr(scheduler.Scheduler, "shared_data_after_reordering_loop", reordered)
    with config.patch(force_pointwise_cat=True, force_disable_caches=True):
        yield seen
    torch._dynamo.reset()


@pytest.mark.parametrize("experts", [6, 7])
def test_inductor_orders_them_on_a_gpu(experts: int, as_on_a_gpu: list[object]) -> None:
    def both(ends: Tensor, arriving: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        return counts, torch.cat([rows_of_ranks(counts, chunks(experts, 2)), arriving.sum(1, dtype=torch.int32)])

    ends = torch.randint(0, 9, (experts,)).cumsum(0, dtype=torch.int32)
    arriving = torch.randint(0, 9, (2, 4), dtype=torch.int32)
    found, expected = torch.compile(both)(ends, arriving), both(ends, arriving)
    assert as_on_a_gpu and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
