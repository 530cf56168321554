"""Lift the body of a loop over experts to all experts at once.

A loop over experts selects, for expert `i`, the rows of a routing decision that equal `i`, computes on them and adds the
results to an output. Every value of its body is therefore one of few kinds: the same for all experts, the expert's
index, the expert itself, a mask, positions of selected rows, or one value per selected row. This module interprets the
body over these kinds and writes each statement once more, over the rows of all experts sorted by expert:

    for i, expert in enumerate(self.experts):           rows = route(indices, 8)
        token, slot = torch.where(indices == i)         token, slot = positions(rows)
        if token.numel() == 0:                   =>
            continue
        y[token] += expert(x[token]) * w[token, slot]   y = total(expert_of_all(self.experts, rows, x[token]) * ..., y)

With expert parallelism a row's token and its expert are on different ranks. Positions, and what is indexed by them, are
computed at the token's home; everything else where the expert is. `sent` stands where a value leaves home, `total`
brings it back (`fp8c.grouped`).

It never guesses: a construct it doesn't know raises `CannotLift` at that construct.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fp8c.prepare.lift_expressions import ExpressionLifter
from fp8c.prepare.loop_values import (
    GROUPED,
    Accumulation,
    Bound,
    CannotLift,
    Count,
    Empty,
    Known,
    Mask,
    PerRow,
    Run,
    Same,
    Several,
    Slice,
    Value,
    Where,
    describe,
)


@dataclass
class Lifter(ExpressionLifter):
    """Lifts one loop, statement by statement."""

    def body(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.here = statement
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Pass() | ast.Continue() | ast.Expr(ast.Constant()):
                return
            case ast.Assign(targets=[ast.Name(name)], value=value):
                self.assign_name(name, value)
            case ast.AnnAssign(target=ast.Name(name), value=ast.expr() as value):
                self.assign_name(name, value)
            case ast.Assign(targets=[ast.Tuple(targets) | ast.List(targets)], value=value):
                self.assign_tuple(targets, value)
            case ast.Assign(targets=[ast.Subscript(target, index)], value=value):
                self.assign_item(node, target, index, value)
            case ast.AugAssign(ast.Subscript(target, index), ast.Add(), value):
                self.add_to(node, target, self.lift(index), self.lift(value))
            case ast.AugAssign(ast.Name(name), ast.Add(), value) if self.env.get(name) == Bound():
                self.count(node, value)
            case ast.AugAssign(ast.Name(name), op, value) if isinstance(self.env.get(name), PerRow):
                target = ast.copy_location(ast.Name(name, ast.Load()), node)
                self.assign_name(name, ast.copy_location(ast.BinOp(target, op, value), node))
            case ast.Expr(ast.Call(ast.Attribute(target, method), args, keywords)):
                self.method_statement(node, target, method, args, keywords)
            case ast.If(test, body, orelse):
                self.branch(test, body, orelse)
            case ast.For(target=ast.Name(name), iter=source, body=body, orelse=[]) if not self.varies(source):
                self.inner_loop(node, name, body)
            case ast.With(items, body) if not any(self.varies(item.context_expr) for item in items):
                inner = self.captured(body)
                self.out.append(ast.copy_location(ast.With(items, inner or [ast.Pass()]), node))
            case _:
                words = ast.unparse(node).splitlines()[0]
                raise CannotLift(node, f"`{words}` has no known meaning for all experts at once")

    def assign_name(self, name: str, value: ast.expr) -> None:
        match value:
            case ast.Call(ast.Attribute(ast.Name(receiver), "index_add"), args, keywords) if receiver == name:
                self.index_add(value, ast.Name(name, ast.Load()), args, keywords)
                return
        found = self.lift(value)
        if isinstance(found, Same | PerRow):
            self.emit(f"{name} = {found.text}")
            found = replace(found, text=name)
        self.env[name] = found

    def assign_tuple(self, targets: Sequence[ast.expr], value: ast.expr) -> None:
        found = self.lift(value)
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if len(names) != len(targets):
            raise CannotLift(value, "an unpacking whose targets are not plain names has no known meaning here")
        match found:
            case Where():
                self.emit(f"{', '.join(names)}{',' if len(names) == 1 else ''} = {found.mask.positions}")
                for k, name in enumerate(names):
                    self.env[name] = found.element(k, name)
            case Several(items) if len(items) == len(names):
                for name, item in zip(names, items, strict=True):
                    if isinstance(item, PerRow | Same):
                        self.emit(f"{name} = {item.text}")
                        item = replace(item, text=name)
                    self.env[name] = item
            case PerRow() | Same():
                self.emit(f"{', '.join(names)} = {found.text}")
                for name in names:
                    self.env[name] = (
                        Same(name) if isinstance(found, Same) else PerRow(name, found.rows, at_home=found.at_home)
                    )
            case _:
                raise CannotLift(value, f"{describe(found)} can't be unpacked")

    def assign_item(self, node: ast.Assign, target: ast.expr, index: ast.expr, value: ast.expr) -> None:
        match value:  # y[idx] = y[idx] + v
            case ast.BinOp(ast.Subscript(ast.Name() as same, again), ast.Add(), added) if ast.unparse(
                same
            ) == ast.unparse(target) and ast.dump(again) == ast.dump(index):
                self.add_to(node, target, self.lift(index), self.lift(added))
                return
        found, at = self.lift(value), self.lift(index)
        name = self.output_name(node, target)
        axes: tuple[int, ...] | None
        match at, found:
            case Mask() as mask, PerRow() if not mask.reduced:
                axes = None
            case Run(), PerRow():
                axes = None
            case PerRow(is_position=True) as position, PerRow():
                axes = position.axes
            case _:
                raise CannotLift(
                    node,
                    f"an assignment of {describe(found)} at {describe(at)} has no known meaning for all experts at once",
                    "add to the output with `y[token] += ...` or `y.index_add_(0, token, ...)`",
                )
        rows = self.rows_of(node, at, found)
        self.emit(f"{name} = {GROUPED}.assigned({found.away}, {rows}, {axes}, {name})")
        self.accumulations.append(Accumulation(name, self.out[-1], nested=True))

    def add_to(self, node: ast.stmt, target: ast.expr, at: Value, added: Value) -> None:
        """`target[at] += added` of every expert."""
        name = self.output_name(node, target)
        if not isinstance(added, PerRow):
            raise CannotLift(node, f"{describe(added)} is added to '{name}', expected a value per selected row")
        axes: tuple[int, ...] | None
        match at:
            case Mask():
                axes = at.axes
            case PerRow(is_position=True):
                axes = at.axes
            case Where():
                axes = at.mask.axes
            case Several(items) if all(isinstance(i, PerRow) and i.is_position for i in items):
                axes = tuple(a for i in items if isinstance(i, PerRow) for a in i.axes or (-1,))
                if -1 in axes or list(axes) != sorted(axes):
                    self.index_put(node, name, at, added)
                    return
            case PerRow() | Several():
                self.index_put(node, name, at, added)
                return
            case _:
                raise CannotLift(node, f"'{name}' is indexed by {describe(at)}, expected positions of selected rows")
        rows = self.rows_of(node, at, added)
        self.emit(f"{name} += {GROUPED}.total({added.away}, {rows}, {axes}, {name})")
        self.accumulations.append(Accumulation(name, self.out[-1], nested=self.depth > 0))

    def index_put(self, node: ast.stmt, name: str, at: Value, added: PerRow) -> None:
        """Positions computed from the rows' own: the general form, whose order of summation is the device's."""
        self.rows_of(node, at, added)
        index = self.index_texts(node, at)
        values = added.text if added.at_home else f"{GROUPED}.returned({added.text}, {added.rows})"
        self.emit(f"{name}.index_put_(({', '.join(index)},), {values}.to({name}.dtype), accumulate=True)")
        self.accumulations.append(Accumulation(name, self.out[-1], nested=True))

    def method_statement(
        self, node: ast.Expr, target: ast.expr, method: str, args: list[ast.expr], keywords: list[ast.keyword]
    ) -> None:
        match method, args, keywords:
            case "index_add_", _, _:
                self.index_add(node, target, args, keywords)
            case "append", [value], []:
                found = self.lift(value)
                if self.varies(target) or not isinstance(found, PerRow):
                    raise CannotLift(node, f"{describe(found)} is appended, expected a value per selected row")
                # One entry for all experts where the loop appended one each: concatenated they are the same.
                text = found.text if found.at_home else f"{GROUPED}.returned({found.text}, {found.rows})"
                self.emit(f"{ast.unparse(target)}.append({text})")
            case "index_put_", [ast.Tuple([at]) | ast.List([at]), value], [
                ast.keyword("accumulate", ast.Constant(True))
            ]:
                self.add_to(node, target, self.lift(at), self.lift(value))
            case _:
                raise CannotLift(node, f"the call `.{method}(...)` has no known meaning for all experts at once")

    def index_add(self, node: ast.AST, target: ast.expr, args: list[ast.expr], keywords: list[ast.keyword]) -> None:
        given = dict(zip(("dim", "index", "source"), args, strict=False)) | {k.arg: k.value for k in keywords if k.arg}
        match given:
            case {"dim": ast.Constant(0), "index": index, "source": source} if len(given) == 3:
                assert self.here is not None
                self.add_to(self.here, target, self.lift(index), self.lift(source))
            case _:
                raise CannotLift(node, "index_add with these arguments has no known meaning for all experts at once")

    def branch(self, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt]) -> None:
        condition = self.lift(test)
        if isinstance(condition, Count | Slice):
            condition = Empty(when=False)
        match condition:
            case Known(value):
                self.body(body if value else orelse)
            case Empty(when):
                # An expert without rows contributes nothing either way, so only the branch for rows counts.
                for_rows, for_none = (orelse, body) if when else (body, orelse)
                if any(not isinstance(s, ast.Continue | ast.Pass) for s in for_none):
                    raise CannotLift(
                        for_none[0],
                        "an expert without tokens does something of its own here",
                        "let the loop skip it with `continue`; unused experts get zero gradients",
                    )
                self.body(for_rows)
            case Same(text):
                branches = [self.captured(body), self.captured(orelse)]
                node = ast.If(ast.parse(text, mode="eval").body, branches[0] or [ast.Pass()], branches[1])
                self.out.append(self.placed(node))
            case _:
                raise CannotLift(
                    test,
                    f"a branch on {describe(condition)} has no known meaning for all experts at once",
                    "branch on whether the expert has tokens only, e.g. `if token.numel() == 0: continue`",
                )

    def inner_loop(self, node: ast.For, name: str, body: list[ast.stmt]) -> None:
        self.env[name] = Same(name)
        known = dict(self.routes)
        self.depth += 1
        inner = self.captured(body)
        self.depth -= 1
        self.routes = known  # what the inner loop routed may depend on its variable
        new = ast.For(ast.Name(name, ast.Store()), node.iter, inner or [ast.Pass()], [], lineno=node.lineno)
        self.out.append(self.placed(new, node))

    def captured(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        with self.into_new_list() as inner:
            self.body(body)
        return inner

    @contextmanager
    def into_new_list(self) -> Iterator[list[ast.stmt]]:
        outer, here = self.out, self.here
        self.out = []
        yield self.out
        self.out, self.here = outer, here
