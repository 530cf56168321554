"""Lift one expert to all of them: a module's forward becomes a function over rows sorted by expert.

The expert is traced with torch.fx, so its body may be any composition of Linear layers, adapters, norms, activations
and elementwise operations. Every GEMM with a parameter becomes one grouped GEMM over the experts' stacked parameters;
any other parameter is gathered per row; everything else acts on rows as it acted on one expert's tokens.

    expert.forward(x):                          lifted(experts, rows, x):
        g = self.gate(x)                            g = linear(x, [m.gate for m in experts], rows)
        return self.down(F.silu(g) * ...)           return linear(silu(g) * ..., [m.down for m in experts], rows)
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fp8c import grouped

Lifted = Callable[..., Any]  # (experts, rows, *per-row tensors) -> per-row tensor


class NotLiftable(Exception):
    """The experts can't run as one; the text says why, as the end of a sentence about them."""


class _Tracer(fx.Tracer):
    record_stack_traces = True


_NORMS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.LayerNorm: F.layer_norm, nn.RMSNorm: F.rms_norm}


def lift_expert(experts: Sequence[nn.Module]) -> Lifted:
    """One function that computes every expert on its own rows.

    Raises: NotLiftable when the experts differ, carry hooks, can't be traced, or hold a layer with parameters that has
            no per-row form.
    """
    first = experts[0]
    key = (type(first), _check_alike(experts))
    if key in _LIFTED:
        return _LIFTED[key]
    try:
        graph = _Tracer().trace(first)
    except Exception as error:  # noqa: BLE001 - fx runs the user's forward on proxies: anything may come out
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotLiftable(f"{type(first).__name__}.forward can't be traced: {reason}") from None
    _LIFTED[key] = _Emitter(first, graph).function()
    return _LIFTED[key]


#: A model's layers have the same experts: trace them once. The functions hold no module and no parameter.
_LIFTED: dict[tuple[type[nn.Module], tuple[object, ...]], Lifted] = {}


def _check_alike(experts: Sequence[nn.Module]) -> tuple[object, ...]:
    """The experts' common signature."""
    first = experts[0]
    want = _signature(first)
    for i, expert in enumerate(experts):
        if type(expert) is not type(first) or _signature(expert) != want:
            raise NotLiftable(f"expert {i} ({type(expert).__name__}) is built differently from expert 0")
        for name, part in expert.named_modules():
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                raise NotLiftable(f"expert {i} has a hook on '{name or type(part).__name__}', which would not run")
    return want


def _signature(module: nn.Module) -> tuple[object, ...]:
    """What two experts must have in common to share a body."""
    return (
        repr(module),
        module.training,
        tuple((name, tuple(p.shape), p.dtype, p.device) for name, p in module.named_parameters(remove_duplicate=False)),
        tuple((name, tuple(b.shape), b.dtype, b.device) for name, b in module.named_buffers(remove_duplicate=False)),
    )


class _Emitter:
    """Writes the lifted function node by node, each statement at the source line it came from."""

    def __init__(self, expert: nn.Module, graph: fx.Graph) -> None:
        self.expert, self.graph = expert, graph
        self.scope: dict[str, Any] = {"grouped": grouped}
        self.lines: list[tuple[str, int]] = []
        self.file = inspect.getsourcefile(type(expert)) or "<expert>"
        self.first_line = type(expert).forward.__code__.co_firstlineno

    def function(self) -> Lifted:
        inputs: list[str] = []
        for node in self.graph.nodes:
            if self.is_only_weight(node):
                continue  # written where the GEMM reads it
            match node.op:
                case "placeholder":
                    inputs.append(node.name if not node.args else f"{node.name}={self.text(node.args[0])}")
                case "output":
                    self.put(node, f"return {self.text(node.args[0])}")
                case "get_attr":
                    self.put(node, f"{node.name} = grouped.entries(grouped.stacked({self.each(node.target)}), rows)")
                case "call_module":
                    self.put(node, f"{node.name} = {self.module_call(node)}")
                case "call_method":
                    receiver, *rest = node.args
                    self.put(
                        node, f"{node.name} = {self.text(receiver)}.{node.target}({self.arguments(rest, node.kwargs)})"
                    )
                case "call_function":
                    self.put(node, f"{node.name} = {self.function_call(node)}")
        return self.compiled(inputs)

    def put(self, node: fx.Node, text: str) -> None:
        places = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
        own = [int(line) for file, line in places if file == self.file]
        self.lines.append((text, own[-1] if own else self.first_line))

    def compiled(self, inputs: list[str]) -> Lifted:
        head = f"def lifted_{type(self.expert).__name__}({', '.join(['experts', 'rows', *inputs])}):"
        tree = ast.parse(head + "\n" + textwrap.indent("\n".join(text for text, _ in self.lines), "    "))
        function = tree.body[0]
        assert isinstance(function, ast.FunctionDef)
        for part in ast.walk(function.args):
            _place(part, self.first_line)
        function.lineno = function.end_lineno = self.first_line
        for statement, (_, line) in zip(function.body, self.lines, strict=True):
            for part in ast.walk(statement):
                _place(part, line)
        scope = dict(self.scope)
        exec(compile(tree, self.file, "exec"), scope)  # noqa: S102 - the text is written above
        lifted = scope[function.name]
        assert isinstance(lifted, types.FunctionType)
        return lifted

    # --- expressions ---

    def each(self, path: str) -> str:
        """The list of every expert's attribute at a dotted path."""
        expression = "m"
        for name in path.split("."):
            expression += f"[{name}]" if name.isdigit() else f".{name}"
        return f"[{expression} for m in experts]"

    def module_call(self, node: fx.Node) -> str:
        module, path = self.expert.get_submodule(str(node.target)), str(node.target)
        x, *rest = node.args
        if type(module).forward is nn.Linear.forward and not rest and not node.kwargs:
            assert isinstance(module, nn.Linear)
            return f"grouped.linear({self.text(x)}, {self.each(path)}, rows)"
        if not any(True for _ in module.parameters()) and not any(True for _ in module.buffers()):
            first = self.each(path).removeprefix("[m").partition(" for ")[0]
            return f"experts[0]{first}({self.arguments(node.args, node.kwargs)})"
        if type(module) in _NORMS:
            norm = self.constant(_NORMS[type(module)])
            text = f"{norm}({self.text(x)}, {tuple(module.normalized_shape)}, eps={module.eps})"  # type: ignore[arg-type]
            if module.weight is not None:
                text = f"({text} * grouped.entries(grouped.stacked({self.each(path + '.weight')}), rows))"
            if getattr(module, "bias", None) is not None:
                text = f"({text} + grouped.entries(grouped.stacked({self.each(path + '.bias')}), rows))"
            return text
        raise NotLiftable(f"the layer '{path}' ({type(module).__name__}) has parameters of its own and no grouped form")

    def function_call(self, node: fx.Node) -> str:
        if node.target in _MATMULS and len(node.args) >= 2 and isinstance(node.args[1], fx.Node):
            weight = self.weight_of(node.args[1], transposed=node.target is F.linear)
            if weight is not None:
                bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
                text = f"grouped.matmul({self.text(node.args[0])}, {weight}, rows)"
                if bias is None:
                    return text
                if isinstance(bias, fx.Node) and bias.op == "get_attr":
                    return text[:-1] + f", grouped.stacked({self.each(str(bias.target))}))"
                return f"({text} + {self.text(bias)})"
        assert callable(node.target)
        return f"{self.constant(node.target)}({self.arguments(node.args, node.kwargs)})"

    def weight_of(self, node: fx.Node, transposed: bool) -> str | None:
        """The stacked [E, in, out] weight behind a chain of transposes of one parameter; None when it is none."""
        while node.op != "get_attr":
            match node.op, node.target, node.args:
                case ("call_method", "t" | "T" | "mT", [fx.Node() as source]):
                    node, transposed = source, not transposed
                case ("call_method", "transpose", [fx.Node() as source, 0 | -2, 1 | -1]):
                    node, transposed = source, not transposed
                case ("call_function", function, [fx.Node() as source, "T" | "mT"]) if function is getattr:
                    node, transposed = source, not transposed
                case _:
                    return None
        value = _attribute(self.expert, str(node.target))
        if not isinstance(value, Tensor) or value.ndim != 2:
            return None
        stack = f"grouped.stacked({self.each(str(node.target))})"
        return f"{stack}.transpose(-2, -1)" if transposed else stack

    def is_only_weight(self, node: fx.Node) -> bool:
        """A parameter, or a transpose of one, that nothing but GEMMs read as weight or bias."""
        if node.op != "get_attr" and self.weight_of(node, transposed=False) is None:
            return False
        return bool(node.users) and all(self.is_weight_of(node, user) for user in node.users)

    def is_weight_of(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether `user` reads the parameter as a GEMM's weight or bias, or only transposes it for one."""
        if user.op == "call_function" and user.target in _MATMULS and len(user.args) >= 2:
            is_bias = user.target is F.linear and node in (*user.args[2:], user.kwargs.get("bias"))
            return (user.args[1] is node or is_bias) and user.args[0] is not node
        transposes = user.op == "call_method" and user.target in ("t", "transpose")
        transposes |= user.op == "call_function" and user.target is getattr and user.args[1] in ("T", "mT")
        transposes = transposes and self.weight_of(user, transposed=False) is not None
        return transposes and all(self.is_weight_of(user, further) for further in user.users)

    def arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
        return ", ".join([*map(self.text, args), *(f"{key}={self.text(value)}" for key, value in kwargs.items())])

    def text(self, value: Any) -> str:
        match value:
            case fx.Node():
                return value.name
            case tuple():
                return f"({', '.join(map(self.text, value))}{',' if len(value) == 1 else ''})"
            case list():
                return f"[{', '.join(map(self.text, value))}]"
            case dict():
                return f"{{{', '.join(f'{k!r}: {self.text(v)}' for k, v in value.items())}}}"
            case slice():
                return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
            case None | bool() | int() | str():
                return repr(value)
            case _:
                return self.constant(value)

    def constant(self, value: Any) -> str:
        stem = re.sub(r"\W", "_", getattr(value, "__name__", type(value).__name__))
        name = f"fp8c_{stem}_{len(self.scope)}"  # apart from the names of nodes
        self.scope[name] = value
        return name


_MATMULS = (F.linear, torch.matmul, torch.mm, operator.matmul)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = value[int(name)] if name.isdigit() and not hasattr(value, name) else getattr(value, name)
    return value


def _place(part: ast.AST, line: int) -> None:
    if isinstance(part, ast.expr | ast.stmt | ast.arg | ast.keyword):
        part.lineno = part.end_lineno = line
        part.col_offset, part.end_col_offset = 0, 1
