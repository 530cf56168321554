"""Expressions in a loop over experts: each is read as one of the kinds of `fp8c.prepare.loop_values` and written once
more, for the rows of all experts. `fp8c.prepare.lift` does the statements."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fp8c.prepare.experts import Lifted, NotLiftable, lift_expert
from fp8c.prepare.loop_values import (
    GROUPED,
    Accumulation,
    Bound,
    CannotLift,
    Column,
    Count,
    Empty,
    Expert,
    Index,
    Known,
    Mask,
    OneHot,
    PerRow,
    Run,
    Same,
    Several,
    Shape,
    Slice,
    Table,
    Value,
    Where,
    describe,
    flat,
)


@dataclass
class ExpressionLifter:
    """What lifting one loop needs to know, and the expressions.

    experts:   how many there are
    resolve:   the object an expression on `self` stands for, or None
    owner:     the name of `self`
    tables:    what the loop indexes by the expert: lists of modules or parameters, and tensors
    one_hots:  one-hot masks defined in front of the loop
    tensor_of: the tensor behind a list of counts, as text
    """

    experts: int
    resolve: Callable[[ast.expr], Any]
    one_hots: dict[str, OneHot]
    tensor_of: Callable[[ast.expr], str]
    counts: ast.expr | None = None  # rows per expert, where the loop runs through sorted rows
    prefix: str = ""
    owner: str = "self"
    tables: list[Any] = field(default_factory=list)
    env: dict[str, Value] = field(default_factory=dict)
    out: list[ast.stmt] = field(default_factory=list)
    lifted: dict[str, Lifted] = field(default_factory=dict)  # functions the new code calls, by name
    accumulations: list[Accumulation] = field(default_factory=list)
    routes: dict[str, str] = field(default_factory=dict)
    selects: bool = False
    here: ast.stmt | None = None
    depth: int = 0
    _cache: dict[tuple[int, ...], str] = field(default_factory=dict)

    def lift(self, node: ast.expr) -> Value:
        if not self.varies(node):
            return Same(ast.unparse(node))
        match node:
            case ast.Name(name):
                return self.env[name]
            case ast.Attribute(value, name):
                return self.attribute(node, self.lift(value), name)
            case ast.Subscript(value, index):
                return self.subscript(node, value, index)
            case ast.Call():
                return self.call(node)
            case ast.BinOp(left, op, right):
                return self.binary(node, op, self.lift(left), self.lift(right))
            case ast.Compare(left, [op], [right]):
                return self.compare(node, left, op, right)
            case ast.UnaryOp(ast.Not(), value):
                return self.negated(node, self.lift(value))
            case ast.UnaryOp(_, value):
                return self.per_row(node, [self.lift(value)], lambda t: f"(-{t[0]})")
            case ast.Tuple(items):
                return Several(tuple(self.lift(item) for item in items))
            case ast.List(items):
                return Several(tuple(self.lift(item) for item in items), "[]")
            case ast.IfExp(test, body, orelse) if not self.varies(test):
                text = ast.unparse(test)
                return self.per_row(
                    node, [self.lift(body), self.lift(orelse)], lambda t: f"({t[0]} if {text} else {t[1]})"
                )
            case ast.IfExp(test, body, orelse):
                condition = self.lift(test)
                if isinstance(condition, Known):
                    return self.lift(body if condition.value else orelse)
                raise CannotLift(test, f"a choice by {describe(condition)} has no known meaning here")
            case ast.Slice():
                return Same(_index_text(node)) if not self.varies(node) else self.index_slice(node)
            case _:
                raise CannotLift(node, f"`{ast.unparse(node)}` has no known meaning for all experts at once")

    def attribute(self, node: ast.Attribute, value: Value, name: str) -> Value:
        match value, name:
            case Expert(text, objects, path), _:
                if not all(hasattr(o, name) for o in objects):
                    raise CannotLift(node, f"not every expert has an attribute '{name}'")
                found = tuple(getattr(o, name) for o in objects)
                if all(isinstance(o, Tensor) for o in found):
                    return Slice(f"{GROUPED}.stacked([m{path}.{name} for m in {text}])")
                return Expert(text, found, f"{path}.{name}")
            case Slice(text, transposed), "T" | "mT":
                return Slice(text, not transposed)
            case PerRow(), "shape":
                return Shape(value)
            case PerRow(text), "dtype" | "device":
                return Same(f"{text}.{name}")
            case Table(mask), "T":
                return Where(mask)
            case _:
                raise CannotLift(node, f"the attribute `.{name}` of {describe(value)} has no known meaning here")

    def subscript(self, node: ast.Subscript, value: ast.expr, index: ast.expr) -> Value:
        base = self.lift(value)
        match base:
            case Same(text):
                return self.subscript_same(node, value, text, index)
            case Where():
                if isinstance(index, ast.Constant) and isinstance(index.value, int):
                    return base.element(index.value)
            case Several(items):
                if isinstance(index, ast.Constant) and isinstance(index.value, int):
                    return items[index.value]
            case Index(boxed=True):
                return Index()
            case Shape(of):
                match ast.unparse(index):
                    case "0":
                        return Count()
                    case other:
                        return Same(f"{of.text}.shape[{other}]")
            case Expert(text, objects, path) if not self.varies(index):
                key = self.resolve(index)
                if isinstance(key, int | str):
                    return Expert(text, tuple(o[key] for o in objects), f"{path}[{key!r}]")
            case Table(mask):
                match index:
                    case ast.Tuple([_, ast.Constant(int() as column)]):  # [:, k] and [..., k]
                        return Where(mask).element(column)
            case Column(text, keepdim):
                at = self.lift(index)
                if isinstance(at, PerRow | Mask):
                    rows = at.rows
                    tail = ", None" if keepdim else ""
                    found = f"{text}[{', '.join(self.index_texts(node, at))}, {rows}.expert{tail}]"
                    return PerRow(found, rows, at_home=True)
            case PerRow(text, rows):
                first = index.elts[0] if isinstance(index, ast.Tuple) else index
                keeps_rows = isinstance(first, ast.Slice) and first.lower is first.upper is first.step is None
                keeps_rows |= isinstance(first, ast.Constant) and first.value is ...
                if keeps_rows and not self.varies(index):
                    return PerRow(f"{text}[{_index_text(index)}]", rows, at_home=base.at_home)
        raise CannotLift(node, f"`{ast.unparse(node)}` has no known meaning for all experts at once")

    def subscript_same(self, node: ast.Subscript, value: ast.expr, text: str, index: ast.expr) -> Value:
        """`x[...]` of a value that is the same for all experts."""
        items = index.elts if isinstance(index, ast.Tuple) else [index]
        owner = self.resolve(value)
        if isinstance(owner, nn.ModuleDict):
            return self.from_dict(node, text, owner, index)
        found = [self.lift(item) for item in items]
        match found:
            case [Index() as i]:
                if isinstance(owner, nn.ModuleList | nn.ParameterList):
                    return self.from_list(node, text, owner)
                if text in self.one_hots:
                    return self.one_hot_mask(node, self.one_hots[text], 0)
                if i.boxed:
                    raise CannotLift(node, f"`{ast.unparse(node)}` has no known meaning for all experts at once")
                if isinstance(owner, Tensor) and owner.shape[0] != self.experts:
                    raise CannotLift(node, f"'{text}' has {owner.shape[0]} entries, expected {self.experts} experts")
                self.tables.append(owner)
                return Slice(text)
            case [*_, Index()] if all(isinstance(f, Same) for f in found[:-1]):
                whole = [f.text for f in found[:-1] if isinstance(f, Same)]
                if all(t == ":" or t == "..." for t in whole):
                    if text in self.one_hots:
                        return self.one_hot_mask(node, self.one_hots[text], -1)
                    return Column(text)
            case [*_, Several((Index(), Same("keepdim")))]:
                return Column(text, keepdim=True)
            case [Run()]:
                return PerRow(text, self.counted(node, text), at_home=True)
        rows = self.rows_of(node, *found)
        if any(isinstance(f, PerRow) and not f.at_home for f in flat(found)):
            raise CannotLift(node, f"`{ast.unparse(node)}` is indexed by what an expert computed")
        texts = [t for item in found for t in self.index_texts(node, item, rows)]
        return PerRow(f"{text}[{', '.join(texts)}]", rows, at_home=True)

    def index_slice(self, node: ast.Slice) -> Value:
        """`start:end` of running bounds, or `i:i + 1`: the slices that depend on the expert."""
        if node.lower is not None and node.upper is not None and node.step is None and self.varies(node.lower):
            if self.lift(node.lower) == Bound() == self.lift(node.upper):
                return Run()
        match node:
            case ast.Slice(ast.Name(a), ast.BinOp(ast.Name(b), ast.Add(), ast.Constant(1)), None) if (
                a == b and self.env.get(a) == Index()
            ):
                return Several((Index(), Same("keepdim")))
        raise CannotLift(node, f"the slice `{_index_text(node)}` has no known meaning for all experts at once")

    def from_list(self, node: ast.AST, text: str, owner: nn.ModuleList | nn.ParameterList) -> Value:
        objects = tuple(owner)
        self.tables.append(owner)
        if len(objects) != self.experts:
            raise CannotLift(node, f"'{text}' has {len(objects)} entries, expected {self.experts} experts")
        if any(o is None for o in objects):
            raise CannotLift(node, f"'{text}' holds None: only some experts are on this rank")
        if all(isinstance(o, Tensor) for o in objects):
            return Slice(f"{GROUPED}.stacked({text})")
        return Expert(text, objects)

    def from_dict(self, node: ast.AST, text: str, owner: nn.ModuleDict, index: ast.expr) -> Value:
        names = {n.id for n in ast.walk(index) if isinstance(n, ast.Name) and n.id in self.env}
        if len(names) == 1 and self.env[next(iter(names))] == Index():
            code = compile(ast.Expression(index), "<key>", "eval")
            try:
                keys = [eval(code, {next(iter(names)): i}) for i in range(self.experts)]  # the model's own code
                objects = tuple(owner[key] for key in keys)
            except Exception:  # noqa: BLE001 - a key that needs more than the index
                objects = ()
            if len(objects) == len(owner):
                self.tables.append(owner)
                return Expert(f"[{', '.join(f'{text}[{key!r}]' for key in keys)}]", objects)
        raise CannotLift(node, f"the keys of '{text}' are not a function of the expert's index alone")

    def one_hot_mask(self, node: ast.AST, one_hot: OneHot, axis: int) -> Value:
        if one_hot.order is None:
            if axis != -1:
                raise CannotLift(node, "the one-hot mask's last axis counts experts, and it is indexed by its first")
            return Mask(self.routed(one_hot.decision))
        if one_hot.order[axis] != -1:
            raise CannotLift(node, "the one-hot mask is indexed along an axis that doesn't count experts")
        rest = [a for k, a in enumerate(one_hot.order) if k != axis % len(one_hot.order)]
        return Mask(self.routed(f"{one_hot.decision}.permute({', '.join(map(str, rest))})"))

    def binary(self, node: ast.BinOp, op: ast.operator, left: Value, right: Value) -> Value:
        match left, op, right:
            case PerRow(), ast.MatMult(), Slice(text, transposed):
                weight = f"{text}.transpose(-2, -1)" if transposed else text
                return PerRow(f"{GROUPED}.matmul({left.away}, {weight}, {left.rows})", left.rows)
            case Bound(), ast.Add(), _:
                self.count(node, node.right)
                return Bound()
            case (Count() | Slice(), _, Same()) | (Same(), _, Count()) | (Count(), _, Count()):
                return Count()
            case (Index(), ast.Add(), Same(text)) | (Same(text), ast.Add(), Index()):
                if self.resolve(ast.parse(text, mode="eval").body) == 0:
                    return Index()
                raise CannotLift(node, f"the expert's index is shifted by `{text}`, which is not known to be 0")
        symbol = _OPERATORS.get(type(op))
        if symbol is None:
            raise CannotLift(node, f"`{ast.unparse(node)}` has no known meaning for all experts at once")
        return self.per_row(node, [left, right], lambda t: f"({t[0]} {symbol} {t[1]})")

    def compare(self, node: ast.Compare, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Value:
        a, b = self.lift(left), self.lift(right)
        match a, op, b:
            case (Same() as same, ast.Eq(), Index()) | (Index(), ast.Eq(), Same() as same):
                number = self.resolve(ast.parse(same.text, mode="eval").body)
                if isinstance(number, int):  # `expert_idx == self.num_experts`: not a decision but a special case
                    if 0 <= number < self.experts:
                        raise CannotLift(node, f"expert {number} is treated differently from the others")
                    return Known(False)
                return Mask(self.routed(same.text))
            case Index(), ast.In() | ast.NotIn(), Same():
                return Empty(when=isinstance(op, ast.NotIn))
            case ((Count() | Slice()), _, Same("0")):
                match op:
                    case ast.Eq() | ast.LtE():
                        return Empty(when=True)
                    case ast.Gt() | ast.NotEq():
                        return Empty(when=False)
            case ((Count() | Slice()), _, Same("1")):
                match op:
                    case ast.Lt():
                        return Empty(when=True)
                    case ast.GtE():
                        return Empty(when=False)
            case Expert(), ast.Is() | ast.IsNot(), Same("None"):
                return Known(isinstance(op, ast.IsNot))
        raise CannotLift(node, f"the comparison `{ast.unparse(node)}` has no known meaning for all experts at once")

    def negated(self, node: ast.AST, value: Value) -> Value:
        match value:
            case Empty(when):
                return Empty(not when)
            case Known(known):
                return Known(not known)
            case Count() | Slice():
                return Empty(when=True)
        raise CannotLift(node, f"the negation of {describe(value)} has no known meaning for all experts at once")

    # --- calls --------------------------------------------------------------------------------------------------------

    def call(self, node: ast.Call) -> Value:
        function = node.func
        if not self.varies(function):
            return self.call_function(node, ast.unparse(function))
        if isinstance(function, ast.Attribute):
            receiver = self.lift(function.value)
            if not (isinstance(receiver, Expert) and function.attr != "forward"):
                return self.call_method(node, receiver, function.attr)
        callee = self.lift(function)
        if isinstance(callee, Expert):
            return self.call_expert(node, callee)
        raise CannotLift(node, f"a call of {describe(callee)} has no known meaning for all experts at once")

    def call_expert(self, node: ast.Call, expert: Expert) -> Value:
        args = [self.lift(arg) for arg in node.args]
        keywords = [(k.arg, self.lift(k.value)) for k in node.keywords]
        values = [*args, *(value for _, value in keywords)]
        if not any(isinstance(v, PerRow) for v in values):
            raise CannotLift(
                node,
                "every expert is called on all tokens",
                "select the expert's tokens first: `token, slot = torch.where(indices == i)`, then expert(x[token])",
            )
        if any(not isinstance(v, PerRow | Same) for v in values):
            raise CannotLift(node, "an expert's arguments must be values of its tokens or the same for all experts")
        if not all(isinstance(o, nn.Module) for o in expert.objects):
            raise CannotLift(node, f"`{ast.unparse(node.func)}` is not a module: its code can't be lifted")
        rows = self.rows_of(node, *values)
        texts = [v.away if isinstance(v, PerRow) else v.text for v in args if isinstance(v, PerRow | Same)]
        if type(expert.objects[0]).forward is nn.Linear.forward and len(values) == 1:
            return PerRow(f"{GROUPED}.linear({texts[0]}, {expert.list_text}, {rows})", rows)
        for name, v in keywords:
            texts.append(f"{name}={v.away if isinstance(v, PerRow) else v.text if isinstance(v, Same) else ''}")
        return PerRow(f"{self.lifted_name(node, expert)}({', '.join([expert.list_text, rows, *texts])})", rows)

    def lifted_name(self, node: ast.AST, expert: Expert) -> str:
        key = tuple(id(o) for o in expert.objects)
        if key not in self._cache:
            try:
                function = lift_expert(expert.objects)
            except NotLiftable as error:
                raise CannotLift(
                    node,
                    f"the experts can't run as one: {error}",
                    "build every expert alike from Linear layers and elementwise operations, without branches on data",
                ) from None
            self._cache[key] = f"{GROUPED}_{self.prefix}expert{len(self.lifted)}"
            self.lifted[self._cache[key]] = function
        return self._cache[key]

    def call_method(self, node: ast.Call, receiver: Value, name: str) -> Value:
        match receiver, name:
            case Mask(), "any":
                if not (node.args or node.keywords):
                    return Empty(when=False)
                if self.is_last_axis(node) and not receiver.flat and not receiver.reduced:
                    return replace(receiver, reduced=True)
            case Mask(), "sum" if not (node.args or node.keywords):
                return Count()
            case Mask(), "nonzero":
                as_tuple = any(k.arg == "as_tuple" and ast.unparse(k.value) == "True" for k in node.keywords)
                return Where(receiver) if as_tuple else Table(receiver)
            case Mask(), "view" | "reshape" | "flatten" | "ravel":
                if name in ("flatten", "ravel") or [ast.unparse(a) for a in node.args] == ["-1"]:
                    return replace(receiver, flat=True)
            case Mask(), "squeeze" | "bool" | "to" | "contiguous" | "detach":
                return receiver
            case Table(mask), "squeeze" | "flatten" | "view" | "reshape":
                return Where(mask).element(0)
            case Table(mask), "unbind" | "t":
                return Where(mask)
            case ((Count() | Empty() | Slice()), "item"):
                return Count() if isinstance(receiver, Slice) else receiver
            case Empty(when), "logical_not":
                return Empty(not when)
            case Index(), "item" | "squeeze" | "view" | "reshape" | "to" | "long" | "int":
                return Index()
            case PerRow(), "numel" | "nelement":
                return Count()
            case PerRow(), "size" if len(node.args) == 1:
                axis = ast.unparse(node.args[0])
                return Count() if axis == "0" else Same(f"{receiver.text}.size({axis})")
            case PerRow(), "item" | "tolist" | "cpu" | "numpy":
                raise CannotLift(
                    node, f"`.{name}()` brings values to the host for every expert", f"keep tensors: drop `.{name}()`"
                )
            case Slice(text, transposed), "t" | "transpose":
                return Slice(text, not transposed)
            case Same() | PerRow() | Slice() | Column(), _:
                values = [receiver, *(self.lift(a) for a in node.args)]
                keywords = [k.arg for k in node.keywords]
                values += [self.lift(k.value) for k in node.keywords]
                count = len(node.args)

                def method_text(t: Sequence[str]) -> str:
                    named = [f"{key}={value}" for key, value in zip(keywords, t[1 + count :], strict=True)]
                    return f"{t[0]}.{name}({', '.join([*t[1 : 1 + count], *named])})"

                return self.per_row(node, values, method_text)
        raise CannotLift(node, f"`.{name}(...)` of {describe(receiver)} has no known meaning for all experts at once")

    def call_function(self, node: ast.Call, function: str) -> Value:
        values = [self.lift(a) for a in node.args]
        short = function.rpartition(".")[2]
        match short, values:
            case "where", [Mask() as mask] if not node.keywords:
                return Where(mask)
            case "nonzero" | "argwhere", [Mask() as mask]:
                as_tuple = any(k.arg == "as_tuple" and ast.unparse(k.value) == "True" for k in node.keywords)
                return Where(mask) if as_tuple else Table(mask)
            case "any", [Mask()] if not node.keywords:
                return Empty(when=False)
            case "sum", [Mask()] if not node.keywords:
                return Count()
            case ("eq", [Same(text), Index()]) | ("eq", [Index(), Same(text)]):
                return Mask(self.routed(text))
            case "eq", [Index()] if isinstance(node.func, ast.Attribute):
                return Mask(self.routed(ast.unparse(node.func.value)))
            case "len", [PerRow()]:
                return Count()
            case "int" | "bool", [(Count() | Empty() | Index()) as value]:
                return Index() if isinstance(value, Index) else value
            case "int", [Slice()]:
                return Count()
            case "linear", [PerRow() as x, Slice(weight, transposed), *rest]:
                rest += [self.lift(k.value) for k in node.keywords if k.arg == "bias"]
                weight = weight if transposed else f"{weight}.transpose(-2, -1)"
                match rest:
                    case [] | [Same("None")]:
                        return PerRow(f"{GROUPED}.matmul({x.away}, {weight}, {x.rows})", x.rows)
                    case [Slice(bias)]:
                        return PerRow(f"{GROUPED}.matmul({x.away}, {weight}, {x.rows}, {bias})", x.rows)
            case "matmul" | "mm", [PerRow() as x, Slice(weight, transposed)]:
                weight = f"{weight}.transpose(-2, -1)" if transposed else weight
                return PerRow(f"{GROUPED}.matmul({x.away}, {weight}, {x.rows})", x.rows)
        if not any(isinstance(v, PerRow | Several) for v in values):
            raise CannotLift(node, f"`{ast.unparse(node)}` has no known meaning for all experts at once")
        keywords = [k.arg for k in node.keywords]
        values += [self.lift(k.value) for k in node.keywords]
        count = len(node.args)

        def function_text(t: Sequence[str]) -> str:
            named = [f"{key}={value}" for key, value in zip(keywords, t[count:], strict=True)]
            return f"{function}({', '.join([*t[:count], *named])})"

        return self.per_row(node, values, function_text)

    # --- small parts --------------------------------------------------------------------------------------------------

    def varies(self, node: ast.AST) -> bool:
        """Whether an expression may differ between experts."""
        return any(
            isinstance(n, ast.Name) and n.id in self.env and not isinstance(self.env[n.id], Same)
            for n in ast.walk(node)
        )

    def routed(self, decision: str) -> str:
        """The name of the sorted rows of a decision, computed in front of its first use."""
        self.selects = True
        if decision not in self.routes:
            name = f"{GROUPED}_{self.prefix}rows{len(self.routes)}_{len(self.out)}_{self.depth}"
            self.emit(f"{name} = {GROUPED}.route({decision}, {self.experts}, {self.ranks})")
            self.routes[decision] = name
        return self.routes[decision]

    def count(self, node: ast.AST, value: ast.expr) -> None:
        """Check that a bound moves by the expert's count, and remember where counts come from."""
        match self.lift(value):
            case Count():
                pass
            case Slice():
                assert isinstance(value, ast.Subscript)
                self.counts = value.value
            case other:
                raise CannotLift(node, f"a running bound moves by {describe(other)}, expected the expert's count")

    def counted(self, node: ast.AST, like: str) -> str:
        """The name of rows that are sorted already, made in front of their first use."""
        if self.counts is None:
            raise CannotLift(node, "the expert's run of tokens has no counts that say where it ends")
        counts = self.tensor_of(self.counts)
        key = f"counts {counts}"
        self.selects = True
        if key not in self.routes:
            self.routes[key] = f"{GROUPED}_{self.prefix}rows{len(self.routes)}_{len(self.out)}_{self.depth}"
            self.emit(f"{self.routes[key]} = {GROUPED}.counted({counts}, {like}, {self.ranks})")
        return self.routes[key]

    @property
    def ranks(self) -> str:
        """Who owns the experts: expert parallelism gives the module this attribute."""
        return f"getattr({self.owner}, 'fp8c_ranks', None)"

    def rows_of(self, node: ast.AST, *values: Value) -> str:
        """The one selection that all per-row values belong to."""
        found = {v.rows for v in flat(values) if isinstance(v, PerRow | Mask)}
        found |= {v.mask.rows for v in flat(values) if isinstance(v, Where | Table)}
        if len(found) != 1:
            what = "two different selections of tokens meet" if found else "no selected rows take part"
            raise CannotLift(node, f"{what} in `{ast.unparse(node).splitlines()[0]}`")
        return found.pop()

    def per_row(self, node: ast.AST, values: Sequence[Value], text: Callable[[Sequence[str]], str]) -> Value:
        """A row-wise operation on per-row values, values of the row's expert, and values the same for all."""
        rows = self.rows_of(node, *values)
        at_home = all(v.at_home if isinstance(v, PerRow) else isinstance(v, Same | Index) for v in flat(values))
        return PerRow(text([self.value_text(node, value, rows, at_home) for value in values]), rows, at_home=at_home)

    def value_text(self, node: ast.AST, value: Value, rows: str, at_home: bool) -> str:
        match value:
            case Same(text):
                return text
            case PerRow(text):
                return text if at_home else value.away
            case Slice(text, False):
                return f"{GROUPED}.entries({text}, {rows})"
            case Index():
                return f"{rows}.expert" if at_home else f"{GROUPED}.numbers({rows})"
            case Several(items, brackets):
                inner = ", ".join(self.value_text(node, item, rows, at_home) for item in items)
                return f"{brackets[0]}{inner}{',' if brackets == '()' else ''}{brackets[1]}"
            case _:
                raise CannotLift(
                    node, f"{describe(value)} in `{ast.unparse(node).splitlines()[0]}` has no known meaning here"
                )

    def index_texts(self, node: ast.AST, value: Value, rows: str = "") -> list[str]:
        """A value as elements of an index."""
        match value:
            case Same(text) | PerRow(text):
                return [text]
            case Mask():
                return [f"*{value.positions}"] if not value.flat else [f"{value.positions}[0]"]
            case Where(mask):
                return self.index_texts(node, mask)
            case Index() if rows:
                return [f"{rows}.expert"]
            case Several(items):
                return [t for item in items for t in self.index_texts(node, item, rows)]
            case _:
                raise CannotLift(node, f"an index by {describe(value)} has no known meaning for all experts at once")

    def is_last_axis(self, node: ast.Call) -> bool:
        given = [*node.args, *(k.value for k in node.keywords if k.arg == "dim")]
        return len(given) == 1 and ast.unparse(given[0]) in ("-1", "1")

    def output_name(self, node: ast.AST, target: ast.expr) -> str:
        if not isinstance(target, ast.Name) or self.varies(target):
            raise CannotLift(
                node, f"`{ast.unparse(target)}` is written to, expected a tensor made in front of the loop"
            )
        return target.id

    def emit(self, text: str) -> None:
        self.out.append(self.placed(ast.parse(text).body[0]))

    def placed(self, new: ast.stmt, at: ast.stmt | None = None) -> ast.stmt:
        """At the line of the statement it replaces, so that stack traces and diagnostics lead there."""
        old = at or self.here
        assert old is not None
        for part in ast.walk(new):
            if isinstance(part, ast.expr | ast.stmt | ast.keyword | ast.arg) and (part is new or at is None):
                ast.copy_location(part, old)
                part.end_lineno = part.lineno
                part.end_col_offset = part.col_offset + 1
        return ast.fix_missing_locations(new)


_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.MatMult: "@",
}


def _index_text(node: ast.expr) -> str:
    """An index as it is written between brackets: `:, None`, where a tuple alone would have parentheses."""
    return ast.unparse(ast.Subscript(ast.Name("x", ast.Load()), node, ast.Load()))[2:-1]
