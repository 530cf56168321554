"""assign-roles: say what every operator use of the model is, and which backward GEMMs belong to it.

Before:  %mm_3 = aten.mm(%view_6, %t_3)        forward, seq_nr 41
         %mm_30 = aten.mm(%t_42, %view_25)     backward, seq_nr 41
After:   the same graph; %mm_3 carries the role `fprop of model.layers.0.self_attn.kv_b_proj`, %mm_30 its `wgrad`,
         and the context holds one `OpUse` per use: operator, kinds, structural roles, sizes, source line.

Contract: uses are found by what is computed (a GEMM with a parameter behind transposes and casts, the data flow between
GEMMs, attention, norms and gates), never by module class or name. Every forward GEMM has its dgrad and its wgrad, or a
reason why not; anything else fails. The graph itself is not changed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx

from fp8c import graph as g
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode
from fp8c.graph import aten
from fp8c.pass_manager import PassContext, PassResult
from fp8c.roles import Op, OpUse

ACTIVATIONS = frozenset(
    {aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.relu.default, aten.tanh.default}
)
NORM_OPS = frozenset({aten.native_layer_norm.default, aten._fused_rms_norm.default})
LOSSES = frozenset(
    {aten._log_softmax.default, aten.nll_loss_forward.default, aten.nll_loss2d_forward.default, aten.logsumexp.default}
)
ATTENTION = frozenset({torch.ops.fp8c.attention.default})


@dataclass(frozen=True)
class GemmRole:
    """Which GEMM a node is: `fprop`, `dgrad` or `wgrad` of a use; "" for the node that anchors another kind of use."""

    use: str
    gemm: str = ""

    def __str__(self) -> str:
        return f"{self.gemm} {self.use}".strip()


@dataclass
class Flow:
    """The coarse data flow of the forward: anchors are the nodes that stand for uses.

    upstream:   for each node, the anchors that reach it without passing another anchor
    needs_grad: nodes a gradient flows through
    from_data:  nodes that depend on an input that is no parameter; the others are functions of parameters alone
    """

    anchors: dict[fx.Node, Op] = field(default_factory=dict)
    upstream: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    needs_grad: set[fx.Node] = field(default_factory=set)
    from_data: set[fx.Node] = field(default_factory=set)
    downstream: dict[fx.Node, set[fx.Node]] = field(default_factory=lambda: defaultdict(set))


@dataclass(frozen=True)
class AssignRoles:
    name: ClassVar[str] = "assign-roles"
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset({"roles"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        for node in graph.nodes:
            node.meta.pop(g.ROLE, None)
        flow = trace_flow(graph, ctx)
        uses = describe_uses(graph, ctx, flow)
        remark_batched_weights(flow, ctx)
        ctx.uses.clear()
        ctx.uses.update(uses)
        return PassResult(graph, 0)


# --- data flow ---------------------------------------------------------------------------------------------------


def trace_flow(graph: fx.Graph, ctx: PassContext) -> Flow:
    flow = Flow()
    none: frozenset[fx.Node] = frozenset()
    for node in graph.nodes:
        if node.op == "placeholder":
            if not ctx.is_parameter(node):
                flow.from_data.add(node)
            elif ctx.is_trained(node):
                flow.needs_grad.add(node)
            flow.upstream[node] = none
            continue
        if g.is_backward(node) or node.op != "call_function":
            continue
        inputs = [n for n in node.all_input_nodes if n in flow.upstream]
        if any(n in flow.from_data for n in inputs):
            flow.from_data.add(node)
        val = node.meta.get("val")
        floating = not isinstance(val, torch.Tensor) or val.dtype.is_floating_point
        if floating and any(n in flow.needs_grad for n in inputs):
            flow.needs_grad.add(node)
        sets = {flow.upstream[n] for n in inputs}
        reaching = next(iter(sets)) if len(sets) == 1 else none.union(*sets)
        kind = anchor_kind(node, flow, reaching)
        if kind is None:
            flow.upstream[node] = reaching
        else:
            flow.anchors[node] = kind
            flow.upstream[node] = frozenset({node})
            for source in reaching:
                flow.downstream[source].add(node)
    return flow


def anchor_kind(node: fx.Node, flow: Flow, reaching: frozenset[fx.Node]) -> Op | None:
    """The kind of use a node anchors, or None."""
    target = node.target
    if target in g.MATMULS:
        weight = node.args[2] if target is aten.addmm.default else node.args[1]
        return Op.LINEAR if weight not in flow.from_data else Op.BMM
    if target in g.GROUPED_MATMULS:
        return Op.GROUPED_MM
    if target in g.BATCHED_MATMULS:
        return Op.BMM
    if target in ATTENTION:
        return Op.ATTENTION
    if target in NORM_OPS or is_norm_product(node):
        return Op.NORM
    if target is aten.embedding.default:
        return Op.EMBEDDING
    if target is aten.mul.Tensor and is_gate_product(node, flow, reaching):
        return Op.SWIGLU
    return None


def is_norm_product(node: fx.Node) -> bool:
    """`x * rsqrt(mean(x^2) + eps)`: the product that makes an RMSNorm written in tensor operations."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return False
    return any(
        g.is_call(n, {aten.rsqrt.default})
        and any(g.is_call(m, {aten.mean.dim, aten.var.correction}) for m in _ancestors(n, 3))
        for n in node.all_input_nodes
    )


def _ancestors(node: fx.Node, depth: int) -> Iterable[fx.Node]:
    frontier = [node]
    for _ in range(depth):
        frontier = [n for f in frontier for n in f.all_input_nodes]
        yield from frontier


def is_gate_product(node: fx.Node, flow: Flow, reaching: frozenset[fx.Node]) -> bool:
    """`act(gate) * up` of equal shapes, both straight from GEMMs: SwiGLU and its kin.

    A gate of another width (a shared expert's `sigmoid(x w) * y`) is no SwiGLU, nor is anything that reads attention.
    """
    if len(node.all_input_nodes) != 2 or not reaching:
        return False
    if any(flow.anchors[a] not in (Op.LINEAR, Op.GROUPED_MM) for a in reaching):
        return False
    left, right = node.all_input_nodes
    if not g.same_sizes(g.value(left), g.value(right)):
        return False
    return _applies_activation(left) != _applies_activation(right)


def _applies_activation(node: fx.Node) -> bool:
    """Whether an activation function lies between a value and the GEMM that feeds it, through elementwise operators."""
    seen = 0
    frontier = [node]
    while frontier and seen < 24:  # GptOss's clamped, shifted gate is 9 operators deep
        n = frontier.pop()
        seen += 1
        if g.is_call(n, ACTIVATIONS):
            return True
        if n.op == "call_function" and n.target not in g.GEMMS:
            frontier += n.all_input_nodes
    return False


# --- uses --------------------------------------------------------------------------------------------------------


def describe_uses(graph: fx.Graph, ctx: PassContext, flow: Flow) -> dict[str, OpUse]:
    backward = _backward_gemms(graph)
    structure = find_structure(graph, flow)
    layer_counts = _layer_counts(flow)
    uses: dict[str, OpUse] = {}
    problems: list[tuple[str, str, int, Diagnostic]] = []
    for anchor, op in flow.anchors.items():
        weight = weight_of(anchor) if op in (Op.LINEAR, Op.GROUPED_MM) else None
        param = _parameter_name(weight, ctx) if weight is not None else None
        path = _use_path(anchor, op, param)
        key = _unique(path if op in (Op.LINEAR, Op.GROUPED_MM) else f"{path}:{op.value}", uses)
        no_dgrad = no_wgrad = ""
        anchor.meta[g.ROLE] = GemmRole(key, "fprop" if op in (Op.LINEAR, Op.GROUPED_MM) else "")
        if op in (Op.LINEAR, Op.GROUPED_MM):
            assert weight is not None
            no_dgrad, no_wgrad, found = claim_backward(anchor, weight, key, backward, flow, ctx)
            problems += [(key, *problem) for problem in found]
        m, n, k = _gemm_sizes(anchor, op)
        layer, prefix = _layer_of(path)
        uses[key] = OpUse(
            key=key,
            op=op,
            path=path,
            kinds=frozenset(structure.kinds[anchor]),
            roles=frozenset(structure.roles[anchor]),
            layer=layer,
            layer_count=layer_counts.get(prefix, 0),
            param=param,
            m=m,
            n=n,
            k=k,
            experts=int(g.value(weight).shape[0]) if op is Op.GROUPED_MM and weight is not None else 1,
            no_dgrad=no_dgrad,
            no_wgrad=no_wgrad,
            source=g.source_span(anchor),
        )
    # What is made under no_grad, or takes another value's shape alone, needs no gradient: that shows in the backward, which has
    # no GEMM for it. One that was looked for in the wrong place would be left without a use.
    products = {anchor.meta.get("seq_nr") for anchor, op in flow.anchors.items() if op is Op.BMM}
    left = [n for seq, nodes in backward.items() if seq not in products for n in nodes if g.ROLE not in n.meta]
    if problems and (left or any(count for _, _, count, _ in problems)):
        raise DiagnosticError([problem for *_, problem in problems], ExitCode.MODEL)
    for key, which, _, _ in problems:
        use = uses[key]
        uses[key] = (
            replace(use, no_dgrad="input needs no gradient")
            if which == "dgrad"
            else replace(use, no_wgrad="weight gets no gradient")
        )
    return uses


def remark_batched_weights(flow: Flow, ctx: PassContext) -> None:
    """R0848: products of a batch of trained weights, Llama 4's experts say, which no rule can give a format."""
    found = [anchor for anchor, op in flow.anchors.items() if op is Op.BMM and _has_trained_weight(anchor, flow)]
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        ctx.remark(
            "R0848",
            f"{g.module_path(found[0])}{more}: a batched product (bmm) with a weight stays in BF16, forward and backward",
            found[0],
        )


def _has_trained_weight(product: fx.Node, flow: Flow) -> bool:
    return any(n in flow.needs_grad and n not in flow.from_data for n in product.all_input_nodes[-2:])


def weight_of(gemm: fx.Node) -> fx.Node:
    """The weight behind transposes and casts: a parameter, or a function of parameters alone (a stack of experts)."""
    operand = gemm.args[2] if gemm.target is aten.addmm.default else gemm.args[1]
    assert isinstance(operand, fx.Node)
    return g.behind_transposes(operand, casts=True)[0]


def activation_of(gemm: fx.Node) -> fx.Node:
    operand = gemm.args[1] if gemm.target is aten.addmm.default else gemm.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _backward_gemms(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    found: dict[int, list[fx.Node]] = defaultdict(list)
    for node in g.calls(graph, g.GEMMS):
        if g.is_backward(node):
            found[node.meta.get("seq_nr", -1)].append(node)
    return found


def claim_backward(
    anchor: fx.Node, weight: fx.Node, key: str, backward: dict[int, list[fx.Node]], flow: Flow, ctx: PassContext
) -> tuple[str, str, list[tuple[str, int, Diagnostic]]]:
    """Find the dgrad and wgrad of a forward GEMM by its `seq_nr`; say why one does not exist, or report which is missing
    or there too often, and how many there are."""
    if not ctx.training:
        return "inference", "inference", []
    dgrads, wgrads = [], []
    for node in backward.get(anchor.meta.get("seq_nr", -2), []):
        if g.ROLE in node.meta:
            continue
        right = node.args[2] if node.target is aten.addmm.default else node.args[1]
        assert isinstance(right, fx.Node)
        if g.behind_transposes(right, casts=True)[0] is weight:
            dgrads.append(node)
            node.meta[g.ROLE] = GemmRole(key, "dgrad")
        else:
            wgrads.append(node)
            node.meta[g.ROLE] = GemmRole(key, "wgrad")
    x = activation_of(anchor)
    problems: list[tuple[str, int, Diagnostic]] = []
    no_dgrad = no_wgrad = ""
    if not dgrads:
        no_dgrad = "input needs no gradient" if x not in flow.needs_grad else ""
    if not wgrads:
        no_wgrad = "weight is frozen" if weight not in flow.needs_grad else ""
    if not dgrads and not wgrads and not (no_dgrad and no_wgrad) and ctx.has_backward:
        # Both missing although both could exist: nothing downstream of this GEMM reaches the loss.
        no_dgrad = no_dgrad or "output does not reach the loss"
        no_wgrad = no_wgrad or "output does not reach the loss"
    for which, nodes, reason in (("dgrad", dgrads, no_dgrad), ("wgrad", wgrads, no_wgrad)):
        if len(nodes) != (0 if reason else 1):
            problem = Diagnostic(
                "E0830",
                f"{key} has {len(nodes)} {which} GEMMs where {0 if reason else 1} {'are' if reason else 'is'} expected",
                g.source_span(anchor),
                help="the captured backward is incomplete; report this with the model if it has no custom autograd",
            )
            problems.append((which, len(nodes), problem))
    return no_dgrad, no_wgrad, problems


def _gemm_sizes(anchor: fx.Node, op: Op) -> tuple[int | None, int | None, int | None]:
    if op not in (Op.LINEAR, Op.GROUPED_MM, Op.BMM):
        return None, None, None
    x, out = g.value(activation_of(anchor)), g.value(anchor)
    m, n, k = x.shape[-2], out.shape[-1], x.shape[-1]
    return tuple(int(s) if isinstance(s, int) else None for s in (m, n, k))  # type: ignore[return-value]


def _parameter_name(weight: fx.Node, ctx: PassContext) -> str | None:
    """FQN of a parameter; for a stack of experts' parameters the common name with `*` for the expert."""
    if weight.op == "placeholder":
        return ctx.input_name(weight)
    names = []
    frontier, seen = [weight], set()
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            names.append(ctx.input_name(node))
        frontier += node.all_input_nodes
    if not names:
        return None
    split = [n.split(".") for n in sorted(names)]
    if len({len(s) for s in split}) != 1:
        return names[0]
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*split))


def _use_path(anchor: fx.Node, op: Op, param: str | None) -> str:
    """The path selectors see: the parameter's without `.weight` and without the expert's index, else the module's."""
    if op in (Op.LINEAR, Op.GROUPED_MM) and param:
        return ".".join(p for p in param.removesuffix(".weight").split(".") if p != "*")
    return g.module_path(anchor)


def _unique(key: str, taken: dict[str, OpUse]) -> str:
    if key not in taken:
        return key
    n = 2
    while f"{key}#{n}" in taken:
        n += 1
    return f"{key}#{n}"


def _layer_of(path: str) -> tuple[int | None, str]:
    """Index of the decoder layer: the first whole-number segment of the path, and the list it indexes."""
    parts = path.split(":")[0].split(".")
    for i, part in enumerate(parts):
        if re.fullmatch(r"\d+", part):
            return int(part), ".".join(parts[:i])
    return None, ""


def _layer_counts(flow: Flow) -> dict[str, int]:
    counts: dict[str, int] = {}
    for anchor in flow.anchors:
        layer, prefix = _layer_of(g.module_path(anchor))
        if layer is not None:
            counts[prefix] = max(counts.get(prefix, 0), layer + 1)
    return counts


# --- structure ---------------------------------------------------------------------------------------------------


@dataclass
class Structure:
    kinds: dict[fx.Node, set[str]] = field(default_factory=lambda: defaultdict(set))
    roles: dict[fx.Node, set[str]] = field(default_factory=lambda: defaultdict(set))


def find_structure(graph: fx.Graph, flow: Flow) -> Structure:
    """Kinds and roles of all uses, from the data flow between anchors."""
    s = Structure()
    gemms = [a for a, op in flow.anchors.items() if op in (Op.LINEAR, Op.GROUPED_MM)]
    inputs = {a: _inputs_of(a, flow) for a in flow.anchors}
    for anchor, op in flow.anchors.items():
        if op in (Op.ATTENTION, Op.NORM, Op.EMBEDDING):
            s.kinds[anchor].add(op.value)
    _mark_batched_attention(flow, inputs, s)
    attentions = {a for a in flow.anchors if "attention" in s.kinds[a]}
    _mark_routers(gemms, flow, s)
    _mark_heads(graph, gemms, flow, s)
    for gemm in gemms:
        if "router" in s.kinds[gemm] or "lm_head" in s.kinds[gemm]:
            continue
        _mark_gemm(gemm, attentions, inputs, flow, s)
    for anchor, op in flow.anchors.items():
        if op is Op.SWIGLU:
            grouped = any(flow.anchors[i] is Op.GROUPED_MM for i in inputs[anchor])
            s.roles[anchor].add("moe_swiglu" if grouped else "mlp_swiglu")
            s.kinds[anchor].add("moe" if grouped else "mlp")
    _mark_shared_experts(gemms, inputs, flow, s)
    _mark_mtp(flow, s)
    return s


def _inputs_of(anchor: fx.Node, flow: Flow) -> frozenset[fx.Node]:
    sets = [flow.upstream[n] for n in anchor.all_input_nodes if n in flow.upstream]
    return frozenset().union(*sets) if sets else frozenset()


def _activation_inputs(gemm: fx.Node, flow: Flow) -> frozenset[fx.Node]:
    return flow.upstream.get(activation_of(gemm), frozenset())


def _mark_batched_attention(flow: Flow, inputs: dict[fx.Node, frozenset[fx.Node]], s: Structure) -> None:
    """Attention written by hand: a bmm whose operand is a softmax of another bmm."""
    for anchor, op in flow.anchors.items():
        if op is not Op.BMM:
            continue
        scores = [i for i in inputs[anchor] if flow.anchors[i] is Op.BMM]
        if scores and _reads_softmax(anchor, flow):
            for use in (anchor, *scores):
                s.kinds[use].add("attention")


def _reads_softmax(node: fx.Node, flow: Flow) -> bool:
    """Whether a softmax lies between the node and the anchors in front of it."""
    frontier = list(node.all_input_nodes)
    seen: set[fx.Node] = set()
    while frontier:
        n = frontier.pop()
        if n in seen or n in flow.anchors:
            continue
        seen.add(n)
        if g.is_call(n, {aten._softmax.default, aten._safe_softmax.default}):
            return True
        frontier += n.all_input_nodes
    return False


def _forward_reach(node: fx.Node, flow: Flow, stop: frozenset[object]) -> Iterable[fx.Node]:
    """Forward nodes that depend on `node` without passing another anchor."""
    frontier, seen = list(node.users), set()
    while frontier:
        n = frontier.pop()
        if n in seen or g.is_backward(n) or n.op != "call_function":
            continue
        seen.add(n)
        yield n
        if n not in flow.anchors and n.target not in stop:
            frontier += n.users


def _mark_routers(gemms: list[fx.Node], flow: Flow, s: Structure) -> None:
    """A router's output reaches a top-k on its own way; found so, whatever it is called.

    The gate of a shared expert (one sigmoid per token, read from what the router reads) is gating as well.
    """
    linears = [a for a in gemms if flow.anchors[a] is Op.LINEAR]
    for gemm in linears:
        if _reaches(gemm, aten.topk.default, flow):
            s.kinds[gemm].add("router")
    routed = {_activation_inputs(x, flow) for x in linears if "router" in s.kinds[x]}
    for gemm in linears:
        if g.last_dim(gemm) == 1 and _activation_inputs(gemm, flow) in routed:
            if _reaches(gemm, aten.sigmoid.default, flow):
                s.kinds[gemm].add("router")


def _reaches(gemm: fx.Node, target: object, flow: Flow) -> bool:
    """Whether the output reaches a call of `target` before it reaches another anchor."""
    return any(n.target is target for n in _forward_reach(gemm, flow, frozenset({target})))


def _mark_heads(graph: fx.Graph, gemms: list[fx.Node], flow: Flow, s: Structure) -> None:
    """Output heads: the last GEMM before a loss over classes, or one as wide as an embedding is long."""
    sources = [n.args[0] for n in g.calls(graph, {aten.embedding.default}) if not g.is_backward(n)]
    vocabularies = {g.value(t).shape[0] for t in sources if isinstance(t, fx.Node)}
    tables = {g.behind_transposes(t, casts=True)[0] for t in sources if isinstance(t, fx.Node)}
    for gemm in gemms:
        if flow.anchors[gemm] is not Op.LINEAR or "router" in s.kinds[gemm] or flow.downstream.get(gemm):
            continue
        tied = weight_of(gemm) in tables
        wide = g.last_dim(gemm) in vocabularies
        if tied or wide or any(g.is_call(n, LOSSES) for n in _forward_reach(gemm, flow, frozenset())):
            s.kinds[gemm].add("lm_head")


def _mark_gemm(
    gemm: fx.Node, attentions: set[fx.Node], inputs: dict[fx.Node, frozenset[fx.Node]], flow: Flow, s: Structure
) -> None:
    grouped = flow.anchors[gemm] is Op.GROUPED_MM
    before, after = _activation_inputs(gemm, flow), flow.downstream.get(gemm, set())
    if any(flow.anchors[a] is Op.SWIGLU for a in after):
        s.roles[gemm].add("moe_up" if grouped else "mlp_up")
        s.kinds[gemm].add("moe" if grouped else "mlp")
    if any(flow.anchors[b] is Op.SWIGLU for b in before):
        s.roles[gemm].add("moe_down" if grouped else "mlp_down")
        s.kinds[gemm].add("moe" if grouped else "mlp")
    if grouped:
        s.kinds[gemm].add("moe")
        return
    if before & attentions:
        s.roles[gemm].add("attn_out_proj")
        s.kinds[gemm].add("attention")
    if _reaches_attention(after, attentions, flow):
        s.roles[gemm].add("attn_in_proj")
        s.kinds[gemm].add("attention")
        latent = _latent_norm(before, inputs, flow)
        if latent is not None:
            norm, down = latent
            s.roles[gemm].add("mla_up_proj")
            s.roles[norm].add("latent_norm")
            s.roles[down].add("mla_down_proj")
            s.kinds[down].add("attention")


def _reaches_attention(after: Iterable[fx.Node], attentions: set[fx.Node], flow: Flow) -> bool:
    """Straight to attention, or through a norm of the heads (Qwen3's q_norm, k_norm) that goes nowhere else."""
    for a in after:
        if a in attentions:
            return True
        below = flow.downstream.get(a, set())
        if flow.anchors[a] is Op.NORM and below and below <= attentions:
            return True
    return False


def _latent_norm(
    before: frozenset[fx.Node], inputs: dict[fx.Node, frozenset[fx.Node]], flow: Flow
) -> tuple[fx.Node, fx.Node] | None:
    """The norm in front of an MLA up-projection and the GEMM it reads: exactly one of each, no residual stream."""
    if len(before) != 1:
        return None
    (norm,) = before
    if flow.anchors[norm] is not Op.NORM or len(inputs[norm]) != 1:
        return None
    (down,) = inputs[norm]
    return (norm, down) if flow.anchors[down] is Op.LINEAR else None


def _mark_shared_experts(
    gemms: list[fx.Node], inputs: dict[fx.Node, frozenset[fx.Node]], flow: Flow, s: Structure
) -> None:
    """A dense MLP that reads what a router reads is a shared expert."""
    routed = {_activation_inputs(x, flow) for x in gemms if "router" in s.kinds[x]}
    for gemm in gemms:
        if "mlp_up" in s.roles[gemm] and _activation_inputs(gemm, flow) in routed:
            for swiglu in flow.downstream[gemm]:
                for member in (gemm, swiglu, *flow.downstream.get(swiglu, ())):
                    if "mlp" in s.kinds[member]:
                        s.kinds[member].add("shared_expert")


def _mark_mtp(flow: Flow, s: Structure) -> None:
    """Multi-token prediction: what reaches only a later output head."""
    heads = [a for a in flow.anchors if "lm_head" in s.kinds[a]]
    if len(heads) < 2:
        return
    reaches: dict[fx.Node, set[fx.Node]] = {h: {h} for h in heads}
    for anchor in reversed(flow.anchors):
        for below in flow.downstream.get(anchor, ()):
            reaches.setdefault(anchor, set()).update(reaches.get(below, ()))
    for anchor, reached in reaches.items():
        if heads[0] not in reached:
            s.kinds[anchor].add("mtp")
