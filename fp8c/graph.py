"""The graph contract: helpers to read and edit a joint FX graph of one training step.

The graph is the one AOTAutograd traces, undecomposed: ATen operators plus the opaque `fp8c` operators. Every node
carries `meta["val"]` (a fake tensor), and the forward's `seq_nr` joins a forward operator with its backward ones.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from fp8c.diagnostics import Span
from fp8c.user_code import is_model_file, short_path

aten = torch.ops.aten

#: Operators that move no data or only copy it: the value's elements are those of the first argument, reordered.
RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
    }
)
#: Views between two GEMMs that read one value: the rows stay the rows.
ROW_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.alias.default})
TRANSPOSES = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})
CASTS = frozenset({aten._to_copy.default, torch.ops.prims.convert_element_type.default})
#: Views of a part of a value.
PART_VIEWS = frozenset(
    {
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.select.int,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.chunk.default,
        aten.unbind.int,
    }
)
VIEWS = RESHAPES | TRANSPOSES | PART_VIEWS

MATMULS = frozenset({aten.mm.default, aten.addmm.default})
GROUPED_MATMULS = frozenset({aten._grouped_mm.default})
BATCHED_MATMULS = frozenset({aten.bmm.default, aten.baddbmm.default})
GEMMS = MATMULS | GROUPED_MATMULS | BATCHED_MATMULS

#: What a node is to the plan: the use it belongs to, and for GEMMs which of the three it is. Derived by assign-roles.
ROLE = "fp8c_role"

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def is_call(node: fx.Node, targets: Iterable[Any]) -> bool:
    return node.op == "call_function" and node.target in targets


def is_backward(node: fx.Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


def value(node: fx.Node) -> Any:
    """The fake tensor (or symbol) the node stands for."""
    return node.meta["val"]


def last_dim(node: fx.Node) -> Any:
    return value(node).shape[-1]


def canonical_path(path: str) -> str:
    """A module path as the model's author writes it: Dynamo's prefix and wrapper modules removed.

    `L['self']._modules['model'].layers.0` and `L['self'].model._orig_mod.layers.0` both become `model.layers.0`.
    """
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", path)
    path = re.sub(r"\._?(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", path)
    path = re.sub(r"^_?(?:modules|parameters|buffers)\['([^']*)'\]", r"\1", path)
    path = re.sub(r"\[(\d+)\]", r".\1", path)
    parts = [p for p in path.split(".") if p and p not in _WRAPPERS]
    if parts[:1] == ["__self__"]:  # the call of a module of torch's own, which Dynamo sees as a bound method
        parts = parts[1:]
    if parts[:1] == ["module"]:  # DistributedDataParallel, and fp8c's own StepModule
        parts = parts[1:]
    return ".".join(parts)


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that produced the node (its forward's, for a backward node); "" when unknown."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    return canonical_path(list(stack.values())[-1][0])


_FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n(?P<text>.*)')


def source_span(node: fx.Node) -> Span | None:
    """The model's source line behind a node: the innermost frame that is neither torch's nor fp8c's own."""
    found = _model_frame(node.meta.get("stack_trace") or "")
    return Span(short_path(found[0]), found[1], text=found[2]) if found else None


@functools.lru_cache(maxsize=65536)
def _model_frame(trace: str) -> tuple[str, int, str] | None:
    """(file, line, text); nodes of one model line share their trace, and a large model has ten thousands of nodes."""
    for frame in reversed(list(_FRAME.finditer(trace))):
        if is_model_file(frame["file"]):
            return frame["file"], int(frame["line"]), frame["text"].strip()
    return None


def strip(node: fx.Node, targets: Iterable[Any]) -> fx.Node:
    """Walk up through single-input operators in `targets`."""
    targets = frozenset(targets)
    while is_call(node, targets) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def swaps_last_two(node: fx.Node) -> bool:
    """Whether a transpose node exchanges exactly the last two axes."""
    rank = value(node).dim()
    if node.target is aten.t.default:
        return True
    if node.target is aten.transpose.int:
        return {int(d) % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[arg-type]
    if node.target is aten.permute.default:
        dims = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return dims == [*range(rank - 2), rank - 1, rank - 2]
    return False


def behind_transposes(node: fx.Node, *, casts: bool = False) -> tuple[fx.Node, bool]:
    """The node behind last-two-axes transposes (with `casts`, behind casts as well), and whether their number is odd."""
    odd = False
    while node.op == "call_function" and isinstance(node.args[0] if node.args else None, fx.Node):
        if node.target in TRANSPOSES and swaps_last_two(node):
            odd = not odd
        elif not (casts and node.target in CASTS) and node.target not in (aten.alias.default, aten.detach.default):
            break
        node = node.args[0]  # type: ignore[assignment]
    return node, odd


def fake_call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Run an operator on the fake values of its node arguments."""
    nodes: list[fx.Node] = []

    def collect(node: fx.Node) -> fx.Node:
        nodes.append(node)
        return node

    fx.map_arg((args, kwargs or {}), collect)
    mode = next((value(n).fake_mode for n in nodes if hasattr(n.meta.get("val"), "fake_mode")), None)
    real_args, real_kwargs = fx.map_arg((args, kwargs or {}), lambda n: n.meta["val"])
    if mode is None:
        return target(*real_args, **real_kwargs)
    with mode, torch.no_grad():
        return target(*real_args, **real_kwargs)


_PROVENANCE = (
    *("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", "partitioner_tag", ROLE),
    *("recompute", "ac_graph_id"),  # PyTorch's: the user's checkpoint regions
)


def inherit(node: fx.Node, like: fx.Node) -> None:
    """Give a new node the provenance of the node it stands for."""
    for key in _PROVENANCE:
        if key in like.meta and key not in node.meta:
            node.meta[key] = like.meta[key]
    if "autograd_backward" in like.meta:
        node.meta["autograd_backward"] = like.meta["autograd_backward"]


def emit(graph: fx.Graph, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Insert a call with its fake value and the provenance of `like`. The insertion point is the caller's."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = fake_call(target, args, kwargs)
    inherit(node, like)
    return node


def emit_pair(graph: fx.Graph, target: Callable[..., Any], *args: Any, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Insert an operator with two results; return the two `getitem` nodes."""
    node = emit(graph, target, *args, like=like)
    first, second = (emit(graph, operator.getitem, node, i, like=like) for i in range(2))
    return first, second


def transpose_last_two(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    """The node with its last two axes exchanged; a transpose of a transpose is its source."""
    if is_call(node, {aten.permute.default}) and swaps_last_two(node):
        return node.args[0]  # type: ignore[return-value]
    rank = value(node).dim()
    dims = [*range(rank - 2), rank - 1, rank - 2]
    return emit(graph, aten.permute.default, node, dims, like=like)


def after(node: fx.Node) -> fx.Node:
    """Where to insert what reads `node`: in front of its successor, and behind all inputs, which stay together."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def gradients(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on a tangent: what backward alone can compute."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and str(node.target).startswith("tangents")
        if is_tangent or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def output_node(graph: fx.Graph) -> fx.Node:
    last: fx.Node = next(iter(reversed(graph.nodes)))
    return last


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same names and shallow copies of the metadata."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, env.__getitem__)
    new._codegen = graph._codegen
    return new


def _argument_text(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return f"%{argument.name}"
    if isinstance(argument, (list, tuple)):
        inner = ", ".join(_argument_text(a) for a in argument)
        return f"({inner})" if isinstance(argument, tuple) else f"[{inner}]"
    if isinstance(argument, dict):
        return "{" + ", ".join(f"{k}={_argument_text(v)}" for k, v in argument.items()) + "}"
    if isinstance(argument, str):
        return f"'{argument}'"
    return str(argument).replace("torch.", "")


_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.float8_e8m0fnu: "e8m0",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}


def type_text(val: Any) -> str:
    """`bf16[256, 512]` for a tensor, a parenthesised list for several, the symbol for a SymInt."""
    if isinstance(val, torch.Tensor):
        return f"{_DTYPES.get(val.dtype, str(val.dtype))}[{', '.join(str(d) for d in val.shape)}]"
    if isinstance(val, (list, tuple)):
        return "(" + ", ".join(type_text(v) for v in val) + ")"
    if val is None:
        return ""
    is_number = isinstance(val, (bool, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool))
    return str(val) if is_number else type(val).__name__  # an object's own text may hold an address, or a rank


def target_text(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target.name()).replace("::", ".")  # type: ignore[no-untyped-call]
        return name.removesuffix(".default")
    return str(getattr(target, "__name__", target))


def node_text(node: fx.Node, *, provenance: bool = True) -> str:
    """One line of the canonical text: `%y = fp8c.scaled_mm(%q, ...) : bf16[256, 128]   # path  file:line`."""
    if node.op == "placeholder":
        text = f"%{node.name} = input({node.meta.get('fp8c_name', '')})"
    elif node.op == "output":
        return f"return {_argument_text(node.args[0])}"
    elif node.op == "get_attr":
        text = f"%{node.name} = attribute({node.target})"
    else:
        arguments = [_argument_text(a) for a in node.args]
        arguments += [f"{k}={_argument_text(v)}" for k, v in node.kwargs.items()]
        text = f"%{node.name} = {target_text(node.target)}({', '.join(arguments)})"
    shown = type_text(node.meta.get("val"))
    if shown:
        text += f" : {shown}"
    if provenance and node.op == "call_function":
        role = node.meta.get(ROLE)
        span = source_span(node)
        notes = [str(role)] if role else ([module_path(node)] if module_path(node) else [])
        if span:
            notes.append(f"{span.file.rsplit('/', 1)[-1]}:{span.line}")
        if notes:
            text += "   # " + "  ".join(notes)
    return text


def graph_text(graph: fx.Graph, name: str, *, provenance: bool = True) -> str:
    """The canonical text of a graph; depends on the model only, never on addresses or time."""
    lines = [f"graph {name}"]
    lines += ["  " + node_text(node, provenance=provenance) for node in graph.nodes]
    return "\n".join(lines) + "\n"


def structural_hash(graph: fx.Graph) -> str:
    """SHA-256 over operators, arguments and types, with nodes numbered in order: names and metadata do not count."""
    numbers: dict[fx.Node, int] = {}
    digest = hashlib.sha256()
    for i, node in enumerate(graph.nodes):
        numbers[node] = i
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
        digest.update(f"{node.op}|{target_text(node.target)}|{arguments}|{type_text(node.meta.get('val'))}\n".encode())
    return digest.hexdigest()


def portable_hash(graph: fx.Graph, *, has_sizes: bool = True) -> str:
    """SHA-256 over operators, arguments and types, the same on every device and rank: where tensors live does not
    count, nor how a process group is called. Without sizes, ranks that own different numbers of experts agree as well:
    numbers don't count, and of types only data type and rank."""
    numbers: dict[fx.Node, int] = {}
    digest = hashlib.sha256()

    def shown(argument: Any) -> Any:
        if not has_sizes and isinstance(argument, (int, torch.SymInt)) and not isinstance(argument, bool):
            return "number"
        return "device" if isinstance(argument, torch.device) else argument

    def type_of(val: Any) -> str:
        if has_sizes:
            return type_text(val)
        leaves = pytree.tree_leaves(val)
        return str([(str(v.dtype), v.dim()) if isinstance(v, torch.Tensor) else type(v).__name__ for v in leaves])

    for i, node in enumerate(graph.nodes):
        numbers[node] = i
        args = node.args
        if getattr(node.target, "namespace", "") == "_c10d_functional":
            args = tuple("group" if isinstance(a, str) else a for a in args)
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory")}
        arguments = fx.map_arg((args, kwargs), lambda n: f"%{numbers[n]}")
        kept = pytree.tree_map(shown, arguments)
        digest.update(f"{node.op}|{target_text(node.target)}|{kept}|{type_of(node.meta.get('val'))}\n".encode())
    return digest.hexdigest()


def same_sizes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values surely have the same shape: sizes that are known only at run time are compared as expressions,
    never guarded on."""
    return a.dim() == b.dim() and all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape))


UNKNOWN_SIZE = 4096  # stands for a size that is known in the step alone


def size_hint(size: Any) -> int:
    """The example value of a size; symbolic sizes are asked for their hint, never specialised."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    hint = getattr(node, "hint", None) if node is not None else None
    return int(hint) if hint is not None else UNKNOWN_SIZE


def size_bytes(val: Any) -> int:
    """Bytes of a dense tensor value (0 for anything else), symbolic sizes by their hint."""
    if not isinstance(val, torch.Tensor):
        return 0
    count = 1
    for size in val.shape:
        count *= size_hint(size)
    return count * val.dtype.itemsize


def calls(graph: fx.Graph, targets: Iterable[Any]) -> Iterator[fx.Node]:
    """Nodes of the graph that call one of `targets`, in order; a snapshot, so the caller may edit."""
    wanted = frozenset(targets)
    yield from [n for n in graph.nodes if n.op == "call_function" and n.target in wanted]
