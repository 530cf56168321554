"""Invariants of the graph: each a function from a graph to diagnostics, named after what it guarantees.

The types of quantized values are derived again from the operators that made them, never read from metadata. A type
follows its value through transposes, row gathers and collectives; a scale that took another way than its data is found.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

import fp8c.ops  # noqa: F401  (defines the operators)
from fp8c import graph as g
from fp8c.diagnostics import Diagnostic
from fp8c.formats import Format
from fp8c.graph import aten
from fp8c.ops import fused
from fp8c.ops.head_loss import LINEAR_CROSS_ENTROPY, gemms_of
from fp8c.partition import Halves
from fp8c.pass_manager import Invariant, PassContext
from fp8c.roles import Op

ops = torch.ops.fp8c
c10d = torch.ops._c10d_functional

SCALED = {
    ops.scaled_mm.default: 4,  # index of a_fmt among the arguments
    ops.scaled_grouped_mm.default: 5,
    ops.scaled_grouped_wgrad.default: 5,
}
SCALED_ADD = {ops.scaled_mm_add_.default: 5, ops.scaled_grouped_wgrad_add_.default: 6}  # an accumulator, then a
_FORMAT_INDEX = SCALED | SCALED_ADD
_GATHERS = frozenset({aten.index.Tensor, aten.index_select.default})
#: What leaves rows, columns and values as they are.
_WIRE = frozenset({c10d.wait_tensor.default, aten.view.dtype, aten.alias.default, aten.clone.default})
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class QuantizedType:
    """What a node holds: `part` "data" or "scale" of a value in `format`, made by `origin`, moved by `moves`."""

    format: Format
    part: str
    origin: str
    moves: tuple[str, ...] = ()


def quantized_types(graph: fx.Graph, seeds: Mapping[str, QuantizedType] | None = None) -> dict[fx.Node, QuantizedType]:
    """Types of all quantized values; `seeds` gives those of a backward half's inputs, by name."""
    types: dict[fx.Node, QuantizedType] = {}
    for node in graph.nodes:
        derived = _derive(node, types, seeds or {})
        if derived is not None:
            types[node] = derived
    return types


def _derive(
    node: fx.Node, types: dict[fx.Node, QuantizedType], seeds: Mapping[str, QuantizedType]
) -> QuantizedType | None:
    if node.op == "placeholder":
        return seeds.get(node.name)
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target is operator.getitem and source.target in fused.MAKES:
        return _made(source, fused.MAKES[source.target][_index(node)])
    if node.target is operator.getitem and source.target is fused.GATHER_QUANTIZED:
        moved = types.get(source.args[_index(node)])  # type: ignore[arg-type]
        numbers = source.args[2]
        assert isinstance(numbers, fx.Node)
        return None if moved is None else replace(moved, moves=(*moved.moves, f"rows {numbers.name}"))
    known = types.get(source)
    if known is None:
        return None
    if node.target in g.TRANSPOSES and g.swaps_last_two(node):
        moves = known.moves[:-1] if known.moves[-1:] == ("transposed",) else (*known.moves, "transposed")
        return replace(known, format=known.format.transposed, moves=moves)
    if node.target in _GATHERS:
        rows = [n.name for n in node.all_input_nodes if n is not source]
        return replace(known, moves=(*known.moves, f"rows {' '.join(rows)}"))
    if node.target is c10d.all_to_all_single.default:
        return replace(known, moves=(*known.moves, f"sent {node.args[1:]}"))
    if node.target in _WIRE:
        return known
    return None


def _index(getitem: fx.Node) -> int:
    index = getitem.args[1]
    assert isinstance(index, int)
    return index


def _made(source: fx.Node, made: fused.Made | None) -> QuantizedType | None:
    if made is None:
        return None
    fmt = Format.parse(str(source.args[made.format]))
    origin = f"{source.name}.{made.pair}" if made.pair else source.name
    if made.is_transposed:
        return QuantizedType(fmt.transposed, made.part, origin, ("transposed",))
    return QuantizedType(fmt, made.part, origin)


def _at(code: str, message: str, node: fx.Node, help: str = "") -> Diagnostic:
    """A broken invariant, with the nodes around it."""
    around: list[str] = []
    current = node
    for _ in range(3):
        current = current.prev
    for _ in range(7):
        if current.op not in ("root",):
            mark = ">" if current is node else " "
            around.append(f"{mark} {g.node_text(current, provenance=False)}")
        current = current.next
    return Diagnostic(code, message, g.source_span(node), notes=tuple(around), help=help)


def scales_paired(
    graph: fx.Graph, ctx: PassContext, seeds: Mapping[str, QuantizedType] | None = None
) -> list[Diagnostic]:
    """Every FP8 value reaches its consumer together with the scale it was quantized with, in the format stated there."""
    types = quantized_types(graph, seeds)
    found: list[Diagnostic] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _FORMAT_INDEX:
            operands, formats = int(node.target in SCALED_ADD), _FORMAT_INDEX[node.target]
            for i, operand in enumerate("ab"):
                data, scale = node.args[operands + 2 * i : operands + 2 * i + 2]
                found += _check_pair(node, data, scale, str(node.args[formats + i]), types, operand)
        elif node.target in fused.READS:
            first, fmt = fused.READS[node.target]
            found += _check_pair(node, node.args[first], node.args[first + 1], str(node.args[fmt]), types, "q")
    return found


def _check_pair(
    node: fx.Node, data: object, scale: object, text: str, types: dict[fx.Node, QuantizedType], operand: str
) -> list[Diagnostic]:
    assert isinstance(data, fx.Node) and isinstance(scale, fx.Node)
    d, s = types.get(data), types.get(scale)
    if d is None or d.part != "data":
        return [_at("E0706", f"operand {operand} of %{node.name}: %{data.name} is no quantized value", node)]
    if s is None or s.part != "scale" or s.origin != d.origin or s.moves != d.moves:
        return [
            _at("E0706", f"operand {operand} of %{node.name}: %{scale.name} is not the scale of %{data.name}", node)
        ]
    if d.format != Format.parse(text):
        return [
            _at("E0707", f"operand {operand} of %{node.name} is {d.format.text}, but the operator expects {text}", node)
        ]
    return []


def groups_on_reduction_axis(graph: fx.Graph, ctx: PassContext) -> list[Diagnostic]:
    """A GEMM operand's groups run along the reduction axis, or are blocks, or cover whole rows or the tensor."""
    found = []
    for node in g.calls(graph, _FORMAT_INDEX):
        for i in range(2):
            fmt = Format.parse(str(node.args[_FORMAT_INDEX[node.target] + i]))  # type: ignore[index]
            assert fmt.group is not None
            if fmt.group[1] == 1:
                found.append(
                    _at("E0708", f"operand {'ab'[i]} of %{node.name} has groups {fmt.group_text} across K", node)
                )
    return found


_FP8_CONSUMERS = (
    frozenset(_FORMAT_INDEX)
    | frozenset(fused.READS)
    | {operator.getitem, aten.permute.default, aten.t.default}
    | _GATHERS
    | _WIRE
)


def fp8_never_accumulates(graph: fx.Graph, ctx: PassContext) -> list[Diagnostic]:
    """FP8 data is read by scaled GEMMs, conversions and data movement; no arithmetic is done in FP8."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target in _FP8_CONSUMERS:
            continue
        for source in node.all_input_nodes:
            val = source.meta.get("val")
            if isinstance(val, torch.Tensor) and val.dtype in FP8:
                found.append(_at("E0709", f"%{node.name} computes with FP8 data %{source.name}", node))
    return found


def gemms_as_planned(graph: fx.Graph, ctx: PassContext) -> list[Diagnostic]:
    """A GEMM is scaled exactly where the plan quantizes it: nothing stays BF16 silently, nothing kept is quantized."""
    if ctx.plan is None:
        return []
    found = []
    for node in graph.nodes:
        role = node.meta.get(g.ROLE)
        if role is None or not role.gemm or node.target not in (*g.GEMMS, *SCALED):
            continue
        planned = ctx.plan.uses[role.use].gemm(role.gemm).is_fp8
        if planned != (node.target in SCALED):
            state = "is not quantized, but the plan says FP8" if planned else "is quantized, but the plan keeps it"
            found.append(_at("E0703", f"{role.gemm} of {role.use} {state}", node))
    return found


def well_typed(graph: fx.Graph, ctx: PassContext) -> list[Diagnostic]:
    """Shape and dtype of every fp8c operator's result, derived again from its operands, agree with the metadata."""
    found = []
    known: dict[tuple[object, ...], str] = {}  # layers repeat: each kind of call is derived once
    for node in graph.nodes:
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "fp8c":
            continue
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: g.type_text(n.meta.get("val")))
        key = (target, str(arguments))
        if key not in known:
            known[key] = g.type_text(g.fake_call(target, node.args, node.kwargs))
        derived, stated = known[key], g.type_text(node.meta.get("val"))
        if derived != stated:
            found.append(_at("E0710", f"%{node.name} is {derived}, but its metadata says {stated}", node))
    return found


def gemms_complete(graph: fx.Graph, ctx: PassContext) -> list[Diagnostic]:
    """Every forward GEMM has its dgrad and its wgrad, or a reason why not."""
    count: dict[tuple[str, str], int] = {}
    for node in graph.nodes:
        role = node.meta.get(g.ROLE)
        if role is not None and role.gemm and node.target in (*g.GEMMS, *SCALED):
            count[role.use, role.gemm] = count.get((role.use, role.gemm), 0) + 1
        elif role is not None and node.target is LINEAR_CROSS_ENTROPY:
            count.update({(role.use, which): count.get((role.use, which), 0) + 1 for which in gemms_of(node.args)})
    found = []
    for use in ctx.uses.values():
        if use.op not in (Op.LINEAR, Op.GROUPED_MM):
            continue
        expected = {"fprop": 1, "dgrad": 0 if use.no_dgrad else 1, "wgrad": 0 if use.no_wgrad else 1}
        for which, number in expected.items():
            if count.get((use.key, which), 0) != number:
                found.append(
                    Diagnostic(
                        "E0711",
                        f"{use.key} has {count.get((use.key, which), 0)} {which} GEMMs, expected {number}",
                        use.source,
                    )
                )
    return found


def saved_is_planned(halves: Halves, ctx: PassContext) -> list[Diagnostic]:
    """What crosses from forward to backward is what choose-saved listed, and quantized values cross with their scale."""
    found = []
    crossing = {n.name for n in halves.saved()}
    types = quantized_types(halves.forward.graph)
    by_pair: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for node in halves.saved():
        if node.op == "placeholder" or isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat)):
            continue
        if node.name not in ctx.saved:
            found.append(_at("E0712", f"%{node.name} crosses to backward, but the plan does not say so", node))
        if node in types:
            by_pair.setdefault((types[node].origin, types[node].moves), set()).add(types[node].part)
    for (origin, _), parts in by_pair.items():
        if parts != {"data", "scale"}:
            found.append(
                Diagnostic("E0706", f"%{origin} crosses to backward without its {({'data', 'scale'} - parts).pop()}")
            )
    seeds = {n.name: types[n] for n in halves.saved() if n in types and n.name in crossing}
    found += scales_paired(halves.backward.graph, ctx, seeds)
    return found


INVARIANTS: dict[str, tuple[Invariant, ...]] = {
    "always": (),
    "roles": (gemms_complete,),
    "scales-paired": (scales_paired, groups_on_reduction_axis, fp8_never_accumulates, well_typed),
    "gemms-as-planned": (gemms_as_planned,),
}
HALF_INVARIANTS: tuple[Invariant, ...] = (groups_on_reduction_axis, fp8_never_accumulates, well_typed, gemms_as_planned)
