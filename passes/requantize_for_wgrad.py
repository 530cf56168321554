"""requantize-for-wgrad: make wgrad's x from what backward keeps instead of from the BF16 activation.

Before:  %xq, %xs = fp8c.quantize(%x, 'e4m3[1x128] fp32')         forward
         %xc, %xt = fp8c.quantize(%x, 'e4m3[128x1] fp32')         backward: keeps x in BF16
After:   %xc, %xt = fp8c.requantize(%xq, %xs, 'e4m3[1x128] fp32', 'e4m3[128x1] fp32')

With a cache format of its own (E5M6 after attention) the forward also makes that copy, and wgrad reads it:
         %xe, %xf = fp8c.quantize(%x, 'e5m6[1x128] pow2')         forward
         %xc, %xt = fp8c.requantize(%xe, %xf, 'e5m6[1x128] pow2', 'e4m3[128x1] pow2')

Contract: only where the plan caches x. Where the value in front of the GEMM is recomputed (the SwiGLU of an expert),
the 128x1 quantize reads the recomputed value and stays as it is.
Source:   DeepSeek-V3 (arXiv:2412.19437), section 3.3.3 and section 3.5.2 for the present workflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fp8c import graph as g
from fp8c.formats import Element, Format
from fp8c.pass_manager import PassContext, PassResult
from fp8c.passes.assign_roles import GemmRole, activation_of
from fp8c.passes.insert_quantize import Quantizer

ops = torch.ops.fp8c


@dataclass(frozen=True)
class RequantizeForWgrad:
    name: ClassVar[str] = "requantize-for-wgrad"
    requires: ClassVar[frozenset[str]] = frozenset({"roles", "scales-paired"})
    ensures: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        assert ctx.plan is not None
        changed = 0
        forward = forward_inputs(graph)
        for use in ctx.plan.uses.values():
            cache = use.cache("x")
            if cache is None or use.use.key not in forward or not use.gemm("wgrad").is_fp8:
                continue
            (gemm, x), target = forward[use.use.key], use.gemm("wgrad").a
            if cache == target:
                continue  # the copy is what wgrad reads: choose-saved keeps it
            for late in late_quantizes(x, target):
                changed += replace_by_requantize(graph, gemm, x, late, cache, target)
        if changed:
            graph.eliminate_dead_code()
        return PassResult(graph, changed)


def forward_inputs(graph: fx.Graph) -> dict[str, tuple[fx.Node, fx.Node]]:
    """For each use its fprop, and that GEMM's x as it was before it was quantized."""
    found = {}
    for node in g.calls(graph, {ops.scaled_mm.default, ops.scaled_grouped_mm.default, *g.MATMULS, *g.GROUPED_MATMULS}):
        role = node.meta.get(g.ROLE)
        if not isinstance(role, GemmRole) or role.gemm != "fprop":
            continue
        if node.target in g.GEMMS:
            found[role.use] = node, activation_of(node)
            continue
        data = node.args[0]
        assert isinstance(data, fx.Node) and isinstance(data.args[0], fx.Node)
        source = data.args[0].args[0]
        assert isinstance(source, fx.Node)
        found[role.use] = node, source
    return found


def late_quantizes(x: fx.Node, target: Format) -> list[fx.Node]:
    """The quantizes of x to wgrad's format."""
    found = []
    frontier, seen = [g.strip(x, g.RESHAPES)], set()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if g.is_call(user, {ops.quantize.default}) and user.args[1] == target.text:
                found.append(user)
            elif g.is_call(user, g.RESHAPES):
                frontier.append(user)
    return found


def replace_by_requantize(
    graph: fx.Graph, gemm: fx.Node, x: fx.Node, late: fx.Node, cache: Format, target: Format
) -> int:
    kept = _cached_pair(graph, gemm, x, cache)
    cols = g.value(x).shape[-1] if cache.element is Element.E5M6 else None
    offs = late.args[2] if len(late.args) > 2 else None
    with graph.inserting_before(late):
        new = g.emit(
            graph, ops.requantize.default, *kept, cache.text, target.text, offs, _size_argument(cols), like=late
        )
    late.replace_all_uses_with(new)
    graph.erase_node(late)
    return 1


def _size_argument(cols: object) -> int | None:
    return int(cols) if isinstance(cols, int) else None


def _cached_pair(graph: fx.Graph, gemm: fx.Node, x: fx.Node, cache: Format) -> tuple[fx.Node, fx.Node]:
    """The pair backward keeps: the forward's own where the formats agree, otherwise a second quantize beside it."""
    for node in x.users:
        is_same = g.is_call(node, {ops.quantize.default}) and node.args[1] == cache.text and len(node.args) == 2
        if is_same and not g.is_backward(node):
            results = sorted(node.users, key=lambda n: n.args[1])  # type: ignore[arg-type, return-value]
            if len(results) == 2:
                return results[0], results[1]
    with graph.inserting_before(g.after(x)):
        return Quantizer(graph).quantize(x, cache, gemm)
