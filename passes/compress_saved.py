"""compress-saved: carry a saved BF16 value across as the format the plan gives it.

Before:  forward   return (%loss, %mm_4)                              mm_4: bf16[T, N]
         backward  %mm_4 = input()
After:   forward   %q, %s = fp8c.quantize(%mm_4, 'e4m3[1x128] pow2');  return (%loss, %q, %s)
         backward  %mm_4 = fp8c.dequantize(%q, %s, 'e4m3[1x128] pow2', bf16)

Where the forward already keeps such a pair of the same values (attention's output, which o_proj caches in E5M6), that
pair is read and nothing is added.

Contract: exactly the values choose-saved gave a format. The halves keep AOTAutograd's order: outputs, tensors, sizes.
Source:   DeepSeek-V3 (arXiv:2412.19437), section 3.3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fp8c import graph as g
from fp8c.formats import Element, Format
from fp8c.graph import aten
from fp8c.partition import Halves
from fp8c.pass_manager import PassContext, SavedValue

ops = torch.ops.fp8c


@dataclass(frozen=True)
class CompressSaved:
    name: ClassVar[str] = "compress-saved"
    requires: ClassVar[frozenset[str]] = frozenset({"saved-chosen"})
    ensures: ClassVar[frozenset[str]] = frozenset({"saved-is-planned"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, halves: Halves, ctx: PassContext) -> int:
        """Edit both halves in place; return the number of values compressed."""
        changed = 0
        for node in halves.saved():
            planned = ctx.saved.get(node.name)
            if planned is None or planned.format is None:
                continue
            compress(halves, node, planned, ctx)
            changed += 1
        if changed:
            for half in (halves.forward, halves.backward):
                half.graph.lint()
                half.recompile()
        return changed


def compress(halves: Halves, node: fx.Node, planned: SavedValue, ctx: PassContext) -> None:
    assert planned.format is not None
    old = next((n for n in halves.backward.graph.find_nodes(op="placeholder") if n.name == node.name), None)
    if old is None:
        return
    existing = existing_pair(halves, node, planned.format)
    if existing is None:
        inputs = replace_crossing(halves, node, old, add_pair(halves, node, planned, ctx))
        shape_chain: list[fx.Node] = []
    else:
        pair, shape_chain = existing
        inputs = read_existing(halves, node, pair)
    insert_dequantize(halves.backward.graph, old, inputs, planned.format, shape_chain, node)
    halves.backward.graph.erase_node(old)


def existing_pair(halves: Halves, node: fx.Node, fmt: Format) -> tuple[tuple[fx.Node, fx.Node], list[fx.Node]] | None:
    """A pair that crosses already and holds the same values, and the reshapes from `node` to what it quantizes."""
    crossing = set(halves.saved())
    frontier: list[tuple[fx.Node, list[fx.Node]]] = [(node, [])]
    while frontier:
        current, chain = frontier.pop()
        for user in current.users:
            if g.is_call(user, {ops.quantize.default}) and user.args[1] == fmt.text and len(user.args) == 2:
                results = sorted(user.users, key=lambda n: n.args[1])  # type: ignore[arg-type, return-value]
                if len(results) == 2 and set(results) <= crossing:
                    return (results[0], results[1]), chain
            elif g.is_call(user, g.RESHAPES | g.TRANSPOSES):
                frontier.append((user, [*chain, user]))
    return None


def add_pair(halves: Halves, node: fx.Node, planned: SavedValue, ctx: PassContext) -> tuple[fx.Node, fx.Node]:
    graph = halves.forward.graph
    assert planned.format is not None
    flat = node
    with graph.inserting_before(node.next):
        val = g.value(node)
        if val.dim() > 2 and not (val.dim() == 3 and planned.format.group[0] != 1):  # type: ignore[index]
            flat = g.emit(graph, aten.reshape.default, node, [-1, val.shape[-1]], like=node)
        data, scale = g.emit_pair(graph, ops.quantize.default, flat, planned.format.text, like=node)
    data._rename(f"{node.name}_q")
    scale._rename(f"{node.name}_s")
    for part in (data, scale):
        ctx.saved[part.name] = SavedValue(part.name, None, planned.why, planned.reason)
    return data, scale


def replace_crossing(
    halves: Halves, node: fx.Node, old: fx.Node, pair: tuple[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Put the pair where the value crossed, on both sides, so that the order stays the same."""
    _set_outputs(halves.forward.graph, node, pair, halves.num_fwd_outputs)
    graph = halves.backward.graph
    with graph.inserting_before(old):
        new = tuple(graph.placeholder(part.name) for part in pair)
    for placeholder, part in zip(new, pair):
        placeholder.meta["val"] = part.meta["val"]
    return new[0], new[1]


def read_existing(halves: Halves, node: fx.Node, pair: tuple[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node]:
    _set_outputs(halves.forward.graph, node, (), halves.num_fwd_outputs)
    by_name = {n.name: n for n in halves.backward.graph.find_nodes(op="placeholder")}
    return by_name[pair[0].name], by_name[pair[1].name]


def _set_outputs(graph: fx.Graph, old: fx.Node, new: tuple[fx.Node, ...], num_fwd_outputs: int) -> None:
    output = g.output_node(graph)
    outputs = list(output.args[0])  # type: ignore[arg-type]
    descriptions = list(output.meta["desc"]) if "desc" in output.meta else None
    index = outputs.index(old, num_fwd_outputs)
    outputs[index : index + 1] = new
    output.args = (tuple(outputs),)
    if descriptions is not None:
        descriptions[index : index + 1] = [descriptions[index]] * len(new)
        output.meta["desc"] = descriptions


def insert_dequantize(
    graph: fx.Graph,
    old: fx.Node,
    pair: tuple[fx.Node, fx.Node],
    fmt: Format,
    chain: list[fx.Node],
    forward_node: fx.Node,
) -> None:
    """Dequantize in front of the first use, then undo the reshapes that lay between the value and its pair."""
    first_user = min(old.users, default=None)
    if first_user is None:
        return
    like = first_user
    val = g.value(forward_node)
    cols = None
    if fmt.element is Element.E5M6:
        last = g.value(chain[-1]).shape[-1] if chain else val.shape[-1]
        cols = int(last) if isinstance(last, int) else None
    with graph.inserting_before(first_user):
        new = g.emit(graph, ops.dequantize.default, *pair, fmt.text, val.dtype, None, cols, like=like)
        for step in reversed(chain):
            new = _undo(graph, step, new, like)
        if not chain and val.dim() > 2 and g.value(new).dim() == 2:
            new = g.emit(graph, aten.view.default, new, _sizes(val, graph), like=like)
    old.replace_all_uses_with(new)


def _undo(graph: fx.Graph, step: fx.Node, new: fx.Node, like: fx.Node) -> fx.Node:
    """The inverse of one reshape, applied to `new`."""
    source = step.args[0]
    assert isinstance(source, fx.Node)
    before = g.value(source)
    if step.target is aten.transpose.int:
        return g.emit(graph, aten.transpose.int, new, *step.args[1:3], like=like)
    if step.target is aten.t.default:
        return g.emit(graph, aten.t.default, new, like=like)
    if step.target is aten.permute.default:
        dims = [int(d) for d in step.args[1]]  # type: ignore[union-attr, arg-type]
        inverse = [dims.index(i) for i in range(len(dims))]
        return g.emit(graph, aten.permute.default, new, inverse, like=like)
    if step.target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        return g.emit(graph, aten.reshape.default, new, _sizes(before, graph), like=like)
    return new  # clone, alias, detach


def _sizes(val: torch.Tensor, graph: fx.Graph) -> list[object]:
    """Sizes of a reshape: at most one symbolic size becomes -1; further ones are read from a node that holds them."""
    sizes: list[object] = []
    symbols = {str(n.meta["val"]): n for n in graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)}
    used_minus_one = False
    for size in val.shape:
        if isinstance(size, int):
            sizes.append(size)
        elif str(size) in symbols:
            sizes.append(symbols[str(size)])
        elif not used_minus_one:
            used_minus_one = True
            sizes.append(-1)
        else:
            raise AssertionError(f"two sizes of {val.shape} are unknown to backward")
    return sizes
