"""fuse-casts: let one kernel read a value once for everything that is quantized from it.

Before:  %q, %s   = fp8c.quantize(%dy, 'e4m3[1x128] fp32')             dy: bf16[T, N]
         %qt, %st = fp8c.quantize(%dy, 'e4m3[128x1] fp32', %offs)
After:   %q, %s, %qt, %st = fp8c.quantize_both(%dy, 'e4m3[1x128] fp32', 'e4m3[128x1] fp32', %offs)

Before:  %q, %s = fp8c.quantize(%w, 'e4m3[128x128] fp32')              w: bf16[N, K]
         %qt    = aten.permute(%q, [1, 0])                             a view: dgrad's GEMM would copy it
After:   %q, %qt, %s = fp8c.quantize_weight(%w, 'e4m3[128x128] fp32')  or quantize_transposed, where %q has no reader

Before:  %qr, %sr = aten.index(%q, [%rows]), aten.index(%s, [%rows])
         %qt, %st = fp8c.requantize(%qr, %sr, ..., %offs)
After:   %qt, %st = fp8c.gather_requantized(%q, %s, %rows, ..., %offs) or gather_quantized in front of a GEMM

Before:  %qt, %st = fp8c.quantize(aten.index(%x, [%rows]), 'e4m3[128x1] pow2', %offs)
After:   %qt, %st = fp8c.gather_quantize(%x, %rows, 'e4m3[128x1] pow2', %offs)

Before:  %qt, %st = fp8c.requantize(%q, %s, 'e5m6[1x128] pow2', 'e4m3[128x1] pow2')   attention's output, for wgrad
         %x = fp8c.dequantize(%q, %s, 'e5m6[1x128] pow2', bfloat16)                 and for attention's own backward
After:   %x = fp8c.dequantize(...);  %qt, %st = fp8c.quantize(%x, 'e4m3[128x1] pow2')

Quantizes around a SwiGLU join it: `fuse_swiglu.py`; a quantize behind an RMSNorm joins that: `fuse_norm.py`.

Contract: exact: every fused operator is defined as what it replaces (a norm's FP32 sum may be taken in another order). Only operators that the backend has
(`PassContext.fusions`). Results keep their names, so what crosses to backward stays what choose-saved listed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fp8c import graph as g
from fp8c.formats import Element, Format, ScaleKind
from fp8c.graph import aten
from fp8c.ops import fused
from fp8c.partition import Halves
from fp8c.pass_manager import PassContext
from fp8c.passes.fuse_norm import fuse_norms
from fp8c.passes.fuse_swiglu import fuse_backward, fuse_forward

ops = torch.ops.fp8c
QUANTIZE = ops.quantize.default


@dataclass(frozen=True)
class FuseCasts:
    name: ClassVar[str] = "fuse-casts"
    requires: ClassVar[frozenset[str]] = frozenset({"saved-chosen"})
    ensures: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, halves: Halves, ctx: PassContext) -> int:
        """Edit both halves in place; return the number of fused operators."""
        changed = 0
        for half in (halves.forward, halves.backward):
            count = sum(rewrite(half.graph, ctx.fusions) for rewrite in REWRITES)
            if count:
                half.graph.eliminate_dead_code()
                half.graph.lint()
                half.recompile()
            changed += count
        return changed


def read_both_ways(graph: fx.Graph, fusions: frozenset[str]) -> int:
    """Quantizes of one value along its rows and along its columns."""
    if "quantize_both" not in fusions:
        return 0
    by_value: dict[tuple[fx.Node, str], list[fx.Node]] = {}
    for node in g.calls(graph, {QUANTIZE}):
        source = argument(node, 0)
        by_value.setdefault((g.strip(source, g.ROW_VIEWS), str(g.value(source).shape)), []).append(node)
    count = 0
    for nodes in by_value.values():
        rows = [n for n in nodes if format_of(n).group == (1, 128)]
        columns = [n for n in nodes if format_of(n).group == (128, 1)]
        for row, column in zip(rows, columns):
            count += join_pair(graph, row, column)
    return count


def join_pair(graph: fx.Graph, row: fx.Node, column: fx.Node) -> int:
    first = min(row, column)
    offs = column.args[2] if len(column.args) > 2 else None
    if isinstance(offs, fx.Node) and not offs < first:
        return 0
    with graph.inserting_before(first):
        arguments = (argument(first, 0), row.args[1], column.args[1], *(() if offs is None else (offs,)))
        both = g.emit(graph, fused.QUANTIZE_BOTH, *arguments, like=first)
    take_results(both, row, {0: 0, 1: 1})
    take_results(both, column, {0: 2, 1: 3})
    return 1


def store_weights_transposed(graph: fx.Graph, fusions: frozenset[str]) -> int:
    """Weights in blocks whose data a GEMM reads transposed."""
    count = 0
    for node in g.calls(graph, {QUANTIZE}):
        fmt = format_of(node)
        data = result(node, 0)
        if data is None or fmt.group != (128, 128) or len(node.args) > 2:
            continue
        turned = [u for u in data.users if g.is_call(u, g.TRANSPOSES) and g.swaps_last_two(u)]
        name = "quantize_transposed" if len(turned) == len(data.users) else "quantize_weight"
        if not turned or name not in fusions:
            continue
        target = getattr(ops, name).default
        with graph.inserting_before(node):
            new = g.emit(graph, target, *node.args, like=node)
        is_both = target is fused.QUANTIZE_WEIGHT
        for permute in turned:
            take(permute, new, 1 if is_both else 0)
        take_results(new, node, {0: 0, 1: 2} if is_both else {1: 1})
        count += 1
    return count


def gather_pairs(graph: fx.Graph, fusions: frozenset[str]) -> int:
    """Rows of a pair, gathered in front of a GEMM or of a requantize."""
    count = 0
    for node in g.calls(graph, {ops.scaled_grouped_mm.default, ops.scaled_mm.default}):
        count += gather_operand(graph, node) if "gather_quantized" in fusions else 0
    for node in g.calls(graph, {ops.requantize.default}):
        count += gather_requantized(graph, node) if "gather_requantized" in fusions else 0
    return count


def gather_operand(graph: fx.Graph, gemm: fx.Node) -> int:
    data, scale = argument(gemm, 0), argument(gemm, 1)
    found = gathered(data, scale)
    if found is None:
        return 0
    first = min(data, scale)
    source, source_scale, rows = found
    if not (source < first and source_scale < first):
        return 0
    text = gemm.args[5 if gemm.target is ops.scaled_grouped_mm.default else 4]
    with graph.inserting_before(first):
        new = g.emit(graph, fused.GATHER_QUANTIZED, source, source_scale, rows, text, like=first)
    take(data, new, 0)
    take(scale, new, 1)
    return 1


def gather_requantized(graph: fx.Graph, node: fx.Node) -> int:
    found = gathered(argument(node, 0), argument(node, 1))
    source_text, target_text = str(node.args[2]), str(node.args[3])
    if found is None or Format.parse(target_text).group != (128, 1) or any(a is not None for a in node.args[5:]):
        return 0
    offs = (node.args[4],) if len(node.args) > 4 and node.args[4] is not None else ()
    with graph.inserting_before(node):
        new = g.emit(graph, fused.GATHER_REQUANTIZED, *found, source_text, target_text, *offs, like=node)
    take_results(new, node, {0: 0, 1: 1})
    return 1


def gather_and_quantize(graph: fx.Graph, fusions: frozenset[str]) -> int:
    """Gathered rows that are only quantized along the columns."""
    if "gather_quantize" not in fusions:
        return 0
    count = 0
    for node in g.calls(graph, {QUANTIZE}):
        moved = argument(node, 0)
        rows = row_numbers(moved)
        if rows is None or format_of(node).group != (128, 1) or len(moved.users) != 1:
            continue
        with graph.inserting_before(node):
            new = g.emit(graph, fused.GATHER_QUANTIZE, argument(moved, 0), rows, *node.args[1:], like=node)
        take_results(new, node, {0: 0, 1: 1})
        count += 1
    return count


def quantize_what_was_unpacked(graph: fx.Graph, fusions: frozenset[str]) -> int:
    """Requantizes of 12-bit codes whose values are made in BF16 as well: read those, which need no unpacking.

    The values are the same: seven significant bits times a power of two. BF16 has eight and FP32's exponents, and what was
    quantized was BF16, so nothing is below its smallest number.
    """
    if not fusions:  # nothing is gained where both are the plain form
        return 0
    unpacked: dict[tuple[Any, ...], fx.Node] = {}
    for node in g.calls(graph, {ops.dequantize.default}):
        if node.args[3] is torch.bfloat16 and fits_bf16(Format.parse(str(node.args[2]))):
            unpacked.setdefault(node.args[:3], node)
    count = 0
    for node in g.calls(graph, {ops.requantize.default}):
        values, target = unpacked.get(node.args[:3]), Format.parse(str(node.args[3]))
        if values is None or target.group != (128, 1):
            continue
        if node < values:
            node.prepend(values)  # the requantize reads what it reads
        offs = [a for a in node.args[4:5] if a is not None]
        with graph.inserting_before(node):
            new = g.emit(graph, QUANTIZE, values, target.text, *offs, like=node)
        take_results(new, node, {0: 0, 1: 1})
        count += 1
    return count


def fits_bf16(fmt: Format) -> bool:
    return fmt.element is Element.E5M6 and fmt.scale in (ScaleKind.POW2, ScaleKind.E8M0)


REWRITES: tuple[Callable[[fx.Graph, frozenset[str]], int], ...] = (
    fuse_forward,
    fuse_backward,
    fuse_norms,
    gather_and_quantize,
    read_both_ways,
    store_weights_transposed,
    gather_pairs,
    quantize_what_was_unpacked,
)


# Reading and editing --------------------------------------------------------------------------------------------------


def argument(node: fx.Node, index: int) -> fx.Node:
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def format_of(quantize: fx.Node) -> Format:
    return Format.parse(str(quantize.args[1]))


def result(node: fx.Node, index: int) -> fx.Node | None:
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == index), None)


def gathered(data: fx.Node, scale: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(data, scale, rows) behind a pair whose rows were gathered by the same row numbers."""
    rows = row_numbers(data)
    if rows is None or row_numbers(scale) is not rows:
        return None
    return argument(data, 0), argument(scale, 0), rows


def row_numbers(node: fx.Node) -> fx.Node | None:
    """The vector `rows` of `x[rows]`, for a matrix x."""
    if g.is_call(node, {aten.index_select.default}) and node.args[1] == 0:
        return argument(node, 2)
    if not g.is_call(node, {aten.index.Tensor}) or g.value(argument(node, 0)).dim() != 2:
        return None
    indices = node.args[1]
    only = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    is_rows = (
        isinstance(only, fx.Node) and g.value(only).dim() == 1 and g.value(only).dtype in (torch.int64, torch.int32)
    )
    return only if is_rows else None  # type: ignore[return-value]


def take_results(new: fx.Node, old: fx.Node, results: dict[int, int]) -> None:
    """Let the results of `old` come from `new`, by index, and erase `old`."""
    for user in list(old.users):
        assert user.target is operator.getitem
        if user.args[1] in results:
            take(user, new, results[user.args[1]])  # type: ignore[index]
    unused: Iterable[Any] = list(old.users)
    for user in unused:  # data that only its own transposes read, and they moved
        assert not user.users
        old.graph.erase_node(user)
    old.graph.erase_node(old)


def take(node: fx.Node, new: fx.Node, index: int) -> None:
    """Make `node` the result `index` of `new`, under its own name."""
    node.target, node.args, node.kwargs = operator.getitem, (new, index), {}
    node.meta["val"] = g.value(new)[index]
