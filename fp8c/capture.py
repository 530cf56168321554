"""Capture: from a model's call to the joint graph of its training step, the same at run time and ahead of time.

Dynamo captures the call; before AOTAutograd differentiates it, two rewrites of the forward keep what would be lost:
attention stays one operator, and the router's weight moves in front of the experts' down-projection.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_map

import fp8c.ops.exchange  # noqa: F401  (defines the operators that rows travel with)
from fp8c import graph as g

_SDPA = {torch.nn.functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention}
_GROUPED_MM: set[Any] = {torch._grouped_mm}
if hasattr(torch.nn.functional, "grouped_mm"):
    _GROUPED_MM.add(torch.nn.functional.grouped_mm)
_MULTIPLY = {operator.mul, torch.mul, operator.imul}


def input_names(gm: fx.GraphModule) -> tuple[str, ...]:
    """FQN of every parameter and buffer among the inputs of Dynamo's graph, "" for data and sizes, in order."""
    names = []
    for node in gm.graph.find_nodes(op="placeholder"):
        argument = node.meta.get("grapharg")
        source = getattr(argument, "source", None)
        name = _source_name(source)
        is_state = (
            "_parameters[" in name
            or "_buffers[" in name
            or isinstance(node.meta.get("example_value"), torch.nn.Parameter)
        )
        names.append(g.canonical_path(name) if is_state else "")
    return tuple(names)


def input_examples(gm: fx.GraphModule) -> list[Any]:
    """What Dynamo captured the inputs of its graph from, in order: weak references to tensors, because a session that held the
    parameters would keep a model alive that nobody has any more; objects as they are.
    """
    arguments = [node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder")]
    examples = [None if argument is None else argument.example for argument in arguments]
    return [weakref.ref(example) if isinstance(example, torch.Tensor) else example for example in examples]


def _source_name(source: Any) -> str:
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)  # a method up to torch 2.11, a property later


def prepare_forward(gm: fx.GraphModule, *, move_router_weight: bool = True) -> list[str]:
    """Rewrite Dynamo's forward graph in place; return what was done, for the report."""
    done = []
    of_dynamo = set(gm.graph.nodes)
    kept = keep_attention(gm)
    if kept:
        done.append(f"{kept} attention calls kept as one operator")
    if move_router_weight:
        moved = move_router_weights(gm)
        if moved:
            done.append(f"{moved} router weights moved in front of the down-projection")
    _fill_in_examples(node for node in gm.graph.nodes if node not in of_dynamo)
    gm.graph.lint()
    gm.recompile()
    return done


def _fill_in_examples(made: Iterable[Any]) -> None:
    """Give nodes that were put in, in order, the fake values that Dynamo gives its own: AOTAutograd's cache wants them. Dynamo's
    nodes without one are called for their effect (autocast, grad mode), which they must not have here."""
    for node in made:
        if node.op in ("call_function", "call_method") and "example_value" not in node.meta:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
            with torch.no_grad():
                called = getattr(args[0], node.target) if node.op == "call_method" else node.target
                node.meta["example_value"] = called(*(args[1:] if node.op == "call_method" else args), **kwargs)


def keep_attention(gm: fx.GraphModule) -> int:
    """Replace scaled_dot_product_attention by the opaque fp8c operator, so that no backend decomposes it.

    Attention with dropout is left to PyTorch: the operator's backward has no random numbers to replay. So is attention with
    a mask that is learned (a position bias): the fused kernels give it no gradient.
    """
    changed = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _SDPA:
            continue
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, node.args)) | dict(node.kwargs)
        if given.get("dropout_p", 0.0) != 0.0 or not _has_rank_4(given) or _is_learned(given.get("attn_mask")):
            continue
        out_dtype = node.meta["example_value"].dtype
        unrepeated = _unrepeated(given)
        keys, values = unrepeated or (given["key"], given["value"])
        with gm.graph.inserting_before(node):
            pair = gm.graph.call_function(
                torch.ops.fp8c.attention.default,
                (
                    *(_heads_last(_as_dtype(n, out_dtype)) for n in (given["query"], keys)),
                    _as_dtype(values, out_dtype),
                    given.get("attn_mask"),
                    given.get("is_causal", False),
                    given.get("scale"),
                    given.get("enable_gqa", False) or unrepeated is not None,
                ),
            )
            out = gm.graph.call_function(operator.getitem, (pair, 0))
        _copy_meta(pair, node)
        _copy_meta(out, node)
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
        if unrepeated is not None:
            _erase_unused(gm.graph, (given["key"], given["value"]))
        changed += 1
    return changed


def _unrepeated(given: dict[str, Any]) -> tuple[fx.Node, fx.Node] | None:
    """The keys and values before each head was repeated for the queries that share it, as transformers' `repeat_kv` does
    where a mask keeps it from saying `enable_gqa`. The kernels read a head once for all its queries, and add its gradients
    up themselves; repeated, it is written, read and kept once for each.
    """
    sources = []
    for name in ("key", "value"):
        source = _before_repeat(given[name])
        if source is None:
            return None
        sources.append(source)
    heads = [n.meta["example_value"].shape[1] for n in sources]
    return (sources[0], sources[1]) if heads[0] == heads[1] else None


def _before_repeat(node: fx.Node) -> fx.Node | None:
    """x of `x[:, :, None, :, :].expand(b, h, n, s, d).reshape(b, h * n, s, d)`, or of `x.repeat_interleave(n, 1)`."""
    if node.op == "call_method" and node.target in ("reshape", "view"):
        expand = node.args[0]
        if not isinstance(expand, fx.Node) or expand.op != "call_method" or expand.target != "expand":
            return None
        column = expand.args[0]
        if not isinstance(column, fx.Node) or column.target is not operator.getitem:
            return None
        every = slice(None)
        source, index = column.args
        if index != (every, every, None, every, every) or not isinstance(source, fx.Node):
            return None
        shapes = [n.meta["example_value"].shape for n in (source, expand, node)]
        (batch, heads, rows, width), wide, flat = shapes
        repeats = wide[2]
        if len(wide) != 5 or len(flat) != 4 or not isinstance(repeats, int) or not isinstance(heads, int):
            return None
        same = zip((*wide[:2], *wide[3:], *flat), (batch, heads, rows, width, batch, heads * repeats, rows, width))
        return source if all(statically_known_true(a == b) for a, b in same) else None
    is_repeat = (
        node.target == "repeat_interleave" if node.op == "call_method" else node.target is torch.repeat_interleave
    )
    if not is_repeat or node.op not in ("call_method", "call_function"):
        return None
    given = dict(zip(("self", "repeats", "dim"), node.args)) | dict(node.kwargs)
    source = given.get("self", given.get("input"))
    is_heads = given.get("dim") in (1, -3) and isinstance(given.get("repeats"), int)
    return source if is_heads and isinstance(source, fx.Node) else None


def _erase_unused(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase these nodes and what only they read: views, and the copy behind them."""
    for node in dict.fromkeys(nodes):
        current: Any = node
        while isinstance(current, fx.Node) and current.op in ("call_method", "call_function") and not current.users:
            source = current.args[0] if current.args else None
            graph.erase_node(current)
            current = source


def _heads_last(value: fx.Node) -> fx.Node:
    """Queries or keys stored [batch, position, head, width], which is how projections write them and the output is read: the
    fused kernels store their results as their operands are, so a value put together heads first costs a transposing copy
    of attention's output and of each gradient.
    """
    example = value.meta["example_value"]
    _, heads, rows, width = example.shape
    if all(
        statically_known_true(a == b) for a, b in zip(example.stride(), (rows * heads * width, width, heads * width, 1))
    ):
        return value
    for method, arguments in (("transpose", (1, 2)), ("contiguous", ()), ("transpose", (1, 2))):
        value = _then(value, method, arguments)
    return value


def _then(value: fx.Node, method: str, arguments: tuple[Any, ...]) -> fx.Node:
    """A method of a value, behind it in the graph."""
    made = value.graph.call_method(method, (value, *arguments))
    _copy_meta(made, value)
    made.meta["example_value"] = getattr(value.meta["example_value"], method)(*arguments)
    return made


def _as_dtype(value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The value in attention's output dtype: autocast casts the inputs of PyTorch's attention, not those of ours."""
    if value.meta["example_value"].dtype == dtype:
        return value
    return _then(value, "to", (dtype,))


def _has_rank_4(given: dict[str, Any]) -> bool:
    for name in ("query", "key", "value"):
        example = given[name].meta.get("example_value") if isinstance(given[name], fx.Node) else None
        if example is None or example.dim() != 4:
            return False
    return True


def _is_learned(mask: Any) -> bool:
    return isinstance(mask, fx.Node) and bool(mask.meta["example_value"].requires_grad)


def _copy_meta(new: fx.Node, old: fx.Node) -> None:
    for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
        if key in old.meta:
            new.meta[key] = old.meta[key]


def move_router_weights(gm: fx.GraphModule) -> int:
    """`grouped_mm(h, W) * w` becomes `grouped_mm(h * w, W)`, equal because a GEMM is linear in its rows.

    The gradient of w then needs h, which backward computes again, and no longer the experts' output: that is never kept.
    """
    changed = 0
    for node in list(gm.graph.nodes):
        match = _weighted_expert_output(node)
        if match is None:
            continue
        product, weight = match
        hidden = product.args[0]
        assert isinstance(hidden, fx.Node) and callable(product.target)
        dtype = hidden.meta["example_value"].dtype
        out_dtype = node.meta["example_value"].dtype
        with gm.graph.inserting_before(node):
            wide = gm.graph.call_function(operator.mul, (hidden, _in_float32(weight)))
            scaled = gm.graph.call_method("to", (wide, dtype))
            new = gm.graph.call_function(product.target, (scaled, *product.args[1:]), dict(product.kwargs))
        for made in (wide, scaled, new):
            _copy_meta(made, product)
        node.replace_all_uses_with(new)
        if out_dtype != dtype:
            # Rows travel back in the type the GEMM gave them, and become wider where they arrive.
            arrived = _behind_travel(new)
            with gm.graph.inserting_after(arrived):
                out = gm.graph.call_method("to", (arrived, out_dtype))
            _copy_meta(out, product)
            for user in [user for user in arrived.users if user is not out]:
                user.replace_input_with(arrived, out)
        for dead in (node, *_dead_chain(node, product)):
            gm.graph.erase_node(dead)
        changed += 1
    return changed


def _in_float32(column: fx.Node) -> fx.Node:
    """A column of row weights in FP32. A product with BF16 rows is then rounded once, as in BF16; the weights' gradient, a
    sum over the row, is not rounded term by term.
    """
    if column.meta["example_value"].dtype.itemsize >= torch.float32.itemsize:
        return column
    vector: Any = column
    if column.op == "call_method" and column.target == "unsqueeze":
        vector = column.args[0]
    wide = column.graph.call_method("to", (vector, torch.float32))
    _copy_meta(wide, column)
    if vector is column:
        return wide
    made = column.graph.call_method("unsqueeze", (wide, *column.args[1:]), dict(column.kwargs))
    _copy_meta(made, column)
    return made


def _behind_travel(node: fx.Node) -> fx.Node:
    """The node behind operators of expert parallelism that only move rows."""
    while len(node.users) == 1:
        (user,) = node.users
        packet = getattr(user.target, "overloadpacket", user.target)
        if user.op != "call_function" or packet not in (torch.ops.fp8c.permute_rows, torch.ops.fp8c.exchange):
            break
        node = user
    return node


def _dead_chain(node: fx.Node, product: fx.Node) -> list[fx.Node]:
    """The reshapes between the product and the node that used it, and the product, last use first."""
    factor = next(a for a in node.args if isinstance(a, fx.Node) and _behind_same_shape(a) is product)
    chain = [factor]
    while chain[-1] is not product:
        source = chain[-1].args[0]
        assert isinstance(source, fx.Node)
        chain.append(source)
    return chain


def _weighted_expert_output(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(grouped GEMM, weight [T, 1]) when the node multiplies a grouped GEMM's only use by a column of row weights."""
    if node.op != "call_function" or node.target not in _MULTIPLY:
        return None
    if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    for factor, weight in (node.args, node.args[::-1]):
        assert isinstance(factor, fx.Node) and isinstance(weight, fx.Node)
        product = _behind_same_shape(factor)
        if product.op == "call_function" and product.target in _GROUPED_MM and len(product.users) == 1:
            example, w = product.meta.get("example_value"), weight.meta.get("example_value")
            if example is None or w is None or example.dim() != 2 or w.dim() != 2 or w.shape[-1] != 1:
                continue
            if not isinstance(product.args[0], fx.Node) or product.args[0].meta.get("example_value") is None:
                continue
            if product not in _ancestors(weight):
                return product, weight
    return None


def _behind_same_shape(node: fx.Node) -> fx.Node:
    """The node behind a reshape that changes nothing and has no other reader."""
    while node.op == "call_method" and node.target in ("reshape", "view") and len(node.users) == 1:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            break
        before, after = source.meta.get("example_value"), node.meta.get("example_value")
        if before is None or after is None or before.shape != after.shape:
            break
        node = source
    return node


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    frontier = [node]
    while frontier:
        n = frontier.pop()
        for m in n.all_input_nodes:
            if m not in seen:
                seen.add(m)
                frontier.append(m)
    return seen


def fake_on_cpu(module: nn.Module, batch: Any) -> Any:
    """Give a module without weights fake CPU tensors in place, and return the batch likewise.

    On the meta device itself PyTorch loses the gradient of the cross-entropy loss (it traces a joint graph whose
    backward starts behind it), so planning runs over fake tensors of the CPU: no data either, and a whole backward.
    """
    mode = FakeTensorMode()
    made: dict[int, torch.Tensor] = {}

    def fake_part(shard: torch.Tensor) -> torch.Tensor:
        return FakeTensor(mode, shard, torch.device("cpu"))

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "meta" or isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in made and isinstance(tensor, DTensor):
            part = fake_part(tensor.to_local().detach())
            sharded = DTensor.from_local(
                part,
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
            made[id(tensor)] = nn.Parameter(sharded, requires_grad=tensor.requires_grad)
        elif id(tensor) not in made:
            new: torch.Tensor = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fake(tensor)  # type: ignore[assignment]
    return tree_map(lambda leaf: fake(leaf) if isinstance(leaf, torch.Tensor) else leaf, batch)


def joint_input_names(joint: fx.GraphModule, names: tuple[str, ...]) -> dict[str, str]:
    """Name of every primal of the joint graph, by placeholder name. Raises ValueError when the counts disagree.

    A DTensor's shard has its parameter's name; what else a DTensor is made of (its mesh) has none.
    """
    primals = [n for n in joint.graph.find_nodes(op="placeholder") if not str(n.target).startswith("tangents")]
    by_index = {}
    for position, node in enumerate(primals):
        described = node.meta.get("desc")
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        while hasattr(described, "base"):
            described = described.base
        index = getattr(described, "idx", position)
        if not 0 <= index < len(names):
            raise ValueError(f"the joint graph has input {index}, but the capture has {len(names)}")
        by_index[node.name] = node.meta["fp8c_name"] = names[index] if is_tensor else ""
    return by_index
