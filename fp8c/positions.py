"""What a tensor of the graph holds as a function of its positions, where operators alone prove it.

Two kinds of values are followed, exactly and for all sizes at once:

    Affine   const + coefs[0] * i0 + coefs[1] * i1 + ...            an arange, a row number, a constant
    Where    `yes` at the positions where every condition is >= 0, `no` elsewhere       a mask

Anything that depends on data (an input, a buffer), and any operator not listed here, is unknown: None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fp8c import graph as g
from fp8c.graph import aten

Number = int | float


@dataclass(frozen=True)
class Affine:
    """Whole numbers `const + sum(coefs[d] * i[d])`; a float constant has no coefficients but zeros."""

    coefs: tuple[int, ...]
    const: Number

    @property
    def is_constant(self) -> bool:
        return not any(self.coefs)

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        """Aligned at the last axis, as broadcasting does."""
        rank = max(len(self.coefs), len(other.coefs))
        left, right = self.padded(rank), other.padded(rank)
        coefs = tuple(a + factor * b for a, b in zip(left.coefs, right.coefs))
        return Affine(coefs, self.const + factor * other.const)

    def times(self, factor: int) -> Affine:
        return Affine(tuple(factor * c for c in self.coefs), factor * self.const)

    def padded(self, rank: int) -> Affine:
        return Affine((0,) * (rank - len(self.coefs)) + self.coefs, self.const)


@dataclass(frozen=True)
class Where:
    """`yes` where every condition is >= 0, else `no`. All conditions have the rank of the tensor."""

    conditions: frozenset[Affine]
    yes: Number
    no: Number

    def inverted(self) -> Where:
        return replace(self, yes=self.no, no=self.yes)


Value = Affine | Where


@dataclass
class Positions:
    """Values of the nodes of one graph, computed when asked for."""

    known: dict[fx.Node, Value | None] = field(default_factory=dict)

    def value(self, node: Any) -> Value | None:
        """What the node (or the number) holds; None when that is not proven."""
        if isinstance(node, (bool, int, float)):
            return Affine((), node)
        if not isinstance(node, fx.Node):
            return None
        if node not in self.known:
            self.known[node] = self._derive(node)
        return self.known[node]

    def _derive(self, node: fx.Node) -> Value | None:
        val = node.meta.get("val")
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None or not isinstance(val, torch.Tensor):
            return None
        found = rule(self, node)
        return None if found is None else _normalized(found, val)


def is_causal_triangle(value: Value | None, rank: int) -> bool:
    """Whether a mask lets query q see exactly the keys k <= q: True or 0 there, False or minus infinity elsewhere.

    The most negative FP32 or BF16 number hides a key as well as minus infinity does: every query sees a key (its own),
    and exp() of what is left of any other score is 0.
    """
    if not isinstance(value, Where) or rank < 2 or len(value.conditions) != 1:
        return False
    (condition,) = value.conditions
    rest, (query, key) = condition.coefs[:-2], condition.coefs[-2:]
    if any(rest):
        return False
    if (query, key, condition.const) == (1, -1, 0):
        visible, hidden = value.yes, value.no
    elif (query, key, condition.const) == (-1, 1, -1):
        visible, hidden = value.no, value.yes
    else:
        return False
    if isinstance(visible, float) or isinstance(hidden, float):
        return visible == 0 and hidden <= torch.finfo(torch.bfloat16).min
    return (visible, hidden) == (1, 0)


def _normalized(value: Value, val: torch.Tensor) -> Value | None:
    """The same value with its rank, without coefficients of axes of length 1 and without conditions that always hold."""
    sizes = list(val.shape)
    if isinstance(value, Affine):
        if len(value.coefs) > len(sizes):
            return None
        value = _without_unit_axes(value.padded(len(sizes)), sizes)
        if value.is_constant:
            return Affine(value.coefs, _as_dtype(value.const, val.dtype))
        return value if val.dtype in (torch.int32, torch.int64) else None  # smaller ones may wrap around
    conditions = set()
    for condition in value.conditions:
        condition = _without_unit_axes(condition.padded(len(sizes)), sizes)
        least, most = _range(condition, sizes)
        if most is not None and most < 0:
            return Affine((0,) * len(sizes), _as_dtype(value.no, val.dtype))
        if least is None or least < 0:
            conditions.add(condition)
    yes, no = _as_dtype(value.yes, val.dtype), _as_dtype(value.no, val.dtype)
    return Where(frozenset(conditions), yes, no) if conditions and yes != no else Affine((0,) * len(sizes), yes)


def _without_unit_axes(value: Affine, sizes: Sequence[Any]) -> Affine:
    return Affine(tuple(0 if _is(size, 1) else c for c, size in zip(value.coefs, sizes)), value.const)


def _range(value: Affine, sizes: Sequence[Any]) -> tuple[Number | None, Number | None]:
    """Least and greatest value over all positions; None where a symbolic size decides."""
    least: Number | None = value.const
    most: Number | None = value.const
    for c, size in zip(value.coefs, sizes):
        if c == 0:
            continue
        end = c * (size - 1) if isinstance(size, int) else None
        if c < 0:
            least = None if end is None or least is None else least + end
        else:
            most = None if end is None or most is None else most + end
    return least, most


def _as_dtype(number: Number, dtype: torch.dtype) -> Number:
    if dtype is torch.bool:
        return int(bool(number))
    if dtype.is_floating_point:
        return float(torch.tensor(float(number), dtype=dtype))
    return int(number) if math.isfinite(number) else number


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


def _same(a: Any, b: Any) -> bool:
    return str(a) == str(b)


# --- rules: one for each operator ---------------------------------------------------------------------------------


def _on_axes(value: Value | None, change: Callable[[Affine], Affine | None]) -> Value | None:
    """Apply a change of axes to an affine value, or to every condition of a mask."""
    match value:
        case None:
            return None
        case Affine():
            return change(value)
        case Where():
            changed = [change(c) for c in value.conditions]
            if any(c is None for c in changed):
                return None
            return replace(value, conditions=frozenset(c for c in changed if c is not None))


def _tensor(node: Any) -> torch.Tensor:
    assert isinstance(node, fx.Node)
    value: torch.Tensor = g.value(node)
    return value


def _rank(node: Any) -> int:
    return _tensor(node).dim()


def _same_values(p: Positions, node: fx.Node) -> Value | None:
    return p.value(node.args[0])


def _arange(p: Positions, node: fx.Node) -> Value | None:
    numbers = node.args
    start, step = (numbers[0] if len(numbers) > 1 else 0), (numbers[2] if len(numbers) > 2 else 1)
    if isinstance(start, int) and isinstance(step, int):
        return Affine((step,), start)
    return None


def _constant(index: int | None, number: int = 0) -> Callable[[Positions, fx.Node], Value | None]:
    def rule(p: Positions, node: fx.Node) -> Value | None:
        value = number if index is None else node.args[index]
        return Affine((), value) if isinstance(value, (bool, int, float)) else None

    return rule


def _sum(sign: int) -> Callable[[Positions, fx.Node], Value | None]:
    def rule(p: Positions, node: fx.Node) -> Value | None:
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        a, b = p.value(node.args[0]), p.value(node.args[1])
        if not isinstance(alpha, int) or a is None or b is None:
            return None
        return _combined(a, b, lambda x, y: x + sign * alpha * y, lambda x, y: x.plus(y, sign * alpha))

    return rule


def _product(p: Positions, node: fx.Node) -> Value | None:
    a, b = p.value(node.args[0]), p.value(node.args[1])
    if a is None or b is None:
        return None
    if g.value(node).dtype is torch.bool:
        return _both(a, b)
    return _combined(a, b, lambda x, y: x * y, _affine_product)


def _affine_product(a: Affine, b: Affine) -> Affine | None:
    for x, y in ((a, b), (b, a)):
        if y.is_constant and isinstance(y.const, int):
            return x.times(y.const).padded(max(len(a.coefs), len(b.coefs)))
    return None


def _combined(
    a: Value, b: Value, number: Callable[[Number, Number], Number], affine: Callable[[Affine, Affine], Affine | None]
) -> Value | None:
    """Arithmetic on two affine values, or on a mask and a constant."""
    match a, b:
        case Affine(), Affine():
            if a.is_constant and b.is_constant:
                return Affine((), number(a.const, b.const))
            if isinstance(a.const, float) or isinstance(b.const, float):
                return None
            return affine(a, b)
        case Where(), Affine() if b.is_constant:
            return replace(a, yes=number(a.yes, b.const), no=number(a.no, b.const))
        case Affine(), Where() if a.is_constant:
            return replace(b, yes=number(a.const, b.yes), no=number(a.const, b.no))
    return None


def _reversed_difference(p: Positions, node: fx.Node) -> Value | None:
    a, b = p.value(node.args[1]), p.value(node.args[0])
    if a is None or b is None:
        return None
    return _combined(a, b, lambda x, y: x - y, lambda x, y: x.plus(y, -1))


def _compare(sign: int, shift: int) -> Callable[[Positions, fx.Node], Value | None]:
    """a >= b as sign * (a - b) + shift >= 0, for whole numbers."""

    def rule(p: Positions, node: fx.Node) -> Value | None:
        difference = _difference(p, node)
        if difference is None:
            return None
        return Where(frozenset({difference.times(sign).plus(Affine((), shift))}), 1, 0)

    return rule


def _difference(p: Positions, node: fx.Node) -> Affine | None:
    a, b = p.value(node.args[0]), p.value(node.args[1])
    if not isinstance(a, Affine) or not isinstance(b, Affine):
        return None
    if isinstance(a.const, float) or isinstance(b.const, float):
        return None
    return a.plus(b, -1)


def _equal(holds: int) -> Callable[[Positions, fx.Node], Value | None]:
    """Equality of values that differ by a constant everywhere."""

    def rule(p: Positions, node: fx.Node) -> Value | None:
        difference = _difference(p, node)
        if difference is None or not difference.is_constant:
            return None
        return Affine((), holds if difference.const == 0 else 1 - holds)

    return rule


def _and(p: Positions, node: fx.Node) -> Value | None:
    a, b = p.value(node.args[0]), p.value(node.args[1])
    if a is None or b is None or g.value(node).dtype is not torch.bool:
        return None
    return _both(a, b)


def _both(a: Value, b: Value) -> Value | None:
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Affine):
            return y if x.const else Affine((), 0)
    assert isinstance(a, Where) and isinstance(b, Where)
    if not (a.yes and b.yes) or a.no or b.no:
        return None
    rank = max(len(c.coefs) for c in (*a.conditions, *b.conditions))
    return Where(frozenset(c.padded(rank) for c in (*a.conditions, *b.conditions)), 1, 0)


def _or(p: Positions, node: fx.Node) -> Value | None:
    a, b = p.value(node.args[0]), p.value(node.args[1])
    if a is None or b is None or g.value(node).dtype is not torch.bool:
        return None
    neither = _both(_inverted(a), _inverted(b))
    return None if neither is None else _inverted(neither)


def _not(p: Positions, node: fx.Node) -> Value | None:
    a = p.value(node.args[0])
    return None if a is None or _tensor(node.args[0]).dtype is not torch.bool else _inverted(a)


def _inverted(value: Value) -> Value:
    return Affine(value.coefs, 1 - int(value.const)) if isinstance(value, Affine) else value.inverted()


def _where(p: Positions, node: fx.Node) -> Value | None:
    return _choose(*(p.value(a) for a in node.args[:3]))


def _masked_fill(p: Positions, node: fx.Node) -> Value | None:
    x, mask, fill = (p.value(a) for a in node.args[:3])
    return _choose(mask, fill, x)


def _choose(condition: Value | None, yes: Value | None, no: Value | None) -> Value | None:
    if not (isinstance(yes, Affine) and isinstance(no, Affine) and yes.is_constant and no.is_constant):
        return None
    match condition:
        case Affine():
            return yes if condition.const else no
        case Where():
            pick = (no.const, yes.const)
            return replace(condition, yes=pick[int(condition.yes)], no=pick[int(condition.no)])
    return None


def _triangle(sign: int) -> Callable[[Positions, fx.Node], Value | None]:
    """tril (sign 1) keeps row - column + diagonal >= 0, triu (sign -1) column - row - diagonal >= 0."""

    def rule(p: Positions, node: fx.Node) -> Value | None:
        diagonal = node.args[1] if len(node.args) > 1 else 0
        x = p.value(node.args[0])
        if not isinstance(diagonal, int) or x is None:
            return None
        rank = _rank(node)
        kept = Affine((sign, -sign), sign * diagonal).padded(rank)
        match x:
            case Affine() if x.is_constant:
                return Where(frozenset({kept}), x.const, 0)
            case Where() if x.no == 0:
                return Where(x.conditions | {kept}, x.yes, 0)
        return None

    return rule


def _expand(p: Positions, node: fx.Node) -> Value | None:
    return _on_axes(p.value(node.args[0]), lambda v: v.padded(_rank(node)))


def _reshape(p: Positions, node: fx.Node) -> Value | None:
    """Reshapes that add and remove axes of length 1 only."""
    before, after = _tensor(node.args[0]).shape, _tensor(node).shape
    kept = [d for d, size in enumerate(before) if not _is(size, 1)]
    target = [d for d, size in enumerate(after) if not _is(size, 1)]
    if len(kept) != len(target) or not all(_same(before[a], after[b]) for a, b in zip(kept, target)):
        return None

    def moved(v: Affine) -> Affine:
        coefs = [0] * len(after)
        for a, b in zip(kept, target):
            coefs[b] = v.coefs[a]
        return Affine(tuple(coefs), v.const)

    return _on_axes(p.value(node.args[0]), moved)


def _permute(p: Positions, node: fx.Node) -> Value | None:
    rank = _rank(node)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    elif rank >= 2:
        a, b = (-2, -1) if node.target is aten.t.default else (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    return _on_axes(p.value(node.args[0]), lambda v: Affine(tuple(v.coefs[d] for d in order), v.const))


def _slice(p: Positions, node: fx.Node) -> Value | None:
    given: list[Any] = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
    axis, start, step = given[0], given[1] or 0, given[3]
    if not (isinstance(axis, int) and isinstance(start, int) and isinstance(step, int) and start >= 0):
        return None

    def part(v: Affine) -> Affine:
        coefs = list(v.coefs)
        first = coefs[axis] * start
        coefs[axis] *= step
        return Affine(tuple(coefs), v.const + first)

    return _on_axes(p.value(node.args[0]), part)


def _select(p: Positions, node: fx.Node) -> Value | None:
    _, axis, index = node.args
    if not (isinstance(axis, int) and isinstance(index, int) and index >= 0):
        return None

    def at(v: Affine) -> Affine:
        coefs = list(v.coefs)
        first = coefs.pop(axis) * index
        return Affine(tuple(coefs), v.const + first)

    return _on_axes(p.value(node.args[0]), at)


def _concatenate(p: Positions, node: fx.Node) -> Value | None:
    """Parts that continue each other: one affine function gives all of them, each at its own offset."""
    parts = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(parts, (list, tuple))
    values = [p.value(part) for part in parts]
    if not isinstance(axis, int) or not all(isinstance(v, Affine) for v in values):
        return None
    sizes = [_tensor(part).shape[axis] for part in parts]
    if not all(isinstance(size, int) for size in sizes[:-1]):
        return None
    longest = next((v for v, size in zip(values, sizes) if not _is(size, 1)), values[-1])
    assert isinstance(longest, Affine)
    step = longest.coefs[axis]
    offset, found = 0, set()
    for v, size in zip(values, sizes):
        assert isinstance(v, Affine)
        coefs = list(v.coefs)
        if not (_is(size, 1) or coefs[axis] == step):
            return None
        coefs[axis] = step
        found.add(Affine(tuple(coefs), v.const - step * offset))
        offset += size if isinstance(size, int) else 0
    return found.pop() if len(found) == 1 else None


def _running_sum(p: Positions, node: fx.Node) -> Value | None:
    x, axis = p.value(node.args[0]), node.args[1]
    if not (isinstance(x, Affine) and x.is_constant and isinstance(x.const, int) and isinstance(axis, int)):
        return None
    coefs = [0] * _rank(node)
    coefs[axis] = x.const
    return Affine(tuple(coefs), x.const)


def _gather(p: Positions, node: fx.Node) -> Value | None:
    """`x[i, j]` with an index for every axis; negative indices would count from the end."""
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    values = [p.value(i) for i in indices]
    if len(indices) != _rank(node.args[0]):
        return None
    for v, i in zip(values, indices):
        if not isinstance(v, Affine) or _tensor(i).dtype is torch.bool or v.const < 0 or any(c < 0 for c in v.coefs):
            return None

    def gathered(x: Affine) -> Affine:
        total = Affine((0,) * _rank(node), x.const)
        for c, v in zip(x.coefs, values):
            assert isinstance(v, Affine)
            total = total.plus(v, c)
        return total

    return _on_axes(p.value(node.args[0]), gathered)


def _cast(p: Positions, node: fx.Node) -> Value | None:
    value = p.value(node.args[0])
    to_bool = g.value(node).dtype is torch.bool
    return None if to_bool and isinstance(value, Affine) and not value.is_constant else value


_RULES: dict[Any, Callable[[Positions, fx.Node], Value | None]] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    **dict.fromkeys((aten.full.default, aten.full_like.default), _constant(1)),
    aten.new_full.default: _constant(2),
    aten.scalar_tensor.default: _constant(0),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _constant(None, 1)),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _constant(None, 0)),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum(1)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _sum(-1)),
    **dict.fromkeys((aten.rsub.Scalar, aten.rsub.Tensor), _reversed_difference),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _compare(1, 0)),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _compare(1, -1)),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _compare(-1, 0)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _compare(-1, -1)),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _equal(1)),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _equal(0)),
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor), _and),
    **dict.fromkeys((aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor), _or),
    **dict.fromkeys((aten.bitwise_not.default, aten.logical_not.default), _not),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    aten.tril.default: _triangle(1),
    aten.triu.default: _triangle(-1),
    **dict.fromkeys((aten.expand.default,), _expand),
    **dict.fromkeys(
        (
            *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default),
            *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        ),
        _reshape,
    ),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), _permute),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.cat.default: _concatenate,
    aten.cumsum.default: _running_sum,
    aten.index.Tensor: _gather,
    **dict.fromkeys(g.CASTS, _cast),
    **dict.fromkeys(
        (
            aten.clone.default,
            aten.alias.default,
            aten.detach.default,
            aten.contiguous.default,
            aten.lift_fresh_copy.default,
        ),
        _same_values,
    ),
}
