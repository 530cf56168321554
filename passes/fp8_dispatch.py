"""fp8-dispatch: quantize the token before it is sent to its experts, not each copy after.

Before:  %xg = aten.index(%x, [%rows])                             bf16[T, K] -> bf16[T * top_k, K]
         %q, %s = fp8c.quantize(%xg, 'e4m3[1x128] pow2')
After:   %q0, %s0 = fp8c.quantize(%x, 'e4m3[1x128] pow2')          once per token
         %q, %s = aten.index(%q0, [%rows]), aten.index(%s0, [%rows])

The same holds for `all_to_all_single` where the plan's `dispatch` (forward) or `combine_grad` (backward) payload is that
format: data (as bytes, which every transport takes) and scales are sent, and the BF16 collective is gone. Whatever else
reads the received value reads the payload: a 128x1 quantize becomes a requantize, anything else a dequantize.

Contract: exact in front of the payload's own readers. Rows are moved whole and groups lie within a row, so quantizing
commutes with moving rows. The experts' weight gradient then needs the token, not its top-k copies. Combine stays BF16:
nothing is quantized behind it.
Source:   DeepSeek-V3 (arXiv:2412.19437), section 3.3.3, low-precision communication.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from fp8c import graph as g
from fp8c.formats import Format
from fp8c.graph import aten
from fp8c.pass_manager import PassContext, PassResult
from fp8c.specs.plan import Value

ops = torch.ops.fp8c
c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Fp8Dispatch:
    name: ClassVar[str] = "fp8-dispatch"
    requires: ClassVar[frozenset[str]] = frozenset({"scales-paired"})
    ensures: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        assert ctx.plan is not None
        mover = Mover(graph, {which: ctx.plan.section(which, "payload") for which in ("dispatch", "combine_grad")})
        changed = 0
        work = list(g.calls(graph, {ops.quantize.default}))
        while work:
            moved = mover.move_before(work.pop(0))
            if moved is not None:
                changed += 1
                work.append(moved)
        changed += mover.read_payloads()
        changed += merge_equal_quantizes(graph) if changed else 0
        if changed:
            graph.eliminate_dead_code()
        return PassResult(graph, changed)


def merge_equal_quantizes(graph: fx.Graph) -> int:
    """A token that a shared expert reads as well is quantized once: the first quantize of a value serves them all."""
    first: dict[tuple[fx.Node, object, str], fx.Node] = {}
    merged = 0
    for node in g.calls(graph, {ops.quantize.default}):
        if len(node.args) > 2 or not node.users:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        root = g.strip(source, g.ROW_VIEWS)
        kept = first.setdefault((root, node.args[1], str(g.value(source).shape)), node)
        if kept is node:
            continue
        results = {n.args[1]: n for n in kept.users}
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
        merged += 1
    return merged


@dataclass
class Mover:
    """Moves quantizes in front of what moves their rows.

    payloads: the plan's payload formats by section
    pairs:    the quantized tokens, by token and format
    arrived:  for each mover passed, its rows as (data, scale, format)
    wires:    the collectives among them
    """

    graph: fx.Graph
    payloads: dict[str, Value | None]
    pairs: dict[tuple[fx.Node, str], tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    arrived: dict[fx.Node, tuple[fx.Node, fx.Node, str]] = field(default_factory=dict)
    wires: list[fx.Node] = field(default_factory=list)

    def move_before(self, quantize: fx.Node) -> fx.Node | None:
        """Move one quantize in front of the operator that moves its rows; None when there is none to pass."""
        moved, text = quantize.args[0], quantize.args[1]
        assert isinstance(moved, fx.Node) and isinstance(text, str)
        fmt = Format.parse(text)
        assert fmt.group is not None
        if fmt.group[0] != 1 or len(quantize.args) > 2 or not quantize.users:
            return None
        mover = behind_same_shape(moved)
        if not (is_row_gather(mover) or self.is_payload(mover, fmt)):
            return None
        source = tokens_of(mover)
        key = (source, text)
        if key not in self.pairs:
            with self.graph.inserting_before(g.after(source)):
                self.pairs[key] = g.emit_pair(self.graph, ops.quantize.default, source, text, like=quantize)
        data, scale = self.pairs[key]
        with self.graph.inserting_before(g.after(mover)):
            first, second = (_move_again(self.graph, mover, part, quantize) for part in (data, scale))
        for user in list(quantize.users):
            user.replace_all_uses_with(second if user.args[1] else first)
        self.arrived[mover] = (first, second, text)
        if is_all_to_all(mover) and mover not in self.wires:
            self.wires.append(mover)
        made = data.args[0]
        assert isinstance(made, fx.Node)
        return made

    def is_payload(self, mover: fx.Node, fmt: Format) -> bool:
        """Whether the plan sends this collective's rows in `fmt`."""
        section = "combine_grad" if g.is_backward(mover) else "dispatch"
        return is_all_to_all(mover) and self.payloads[section] == fmt

    def read_payloads(self) -> int:
        """Let everything behind a collective that now carries a payload read that; the BF16 collective goes."""
        changed = 0
        for quantize in g.calls(self.graph, {ops.quantize.default}) if self.wires else ():
            value = behind_same_shape(quantize.args[0])  # type: ignore[arg-type]
            if quantize.users and value in self.arrived and self.came_over_wire(value):
                self.requantize(quantize, *self.arrived[value])
                changed += 1
        if self.wires:
            self.graph.eliminate_dead_code()
        for wire in self.wires:
            data, scale, text = self.arrived[wire]
            sent = wire.args[0]
            assert isinstance(sent, fx.Node)
            read_sizes_of(sent, sent_payload(data))
            read_sizes_of(wire, data)
            if wire.users:
                with self.graph.inserting_before(g.after(max(data, scale))):
                    received = g.emit(
                        self.graph, ops.dequantize.default, data, scale, text, g.value(wire).dtype, like=wire
                    )
                wire.replace_all_uses_with(received)
            for node in (wire, sent):  # a collective is impure: dead code elimination leaves it
                self.graph.erase_node(node)
        return changed

    def came_over_wire(self, value: fx.Node) -> bool:
        while value in self.arrived:
            if value in self.wires:
                return True
            value = behind_same_shape(tokens_of(value))
        return False

    def requantize(self, quantize: fx.Node, data: fx.Node, scale: fx.Node, text: str) -> None:
        offs = quantize.args[2] if len(quantize.args) > 2 else None
        with self.graph.inserting_before(quantize):
            new = g.emit(
                self.graph, ops.requantize.default, data, scale, text, quantize.args[1], offs, None, like=quantize
            )
        quantize.replace_all_uses_with(new)
        self.graph.erase_node(quantize)


def behind_same_shape(node: fx.Node) -> fx.Node:
    """The node behind views that change nothing."""
    while g.is_call(node, g.RESHAPES) and isinstance(node.args[0], fx.Node):
        if not g.same_sizes(g.value(node.args[0]), g.value(node)):
            break
        node = node.args[0]
    return node


def is_row_gather(node: fx.Node) -> bool:
    """`x[rows]` for a matrix x and a vector of row numbers."""
    if g.is_call(node, {aten.index.Tensor}):
        indices = node.args[1]
        assert isinstance(indices, (list, tuple))
        only = indices[0] if len(indices) == 1 else None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return isinstance(only, fx.Node) and g.value(only).dim() == 1 and g.value(source).dim() == 2
    return g.is_call(node, {aten.index_select.default}) and bool(node.args[1] == 0)


def is_all_to_all(node: fx.Node) -> bool:
    if not g.is_call(node, {c10d.wait_tensor.default}):
        return False
    sent = node.args[0]
    return isinstance(sent, fx.Node) and g.is_call(sent, {c10d.all_to_all_single.default})


def tokens_of(mover: fx.Node) -> fx.Node:
    source = mover.args[0]
    assert isinstance(source, fx.Node)
    if is_all_to_all(mover):
        inner = source.args[0]
        assert isinstance(inner, fx.Node)
        return inner
    return source


def sent_payload(data: fx.Node) -> fx.Node:
    """The collective, not waited for, that a payload came with."""
    while not g.is_call(data, {c10d.all_to_all_single.default}):
        assert isinstance(data.args[0], fx.Node)
        data = data.args[0]
    return data


def read_sizes_of(node: fx.Node, same: fx.Node) -> None:
    """Let whatever asks for sizes of one node ask another of the same sizes."""
    for user in list(node.users):
        if g.is_call(user, {aten.sym_size.int}):
            user.replace_input_with(node, same)


def _move_again(graph: fx.Graph, mover: fx.Node, part: fx.Node, like: fx.Node) -> fx.Node:
    """The mover applied to a payload or its scales."""
    if not is_all_to_all(mover):
        return g.emit(graph, mover.target, part, *mover.args[1:], like=like)  # type: ignore[arg-type]
    sent = mover.args[0]
    assert isinstance(sent, fx.Node)
    dtype = g.value(part).dtype
    as_bytes = dtype.itemsize == 1 and dtype is not torch.uint8
    # In front of whoever asks for the sizes of what is sent before waiting for it.
    asking = [user for user in sent.users if user is not mover]
    with graph.inserting_before(min(asking)) if asking else contextlib.nullcontext():
        if g.value(part).stride()[-1:] != (1,):  # scales may be stored with their rows innermost; collectives take rows
            part = g.emit(graph, aten.clone.default, part, memory_format=torch.contiguous_format, like=like)
        if as_bytes:  # gloo refuses float8
            part = g.emit(graph, aten.view.dtype, part, torch.uint8, like=like)
        wire = g.emit(graph, c10d.all_to_all_single.default, part, *sent.args[1:], like=like)
    arrived = g.emit(graph, c10d.wait_tensor.default, wire, like=like)
    return g.emit(graph, aten.view.dtype, arrived, dtype, like=like) if as_bytes else arrived
