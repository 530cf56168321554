"""fuse-combine: the same numbers from one operator, and nothing where its sum or its rows are read by something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fp8c.backends.reference  # noqa: F401
from fp8c import graph as g
from fp8c.ops.combine import GATHER_SUM
from fp8c.tools import opt
from tests.passes.steps import Function, data, random

BEFORE = opt.pass_names()[: opt.pass_names().index("fuse-combine")]
TOKENS, WIDTH = 6, 16


def step(k: int, tail: Callable[[Tensor, Tensor, Tensor], Tensor]) -> opt.JointStep:
    """Tokens through a GEMM, then gathered in twos or eights; `tail` makes the result of tokens, rows and row numbers."""

    def combine(x: Tensor, back: Tensor, w: Tensor) -> Tensor:
        return tail(x, (x @ w).repeat_interleave(k, 0), back)

    module = Function(combine, w=random(WIDTH, WIDTH))
    return opt.capture_joint(module, data(TOKENS, WIDTH), torch.randperm(TOKENS * k))


def with_shared(k: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def tail(x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        total = rows[back].float().view(TOKENS, k, WIDTH).sum(1).bfloat16()
        return x.sin().view(2, 3, WIDTH) + total.view(2, 3, WIDTH)

    return tail


def alone(k: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def tail(x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        return rows[back].view(TOKENS, k, WIDTH).sum(1).sin()

    return tail


def rows_are_read(x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
    taken = rows[back]
    return taken.view(TOKENS, 2, WIDTH).sum(1) + taken[:TOKENS]


def sum_is_read_in_fp32(x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
    total = rows[back].float().view(TOKENS, 2, WIDTH).sum(1)
    return total.bfloat16() + total.sin()


def along_columns(x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
    return rows[back].view(TOKENS, 2, WIDTH).sum(2)


def fused(captured: opt.JointStep, *more: str, target: str = "h200") -> opt.OptResult:
    return opt.run_passes(captured, "bf16", [*BEFORE, "fuse-combine", *more], target=target)


def forward(result: opt.OptResult) -> Any:
    assert result.halves is not None
    half, generator = result.halves.forward, torch.Generator().manual_seed(1)
    inputs = [
        torch.randperm(t.numel(), generator=generator)
        if t.dtype is torch.int64
        else torch.randn(t.shape, generator=generator).to(t.dtype)
        for t in (n.meta["val"] for n in half.graph.find_nodes(op="placeholder"))
    ]
    return half(*inputs)[: result.halves.num_fwd_outputs]


@pytest.mark.parametrize("tail", (with_shared, alone))
@pytest.mark.parametrize("k", (2, 8))
def test_the_numbers_stay_the_same(k: int, tail: Callable[[int], Callable[[Tensor, Tensor, Tensor], Tensor]]) -> None:
    captured = step(k, tail(k))
    result = fused(captured)
    assert result.changed[-1] == ("fuse-combine", 1)
    assert result.halves is not None
    (node,) = g.calls(result.halves.forward.graph, {GATHER_SUM})
    assert (len(node.args) == 4) == (tail is with_shared)
    for before, after in zip(forward(opt.run_passes(captured, "bf16", BEFORE, target="h200")), forward(result)):
        assert before.dtype == after.dtype and before.shape == after.shape
        # FP32 sums of k BF16 numbers in another order differ by less than a BF16 rounding of the largest: where they straddle
        # a boundary, by one; `alone` takes a sine of that, which is no steeper.
        torch.testing.assert_close(before, after, rtol=0.0 if k == 2 else 2.0**-7, atol=0.0 if k == 2 else 2.0**-14)


@pytest.mark.parametrize("tail", (rows_are_read, sum_is_read_in_fp32, along_columns))
def test_what_else_reads_it_keeps_it(tail: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert fused(step(2, tail)).changed[-1] == ("fuse-combine", 0)


def test_running_it_again_changes_nothing() -> None:
    assert fused(step(2, with_shared(2)), "fuse-combine").changed[-1] == ("fuse-combine", 0)


def test_a_target_without_the_kernel_keeps_the_graph() -> None:
    assert fused(step(2, with_shared(2)), target="cpu").changed[-1] == ("fuse-combine", 0)
