"""The functions of a module that hold its loops: their source, and a rewritten tree compiled in their place."""

from __future__ import annotations
import __future__ as future

import ast
import functools
import inspect
import linecache
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from fp8c import grouped
from fp8c.diagnostics import Span
from fp8c.prepare.experts import Lifted
from fp8c.prepare.loop_values import GROUPED
from fp8c.user_code import short_path

MARK = "__fp8c_loops__"  # of a rewritten function: the loops it had

_FUTURE_FLAGS = functools.reduce(
    lambda flags, name: flags | getattr(future, name).compiler_flag, future.all_feature_names, 0
)


@dataclass(frozen=True)
class Source:
    """A method with its syntax tree, at the positions of its file."""

    name: str
    function: types.FunctionType
    tree: ast.FunctionDef
    file: str

    def span(self, node: ast.AST) -> Span:
        line = getattr(node, "lineno", self.tree.lineno)
        text = linecache.getline(self.file, line).rstrip("\n")
        column = getattr(node, "col_offset", len(text) - len(text.lstrip()))
        same_line = getattr(node, "end_lineno", None) == line
        end = getattr(node, "end_col_offset", None) if same_line else len(text)
        return Span(short_path(self.file), line, column + 1, max(1, (end or len(text)) - column), text)


def reachable_sources(module: nn.Module) -> Iterator[Source]:
    """`forward` and the module's other methods it calls while training, where they have a source and aren't wrapped."""
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        source = method_source(module, name)
        if source is None:
            continue
        yield source
        self_name = source.tree.args.args[0].arg if source.tree.args.args else "self"
        for node in training_nodes(source.tree.body, self_name):
            match node:
                case ast.Call(ast.Attribute(ast.Name(receiver), called)) if receiver == self_name:
                    attribute = _mangled(called, source.function)
                    if attribute not in seen:
                        seen.add(attribute)
                        waiting.append(attribute)


def is_rewritten(function: object) -> bool:
    return hasattr(function, MARK)


def method_source(module: nn.Module, name: str) -> Source | None:
    if name in module.__dict__:  # replaced on the instance by the user
        return None
    function = inspect.getattr_static(type(module), name, None)
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__") or is_rewritten(function):
        return None
    if function.__module__.partition(".")[0] == "torch":
        return None
    file = inspect.getsourcefile(function)
    text = "".join(linecache.getlines(file)) if file else ""
    tree = _trees(text).get((function.__name__, function.__code__.co_firstlineno))
    if tree is None or file is None:
        return None
    return Source(name, function, tree, file)


@functools.lru_cache(maxsize=256)
def _trees(text: str) -> dict[tuple[str, int], ast.FunctionDef]:
    """Every function of a file by name and first line (its first decorator's, as in code objects)."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # changed on disk since it was imported
        return {}
    return {
        (node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])): node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


def training_nodes(body: Sequence[ast.stmt], self_name: str) -> Iterator[ast.AST]:
    """All nodes except those that only run in evaluation (`if self.training: ... else: ...`)."""
    for statement in body:
        taken: Sequence[ast.stmt] | None = None
        if isinstance(statement, ast.If):
            match statement.test:
                case ast.Attribute(ast.Name(name), "training") if name == self_name:
                    taken = statement.body
                case ast.UnaryOp(ast.Not(), ast.Attribute(ast.Name(name), "training")) if name == self_name:
                    taken = statement.orelse
        if taken is not None:
            yield from training_nodes(taken, self_name)
            if taken and isinstance(taken[-1], ast.Return | ast.Raise):
                return  # what follows is for evaluation
            continue
        blocks = [b for b in (getattr(statement, f, None) for f in ("body", "orelse", "finalbody")) if b]
        inside = {id(s) for block in blocks for s in block}
        yield statement
        for child in ast.iter_child_nodes(statement):
            if id(child) not in inside:
                yield from ast.walk(child)
        for block in blocks:
            yield from training_nodes(block, self_name)


def compiled(
    source: Source, tree: ast.FunctionDef, lifted: dict[str, Lifted], loops: tuple[object, ...]
) -> types.FunctionType:
    """Compile the tree as the function it came from: same globals, closure, defaults, file and lines."""
    original = source.function
    key = (original, ast.dump(tree), tuple(lifted.items()))
    if key in _COMPILED:
        return _COMPILED[key]
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    cells |= {name: types.CellType(value) for name, value in {GROUPED: grouped, **lifted}.items()}
    tree.decorator_list, tree.returns = [], None
    for arg in ast.walk(tree.args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    _Mangler(original).visit(tree)
    # Names of the closure are parameters of a function around it, so that the compiler sees them as free variables.
    outer = ast.FunctionDef(
        name="outer",
        args=ast.arguments([], [ast.arg(name) for name in cells], None, [], [], None, []),
        body=[tree],
        decorator_list=[],
    )
    outer = ast.copy_location(outer, tree)
    root = ast.fix_missing_locations(ast.Module([outer], []))
    flags = original.__code__.co_flags & _FUTURE_FLAGS
    code = compile(root, source.file, "exec", flags=flags, dont_inherit=True)
    inner = _code_named(_code_named(code, "outer"), tree.name)
    closure = tuple(cells[name] for name in inner.co_freevars)
    function = types.FunctionType(inner, original.__globals__, original.__name__, original.__defaults__, closure)
    function.__kwdefaults__ = original.__kwdefaults__
    setattr(function, MARK, loops)
    function.__qualname__, function.__module__ = original.__qualname__, original.__module__
    _COMPILED[key] = function
    return function


#: Layers of a model share one function, as they shared one method.
_COMPILED: dict[object, types.FunctionType] = {}


def _code_named(code: types.CodeType, name: str) -> types.CodeType:
    return next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)


def _mangled(name: str, function: types.FunctionType) -> str:
    """`self.__x` means `self._Class__x` inside a class."""
    class_name = function.__qualname__.rpartition(".")[0].rpartition(".")[2].lstrip("_")
    return f"_{class_name}{name}" if name.startswith("__") and not name.endswith("__") and class_name else name


class _Mangler(ast.NodeTransformer):
    """Spells private names out, because the function is compiled outside of its class."""

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        node.attr = _mangled(node.attr, self.function)
        return node
