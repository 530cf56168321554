"""What a loop over experts runs over, read from the statements in front of it and from the module that it indexes."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fp8c.prepare.lift import Lifter
from fp8c.prepare.loop_values import GROUPED, CannotLift, Count, Index, OneHot, PerRow


def resolver(module: nn.Module, self_name: str, before: Sequence[ast.stmt]) -> Callable[[ast.expr], Any]:
    """Evaluates attribute chains on `self`, constants, len() and arithmetic of them; None for everything else."""
    aliases: dict[str, ast.expr | None] = {}
    for statement in before:
        for name in names_stored(statement):
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


def expert_lists(loop: ast.For, resolve: Callable[[ast.expr], Any]) -> list[int]:
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


def bind(
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
            bind(lifter, item, inner, resolve, definitions, numbered=True)
        case ast.Tuple(targets), ast.Call(ast.Name("zip"), sources) if len(targets) == len(sources):
            for item, inner in zip(targets, sources, strict=True):
                bind(lifter, item, inner, resolve, definitions, numbered=True)
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


def definitions_before(before: Sequence[ast.stmt]) -> dict[str, ast.expr]:
    """Names in front of the loop with expressions that still have their values there."""
    known: dict[str, ast.expr] = {}
    for statement in before:
        stored = names_stored(statement)
        value = None
        match statement:
            case ast.Assign([ast.Name(name)], found):
                # `counts = counts.tolist()`: what the name stood for takes its place in the new expression.
                old = known.get(name)
                value = _Replaced(name, old).visit(copy.deepcopy(found)) if old is not None else found
        known = {n: v for n, v in known.items() if n not in stored and not (names_loaded(v) & stored)}
        match statement:
            case ast.Assign([ast.Name(name)]) if value is not None and name not in names_loaded(value):
                known[name] = value
    return known


class _Replaced(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.expr) -> None:
        self.name, self.value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.value) if node.id == self.name else node


def counts_tensor(node: ast.expr, definitions: dict[str, ast.expr], experts: int) -> str:
    """The tensor of counts behind `counts.tolist()` and the like, as text."""
    match node:
        case ast.Call(ast.Attribute(inner, "tolist" | "cpu" | "numpy"), [], []):
            return counts_tensor(inner, definitions, experts)
        case ast.Name(name) if name in definitions:
            text = counts_tensor(definitions[name], definitions, experts)
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


def one_hots(before: Sequence[ast.stmt]) -> dict[str, OneHot]:
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
        stored = names_stored(statement)
        found = parse(statement.value) if isinstance(statement, ast.Assign) else None
        known = {name: o for name, o in known.items() if name not in stored and not (o.names & stored)}
        match statement:
            case ast.Assign([ast.Name(name)]) if found is not None and name not in found.names:
                known[name] = found
    return known


def check_carried(loop: ast.For, bounds: set[str]) -> None:
    """No value may travel from one expert to the next, except running bounds of sorted rows."""
    everywhere = {name for statement in loop.body for name in names_stored(statement)} - bounds

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
                    stored |= names_stored(target)
                    check(body, stored)
                case ast.With(_, body):
                    check(body, stored)
                case _:
                    read(statement, stored)
                    stored |= names_stored(statement)

    check(loop.body, set())


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


def names_loaded(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def names_stored(statement: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
