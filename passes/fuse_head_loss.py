"""fuse-head-loss: join the output head with the cross-entropy loss behind it, and with their backward.

Before:  %y    = aten.mm(%x, aten.t(%w))                            x: bf16[T, H]   w: bf16[V, H]   y: bf16[T, V]
         %logs = aten._log_softmax(aten._to_copy(%y, float32), 1)   f32[T, V]
         %loss = aten.nll_loss_forward(%logs, %labels, None, 1, -100)[0]
         %dy   = aten._to_copy(aten._log_softmax_backward_data(aten.nll_loss_backward(%t, ...), %logs, ...), bfloat16)
         %dx, %dw = aten.mm(%dy, %w), aten.mm(aten.t(%dy), %x)
After:   %loss, %gx, %gw = fp8c.linear_cross_entropy(%x, %w, %labels, -100, True, True, True)
         %dx, %dw = aten.mul(%gx, %t), aten.mul(%gw, %t)            t: the gradient of the loss, f32[]

Contract: logits and their gradient are rounded where the model rounds them. What differs: the products' FP32 sums may be
taken in another order, and dx and dw are rounded once more where t is no power of two. Logits that anything else reads
(outputs of the step, label smoothing, a z-loss), a bias, weights of classes and a head in FP8 keep the head as it is; a
remark says so.
Source:   gradients in forward as Liger Kernel's fused linear cross-entropy (arXiv:2410.10989).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fp8c import graph as g
from fp8c.graph import aten
from fp8c.ops.head_loss import LINEAR_CROSS_ENTROPY
from fp8c.pass_manager import PassContext, PassResult
from fp8c.passes.assign_roles import GemmRole

_COPIES = g.ROW_VIEWS | {aten.clone.default, aten.detach.default}
_REDUCTIONS = {1: True, 2: False}  # of nll_loss: mean, sum; 0 keeps every token's loss


@dataclass(frozen=True)
class Head:
    """A head with its loss in the graph. `dgrad`, `wgrad` are None where no gradient is asked for."""

    product: fx.Node  # x @ w.T
    loss: fx.Node  # nll_loss_forward
    tangent: fx.Node | None  # None without a backward
    dgrad: fx.Node | None
    wgrad: fx.Node | None


@dataclass(frozen=True)
class FuseHeadLoss:
    name: ClassVar[str] = "fuse-head-loss"
    requires: ClassVar[frozenset[str]] = frozenset({"roles"})
    ensures: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassResult:
        joined: list[fx.Node] = []
        for product in candidates(graph):
            found = match(product, ctx)
            if isinstance(found, str):
                ctx.remark("R0845", f"the output head is not joined with its loss: {found}", product)
                continue
            fuse(graph, found)
            joined.append(product)
        if joined:
            losses = "its loss" if len(joined) == 1 else f"{len(joined)} losses"
            ctx.remark("R0844", f"the output head is joined with {losses}: no logits are kept", joined[0])
            graph.eliminate_dead_code()
        return PassResult(graph, len(joined))


def candidates(graph: fx.Graph) -> Iterator[fx.Node]:
    """Forward products whose result a cross-entropy reads, however it is brought there."""
    for loss in g.calls(graph, {aten.nll_loss_forward.default}):
        logs: Any = loss.args[0]
        if g.is_call(logs, {aten._log_softmax.default}):
            product = g.strip(logs, g.VIEWS | g.CASTS | {aten._log_softmax.default, aten.constant_pad_nd.default})
            if g.is_call(product, g.MATMULS) and not g.is_backward(product) and g.ROLE in product.meta:
                yield product


def match(product: fx.Node, ctx: PassContext) -> Head | str:
    """The head that this product begins, or why it stays as it is."""
    role = product.meta[g.ROLE]
    if product.target is not aten.mm.default:
        return "it has a bias"
    if ctx.plan is not None and any(ctx.plan.uses[role.use].gemm(w).is_fp8 for w in ("fprop", "dgrad", "wgrad")):
        return "the spec puts it in FP8"
    chain = straight_to(product, aten._log_softmax.default)
    if chain is None:
        return "something else reads its logits; return only the loss, outputs=('loss',) say"
    logs = chain[-1]
    is_wide = all(g.value(n).dtype is torch.float32 for n in chain if g.is_call(n, g.CASTS) or n is logs)
    if not is_wide or not g.same_sizes(g.value(logs), g.value(product)) or logs.args[1] not in (1, -1):
        return "its loss is not taken in FP32 over the words of each token"
    return match_loss(product, logs, role, ctx)


def match_loss(product: fx.Node, logs: fx.Node, role: GemmRole, ctx: PassContext) -> Head | str:
    readers = [u for n in (logs, *detached(logs)) for u in n.users if u not in detached(logs)]
    loss = only(readers, aten.nll_loss_forward.default)
    back = only(readers, aten.nll_loss_backward.default)
    softmax = only(readers, aten._log_softmax_backward_data.default)
    if loss is None or len(readers) != (1 if back is None else 3):
        return "something else reads the logarithms of its probabilities"
    if loss.args[2] is not None or loss.args[3] not in _REDUCTIONS or g.value(loss.args[1]).dim() != 1:  # type: ignore[arg-type]
        return "its loss has weights of classes, or one value for each token"
    if not ctx.training and back is None:
        return Head(product, loss, None, None, None)
    if back is None or softmax is None:
        return "its loss has no gradient"
    if back.args[1:6] != (logs, *loss.args[1:5]) or softmax.args[0] is not back or len(back.users) != 1:
        return "its loss has another gradient"
    chain = straight_to(softmax, None)
    dlogits = chain[-1]
    gemms = {u.meta[g.ROLE].gemm: u for n in (dlogits, *turned(dlogits)) for u in n.users if g.ROLE in u.meta}
    readers = [u for n in (dlogits, *turned(dlogits)) for u in n.users if u not in turned(dlogits)]
    is_own = all(u.meta.get(g.ROLE) in (GemmRole(role.use, "dgrad"), GemmRole(role.use, "wgrad")) for u in readers)
    if not is_own or len(readers) != len(gemms) or g.value(dlogits).dtype is not g.value(product).dtype:
        return "something else reads the gradient of its logits"
    if not g.same_sizes(g.value(dlogits), g.value(product)):
        return "its loss has another gradient"
    tangent = back.args[0]
    assert isinstance(tangent, fx.Node)
    return Head(product, loss, tangent, gemms.get("dgrad"), gemms.get("wgrad"))


def straight_to(node: fx.Node, target: Any) -> Any:
    """The chain of copies and casts from `node` to its only reader `target`; with None, as far as it goes.

    None where the chain forks or ends in something else.
    """
    chain = [node]
    while True:
        users = list(chain[-1].users)
        following = users[0] if len(users) == 1 else None
        if following is not None and following.target is target:
            return [*chain, following]
        if following is None or not g.is_call(following, _COPIES | g.CASTS):
            return chain if target is None else None
        chain.append(following)


def detached(node: fx.Node) -> set[fx.Node]:
    """What `detach` makes of a value, however often."""
    found: set[fx.Node] = set()
    frontier = [node]
    while frontier:
        for user in frontier.pop().users:
            if g.is_call(user, {aten.detach.default}) and user not in found:
                found.add(user)
                frontier.append(user)
    return found


def turned(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if g.is_call(u, g.TRANSPOSES) and g.swaps_last_two(u)]


def only(nodes: list[fx.Node], target: Any) -> fx.Node | None:
    found = [n for n in nodes if n.target is target]
    return found[0] if len(found) == 1 else None


def fuse(graph: fx.Graph, head: Head) -> None:
    product, loss = head.product, head.loss
    x, right = product.args[:2]
    assert isinstance(x, fx.Node) and isinstance(right, fx.Node)
    is_turned = g.is_call(right, g.TRANSPOSES) and g.swaps_last_two(right)
    with graph.inserting_before(loss):
        w = right.args[0] if is_turned else g.emit(graph, aten.t.default, right, like=product)
        needs = head.dgrad is not None, head.wgrad is not None
        arguments = (x, w, loss.args[1], loss.args[4], _REDUCTIONS[loss.args[3]], *needs)  # type: ignore[index]
        new = g.emit(graph, LINEAR_CROSS_ENTROPY, *arguments, like=product)
        total, dx, dw = (g.emit(graph, operator.getitem, new, i, like=product) for i in range(3))
    for part in (total, dx, dw):
        part.meta.pop(g.ROLE)
    for user in list(loss.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(total)
    if head.dgrad is not None and head.tangent is not None:
        scale(graph, head.dgrad, dx, head.tangent, is_turned=False)
    if head.wgrad is not None and head.tangent is not None:  # of w as [V, H] or of its transpose, as autograd likes
        is_transpose = g.behind_transposes(head.wgrad.args[0])[0] is g.behind_transposes(x)[0]  # type: ignore[arg-type]
        scale(graph, head.wgrad, dw, head.tangent, is_turned=is_transpose)


def scale(graph: fx.Graph, gemm: fx.Node, gradient: fx.Node, tangent: fx.Node, is_turned: bool) -> None:
    """In place of a GEMM of backward: the gradient that forward computed, times the gradient of the loss."""
    with graph.inserting_before(gemm):
        scaled = g.emit(graph, aten.mul.Tensor, gradient, tangent, like=gemm)
        scaled.meta.pop(g.ROLE)
        if is_turned:
            scaled = g.emit(graph, aten.t.default, scaled, like=gemm)
            scaled.meta.pop(g.ROLE)
            # Views of the product behind it want its rows side by side.
            scaled = g.emit(graph, aten.clone.default, scaled, memory_format=torch.contiguous_format, like=scaled)
    gemm.replace_all_uses_with(scaled)
    graph.erase_node(gemm)
