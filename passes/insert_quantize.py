"""insert-quantize: put a quantize in front of every GEMM operand the plan marks, and read it with a scaled GEMM.

Before:  %y  = aten.mm(%x, %wT)                                 x: bf16[T, K]   w: bf16[N, K]   y: bf16[T, N]
         %dx = aten.mm(%dy, %w)
         %dw = aten.mm(%dyT, %x)
After:   %xq, %xs = fp8c.quantize(%x, 'e4m3[1x128] fp32')        e4m3[T, K], f32[T, K/128]
         %wq, %ws = fp8c.quantize(%w, 'e4m3[128x128] fp32')      e4m3[N, K], f32[N/128, K/128]
         %y  = fp8c.scaled_mm(%xq, %xs, %wq, %ws, ...)           bf16[T, N]
         %dx = fp8c.scaled_mm(%dyq, %dys, %wqT, %wsT, ...)       the same quantized weight, read transposed
         %dw = fp8c.scaled_mm(%dyqT, %dysT, %xqT, %xsT, ...)     both quantized again in 128x1 groups along tokens
Delayed: %xq, %xs = fp8c.quantize_delayed(%x, 'e4m3[tensor] fp32', history, algo, margin, 'up fprop 0', False)

Contract: a value is quantized once per format however many GEMMs read it; every GEMM the plan quantizes is rewritten or
the pass fails. Grouped GEMMs keep their offsets, and groups along tokens restart at each expert's first row.
Source:   DeepSeek-V3 (arXiv:2412.19437), sections 3.3.1 and 3.3.2.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from fp8c import graph as g
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode
from fp8c.formats import Format
from fp8c.graph import aten
from fp8c.pass_manager import PassContext, PassResult
from fp8c.passes.assign_roles import GemmRole, activation_of
from fp8c.specs.plan import GemmFormats

ops = torch.ops.fp8c


@dataclass(frozen=True)
class InsertQuantize:
    name: ClassVar[str] = "insert-quantize"
    requires: ClassVar[frozenset[str]] = frozenset({"roles"})
    ensures: ClassVar[frozenset[str]] = frozenset({"scales-paired", "gemms-as-planned"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        assert ctx.plan is not None
        quantizer = Quantizer(graph, g.gradients(graph), training=ctx.training)
        problems: list[Diagnostic] = []
        changed = 0
        weights: dict[str, fx.Node] = {}  # the forward's weight operand by use: its dgrad reads the same one
        for node in g.calls(graph, g.GEMMS):
            role = node.meta.get(g.ROLE)
            if not isinstance(role, GemmRole) or not role.gemm:
                continue
            if role.gemm == "fprop":
                weights[role.use] = weight_operand(node)
            plan = ctx.plan.uses[role.use]
            formats = plan.gemm(role.gemm)
            if not formats.is_fp8:
                continue
            problem = check_operands(node)
            if problem is not None:
                problems.append(problem)
                continue
            with graph.inserting_before(node):
                new = rewrite_gemm(quantizer, node, role.gemm, weights[role.use], formats)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            changed += 1
        if problems:
            raise DiagnosticError(problems, ExitCode.MODEL)
        if changed:
            graph.eliminate_dead_code()
        return PassResult(graph, changed)


def quantized_value(pair: tuple[fx.Node, fx.Node]) -> fx.Node:
    """What a pair was quantized from."""
    made = pair[0].args[0]
    assert isinstance(made, fx.Node) and isinstance(made.args[0], fx.Node)
    return made.args[0]


@dataclass
class Quantizer:
    """Quantizes values, each once per format: the pairs already made, keyed by the value behind row-keeping views."""

    graph: fx.Graph
    gradients: set[fx.Node] = field(default_factory=set)
    pairs: dict[tuple[fx.Node, str, int, fx.Node | None], tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    training: bool = True
    sites: Counter[str] = field(default_factory=Counter)

    def quantize(self, x: fx.Node, fmt: Format, like: fx.Node, offs: fx.Node | None = None) -> tuple[fx.Node, fx.Node]:
        """(data, scale) of x. `offs` matters only where groups run along the rows and must restart per expert."""
        assert fmt.group is not None
        if fmt.group[0] == 1:
            offs = None
        source = g.strip(x, g.ROW_VIEWS)
        key = (source, fmt.text, g.value(x).dim(), offs)
        pair = self.pairs.get(key)
        if pair is None or not g.same_sizes(g.value(quantized_value(pair)), g.value(x)):
            pair = self._delayed(x, fmt, like) if fmt.delayed is not None else self._online(x, fmt, like, offs)
            self.pairs[key] = pair
        return pair

    def _online(self, x: fx.Node, fmt: Format, like: fx.Node, offs: fx.Node | None) -> tuple[fx.Node, fx.Node]:
        arguments = (x, fmt.text) if offs is None else (x, fmt.text, offs)
        return g.emit_pair(self.graph, ops.quantize.default, *arguments, like=like)

    def _delayed(self, x: fx.Node, fmt: Format, like: fx.Node) -> tuple[fx.Node, fx.Node]:
        """A site is named after the GEMM that first reads the value; evaluation replays and notes nothing."""
        assert fmt.delayed is not None
        role = like.meta.get(g.ROLE)
        gemm = f"{role.use} {role.gemm}" if isinstance(role, GemmRole) else like.name
        site = f"{gemm} {self.sites[gemm]}"
        self.sites[gemm] += 1
        how = (fmt.delayed.history, fmt.delayed.algo, fmt.delayed.margin)
        arguments = (x, fmt.online.text, *how, site, not self.training)
        return g.emit_pair(self.graph, ops.quantize_delayed.default, *arguments, like=like)

    def transposed(self, pair: tuple[fx.Node, fx.Node], like: fx.Node) -> tuple[fx.Node, fx.Node]:
        data, scale = pair
        return g.transpose_last_two(self.graph, data, like), g.transpose_last_two(self.graph, scale, like)


def check_operands(node: fx.Node) -> Diagnostic | None:
    """A GEMM the plan quantizes must have floating operands of at most 32 bits."""
    dtype = g.value(node).dtype
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return Diagnostic(
        "E0831",
        f"a {dtype} GEMM cannot be quantized".replace("torch.", ""),
        g.source_span(node),
        help="keep it with `precision = bf16` in a rule, or run the model in BF16",
    )


def weight_operand(forward: fx.Node) -> fx.Node:
    operand = forward.args[2] if forward.target is aten.addmm.default else forward.args[1]
    assert isinstance(operand, fx.Node)
    return operand


def weight_pair(q: Quantizer, operand: fx.Node, fmt: Format, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The weight as [.., N, K], quantized in the orientation it is stored in: one quantize serves fprop and dgrad."""
    weight, is_transposed = g.behind_transposes(operand, casts=True)  # the operand is [.., K, N]
    if is_transposed:
        return q.quantize(weight, fmt, like)
    return q.transposed(q.quantize(weight, fmt.transposed, like), like)


def rewrite_gemm(q: Quantizer, node: fx.Node, which: str, weight: fx.Node, formats: GemmFormats) -> fx.Node:
    offs = node.args[2] if node.target is aten._grouped_mm.default else None
    assert offs is None or isinstance(offs, fx.Node)
    match which:
        case "fprop":
            a = q.quantize(activation_of(node), formats.a, node)
            b = weight_pair(q, weight, formats.b, node)
            new = scaled(q.graph, node, a, formats.a, b, formats.b, formats, offs)
            return add_bias(q.graph, node, new)
        case "dgrad":
            dy = activation_of(node)
            a = q.quantize(dy, formats.a, node)
            b = q.transposed(weight_pair(q, weight, formats.b, node), node)
            return scaled(q.graph, node, a, formats.a, b, formats.b.transposed, formats, offs)
        case _:
            return rewrite_wgrad(q, node, formats, offs)


def rewrite_wgrad(q: Quantizer, node: fx.Node, formats: GemmFormats, offs: fx.Node | None) -> fx.Node:
    """dW = dY^T X, or X^T dY where the weight is stored [K, N]; formats are (x, dy) relative to [T, ...]."""
    left, right = node.args[0], node.args[1]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    rows, odd = g.behind_transposes(left)
    if not odd:  # X^T or dY^T that arrives as a copy: transpose back, the permutes cancel
        rows = g.transpose_last_two(q.graph, left, node)
    x_first = rows not in q.gradients
    left_format, right_format = (formats.a, formats.b) if x_first else (formats.b, formats.a)
    a = q.transposed(q.quantize(rows, left_format, node, offs), node)
    b = q.transposed(q.quantize(right, right_format, node, offs), node)
    return scaled(q.graph, node, a, left_format.transposed, b, right_format.transposed, formats, offs, wgrad=True)


def scaled(
    graph: fx.Graph,
    node: fx.Node,
    a: tuple[fx.Node, fx.Node],
    a_format: Format,
    b: tuple[fx.Node, fx.Node],
    b_format: Format,
    formats: GemmFormats,
    offs: fx.Node | None,
    wgrad: bool = False,
) -> fx.Node:
    out_dtype = g.value(node).dtype
    tail = (a_format.online.text, b_format.online.text, formats.promote_every, out_dtype)
    if offs is None:
        return g.emit(graph, ops.scaled_mm.default, *a, *b, *tail, like=node)
    target = ops.scaled_grouped_wgrad.default if wgrad else ops.scaled_grouped_mm.default
    return g.emit(graph, target, *a, *b, offs, *tail, like=node)


def add_bias(graph: fx.Graph, node: fx.Node, new: fx.Node) -> fx.Node:
    if node.target is aten.addmm.default:
        return g.emit(graph, aten.add.Tensor, new, node.args[0], like=node)
    return new
