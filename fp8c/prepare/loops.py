"""Rewrite loops over experts in a module's own source to grouped GEMMs.

The loop is found by what it does: it indexes a list of experts by its variable and selects each expert's tokens by the
data. Its body is lifted to all experts at once (`fp8c.prepare.lift`), put in the loop's place, and the function compiled
again, at the same lines of the same file. The module's class and its other instances stay as they are.
"""

from __future__ import annotations
import __future__ as future

import ast
import copy
import functools
import inspect
import linecache
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fp8c import grouped
from fp8c.diagnostics import Diagnostic, Span
from fp8c.prepare.experts import Lifted
from fp8c.prepare.lift import Lifter
from fp8c.prepare.loop_values import GROUPED, Bound, CannotLift, Count, Index, OneHot, PerRow
from fp8c.user_code import short_path

_FUTURE_FLAGS = functools.reduce(
    lambda flags, name: flags | getattr(future, name).compiler_flag, future.all_feature_names, 0
)


@dataclass(frozen=True)
class Loop:
    """A loop that became grouped GEMMs: where it stands, over how many experts it ran, and the paths in its module of
    what it indexed by the expert: lists of modules or parameters, and tensors."""

    span: Span
    experts: int
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rewrite:
    """One function of one module, rewritten."""

    module: nn.Module
    method: str
    function: types.FunctionType

    def install(self) -> None:
        # A subclass of the same name for this instance: its class and other instances stay untouched, and it is named,
        # copied and traced like any module (a function bound to the instance would be traced through its `__self__`).
        self.module.__class__ = _subclass(type(self.module), self.method, self.function)


def _subclass(base: type[nn.Module], method: str, function: types.FunctionType) -> type[nn.Module]:
    key = (base, method, function)
    if key not in _SUBCLASSES:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _SUBCLASSES[key] = made = type(base.__name__, (base,), {method: function, **names})
        _BASES[made] = base
    return _SUBCLASSES[key]


#: Layers of a model share one class, as they did before.
_SUBCLASSES: dict[object, type[nn.Module]] = {}
_BASES: dict[type[nn.Module], type[nn.Module]] = {}


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before its loops were rewritten."""
    found = type(module)
    while found in _BASES:
        found = _BASES[found]
    return found


def rewritten_loops(module: nn.Module) -> tuple[Loop, ...]:
    """The loops of a module that run as grouped GEMMs now."""
    found: list[Loop] = []
    cls = type(module)
    while cls in _BASES:
        for value in vars(cls).values():
            found += getattr(value, _MARK, ())
        cls = _BASES[cls]
    return tuple(found)


def is_rewritten(function: object) -> bool:
    return hasattr(function, _MARK)


_MARK = "__fp8c_loops__"  # of a rewritten function: the loops it had


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


def rewrite_loops(module: nn.Module) -> tuple[list[Rewrite], list[Diagnostic]]:
    """The rewrites of one module's own methods that a training step reaches, and why loops can't be rewritten.

    Nothing is installed yet.
    """
    rewrites: list[Rewrite] = []
    errors: list[Diagnostic] = []
    for source in reachable_sources(module):
        try:
            found = _rewrite_function(module, source)
        except CannotLift as error:
            errors.append(
                Diagnostic(
                    "E0820",
                    f"the loop over experts can't become grouped GEMMs: {error.message}",
                    source.span(error.node),
                    notes=(f"in {type(module).__name__}.{source.name}",),
                    help=error.help
                    or "write the loop as in the page on models: select tokens with "
                    "`torch.where(indices == i)`, call the expert on them, add the result with `y[token] += ...`",
                )
            )
            continue
        if found is not None:
            rewrites.append(found)
    return rewrites, errors


# --- finding ----------------------------------------------------------------------------------------------------------


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
        for node in _training_nodes(source.tree.body, self_name):
            match node:
                case ast.Call(ast.Attribute(ast.Name(receiver), called)) if receiver == self_name:
                    attribute = _mangled(called, source.function)
                    if attribute not in seen:
                        seen.add(attribute)
                        waiting.append(attribute)


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


def _training_nodes(body: Sequence[ast.stmt], self_name: str) -> Iterator[ast.AST]:
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
            yield from _training_nodes(taken, self_name)
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
            yield from _training_nodes(block, self_name)


def selects_by_data(loop: ast.For) -> bool:
    """Whether the loop's shapes depend on data, so that no graph can hold it as it is."""
    for node in ast.walk(loop):
        match node:
            case ast.Call(ast.Attribute(_, "nonzero" | "argwhere" | "item" | "tolist" | "masked_select")):
                return True
            case ast.Call(ast.Attribute(_, "where"), [_], []) | ast.Call(ast.Name("where"), [_], []):
                return True
            case ast.Call(ast.Attribute(_, "any"), [], []) | ast.Call(ast.Attribute(_, "any"), [_], []):
                return True
            case ast.Subscript(_, ast.Compare()):
                return True
            case ast.Subscript(slice=ast.Slice(ast.Name(), ast.Name())):  # x[start:end] of running bounds
                return True
    return not isinstance(loop.iter, ast.Call | ast.Attribute)


# --- rewriting one function -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A loop in a function: the block it stands in, what runs before it, and whether another loop encloses it."""

    loop: ast.For
    block: list[ast.stmt]
    before: tuple[ast.stmt, ...]  # simple statements in textual order
    in_loop: bool


def _rewrite_function(module: nn.Module, source: Source) -> Rewrite | None:
    tree = copy.deepcopy(source.tree)
    self_name = tree.args.args[0].arg if tree.args.args else "self"
    if not any(isinstance(node, ast.For) for node in _training_nodes(tree.body, self_name)):
        return None
    training = {id(node) for node in _training_nodes(tree.body, self_name)}
    done: list[Loop] = []
    lifted: dict[str, Lifted] = {}
    skipped: set[int] = set()
    while True:
        places = [p for p in _loops(tree.body) if id(p.loop) not in skipped and id(p.loop) in training]
        if not places:
            break
        place = places[0]
        span = source.span(place.loop)
        lifter = _lift_loop(module, tree, self_name, place, len(done))
        if lifter is None:
            skipped.add(id(place.loop))  # its inner loops are looked at next
            continue
        _replace(tree, place, lifter)
        lifted.update(lifter.lifted)
        done.append(Loop(span, lifter.experts, _paths(module, lifter.tables)))
    if not done:
        return None
    return Rewrite(module, source.name, _compiled(source, tree, lifted, tuple(done)))


def _paths(module: nn.Module, tables: Sequence[Any]) -> tuple[str, ...]:
    """Where the module holds these lists and tensors; locals are left out."""
    wanted = {id(table) for table in tables}
    named = [*module.named_modules(), *module.named_parameters(), *module.named_buffers()]
    return tuple(name for name, found in named if id(found) in wanted and name)


def _loops(body: list[ast.stmt]) -> Iterator[_Place]:
    """All for-loops of a function, outer before inner."""

    def visit(block: list[ast.stmt], before: list[ast.stmt], in_loop: bool) -> Iterator[_Place]:
        for statement in block:
            if isinstance(statement, ast.For):
                yield _Place(statement, block, tuple(before), in_loop)
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr | ast.Return):
                before.append(statement)
            for name in ("body", "orelse", "finalbody"):
                inner = getattr(statement, name, None)
                if inner and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                    yield from visit(inner, before, in_loop or isinstance(statement, ast.For | ast.While))

    yield from visit(body, [], in_loop=False)


def _lift_loop(module: nn.Module, tree: ast.FunctionDef, self_name: str, place: _Place, number: int) -> Lifter | None:
    """The lifted loop; None for a loop that is none over experts, or needs no rewriting."""
    loop = place.loop
    resolve = _resolver(module, self_name, place.before)
    lists = _expert_lists(loop, resolve)
    if not lists:
        return None
    experts = lists[0]
    definitions = _definitions(place.before)
    tensor_of = functools.partial(_tensor_of, definitions=definitions, experts=experts)
    prefix = f"{number}_" if number else ""
    lifter = Lifter(experts, resolve, _one_hots(place.before), tensor_of, prefix=prefix, owner=self_name)
    # What the target needs (the rows of a split) is emitted at the loop's own line.
    lifter.here = loop
    try:
        _bind(lifter, loop.target, loop.iter, resolve, definitions)
        if loop.orelse:
            raise CannotLift(loop.orelse[0], "the loop has an else branch")
        bounds = {name for name in _stored(loop) if resolve(ast.Name(name, ast.Load())) == 0}
        _check_carried(loop, bounds)
        lifter.env.update({name: Bound() for name in bounds})
        lifter.body(loop.body)
        if not lifter.selects:
            raise CannotLift(loop, "it selects no tokens by the expert's index")
    except CannotLift:
        if lifter.selects or selects_by_data(loop):
            raise
        return None  # a static loop, over layers or dense experts: capture unrolls it as it is
    return lifter


def _resolver(module: nn.Module, self_name: str, before: Sequence[ast.stmt]) -> Callable[[ast.expr], Any]:
    """Evaluates attribute chains on `self`, constants, len() and arithmetic of them; None for everything else."""
    aliases: dict[str, ast.expr | None] = {}
    for statement in before:
        for name in _stored(statement):
            match statement:
                case ast.Assign([ast.Name()], value) if name not in aliases:
                    aliases[name] = value
                case _:
                    aliases[name] = None

    def value_of(node: ast.expr, depth: int = 0) -> Any:
        match node:
            case ast.Name(name) if name == self_name:
                return module
            case ast.Name(name) if aliases.get(name) is not None and depth < 8:
                alias = aliases[name]
                assert alias is not None
                return value_of(alias, depth + 1)
            case ast.Attribute(owner, name):
                found = value_of(owner, depth)
                return getattr(found, name, None) if found is not None and not isinstance(found, Tensor) else None
            case ast.Constant(int() | str() as value):
                return value
            case ast.Call(ast.Name("len"), [arg], []):
                found = value_of(arg, depth)
                return len(found) if hasattr(found, "__len__") else None
            case ast.BinOp(left, op, right):
                a, b = value_of(left, depth), value_of(right, depth)
                if isinstance(a, int) and isinstance(b, int):
                    match op:
                        case ast.Add():
                            return a + b
                        case ast.Sub():
                            return a - b
                        case ast.Mult():
                            return a * b
                        case ast.FloorDiv() if b:
                            return a // b
        return None

    return value_of


def _expert_lists(loop: ast.For, resolve: Callable[[ast.expr], Any]) -> list[int]:
    """Lengths of the lists of modules (or stacked parameters) that the loop takes by its variable, in order."""
    targets = {n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)}
    found: list[int] = []

    def consider(node: ast.expr) -> None:
        owner = resolve(node)
        if isinstance(owner, nn.ModuleList | nn.ModuleDict | nn.ParameterList) and len(owner) > 1:
            found.append(len(owner))
        elif isinstance(owner, nn.Parameter) and owner.ndim >= 3:
            found.append(owner.shape[0])

    def sources(node: ast.expr) -> Iterator[ast.expr]:
        match node:
            case ast.Call(ast.Name("enumerate" | "zip"), args):
                for arg in args:
                    yield from sources(arg)
            case ast.Attribute() | ast.Name():
                yield node

    for source in sources(loop.iter):
        consider(source)
    for node in ast.walk(loop):
        if isinstance(node, ast.Subscript) and any(
            isinstance(n, ast.Name) and n.id in targets for n in ast.walk(node.slice)
        ):
            consider(node.value)
    return found


def _bind(
    lifter: Lifter,
    target: ast.expr,
    source: ast.expr,
    resolve: Callable[[ast.expr], Any],
    definitions: dict[str, ast.expr],
    numbered: bool = False,
) -> None:
    """Say what the loop's variables are. `numbered`: another variable counts the experts, or takes them along."""
    match target, source:
        case ast.Tuple([ast.Name(i), item]), ast.Call(ast.Name("enumerate"), [inner], []):
            lifter.env[i] = Index()
            _bind(lifter, item, inner, resolve, definitions, numbered=True)
        case ast.Tuple(targets), ast.Call(ast.Name("zip"), sources) if len(targets) == len(sources):
            for item, inner in zip(targets, sources, strict=True):
                _bind(lifter, item, inner, resolve, definitions, numbered=True)
        case ast.Name(i), ast.Call(ast.Name("range"), args, []):
            bounds = [resolve(arg) for arg in args]
            start, stop, step = {1: [0, *bounds, 1], 2: [*bounds, 1]}.get(len(bounds), bounds)
            known = all(isinstance(b, int) for b in (start, stop, step))
            if known and (start, stop, step) != (0, lifter.experts, 1):
                raise CannotLift(
                    source,
                    f"the loop covers experts {start} to {stop} of {lifter.experts}",
                    "loop over all experts; experts on other ranks need an expert-parallel dispatch",
                )
            lifter.env[i] = Index()
        case ast.Name(item), _:
            owner, split = resolve(source), _split(source, definitions)
            if isinstance(owner, nn.ModuleList | nn.ParameterList):
                lifter.env[item] = lifter.from_list(source, ast.unparse(source), owner)
            elif split is not None:
                rows, lifter.counts = split
                text = ast.unparse(rows)
                lifter.env[item] = PerRow(text, lifter.counted(source, text), at_home=True)
            elif numbered:  # `for i, count in enumerate(counts)`
                lifter.env[item], lifter.counts = Count(), source
            else:  # `for e in hit`: the experts that have tokens; the others have nothing to add
                lifter.env[item] = Index(boxed=True)
        case _:
            raise CannotLift(
                target,
                f"`for {ast.unparse(target)} in {ast.unparse(source)}` is not a known loop over experts",
                "write `for i, expert in enumerate(self.experts)`",
            )


def _definitions(before: Sequence[ast.stmt]) -> dict[str, ast.expr]:
    """Names in front of the loop with expressions that still have their values there."""
    known: dict[str, ast.expr] = {}
    for statement in before:
        stored = _stored(statement)
        value = None
        match statement:
            case ast.Assign([ast.Name(name)], found):
                # `counts = counts.tolist()`: what the name stood for takes its place in the new expression.
                old = known.get(name)
                value = _Replaced(name, old).visit(copy.deepcopy(found)) if old is not None else found
        known = {n: v for n, v in known.items() if n not in stored and not (_loaded(v) & stored)}
        match statement:
            case ast.Assign([ast.Name(name)]) if value is not None and name not in _loaded(value):
                known[name] = value
    return known


class _Replaced(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.expr) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.value) if node.id == self.name else node


def _tensor_of(node: ast.expr, definitions: dict[str, ast.expr], experts: int) -> str:
    """The tensor of counts behind `counts.tolist()` and the like, as text."""
    match node:
        case ast.Call(ast.Attribute(inner, "tolist" | "cpu" | "numpy"), [], []):
            return _tensor_of(inner, definitions, experts)
        case ast.Name(name) if name in definitions:
            text = _tensor_of(definitions[name], definitions, experts)
            return name if text == ast.unparse(definitions[name]) else text
        # Its length depends on data, unless the number of experts is known.
        case ast.Call(ast.Attribute(ast.Name("torch"), "bincount"), [decision, *_]):
            return f"{GROUPED}.histogram({ast.unparse(decision)}, {experts})"
        case ast.Call(ast.Attribute(decision, "bincount"), []):
            return f"{GROUPED}.histogram({ast.unparse(decision)}, {experts})"
        case _:
            return ast.unparse(node)


def _split(node: ast.expr, definitions: dict[str, ast.expr]) -> tuple[ast.expr, ast.expr] | None:
    """Rows and counts of `torch.split(rows, counts)`, by name or in place."""
    match node:
        case ast.Name(name) if name in definitions:
            return _split(definitions[name], definitions)
        case ast.Call(ast.Attribute(ast.Name("torch"), "split"), args, keywords):
            names = ["tensor", "split_size_or_sections", "dim"]
        case ast.Call(ast.Attribute(rows, "split"), args, keywords):
            names, args = ["tensor", "split_size", "dim"], [rows, *args]
        case _:
            return None
    given = dict(zip(names, args, strict=False)) | {k.arg: k.value for k in keywords if k.arg is not None}
    axis = given.get("dim")
    counts = given.get("split_size_or_sections", given.get("split_size"))
    if counts is None or "tensor" not in given or (axis is not None and ast.unparse(axis) != "0"):
        return None
    return given["tensor"], counts


def _loaded(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _check_carried(loop: ast.For, bounds: set[str]) -> None:
    """No value may travel from one expert to the next, except running bounds of sorted rows."""
    everywhere = {name for statement in loop.body for name in _stored(statement)} - bounds

    def read(node: ast.AST, stored: set[str]) -> None:
        match node:
            case ast.AugAssign(ast.Subscript(ast.Name(), index), _, value):  # an output, not a carried value
                read(index, stored)
                read(value, stored)
                return
        for part in ast.walk(node):
            is_read = isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
            if isinstance(part, ast.AugAssign):  # its target is read, though written as a store
                is_read, part = isinstance(part.target, ast.Name), part.target
            if is_read and isinstance(part, ast.Name) and part.id in everywhere - stored:
                raise CannotLift(
                    part,
                    f"'{part.id}' carries a value from one expert to the next",
                    "select each expert's tokens with `torch.where(indices == i)` instead of running bounds or counters",
                )

    def check(block: Sequence[ast.stmt], stored: set[str]) -> None:
        for statement in block:
            match statement:
                case ast.Assign([ast.Name(a)], ast.Call(ast.Attribute(ast.Name(b), "index_add"))) if a == b:
                    continue  # lifted as an addition
                case ast.If(test, body, orelse):
                    read(test, stored)
                    check(body, stored)
                    check(orelse, stored)
                case ast.For(target, source, body):
                    read(source, stored)
                    stored |= _stored(target)
                    check(body, stored)
                case ast.With(_, body):
                    check(body, stored)
                case _:
                    read(statement, stored)
                    stored |= _stored(statement)

    check(loop.body, set())


def _stored(statement: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _one_hots(before: Sequence[ast.stmt]) -> dict[str, OneHot]:
    """One-hot masks that still mean what they meant when they were made."""
    known: dict[str, OneHot] = {}

    def parse(node: ast.expr) -> OneHot | None:
        match node:
            case ast.Name(name):
                return known.get(name)
            case ast.Call(ast.Attribute(_, "one_hot") | ast.Name("one_hot"), [decision, *_]):
                names = frozenset(n.id for n in ast.walk(decision) if isinstance(n, ast.Name))
                return OneHot(ast.unparse(decision), None, names)
            case ast.Call(ast.Attribute(inner, "to" | "bool" | "float" | "int" | "long" | "contiguous")):
                return parse(inner)
            case ast.Call(ast.Attribute(inner, "permute"), args) if (source := parse(inner)) is not None:
                items = args[0].elts if len(args) == 1 and isinstance(args[0], ast.Tuple | ast.List) else args
                try:
                    axes = [ast.literal_eval(item) for item in items]
                except ValueError:
                    return None
                order = source.order or (*range(len(axes) - 1), -1)
                return OneHot(source.decision, tuple(order[a] for a in axes), source.names)
            case ast.Call(ast.Attribute(inner, "transpose"), [a, b]) if (source := parse(inner)) is not None:
                # A routing decision has two axes, tokens and choices, unless a permute said otherwise.
                swapped = list(source.order or (0, 1, -1))
                try:
                    i, j = ast.literal_eval(a), ast.literal_eval(b)
                    swapped[i], swapped[j] = swapped[j], swapped[i]
                except (ValueError, IndexError):
                    return None
                return OneHot(source.decision, tuple(swapped), source.names)
        return None

    for statement in before:
        stored = _stored(statement)
        found = parse(statement.value) if isinstance(statement, ast.Assign) else None
        known = {name: o for name, o in known.items() if name not in stored and not (o.names & stored)}
        match statement:
            case ast.Assign([ast.Name(name)]) if found is not None and name not in found.names:
                known[name] = found
    return known


# --- putting the lifted loop in ---------------------------------------------------------------------------------------


def _replace(tree: ast.FunctionDef, place: _Place, lifter: Lifter) -> None:
    loop = place.loop
    for accumulation in lifter.accumulations:
        once = sum(a.name == accumulation.name for a in lifter.accumulations) == 1
        if once and not accumulation.nested and _starts_from_zeros(place, accumulation.name):
            statement = accumulation.statement
            assert isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name)
            new = ast.copy_location(ast.Assign([statement.target], statement.value), statement)
            lifter.out[lifter.out.index(statement)] = new
    at = next(i for i, s in enumerate(place.block) if s is loop)
    place.block[at : at + 1] = lifter.out
    _drop_unused(tree, {n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)})


def _starts_from_zeros(place: _Place, name: str) -> bool:
    """Whether the output is made of zeros in the loop's own block and read by nothing else before the loop."""
    stores = [s for s in place.before if name in _stored(s)]
    reads = any(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)
        for s in place.before
        for n in ast.walk(s)
    )
    if len(stores) != 1 or reads or not any(s is stores[0] for s in place.block):
        return False
    match stores[0]:
        case ast.Assign([ast.Name()], ast.Call(ast.Attribute(_, "zeros" | "zeros_like" | "new_zeros"))):
            return True
    return False


def _drop_unused(tree: ast.FunctionDef, candidates: set[str]) -> None:
    """Remove what only the loop needed (masks, counts, lists of hit experts): some of it has data-dependent shapes.

    candidates: the names the loop read; what they were computed from becomes a candidate with them.
    """
    candidates -= {a.arg for a in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)}
    while dead := _dead_assignments(tree.body, candidates):
        for statement in dead:
            candidates |= _loaded(statement.value)
        _Dropper({id(statement) for statement in dead}).visit(tree)


def _dead_assignments(body: list[ast.stmt], candidates: set[str]) -> list[ast.Assign]:
    """Assignments to candidates that nothing reads afterwards; inside loops, that nothing reads at all."""
    order: list[tuple[ast.AST, bool]] = []  # statements and conditions in the order they run, and whether they repeat

    def visit(block: Sequence[ast.stmt], repeats: bool) -> None:
        for statement in block:
            match statement:
                case ast.If(test, inner, orelse):
                    order.append((test, repeats))
                    visit(inner, repeats)
                    visit(orelse, repeats)
                case ast.With(_, inner):
                    order.extend((item, repeats) for item in statement.items)
                    visit(inner, repeats)
                case ast.For(target, source, inner, orelse):
                    order.extend([(source, repeats), (target, repeats)])
                    visit(inner, True)
                    visit(orelse, repeats)
                case _:
                    order.append((statement, repeats))

    visit(body, False)
    everything = [name for node, _ in order for name in _loaded(node)]
    dead: list[ast.Assign] = []
    read_later: set[str] = set()
    for node, repeats in reversed(order):
        match node:
            case ast.Assign([ast.Name(name)], value) if name in candidates and _has_no_effect(value):
                if (everything.count(name) == 0) if repeats else (name not in read_later):
                    dead.append(node)
                    continue  # what it reads is read no more
        read_later |= _loaded(node)
    return dead


def _has_no_effect(node: ast.expr) -> bool:
    """Whether an expression only computes: tensor methods and torch functions, nothing in place, nothing of the model's."""
    for part in ast.walk(node):
        match part:
            case ast.Call(ast.Attribute(ast.Name(owner), _)) if owner in ("torch", "F"):
                pass
            case ast.Call(ast.Attribute(ast.Name("self" | "cls"), _)):
                return False
            case ast.Call(ast.Attribute(_, name)):
                if name.endswith("_"):
                    return False
            case ast.Call(ast.Name(name)):
                if name not in ("len", "int", "list", "tuple", "range", "sum", "max", "min", "one_hot"):
                    return False
            case ast.NamedExpr() | ast.Await() | ast.Yield() | ast.YieldFrom():
                return False
    return True


class _Dropper(ast.NodeTransformer):
    def __init__(self, dead: set[int]) -> None:
        self.dead = dead

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if id(node) in self.dead else node

    def visit_With(self, node: ast.With) -> ast.AST | None:
        self.generic_visit(node)
        return node if node.body else None

    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        node.body = node.body or [ast.copy_location(ast.Pass(), node)]
        return node


def _compiled(
    source: Source, tree: ast.FunctionDef, lifted: dict[str, Lifted], loops: tuple[Loop, ...]
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
    setattr(function, _MARK, loops)
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
