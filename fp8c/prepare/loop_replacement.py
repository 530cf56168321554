"""A lifted loop put in the loop's place, and what only the loop needed taken out."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from fp8c.prepare.lift import Lifter
from fp8c.prepare.loop_header import names_loaded, names_stored


@dataclass(frozen=True)
class Place:
    """A loop in a function: the block it stands in, what runs before it, and whether another loop encloses it."""

    loop: ast.For
    block: list[ast.stmt]
    before: tuple[ast.stmt, ...]  # simple statements in textual order
    in_loop: bool


def replace(tree: ast.FunctionDef, place: Place, lifter: Lifter) -> None:
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


def _starts_from_zeros(place: Place, name: str) -> bool:
    """Whether the output is made of zeros in the loop's own block and read by nothing else before the loop."""
    stores = [s for s in place.before if name in names_stored(s)]
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
            candidates |= names_loaded(statement.value)
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
    everything = [name for node, _ in order for name in names_loaded(node)]
    dead: list[ast.Assign] = []
    read_later: set[str] = set()
    for node, repeats in reversed(order):
        match node:
            case ast.Assign([ast.Name(name)], value) if name in candidates and _has_no_effect(value):
                if (everything.count(name) == 0) if repeats else (name not in read_later):
                    dead.append(node)
                    continue  # what it reads is read no more
        read_later |= names_loaded(node)
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
