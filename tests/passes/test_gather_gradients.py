"""gather-gradients: the same gradients by gathers, and nothing where no sort proves a permutation."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

import fp8c.backends.reference  # noqa: F401
from fp8c import graph as g
from fp8c.graph import aten
from fp8c.tools import opt
from tests.passes.steps import Function, data, random

PASSES = ["assign-roles", "gather-gradients"]
TOKENS, CHOICES, WIDTH = 6, 2, 4


def combine(x: Tensor, decision: Tensor, scale: Tensor) -> Tensor:
    """Rows gathered for their experts, scaled there, put back and summed: the skeleton of an MoE layer."""
    order = torch.sort(decision.reshape(-1), stable=True).indices
    rows = x[order // CHOICES] * scale
    back = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    return rows[back].view(TOKENS, CHOICES, WIDTH).float().sum(1).to(x.dtype)


def run(graph: fx.Graph, step: opt.JointStep, inputs: list[Tensor]) -> list[Tensor]:
    results = fx.Interpreter(fx.GraphModule(step.joint, graph)).run(*inputs, enable_io_processing=False)
    return [t for t in tree_flatten(results)[0] if t is not None]


def captured(dtype: torch.dtype) -> tuple[opt.JointStep, list[Tensor]]:
    decision = torch.randint(5, (TOKENS, CHOICES))
    x, scale = data(TOKENS, WIDTH, dtype=dtype), random(WIDTH, dtype=dtype)
    step = opt.capture_joint(Function(combine, scale=scale), x, decision)
    by_shape = {(TOKENS, WIDTH): x.detach(), (TOKENS, CHOICES): decision, (WIDTH,): scale}
    return step, [by_shape[tuple(n.meta["val"].shape)] for n in step.joint.graph.find_nodes(op="placeholder")]


def test_gradients_are_the_same() -> None:
    step, inputs = captured(torch.float32)
    result = opt.run_passes(step, "bf16", PASSES)
    assert result.changed[-1][1] > 0
    assert not list(g.calls(result.graph, {aten.index_put.default}))
    for before, after in zip(run(step.joint.graph, step, inputs), run(result.graph, step, inputs), strict=True):
        # Two terms in either order: the same FP32 sum.
        assert torch.equal(before, after)


def test_the_token_is_read_where_its_gradient_was_repeated() -> None:
    step, inputs = captured(torch.bfloat16)
    result = opt.run_passes(step, "bf16", PASSES)
    moved = [n for n in g.calls(result.graph, {aten.index.Tensor}) if g.is_backward(n)]
    sources = [tuple(g.value(n.args[0]).shape) for n in moved]  # type: ignore[arg-type]
    assert (TOKENS, WIDTH) in sources, sources
    assert not list(g.calls(result.graph, {aten.index_put.default}))
    for before, after in zip(run(step.joint.graph, step, inputs), run(result.graph, step, inputs), strict=True):
        torch.testing.assert_close(before, after, rtol=2.0**-7, atol=2.0**-7)  # BF16 sums, added once or twice rounded


def test_running_it_again_changes_nothing() -> None:
    step, _ = captured(torch.bfloat16)
    result = opt.run_passes(step, "bf16", [*PASSES, "gather-gradients"])
    assert result.changed[-2][1] > 0 and result.changed[-1][1] == 0


def test_other_rows_are_left_alone() -> None:
    """Row numbers that come from outside may repeat."""
    module = Function(lambda x, rows, scale: x[rows] * scale, scale=random(WIDTH))
    step = opt.capture_joint(module, data(TOKENS, WIDTH), torch.randint(TOKENS, (9,)))
    assert opt.run_passes(step, "bf16", PASSES).changed[-1] == ("gather-gradients", 0)
