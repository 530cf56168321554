"""Concatenations that an opaque operator reads, queries of copied and of rotated features say, as Inductor makes them well.

write_where_read  a concatenation that is copied to another order of its axes is made in that order
store_parts       computed parts are stored before they are put in: in one kernel with the copied ones, every element of the
                  result would go through the loads of every part, most of them masked
Exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fp8c import graph as g
from fp8c.graph import aten
from fp8c.ops.stored import STORED

_CAT = frozenset({aten.cat.default})
_PASSED_ON = g.VIEWS | {aten.clone.default}


def write_where_read(graph: fx.Graph) -> int:
    """`clone(permute(cat(parts)))` -> `cat(permute(part) ...)`, and a concatenation within one along the same axis joined."""
    changed = 0
    for node in list(g.calls(graph, {aten.clone.default})):
        found = permuted_concatenation(node)
        if found is None:
            continue
        joined, order = found
        with graph.inserting_before(node):
            parts = [g.emit(graph, aten.permute.default, part, order, like=part) for part in flat_parts(joined)]
            made = g.emit(graph, aten.cat.default, parts, order.index(axis_of(joined)), like=node)
        node.replace_all_uses_with(made)
        changed += 1
    return changed


def permuted_concatenation(clone: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """(concatenation, order of its axes) when this copies one that nothing else reads."""
    permuted: Any = clone.args[0]
    is_contiguous = clone.kwargs.get("memory_format") is torch.contiguous_format
    if not is_contiguous or not g.is_call(permuted, {aten.permute.default}) or len(permuted.users) > 1:
        return None
    joined, order = permuted.args
    return (joined, list(order)) if g.is_call(joined, _CAT) and len(joined.users) == 1 else None


def axis_of(joined: fx.Node) -> int:
    dim = joined.args[1] if len(joined.args) > 1 else 0
    assert isinstance(dim, int)
    return int(dim % g.value(joined).dim())


def parts_of(joined: fx.Node) -> list[fx.Node]:
    return list(joined.args[0])  # type: ignore[arg-type]


def flat_parts(joined: fx.Node) -> Iterator[fx.Node]:
    """The parts of a concatenation; of one that is such a part and nothing else, its own."""
    for part in parts_of(joined):
        if g.is_call(part, _CAT) and len(part.users) == 1 and axis_of(part) == axis_of(joined):
            yield from flat_parts(part)
        else:
            yield part


def store_parts(graph: fx.Graph) -> int:
    """Put `fp8c.stored` behind computed parts that stand beside others which are copied as they are."""
    changed = 0
    for joined in list(g.calls(graph, _CAT)):
        is_last = axis_of(joined) == g.value(joined).dim() - 1
        if not is_last or len(joined.users) == 0 or not is_for_operators(joined):
            continue
        sources = [source_of(part) for part in parts_of(joined)]
        computed = [source for source in sources if is_computed(source)]
        if len(computed) == len(sources):
            continue
        for source in dict.fromkeys(computed):
            with graph.inserting_after(source):
                kept = g.emit(graph, STORED, source, like=source)
            source.replace_all_uses_with(kept, lambda user: user is not kept)
            changed += 1
    return changed


def source_of(node: fx.Node) -> fx.Node:
    """What a value is a view of."""
    while g.is_call(node, g.VIEWS):
        node = node.all_input_nodes[0]
    return node


def is_computed(node: fx.Node) -> bool:
    """From elements of several values, or from several elements."""
    if not isinstance(node.target, OpOverload) or len(node.all_input_nodes) < 2:
        return False
    return torch.Tag.pointwise in node.target.tags or g.is_call(node, _CAT)


def is_for_operators(node: fx.Node) -> bool:
    """Whether nothing but fp8c's operators reads a value, through views and copies."""
    for user in node.users:
        if g.is_call(user, _PASSED_ON):
            if not is_for_operators(user):
                return False
        elif not isinstance(user.target, OpOverload) or user.target.namespace != "fp8c":
            return False
    return bool(node.users)
