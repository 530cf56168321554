"""gather-gradients: the gradient of gathered rows by gathering, where it is known which rows go where.

Before:  %order   = sort(%experts).indices                              a permutation of the R = T * k rows
         %back    = scatter(empty, 0, %order, arange(R))                its inverse
         %d       = aten.index_put(zeros, [%back], %g, accumulate)      backward of %y[%back]
         %dx      = aten.index_put(zeros, [%order // k], %h, accumulate)  backward of %x[%order // k]
After:   %d       = aten.index(%g, [%order])
         %dx      = aten.sum(aten.view(aten.index(%h, [%back]), [T, k, N]), 1)

Where %g is a token's gradient repeated for its k rows, %d reads the token: %d = aten.index(%dy, [%order // k]), which
fp8-dispatch can then quantize before it is gathered.

Contract: only permutations that a sort proves. An entry is written once by the first form, so it is exact; the second adds
the k rows of a token in one FP32 sum of fixed order instead of by atomic additions in the gradient's own type.
Source:   backward of the combine and of the dispatch of an MoE layer (arXiv:2412.19437, section 3.3.3).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fp8c import graph as g
from fp8c.graph import aten
from fp8c.pass_manager import PassContext, PassResult

_SORTS = frozenset({aten.sort.stable, aten.sort.default})
_ZEROS = frozenset({aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default})
_INDEX_PUT = aten.index_put.default


@dataclass(frozen=True)
class GatherGradients:
    name: ClassVar[str] = "gather-gradients"
    requires: ClassVar[frozenset[str]] = frozenset({"roles"})
    ensures: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        changed = sum(rewrite(graph, node) for node in g.calls(graph, {_INDEX_PUT}))
        changed += sum(read_token(graph, node) for node in g.calls(graph, {aten.index.Tensor}))
        if changed:
            graph.eliminate_dead_code()
        return PassResult(graph, changed)


def rewrite(graph: fx.Graph, node: fx.Node) -> int:
    zeros: Any = node.args[0]
    indices, added = node.args[1:3]
    accumulates = len(node.args) > 3 and bool(node.args[3])
    only = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    is_fresh = isinstance(zeros, fx.Node) and g.is_call(zeros, _ZEROS)
    if not (accumulates and is_fresh and isinstance(only, fx.Node) and isinstance(added, fx.Node)):
        return 0
    if g.value(only).dim() != 1 or g.value(zeros).dtype != g.value(added).dtype:
        return 0
    with graph.inserting_before(node):
        new = gathered(graph, node, only, zeros, added)
    if new is None:
        return 0
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return 1


def read_token(graph: fx.Graph, node: fx.Node) -> int:
    """Gathered rows of a value that repeats each token: gather the token."""
    source, indices = node.args[:2]
    order = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    if not (isinstance(order, fx.Node) and isinstance(source, fx.Node) and is_permutation(order)):
        return 0
    with graph.inserting_before(node):
        new = repeated(graph, node, order, source)
    if new is None:
        return 0
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return 1


def gathered(graph: fx.Graph, node: fx.Node, rows: fx.Node, zeros: fx.Node, added: fx.Node) -> fx.Node | None:
    """What the scatter leaves, by gathers; None where the rows aren't a sort's permutation."""
    order = inverted(rows)
    if order is not None:
        return repeated(graph, node, order, added) or g.emit(graph, aten.index.Tensor, added, [order], like=node)
    if is_permutation(rows):
        back = inverse(graph, rows, node)
        return None if back is None else g.emit(graph, aten.index.Tensor, added, [back], like=node)
    divided = token_of(rows)
    if divided is None:
        return None
    order, choices = divided
    tokens, width = g.value(zeros).shape[0], g.value(zeros).shape[1:]
    rows_in_all = g.value(order).shape[0]
    if str(tokens * choices) != str(rows_in_all) or any(not isinstance(n, int) for n in width):
        return None
    back = inverse(graph, order, node)
    if back is None:
        return None
    taken = g.emit(graph, aten.index.Tensor, added, [back], like=node)
    folded = g.emit(graph, aten.view.default, taken, [-1, choices, *width], like=node)
    return g.emit(graph, aten.sum.dim_IntList, folded, [1], like=node)


def is_permutation(node: fx.Node) -> bool:
    """The indices of a sort of a vector."""
    source = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return isinstance(source, fx.Node) and g.is_call(source, _SORTS) and g.value(node).dim() == 1


def inverted(node: fx.Node) -> fx.Node | None:
    """The permutation whose inverse this is: positions scattered to where it points."""
    if not g.is_call(node, {aten.scatter.src}) or node.args[1] != 0:
        return None
    order, positions = node.args[2], node.args[3]
    assert isinstance(order, fx.Node) and isinstance(positions, fx.Node)
    is_count = g.is_call(positions, {aten.arange.default}) and str(g.value(positions).shape) == str(
        g.value(order).shape
    )
    same_size = str(g.value(node).shape) == str(g.value(order).shape)
    return order if is_permutation(order) and is_count and same_size else None


def inverse(graph: fx.Graph, order: fx.Node, like: fx.Node) -> fx.Node | None:
    """The forward's inverse of a permutation."""
    return next((u for u in order.users if inverted(u) is order and u < like), None)


def token_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(order, k) of `order // k`."""
    if not g.is_call(node, {aten.floor_divide.default}) or not isinstance(node.args[1], int):
        return None
    order = node.args[0]
    assert isinstance(order, fx.Node)
    return (order, node.args[1]) if is_permutation(order) else None


def repeated(graph: fx.Graph, node: fx.Node, order: fx.Node, added: fx.Node) -> fx.Node | None:
    """x[order // k], where `added` repeats each row of x k times."""
    chain = g.strip(added, g.RESHAPES | g.CASTS)
    if not g.is_call(chain, {aten.expand.default}) or g.value(added).dim() != 2 or g.value(chain).dim() != 3:
        return None
    inner: Any = chain.args[0]
    if not g.is_call(inner, {aten.unsqueeze.default}) or inner.args[1] != 1:
        return None
    source, choices = inner.args[0], g.value(chain).shape[1]
    tokens = next((u for u in order.users if token_of(u) == (order, choices) and u < node), None)
    if tokens is None or g.value(source).dim() != 2 or not isinstance(choices, int):
        return None
    if g.value(added).dtype is g.value(source).dtype:
        return narrowed(graph, node, source, tokens) or g.emit(graph, aten.index.Tensor, source, [tokens], like=node)
    narrow = widened(source)  # widened and narrowed again on the way
    if narrow is None or g.value(narrow).dtype is not g.value(added).dtype:
        return None
    return g.emit(graph, aten.index.Tensor, narrow, [tokens], like=node)


def widened(source: fx.Node) -> fx.Node | None:
    """The BF16 or FP16 value behind an FP32 one, in the same shape."""
    wide = g.strip(source, g.ROW_VIEWS)
    narrow = wide.args[0] if g.is_call(wide, g.CASTS) else None
    if not isinstance(narrow, fx.Node) or g.value(source).dtype is not torch.float32:
        return None
    same = str(g.value(narrow).shape) == str(g.value(source).shape)
    return narrow if same and g.value(narrow).dtype in (torch.bfloat16, torch.float16) else None


def narrowed(graph: fx.Graph, node: fx.Node, source: fx.Node, tokens: fx.Node) -> fx.Node | None:
    """Gather in the narrow type when the source was widened from it and every reader narrows it again."""
    narrow = widened(source)
    casts = list(node.users)
    if narrow is None or not all(g.is_call(u, g.CASTS) and g.value(u).dtype is g.value(narrow).dtype for u in casts):
        return None
    taken = g.emit(graph, aten.index.Tensor, narrow, [tokens], like=node)
    for cast in casts:
        cast.replace_all_uses_with(taken)
        graph.erase_node(cast)
    return taken
