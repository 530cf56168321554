"""fuse-combine: gather the rows that experts made of a token and add them up in one reading.

Before:  %g   = aten.index(%x, [%back])                       x: bf16[R, N], back: i64[R], R = T * k
         %sum = aten.sum(aten.view(_to_copy(%g, f32), [T, k, N]), [1])
         %y   = _to_copy(%sum, bf16)                           the combine; the dispatch's backward sums in bf16 at once
         %z   = %shared + aten.view(%y, [B, S, N])             optional
After:   %y   = fp8c.gather_sum(%x, %back, k)
         or %z = aten.view(fp8c.gather_sum(%x, %back, k, aten.view(%shared, [-1, N])), [B, S, N])

Contract: the same roundings: one FP32 sum of a token's k rows, rounded to their type, then the addition. aten.sum leaves
open in which order it adds; fp8c.gather_sum adds in the order of the choices. Where something else reads the gathered rows
or the sum in FP32, nothing changes. Only where the backend has the kernel (`PassContext.fusions`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp8c import graph as g
from fp8c.graph import aten
from fp8c.ops.combine import GATHER_SUM
from fp8c.partition import Halves
from fp8c.pass_manager import PassContext

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Combine:
    """result [T, N] in the type of source [R, N]: rows [T * k] of it, k at a time, summed."""

    result: fx.Node
    source: fx.Node
    rows: fx.Node
    k: int


@dataclass(frozen=True)
class FuseCombine:
    name: ClassVar[str] = "fuse-combine"
    requires: ClassVar[frozenset[str]] = frozenset({"saved-chosen"})
    ensures: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, halves: Halves, ctx: PassContext) -> int:
        """Edit both halves in place; return the number of sums replaced."""
        if "gather_sum" not in ctx.fusions:
            return 0
        changed = 0
        for half in (halves.forward, halves.backward):
            count = sum(fuse(half.graph, node) for node in g.calls(half.graph, {aten.sum.dim_IntList}))
            if count:
                half.graph.eliminate_dead_code()
                half.graph.lint()
                half.recompile()
            changed += count
        return changed


def fuse(graph: fx.Graph, node: fx.Node) -> int:
    found = combine_behind(node)
    if found is None:
        return 0
    views, add = addition_of(found.result)
    if add is None:
        become(found.result, GATHER_SUM, found.source, found.rows, found.k)
        return 1
    last = views[-1] if views else found.result
    other: Any = add.args[1] if add.args[0] is last else add.args[0]
    with graph.inserting_before(add):
        flat = g.emit(graph, aten.view.default, other, [-1, g.value(found.source).shape[1]], like=add)
        arguments = (found.source, found.rows, found.k, flat)
        if not views:
            become(add, GATHER_SUM, *arguments)
            return 1
        new = g.emit(graph, GATHER_SUM, *arguments, like=add)
        for view in views[:-1]:
            new = g.emit(graph, view.target, new, *view.args[1:], like=add)  # type: ignore[arg-type]
    become(add, views[-1].target, new, *views[-1].args[1:])
    return 1


def become(node: fx.Node, target: Any, *args: Any) -> None:
    """Make `node` this call, under its own name, which choose-saved may have listed. Its value stays as it is."""
    node.target, node.args, node.kwargs = target, args, {}


def combine_behind(node: fx.Node) -> Combine | None:
    """The sum of gathered rows that ends in this `aten.sum`, with the cast behind it."""
    folded: Any = node.args[0]
    if list(node.args[1]) not in ([1], [-2]) or (len(node.args) > 2 and node.args[2]):  # type: ignore[arg-type]
        return None
    if g.value(folded).dim() != 3 or not isinstance(g.value(folded).shape[1], int):
        return None
    k, chain = g.value(folded).shape[1], folded
    while isinstance(chain, fx.Node) and g.is_call(chain, g.CASTS | g.ROW_VIEWS) and len(chain.users) == 1:
        chain = chain.args[0]
    rows = None if not isinstance(chain, fx.Node) else vector_index(chain)
    if rows is None or len(chain.users) != 1:
        return None
    source: Any = chain.args[0]
    dtype, width = g.value(source).dtype, g.value(source).shape[1]
    if dtype not in _DTYPES or not isinstance(width, int) or g.value(folded).shape[2] != width:
        return None
    result = node
    if g.value(node).dtype is not dtype:
        casts = list(node.users)
        if g.value(node).dtype is not torch.float32 or len(casts) != 1 or not g.is_call(casts[0], g.CASTS):
            return None
        result = casts[0]
    if g.value(result).dtype is not dtype or g.value(result).device != g.value(source).device:
        return None
    return Combine(result, source, rows, k)


def vector_index(node: fx.Node) -> fx.Node | None:
    """The vector `rows` of `x[rows]`, for a matrix x."""
    if not g.is_call(node, {aten.index.Tensor}) or g.value(node).dim() != 2:
        return None
    indices: Any = node.args[1]
    only = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    if not isinstance(only, fx.Node) or g.value(only).dim() != 1:
        return None
    return only if g.value(only).dtype in (torch.int64, torch.int32) else None


def addition_of(result: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """The views between a combine and the addition that alone reads it, and the addition where it can be joined."""
    views: list[fx.Node] = []
    node = result
    while len(node.users) == 1:
        user = next(iter(node.users))
        if g.is_call(user, g.ROW_VIEWS):
            views.append(user)
            node = user
            continue
        return (views, user) if joins(user, node, result) else ([], None)
    return [], None


def joins(add: fx.Node, operand: fx.Node, result: fx.Node) -> bool:
    """The addition of two tensors of one type and shape, the other of which can be viewed as a matrix."""
    if not g.is_call(add, {aten.add.Tensor}) or add.kwargs or len(add.args) != 2 or add.args[0] is add.args[1]:
        return False
    if not all(isinstance(a, fx.Node) for a in add.args):
        return False
    other: Any = add.args[1] if add.args[0] is operand else add.args[0]
    found = g.value(other)
    return (
        isinstance(found, torch.Tensor)
        and found.dtype is g.value(result).dtype is g.value(add).dtype
        and found.shape[-1:] == g.value(result).shape[-1:]
        and g.same_sizes(found, g.value(operand))
        and is_dense(found)
    )


def is_dense(t: torch.Tensor) -> bool:
    """Surely contiguous, without a guard on a symbolic size."""
    expected: Any = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride())):
        if not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True
