"""causal-attention: drop a mask that is proven to be the causal triangle, and say `is_causal` instead.

Before:  %rows = aten.arange(128)                                   i64[128]
         %mask = aten.le(%keys, %queries)                           b8[1, 1, 128, 128]
         %o, %lse = fp8c.attention(%q, %k, %v, %mask, False, 0.125, False)
After:   %o, %lse = fp8c.attention(%q, %k, %v, None, True, 0.125, False)

Contract: exact. The mask must follow from positions alone (`fp8c.positions`), for every size the graph takes, and
queries and keys must be equally many. A padding mask, a window, packed sequences and anything unproven stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp8c import graph as g
from fp8c import ops
from fp8c.pass_manager import PassContext, PassResult
from fp8c.positions import Positions, is_causal_triangle

#: Places of (q, k, mask, is_causal) among the arguments.
_ARGUMENTS = {ops.ATTENTION: (0, 1, 3, 4), ops.ATTENTION_BACKWARD: (1, 2, 6, 7)}


@dataclass(frozen=True)
class CausalAttention:
    name: ClassVar[str] = "causal-attention"
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        positions = Positions()
        dropped, kept = [], []
        for node in g.calls(graph, _ARGUMENTS):
            q, k, mask, is_causal = _ARGUMENTS[node.target]  # type: ignore[index]
            if not isinstance(node.args[mask], fx.Node):
                continue
            if not may_be_causal(node.args[q], node.args[k], node.args[mask], positions):
                kept.append(node)
                continue
            node.update_arg(mask, None)
            node.update_arg(is_causal, True)
            dropped.append(node)
        if dropped:
            graph.eliminate_dead_code()
        report(dropped, kept, ctx)
        return PassResult(graph, len(dropped))


def may_be_causal(q: object, k: object, mask: object, positions: Positions) -> bool:
    """Whether attention of q on k with this mask is causal attention, whatever the sizes."""
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(mask, fx.Node)
    rows, columns = g.value(q).shape[2], g.value(k).shape[2]
    triangle = g.value(mask).shape
    if len(triangle) < 2 or not all(statically_known_true(n == rows) for n in (columns, triangle[-2], triangle[-1])):
        return False
    return is_causal_triangle(positions.value(mask), len(triangle))


def report(dropped: list[fx.Node], kept: list[fx.Node], ctx: PassContext) -> None:
    """One remark for what was proven, one for what was not."""
    forward = [[n for n in nodes if n.target is ops.ATTENTION] for nodes in (dropped, kept)]
    if forward[0]:
        ctx.remark(
            "R0840", f"{len(forward[0])} attention masks are the causal triangle and were dropped", forward[0][0]
        )
    if forward[1]:
        ctx.remark("R0841", f"{len(forward[1])} attention masks stay: not proven to be causal", forward[1][0])
