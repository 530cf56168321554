"""The part of fuse-casts that joins quantizes with the SwiGLU between an expert's GEMMs.

Before:  %q, %s   = fp8c.quantize(%x, cache)                     x: bf16[R, 2F], the gates and ups of all rows
         %gate, %up = aten.split(%x, F, -1)
         %h       = aten.silu(%gate) * %up [* %weight]
         %hq, %hs = fp8c.quantize(%h, fmt)
After:   %hq, %hs, %q, %s = fp8c.swiglu_quantize_cached(%x, %weight, fmt, cache)
         or fp8c.swiglu_quantize where x isn't cached in FP8, or gate and up are two GEMMs' results

Before:  %x = fp8c.dequantize(%q, %s, cache)                     backward: the same again, its gradient, and
         quantizes of h along columns, of the gradient of x along rows and along columns
After:   fp8c.swiglu_backward_quantize(%dh, %q, %s, %weight, %offs, ...)

Contract: exact. A value that anything else reads, or that crosses to backward, keeps the SwiGLU as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp8c import graph as g
from fp8c.formats import Format
from fp8c.graph import aten
from fp8c.ops import fused

ops = torch.ops.fp8c
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default})


@dataclass(frozen=True)
class Forward:
    """A SwiGLU in the graph: its inputs as matrices, the router's weight, the result as it is quantized."""

    silu: fx.Node
    gate: fx.Node
    up: fx.Node
    product: fx.Node
    weight: fx.Node | None
    result: fx.Node
    joined: fx.Node | None  # what gate and up are the halves of


def fuse_forward(graph: fx.Graph, fusions: frozenset[str]) -> int:
    """Quantizes of SwiGLU's results along rows."""
    count = 0
    for node in g.calls(graph, {ops.quantize.default}):
        found = swiglu_behind(node.args[0])
        if found is None or len(node.args) > 2 or Format.parse(str(node.args[1])).group != (1, 128):
            continue
        if not is_private(found, node):
            continue
        cached = None if found.joined is None else cache_of(found.joined)
        if cached is not None and "swiglu_quantize_cached" in fusions:
            count += join_cached(graph, node, found, cached)
        elif "swiglu_quantize" in fusions:
            count += join(graph, node, found)
    return count


def swiglu_behind(result: Any) -> Forward | None:
    """The SwiGLU that made this value, through reshapes, a weight per row and the cast behind it."""
    node: Any = g.strip(result, g.RESHAPES)
    weight = None
    if g.is_call(node, g.CASTS) and isinstance(node.args[0], fx.Node) and g.is_call(node.args[0], {aten.mul.Tensor}):
        weighted: Any = node.args[0]
        weight = row_weight(weighted.args[1])
        if weight is None or g.value(weighted).dtype is not torch.float32:
            return None
        node = g.strip(weighted.args[0], g.RESHAPES)
    if not g.is_call(node, {aten.mul.Tensor}) or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    product, (silu, up) = node, (node.args[0], node.args[1])
    if g.is_call(up, {aten.silu.default}):
        silu, up = up, silu
    if not g.is_call(silu, {aten.silu.default}):
        return None
    gate = silu.args[0]
    assert isinstance(silu, fx.Node) and isinstance(gate, fx.Node) and isinstance(up, fx.Node)
    if not g.same_sizes(g.value(gate), g.value(up)) or g.value(gate).dtype != g.value(product).dtype:
        return None
    if weight is not None and not statically_known_true(g.value(weight).shape[0] == g.value(result).shape[0]):
        return None
    return Forward(silu, gate, up, product, weight, result, joined_halves(gate, up))


def row_weight(node: Any) -> fx.Node | None:
    """The vector w of `w[:, None]`, in FP32."""
    is_column = isinstance(node, fx.Node) and g.is_call(node, {aten.unsqueeze.default}) and node.args[1] in (-1, 1)
    vector: Any = node.args[0] if is_column else None
    is_vector = isinstance(vector, fx.Node) and g.value(vector).dim() == 1 and g.value(vector).dtype is torch.float32
    return vector if is_vector else None


def joined_halves(gate: fx.Node, up: fx.Node) -> fx.Node | None:
    """The matrix whose left half is gate and right half is up."""
    for node, index in ((gate, 0), (up, 1)):
        if node.target is not operator.getitem or node.args[1] != index:
            return None
    split = gate.args[0]
    if not isinstance(split, fx.Node) or split is not up.args[0] or not g.is_call(split, _SPLITS):
        return None
    source: Any = split.args[0]
    assert isinstance(source, fx.Node)
    is_last = len(split.args) > 2 and split.args[2] in (-1, g.value(source).dim() - 1)
    halves = len(g.value(split)) == 2 and g.same_sizes(g.value(gate), g.value(up))
    matrix = g.strip(source, g.ROW_VIEWS)
    is_matrix = g.value(source).dim() == 2 and g.same_sizes(g.value(matrix), g.value(source))
    return matrix if is_last and halves and is_matrix else None


def is_private(found: Forward, quantize: fx.Node) -> bool:
    """Whether nothing but the quantize reads what lies between SwiGLU's inputs and it."""
    inside = path(quantize.args[0], found.product) | {found.product, found.silu}
    return all(user in inside or user is quantize for node in inside for user in node.users)


def path(last: Any, first: fx.Node) -> set[fx.Node]:
    """The nodes from `last` back to `first`, along first arguments."""
    found = set()
    while last is not first:
        found.add(last)
        last = last.args[0]
    return found


def cache_of(x: fx.Node) -> fx.Node | None:
    """The quantize that keeps x for backward."""
    for user in x.users:
        if g.is_call(user, {ops.quantize.default}) and len(user.args) == 2:
            if Format.parse(str(user.args[1])).group == (1, 128):
                return user
    return None


def join_cached(graph: fx.Graph, quantize: fx.Node, found: Forward, cached: fx.Node) -> int:
    weight = found.weight
    with graph.inserting_before(quantize):
        new = g.emit(
            graph,
            fused.SWIGLU_QUANTIZE_CACHED,
            found.joined,
            weight,
            quantize.args[1],
            cached.args[1],
            like=quantize,
        )
    redirect(graph, new, quantize, {0: 0, 1: 1})
    redirect(graph, new, cached, {0: 2, 1: 3})
    return 1


def join(graph: fx.Graph, quantize: fx.Node, found: Forward) -> int:
    gate, up = (as_matrix(n, quantize.args[0]) for n in (found.gate, found.up))
    if gate is None or up is None:
        return 0
    with graph.inserting_before(quantize):
        new = g.emit(graph, fused.SWIGLU_QUANTIZE, gate, up, found.weight, quantize.args[1], like=quantize)
    redirect(graph, new, quantize, {0: 0, 1: 1})
    return 1


def as_matrix(node: fx.Node, like: Any) -> fx.Node | None:
    """The value as a matrix shaped as `like`, behind views that keep its rows."""
    while not g.same_sizes(g.value(node), g.value(like)):
        if not g.is_call(node, g.ROW_VIEWS) or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return node


# Backward -------------------------------------------------------------------------------------------------------------


def fuse_backward(graph: fx.Graph, fusions: frozenset[str]) -> int:
    """Gradients of SwiGLU whose inputs were cached in FP8, side by side."""
    if "swiglu_backward_quantize" not in fusions:
        return 0
    return sum(join_gradient(graph, node) for node in g.calls(graph, {aten.cat.default}))


def join_gradient(graph: fx.Graph, cat: fx.Node) -> int:
    found = match_gradient(cat)
    if found is None:
        return 0
    dequantize, quantize_h, rows, columns, dh, weight, dweight, offs = found
    q, s, cache = dequantize.args[:3]
    last = max([n for n in (dh, weight, q, s, offs) if isinstance(n, fx.Node)])
    with graph.inserting_before(g.after(last)):
        new = g.emit(
            graph, fused.SWIGLU_BACKWARD_QUANTIZE, dh, q, s, weight, offs,
            cache, quantize_h.args[1], rows.args[1], columns.args[1], like=cat,
        )  # fmt: skip
    if dweight is not None:
        dweight.target, dweight.args, dweight.kwargs = operator.getitem, (new, 6), {}
        dweight.meta["val"] = g.value(new)[6]
    moved = [*quantize_h.users, *rows.users, *columns.users]
    redirect(graph, new, quantize_h, {0: 0, 1: 1})
    redirect(graph, new, rows, {0: 2, 1: 3})
    redirect(graph, new, columns, {0: 4, 1: 5})
    move_behind(graph, new, moved if dweight is None else [*moved, dweight])
    return 1


def match_gradient(cat: fx.Node) -> tuple[Any, ...] | None:
    """(dequantize, quantize of h, of the gradient by rows, by columns, dh, weight, its gradient, offs) behind a cat."""
    inputs: Any = cat.args[0]
    if not (isinstance(inputs, (list, tuple)) and len(inputs) == 2 and g.value(cat).dim() == 2):
        return None
    dgate, dup = inputs
    if not g.is_call(dgate, {aten.silu_backward.default}) or not g.is_call(dup, {aten.mul.Tensor}):
        return None
    dsilu, gate = dgate.args
    if not g.is_call(dsilu, {aten.mul.Tensor}):
        return None
    (dproduct, up), (dproduct_2, silu) = dsilu.args, dup.args
    is_one = dproduct is dproduct_2 and g.is_call(silu, {aten.silu.default}) and silu.args[0] is gate
    joined = joined_halves(gate, up) if is_one else None
    if joined is None or not g.is_call(joined, {ops.dequantize.default}):
        return None
    product = next((u for u in silu.users if g.is_call(u, {aten.mul.Tensor}) and up in u.args and u is not dsilu), None)
    rows, columns = (quantize_of(cat, group) for group in ((1, 128), (128, 1)))
    if product is None or rows is None or columns is None:
        return None
    gradient: Any = g.strip(dproduct, g.ROW_VIEWS)
    weight: Any = None
    dweight: Any = None
    dh, result = dproduct, product
    if g.is_call(gradient, g.CASTS) and g.is_call(gradient.args[0], {aten.mul.Tensor}):
        wide, column = gradient.args[0].args
        weight, plain = row_weight(column), g.strip(product, g.ROW_VIEWS)
        if weight is None or not g.is_call(wide, g.CASTS):
            return None
        dh = wide.args[0]
        weighted = find_user(product, lambda n: g.is_call(n, {aten.mul.Tensor}) and n.args[1] is column)
        result = None if weighted is None else next(iter(weighted.users), None)
        terms = next((u for u in wide.users if u.target is aten.mul.Tensor and is_view_of(u.args[1], plain)), None)
        dweight = None if terms is None else next(iter(terms.users), None)
        is_sum = dweight is not None and g.is_call(dweight, {aten.sum.dim_IntList})
        if terms is None or not is_sum or dweight.args[1:] != ([1], True) or len(terms.users) != 1:
            return None
        if result is None or not g.is_call(result, g.CASTS) or set(wide.users) != {gradient.args[0], terms}:
            return None
    dh = g.strip(dh, g.ROW_VIEWS)
    quantize_h = quantize_of(result, (128, 1))
    if quantize_h is None or not g.same_sizes(g.value(dh), g.value(g.strip(dproduct, g.ROW_VIEWS))):
        return None
    offs = {n.args[2] if len(n.args) > 2 else None for n in (quantize_h, columns)}
    if len(offs) != 1 or g.value(dh).dim() != 2:
        return None
    known = (joined, quantize_h, rows, columns, dh, weight, dweight, offs.pop())
    return known if nothing_else_reads(joined, cat, known) else None


def quantize_of(node: Any, group: tuple[int, int]) -> Any:
    """A quantize of this value, behind views, in groups of this shape."""
    return find_user(
        node, lambda n: g.is_call(n, {ops.quantize.default}) and Format.parse(str(n.args[1])).group == group
    )


def find_user(node: Any, wanted: Any) -> Any:
    """A reader for which `wanted` holds, also behind views."""
    frontier = [node]
    while frontier:
        for user in frontier.pop().users:
            if wanted(user):
                return user
            if g.is_call(user, g.ROW_VIEWS):
                frontier.append(user)
    return None


def is_view_of(node: Any, source: fx.Node) -> bool:
    return isinstance(node, fx.Node) and g.strip(node, g.ROW_VIEWS) is source


def nothing_else_reads(dequantize: fx.Node, cat: fx.Node, known: tuple[Any, ...]) -> bool:
    """Whether every value computed from the cached inputs ends in one of the known results."""
    ends = {known[1], known[2], known[3], known[6]} - {None}
    frontier, seen = [dequantize], {dequantize}
    while frontier:
        for user in frontier.pop().users:
            if user in ends or user in seen:
                continue
            if user.op == "output" or user.target is ops.quantize.default or len(seen) > 64:
                return False
            seen.add(user)
            frontier.append(user)
    return cat in seen


def redirect(graph: fx.Graph, new: fx.Node, old: fx.Node, results: dict[int, int]) -> None:
    """Let the results of `old` come from `new` under their own names."""
    for user in list(old.users):
        index = results[user.args[1]]  # type: ignore[index]
        user.args = (new, index)
        user.meta["val"] = g.value(new)[index]
    graph.erase_node(old)
    for user in [u for u in new.users if u < new]:
        move_behind(graph, new, [user])


def move_behind(graph: fx.Graph, new: fx.Node, results: list[fx.Node]) -> None:
    """Move nodes that read a result of `new` behind it, with everything that depends on them, in order."""
    early = [n for n in results if n < new]
    depending = set(early)
    node = min(early, default=new)
    while node is not new:
        following = node.next
        if any(n in depending for n in node.all_input_nodes):
            depending.add(node)
        node = following
    anchor = new
    for node in sorted(depending):
        anchor.append(node)
        anchor = node
