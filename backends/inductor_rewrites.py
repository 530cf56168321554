"""Rewrites of a decomposed half for what Inductor would make of it. Exact; other lowerings do without.

store_tables   sines and cosines of positions, read by every head: computed once, not for every element of q and k
join_parts     a tensor written part by part (`y = empty; y[..., :a] = u; y[..., a:] = v`) is a concatenation
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp8c import graph as g
from fp8c.backends.inductor_concatenations import store_parts, write_where_read
from fp8c.graph import aten
from fp8c.ops.stored import STORED

_TABLES = frozenset({aten.cos.default, aten.sin.default})
_EMPTY = frozenset(
    {aten.empty.memory_format, aten.new_empty.default, aten.empty_strided.default, aten.new_empty_strided.default}
)
_REPEATED_AT_LEAST = 4  # times that an element of a table is read


def rewrite_for_inductor(gm: fx.GraphModule) -> None:
    """Apply all of them in place."""
    changed = store_tables(gm.graph) + join_parts(gm.graph)
    if changed + write_where_read(gm.graph) + store_parts(gm.graph):
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()


def store_tables(graph: fx.Graph) -> int:
    """Put `fp8c.stored` behind sines and cosines that a broadcast reads many times, where they are narrowest."""
    changed = 0
    for node in list(g.calls(graph, _TABLES)):
        table = node
        while len(table.users) == 1:
            (user,) = table.users
            is_narrowed = g.is_call(user, {aten.mul.Tensor, *g.CASTS}) and g.same_sizes(g.value(user), g.value(table))
            if not is_narrowed or len(user.all_input_nodes) != 1:
                break
            table = user
        if largest_reader(table) < _REPEATED_AT_LEAST * elements(table):
            continue
        with graph.inserting_after(table):
            kept = graph.call_function(STORED, (table,))
        g.inherit(kept, table)
        kept.meta["val"] = g.fake_call(STORED, (table,), {})
        table.replace_all_uses_with(kept, lambda user: user is not kept)
        changed += 1
    return changed


def largest_reader(table: fx.Node) -> int:
    """Elements of the largest value computed from this one element by element, through views."""
    largest, frontier = 0, [table]
    while frontier:
        for user in frontier.pop().users:
            if g.is_call(user, g.VIEWS):
                frontier.append(user)
            elif isinstance(user.meta.get("val"), torch.Tensor):
                largest = max(largest, elements(user))
    return largest


def elements(node: fx.Node) -> int:
    count = 1
    for size in g.value(node).shape:
        count *= g.size_hint(size)
    return count


def join_parts(graph: fx.Graph) -> int:
    changed = 0
    for node in list(g.calls(graph, {aten.slice_scatter.default})):
        parts = parts_of(node)
        if parts is None:
            continue
        with graph.inserting_before(node):
            joined = g.emit(graph, aten.cat.default, list(parts), node.args[2], like=node)
        node.replace_all_uses_with(joined)
        changed += 1
    return changed


def parts_of(last: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(u, v) when this writes v behind u into memory that held nothing, and nothing else sees it half written."""
    first, second, dim, middle, end, step = scatter_arguments(last)
    if not g.is_call(first, {aten.slice_scatter.default}) or dim < 0:
        return None
    memory, copied, other, start, stop, other_step = scatter_arguments(first)
    size = g.value(last).shape[dim]
    is_whole = start == 0 and stop == middle and isinstance(end, int) and statically_known_true(end >= size)
    if not g.is_call(memory, _EMPTY) or other != dim or not is_whole or step != 1 or other_step != 1:
        return None
    u, v = source_of(copied, memory), source_of(second, first)
    if u is None or v is None:
        return None
    window = second.args[0]  # v is copied over what first holds there, which is all that else reads first
    return (u, v) if set(first.users) <= {last, window} and set(window.users) <= {second} else None


def scatter_arguments(node: Any) -> tuple[Any, Any, int, Any, Any, Any]:
    """(base, source, dim, start, end, step) of a slice_scatter."""
    defaults = (None, None, 0, None, None, 1)
    given: tuple[Any, ...] = tuple(node.args) + defaults[len(node.args) :]
    base, source, dim, start, end, step = given
    return base, source, dim, 0 if start is None else start, torch.iinfo(torch.int64).max if end is None else end, step


def source_of(copied: Any, base: fx.Node) -> Any:
    """x of `copy(slice(base), x)` where that neither casts nor broadcasts."""
    if not g.is_call(copied, {aten.copy.default}) or not g.is_call(copied.args[0], {aten.slice.Tensor}):
        return None
    window, source = copied.args[:2]
    is_same = window.args[0] is base and g.value(window).dtype == g.value(source).dtype
    return source if is_same and g.same_sizes(g.value(window), g.value(source)) else None
