"""Rewrite loops over experts in a module's own source to grouped GEMMs.

The loop is found by what it does: it indexes a list of experts by its variable and selects each expert's tokens by the
data (`loop_header`). Its body is lifted to all experts at once (`lift`), put in the loop's place (`loop_replacement`), and
the function compiled again, at the same lines of the same file (`loop_source`). The module's class and its other instances
stay as they are.
"""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fp8c.diagnostics import Diagnostic, Span
from fp8c.prepare.experts import Lifted
from fp8c.prepare.lift import Lifter
from fp8c.prepare.loop_header import (
    bind,
    check_carried,
    counts_tensor,
    definitions_before,
    expert_lists,
    names_stored,
    one_hots,
    resolver,
    selects_by_data,
)
from fp8c.prepare.loop_replacement import Place, replace
from fp8c.prepare.loop_source import MARK, Source, compiled, reachable_sources, training_nodes
from fp8c.prepare.loop_values import Bound, CannotLift


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
            found += getattr(value, MARK, ())
        cls = _BASES[cls]
    return tuple(found)


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


def _rewrite_function(module: nn.Module, source: Source) -> Rewrite | None:
    tree = copy.deepcopy(source.tree)
    self_name = tree.args.args[0].arg if tree.args.args else "self"
    if not any(isinstance(node, ast.For) for node in training_nodes(tree.body, self_name)):
        return None
    training = {id(node) for node in training_nodes(tree.body, self_name)}
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
        replace(tree, place, lifter)
        lifted.update(lifter.lifted)
        done.append(Loop(span, lifter.experts, _paths(module, lifter.tables)))
    if not done:
        return None
    return Rewrite(module, source.name, compiled(source, tree, lifted, tuple(done)))


def _paths(module: nn.Module, tables: Sequence[Any]) -> tuple[str, ...]:
    """Where the module holds these lists and tensors; locals are left out."""
    wanted = {id(table) for table in tables}
    named = [*module.named_modules(), *module.named_parameters(), *module.named_buffers()]
    return tuple(name for name, found in named if id(found) in wanted and name)


def _loops(body: list[ast.stmt]) -> Iterator[Place]:
    """All for-loops of a function, outer before inner."""

    def visit(block: list[ast.stmt], before: list[ast.stmt], in_loop: bool) -> Iterator[Place]:
        for statement in block:
            if isinstance(statement, ast.For):
                yield Place(statement, block, tuple(before), in_loop)
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr | ast.Return):
                before.append(statement)
            for name in ("body", "orelse", "finalbody"):
                inner = getattr(statement, name, None)
                if inner and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                    yield from visit(inner, before, in_loop or isinstance(statement, ast.For | ast.While))

    yield from visit(body, [], in_loop=False)


def _lift_loop(module: nn.Module, tree: ast.FunctionDef, self_name: str, place: Place, number: int) -> Lifter | None:
    """The lifted loop; None for a loop that is none over experts, or needs no rewriting."""
    loop = place.loop
    resolve = resolver(module, self_name, place.before)
    lists = expert_lists(loop, resolve)
    if not lists:
        return None
    experts = lists[0]
    definitions = definitions_before(place.before)
    tensor_of = functools.partial(counts_tensor, definitions=definitions, experts=experts)
    prefix = f"{number}_" if number else ""
    lifter = Lifter(experts, resolve, one_hots(place.before), tensor_of, prefix=prefix, owner=self_name)
    # What the target needs (the rows of a split) is emitted at the loop's own line.
    lifter.here = loop
    try:
        bind(lifter, loop.target, loop.iter, resolve, definitions)
        if loop.orelse:
            raise CannotLift(loop.orelse[0], "the loop has an else branch")
        bounds = {name for name in names_stored(loop) if resolve(ast.Name(name, ast.Load())) == 0}
        check_carried(loop, bounds)
        lifter.env.update({name: Bound() for name in bounds})
        lifter.body(loop.body)
        if not lifter.selects:
            raise CannotLift(loop, "it selects no tokens by the expert's index")
    except CannotLift:
        if lifter.selects or selects_by_data(loop):
            raise
        return None  # a static loop, over layers or dense experts: capture unrolls it as it is
    return lifter
