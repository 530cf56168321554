"""Costs of graph nodes: each call of an FX graph as an operator of the cost model, with the stream it runs on."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import fp8c.ops  # noqa: F401  (defines the operators)
from fp8c import graph as g
from fp8c.cost_model import AllToAll, Attention, Elementwise, Gemm, Machine, Operator, Quantize, Retile, estimate_us
from fp8c.graph import aten
from fp8c.ops.head_loss import LINEAR_CROSS_ENTROPY, gemms_of
from fp8c.schedule import COMM, COMPUTE

ops = torch.ops.fp8c
c10d = torch.ops._c10d_functional

WAIT = c10d.wait_tensor.default
#: Collectives that run on the communication stream; each has a wait_tensor behind it.
COLLECTIVES = frozenset(
    {
        c10d.all_to_all_single.default,
        c10d.all_gather_into_tensor.default,
        c10d.reduce_scatter_tensor.default,
        c10d.all_reduce.default,
    }
)
_BF16_GEMMS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
_FREE = (
    g.VIEWS
    | {operator.getitem, WAIT, aten.view.dtype, aten.sym_size.int, aten.empty.memory_format}
    | {aten.expand.default, aten.as_strided.default}
)


def is_collective(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in COLLECTIVES


def is_control(node: fx.Node) -> bool:
    """A collective of a few numbers that compute waits for on the spot: how many rows each rank sends. Such transfers
    have a process group of their own, so that they don't queue behind payloads."""
    if not is_collective(node):
        return False
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and not val.dtype.is_floating_point and g.size_bytes(val) <= CONTROL_BYTES


CONTROL_BYTES = 1 << 16


def stream_of(node: fx.Node) -> str:
    return COMM if is_collective(node) and not is_control(node) else COMPUTE


def reads_on_host(node: fx.Node) -> bool:
    """A copy to the host that Python waits for: everything behind it is issued when the device has come there."""
    to = node.kwargs.get("device")
    source = node.args[0] if node.args else None
    is_copy = node.op == "call_function" and node.target is aten._to_copy.default and isinstance(source, fx.Node)
    return is_copy and isinstance(to, torch.device) and to.type == "cpu" and g.value(source).device.type != "cpu"  # type: ignore[arg-type]


def group_of(node: fx.Node) -> str:
    """The process group's name: the last argument of every functional collective."""
    return str(node.args[-1])


def group_size(name: str) -> int:
    """Ranks of a process group. A graph that was captured elsewhere has a group that is not set up here: 1 node of 8."""
    try:
        resolve: Any = vars(torch.distributed.distributed_c10d)["_resolve_process_group"]
        return int(resolve(name).size())
    except (RuntimeError, ValueError, LookupError):  # LookupError: a torch without this private function
        return 8


def members_of(graph: fx.Graph) -> tuple[int, ...]:
    """Ranks that the graph's collectives reach, this one among them; none without collectives."""
    distributed: Any = torch.distributed
    resolve: Any = vars(distributed.distributed_c10d)["_resolve_process_group"]
    names = {group_of(node) for node in graph.nodes if is_collective(node)}
    return tuple(sorted({rank for name in names for rank in distributed.get_process_group_ranks(resolve(name))}))


def node_us(node: fx.Node, machine: Machine, comm_sms: int) -> float:
    """Time of a node by itself, microseconds: compute on the SMs communication leaves, transfers with nothing beside."""
    if node.op != "call_function":
        return 0.0
    if is_collective(node):
        return estimate_us(collective(node, machine.gpus_per_node), machine)
    found = node_operator(node)
    if found is None:
        return 0.0
    sms = machine.sms if machine.has_comm_engine else max(1, machine.sms - comm_sms)
    return estimate_us(found, machine, sms)


def collective(node: fx.Node, gpus_per_node: int) -> AllToAll:
    """Bytes a rank sends in a collective, over its NIC and over NVLink, every pair of ranks alike."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    ranks = group_size(group_of(node))
    sent = float(max(g.size_bytes(source.meta.get("val")), g.size_bytes(node.meta.get("val"))))
    if node.target is c10d.all_reduce.default:
        sent *= 2.0  # reduce-scatter, then all-gather
    far = max(0, ranks - gpus_per_node) / ranks
    near = (min(ranks, gpus_per_node) - 1) / ranks
    return AllToAll(sent * far, sent * (near + far))


def node_operator(node: fx.Node) -> Operator | None:
    """What the node costs as; None for views, waits and anything that launches nothing."""
    target = node.target
    if target in _FREE or not isinstance(target, torch._ops.OpOverload):
        return None
    val = node.meta.get("val")
    if target in _BF16_GEMMS or target is aten._grouped_mm.default:
        return _gemm(node, is_bf16=True)
    if target in (ops.scaled_mm.default, ops.scaled_grouped_mm.default, ops.scaled_grouped_wgrad.default):
        return _gemm(node, is_bf16=False)
    if target is LINEAR_CROSS_ENTROPY:
        (tokens, hidden), vocabulary = _sizes(_tensor(node, 0)), _sizes(_tensor(node, 1))[0]
        return Gemm(tokens, vocabulary, hidden, len(gemms_of(node.args)), "fprop", is_bf16=True)  # of equal size
    if target in (ops.quantize.default, ops.quantize_delayed.default):
        return Quantize(_elements(_tensor(node, 0)))
    if target is ops.requantize.default:
        return Retile(_elements(_tensor(node, 0)))
    if target in (ops.attention.default, aten.scaled_dot_product_attention.default):
        return _attention(node, 0, is_backward=False)
    if target is ops.attention_backward.default:
        return _attention(node, 1, is_backward=True)
    moved = sum(g.size_bytes(n.meta.get("val")) for n in node.all_input_nodes)
    results = val if isinstance(val, (tuple, list)) else (val,)
    return Elementwise(float(moved + sum(g.size_bytes(v) for v in results)))


def _tensor(node: fx.Node, i: int) -> Any:
    source = node.args[i]
    return source.meta["val"] if isinstance(source, fx.Node) else None


def _sizes(val: Any) -> list[int]:
    return [g.size_hint(s) for s in val.shape]


def _elements(val: Any) -> int:
    count = 1
    for size in _sizes(val):
        count *= size
    return count


def _gemm(node: fx.Node, is_bf16: bool) -> Gemm:
    """Sizes from the operands: the result is [m, n] or [groups, m, n], the reduction is what it lacks.

    A grouped product over ragged rows ([rows, k] x [groups, k, n]) shares its rows evenly; one that reduces over them
    ([m, rows] x [rows, n]) is a weight gradient.
    """
    first = 1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0
    second = first + 1 if is_bf16 else 2
    a, b, out = _sizes(_tensor(node, first)), _sizes(_tensor(node, second)), _sizes(node.meta["val"])
    use = "fprop"
    role = node.meta.get(g.ROLE)
    if role is not None and role.gemm:
        use = str(role.gemm)
    if len(out) == 3 and len(a) == 3:
        return Gemm(out[1], out[2], a[2], out[0], use, is_bf16)
    if len(out) == 3:  # [m, rows] x [rows, n] per group: rows are shared
        rows = _elements(_tensor(node, first)) // out[1]
        return Gemm(out[1], out[2], max(1, rows // out[0]), out[0], "wgrad", is_bf16)
    if len(b) == 3:
        return Gemm(max(1, out[0] // b[0]), out[1], a[1], b[0], use, is_bf16)
    reduction = _elements(_tensor(node, first)) // max(1, out[0])
    return Gemm(out[0], out[1], max(1, reduction), 1, use, is_bf16)


def _attention(node: fx.Node, first: int, is_backward: bool) -> Attention:
    q, v = _sizes(_tensor(node, first)), _sizes(_tensor(node, first + 2))
    return Attention(q[0], q[2], q[1], q[3], v[3], is_backward)
