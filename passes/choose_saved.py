"""choose-saved: decide what crosses from forward to backward, in which format, and what backward computes again.

Before:  nothing said; a default min-cut would keep BF16 activations
After:   the context lists every saved value with its format and reason:
           %xq, %xs                     as they are     cache x of model.layers.1.mlp.experts.gate_up_proj
           %_grouped_mm                 e4m3[1x128]     cache gate, up of model.layers.1.mlp.experts:swiglu
           %getitem_9 (attention out)   e5m6[1x128]     cache x of model.layers.1.self_attn.o_proj
         everything else backward needs is computed again from those, or saved where that is cheaper

Contract: what the plan says about caches and recompute is obeyed. The rest is a minimum cut by bytes over the forward
values backward needs, cut as late as possible (the least recomputation among equals). GEMMs, attention, sorts, random
numbers and collectives are never computed twice unless the plan says so. The graph is not changed.
Source:   DeepSeek-V3 (arXiv:2412.19437), sections 3.2.3 and 3.3.3; ownership instead of name lists.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import ClassVar

import networkx as nx
import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from fp8c import graph as g
from fp8c.diagnostics import DiagnosticError, fail
from fp8c.formats import Element, Format
from fp8c.graph import aten
from fp8c.ops.head_loss import LINEAR_CROSS_ENTROPY
from fp8c.pass_manager import PassContext, PassResult, SavedValue
from fp8c.passes.assign_roles import GemmRole
from fp8c.roles import Op
from fp8c.saved import storage_root
from fp8c.specs.plan import UsePlan

ops = torch.ops.fp8c

SCALED_GEMMS = frozenset({ops.scaled_mm.default, ops.scaled_grouped_mm.default, ops.scaled_grouped_wgrad.default})
#: Too expensive to compute twice.
NEVER_TWICE = (
    g.GEMMS
    | SCALED_GEMMS
    | {LINEAR_CROSS_ENTROPY, ops.attention.default, aten.topk.default, aten.sort.default, aten.sort.stable}
)


@dataclass(frozen=True)
class ChooseSaved:
    name: ClassVar[str] = "choose-saved"
    requires: ClassVar[frozenset[str]] = frozenset({"roles"})
    ensures: ClassVar[frozenset[str]] = frozenset({"saved-chosen"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        policy = read_policy(graph, ctx)
        chosen = dict(policy.must_save)
        for node in minimum_cut(graph, ctx, policy):
            chosen.setdefault(node, SavedValue(node.name, None, "cheapest value backward can be computed from"))
        ctx.saved.clear()
        ctx.saved.update({node.name: saved for node, saved in chosen.items()})
        return PassResult(graph, 0)


@dataclass
class Policy:
    """What the plan says: values to save (and how), values never to save, GEMMs to compute again.

    region_outputs: what leaves a checkpointed region: what lies behind it starts from there, not from the region's inputs
    """

    must_save: dict[fx.Node, SavedValue] = field(default_factory=dict)
    never_save: set[fx.Node] = field(default_factory=set)
    compute_again: set[fx.Node] = field(default_factory=set)
    region_outputs: set[fx.Node] = field(default_factory=set)


def read_policy(graph: fx.Graph, ctx: PassContext) -> Policy:
    assert ctx.plan is not None
    policy = Policy()
    by_use: dict[str, list[fx.Node]] = defaultdict(list)
    wgrads: dict[str, fx.Node] = {}
    for node in graph.nodes:
        role = node.meta.get(g.ROLE)
        if isinstance(role, GemmRole) and not g.is_backward(node):
            by_use[role.use].append(node)
        if isinstance(role, GemmRole) and role.gemm == "wgrad" and node.target in SCALED_GEMMS:
            wgrads[role.use] = node
        if checkpointed(node):
            policy.compute_again.add(node)
            policy.region_outputs |= {storage_root(node)} if leaves_region(node) else set()
    for key, use in ctx.plan.uses.items():
        anchor = next((n for n in by_use.get(key, ()) if is_anchor(n, use.use.op)), None)
        if anchor is None or checkpointed(anchor):
            continue
        if use.recomputes("out"):
            _recompute_output(anchor, use, policy)
        if use.use.op is Op.SWIGLU:
            _cache_gate_inputs(anchor, use, policy)
        if use.cache("x") is not None and key in wgrads:
            _cache_input(wgrads[key], use, policy)
    return policy


def checkpointed(node: fx.Node) -> bool:
    """Inside a region the user checkpoints: the user asked for recomputation, and gets it, but for random numbers."""
    if node.op != "call_function" or is_random(node) or g.is_backward(node):
        return False
    return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def leaves_region(node: fx.Node) -> bool:
    """Whether a value of a checkpointed region is read by the forward outside of it."""
    region = node.meta.get("ac_graph_id")
    readers = [u for u in node.users if u.op == "call_function" and not g.is_backward(u)]
    return any(not checkpointed(u) or u.meta.get("ac_graph_id") != region for u in readers)


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws other numbers each time, by PyTorch's own tag: backward must not draw again. Attention with a
    dropout of 0 has the tag and draws nothing.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = dict(zip((a.name for a in target._schema.arguments), node.args)) | dict(node.kwargs)
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    return bool({**defaults, **given}.get("dropout_p") != 0.0)


def is_computed_once(node: fx.Node) -> bool:
    """Too expensive to compute twice, or not allowed to."""
    return node.target in NEVER_TWICE or is_random(node)


def is_anchor(node: fx.Node, op: Op) -> bool:
    if op in (Op.LINEAR, Op.GROUPED_MM):
        return node.target in NEVER_TWICE and node.op == "call_function"
    return node.op == "call_function"


def _recompute_output(anchor: fx.Node, use: UsePlan, policy: Policy) -> None:
    """Ban saving the output and every elementwise descendant of it up to the next use: they hold the same values."""
    if use.use.is_gemm:
        policy.compute_again.add(anchor)
    frontier = [anchor]
    while frontier:
        node = frontier.pop()
        if node in policy.never_save or g.is_backward(node):
            continue
        policy.never_save.add(node)
        for user in node.users:
            role = user.meta.get(g.ROLE)
            if isinstance(role, GemmRole) and role.use != use.use.key:
                continue
            if is_computed_once(user) or user.target in QUANTIZES or _joins_residual(user, node):
                continue
            if isinstance(user.meta.get("val"), torch.Tensor) and user.meta["val"].dtype.is_floating_point:
                frontier.append(user)


def _joins_residual(user: fx.Node, node: fx.Node) -> bool:
    """An addition with a value of another origin makes a new value; it is no longer the recomputed output."""
    return user.target is aten.add.Tensor and len(user.all_input_nodes) > 1


def _cache_gate_inputs(anchor: fx.Node, use: UsePlan, policy: Policy) -> None:
    """`cache gate as F; cache up as F`: the up-projections' outputs are kept in F."""
    formats = {f for f in (use.cache("gate"), use.cache("up")) if f is not None}
    if len(formats) != 1:
        return
    (fmt,) = formats
    kept_as = fmt if fmt.is_quantized else None  # `cache gate as bf16`: as the GEMM wrote it
    for gemm in feeding_gemms(anchor):
        why = f"cache gate, up of {use.use.key}"
        policy.must_save[gemm] = SavedValue(gemm.name, kept_as, why, use.reason("cache.gate"))


def feeding_gemms(anchor: fx.Node) -> list[fx.Node]:
    """The GEMMs behind a gate product, through elementwise operators and views."""
    found, frontier, seen = [], list(anchor.all_input_nodes), set()
    while frontier:
        node = frontier.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in g.GEMMS | SCALED_GEMMS:
            found.append(node)
        elif not is_computed_once(node):
            frontier += node.all_input_nodes
    return sorted(found)


def _cache_input(wgrad: fx.Node, use: UsePlan, policy: Policy) -> None:
    """`cache x as F`: the quantized pair wgrad reads; after attention the attention's own backward reads it as well."""
    fmt = use.cache("x")
    assert fmt is not None
    pair = pair_read_by_wgrad(wgrad, fmt)
    if pair is None:
        return
    why = f"cache x of {use.use.key}"
    for part in pair:
        source = behind_row_gathers(part)
        policy.must_save[source] = SavedValue(source.name, None, why, use.reason("cache.x"))
    if fmt.element is Element.E5M6:
        out = attention_output(pair[0])
        if out is not None:
            policy.must_save[out] = SavedValue(out.name, fmt, why, use.reason("cache.x"))


def pair_read_by_wgrad(wgrad: fx.Node, fmt: Format) -> tuple[fx.Node, fx.Node] | None:
    """What a wgrad keeps of x: the pair that is quantized again for it, or the one it reads as it is."""
    for operand in (wgrad.args[2], wgrad.args[0]):
        assert isinstance(operand, fx.Node)
        source = g.strip(operand, g.TRANSPOSES).args[0]
        if not isinstance(source, fx.Node):
            continue
        if g.is_call(source, {ops.requantize.default}):
            data, scale = source.args[:2]
            assert isinstance(data, fx.Node) and isinstance(scale, fx.Node)
            return data, scale
        if g.is_call(source, QUANTIZES) and source.args[1] == fmt.online.text and _is_forward_value(source.args[0]):
            data, scale = sorted(source.users, key=lambda n: n.args[1])  # type: ignore[arg-type, return-value]
            return data, scale
    return None


#: Operators that make a pair from a value.
QUANTIZES = frozenset({ops.quantize.default, ops.quantize_delayed.default})


def _is_forward_value(node: object) -> bool:
    return isinstance(node, fx.Node) and not g.is_backward(g.strip(node, g.VIEWS))


def behind_row_gathers(node: fx.Node) -> fx.Node:
    """A gathered payload is gathered again in backward; what is kept is the token."""
    while g.is_call(node, {aten.index.Tensor, aten.index_select.default}):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    return node


def attention_output(data: fx.Node) -> fx.Node | None:
    """The attention output behind a quantized value, when only reshapes lie between."""
    quantize = data.args[0]
    assert isinstance(quantize, fx.Node) and isinstance(quantize.args[0], fx.Node)
    root = g.strip(quantize.args[0], g.RESHAPES | g.TRANSPOSES)
    if not g.is_call(root, {operator.getitem}):
        return None
    source = root.args[0]
    return root if isinstance(source, fx.Node) and g.is_call(source, {ops.attention.default}) else None


# --- the cut -----------------------------------------------------------------------------------------------------


def needed_by_backward(graph: fx.Graph, gradients: set[fx.Node]) -> set[fx.Node]:
    """Values that no tangent reaches and that a gradient is computed from."""
    needed = set()
    for node in gradients:
        if node.op == "output":
            continue
        needed |= {n for n in node.all_input_nodes if n not in gradients}
    return needed


def minimum_cut(graph: fx.Graph, ctx: PassContext, policy: Policy) -> list[fx.Node]:
    gradients = g.gradients(graph)
    sinks = needed_by_backward(graph, gradients)
    network = _network(sinks, policy)
    saved: list[fx.Node] = []
    for component in nx.weakly_connected_components(network):
        saved += _cut_component(network.subgraph(component), sinks, policy)
    return saved


def is_free(node: fx.Node) -> bool:
    """Inputs and symbolic sizes reach backward without being kept."""
    return node.op in ("placeholder", "get_attr") or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def is_source(node: fx.Node, policy: Policy) -> bool:
    """A value that exists only because forward computed it."""
    if node in policy.must_save or (node in policy.region_outputs and node not in policy.never_save):
        return True
    target = node.target
    collective = isinstance(target, torch._ops.OpOverload) and target.namespace == "_c10d_functional"
    return (is_computed_once(node) or collective) and node not in policy.compute_again


def _network(sinks: set[fx.Node], policy: Policy) -> nx.DiGraph:
    """Dependences among the values between the sources and what backward reads, edges from producer to consumer.

    A sink that must be saved needs no decision and is left out.
    """
    network: nx.DiGraph = nx.DiGraph()
    frontier = [n for n in sinks if not is_free(n) and n not in policy.must_save]
    seen: set[fx.Node] = set()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        network.add_node(node)
        if is_source(node, policy):
            continue
        for producer in node.all_input_nodes:
            if is_free(producer) or producer in policy.must_save:
                continue
            network.add_edge(producer, node)
            frontier.append(producer)
    return network


def _cut_component(component: nx.DiGraph, sinks: set[fx.Node], policy: Policy) -> list[fx.Node]:
    """Minimum cut by bytes; among equals the one nearest to backward, which computes the least again."""
    sources = [n for n in component if is_source(n, policy)]
    if not sources:
        return []  # all of it can be computed from inputs and saved values
    flow: nx.DiGraph = nx.DiGraph()
    for node in component:
        capacity = save_cost_bytes(node, policy)
        limit = {} if capacity is None else {"capacity": capacity}
        flow.add_edge((node, "in"), (node, "out"), **limit)
        if node in sinks:
            flow.add_edge((node, "out"), "backward")
    for producer, consumer in component.edges:
        flow.add_edge((producer, "out"), (consumer, "in"))
    for node in sources:
        flow.add_edge("forward", (node, "in"))
    if "backward" not in flow:
        return []
    try:
        # networkx returns the cut whose sink side is smallest.
        _, (far, near) = nx.minimum_cut(flow, "forward", "backward", flow_func=nx.algorithms.flow.boykov_kolmogorov)
    except nx.NetworkXUnbounded:
        raise _unreachable(component, sinks, policy) from None
    return sorted(n for n in component if (n, "in") in far and (n, "out") in near)


def _unreachable(component: nx.DiGraph, sinks: set[fx.Node], policy: Policy) -> DiagnosticError:
    """A value backward needs may neither be kept nor be computed again."""
    stuck = sorted(n for n in component if n in sinks and save_cost_bytes(n, policy) is None) or sorted(component)
    return fail(
        "E0502",
        f"backward needs %{stuck[0].name}, which the spec says to recompute, but nothing it comes from may be kept",
        span=g.source_span(stuck[0]),
        help="drop `recompute` for this value, or cache one of the values in front of it",
    )


def save_cost_bytes(node: fx.Node, policy: Policy) -> int | None:
    """Bytes of keeping a value; None where it must not be kept. A view keeps its whole storage: keep that instead."""
    val = node.meta.get("val")
    if storage_root(node) is not node:
        return None
    if not isinstance(val, torch.Tensor) or node in policy.never_save or g.is_backward(node):
        return None
    return max(1, g.size_bytes(val))
