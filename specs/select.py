"""Which uses a selector matches, and which of its alternatives match nothing. No torch here.

A set of uses is a bit mask (bit i: the i-th use), so a selector over 1,500 uses is a handful of integer operations.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterator, Sequence

from fp8c.diagnostics import Diagnostic, Span
from fp8c.roles import OpUse
from fp8c.specs import ast, globs

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def compare(left: int, symbol: str, right: int) -> bool:
    return _COMPARE[symbol](left, right)


def indices(mask: int) -> Iterator[int]:
    """The uses of a mask, in order."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Selection:
    """Selectors over one model's uses. Results are kept, so a set used by ten rules is matched once."""

    def __init__(self, uses: Sequence[OpUse]) -> None:
        self.uses = uses
        self.everything = (1 << len(uses)) - 1
        self.layer_count = max((u.layer_count for u in uses), default=0)
        self.diagnostics: list[Diagnostic] = []  # of matching itself: symbolic sizes, patterns that take too long
        self._by_value: dict[tuple[str, str], int] = {}
        self._by_layer: dict[int, int] = {}
        self._names: dict[str, dict[str, int]] = {"path": {}, "param": {}}
        self._masks: dict[ast.Selector, int] = {}
        self._globs: dict[tuple[str, str], int] = {}
        self._reported: set[Span] = set()
        for i, use in enumerate(uses):
            bit = 1 << i
            values = [("op", use.op.value), *(("kind", k) for k in use.kinds), *(("role", r) for r in use.roles)]
            for value in values:
                self._by_value[value] = self._by_value.get(value, 0) | bit
            if use.layer is not None:
                self._by_layer[use.layer] = self._by_layer.get(use.layer, 0) | bit
            self._names["path"][use.path] = self._names["path"].get(use.path, 0) | bit
            if use.param is not None:
                self._names["param"][use.param] = self._names["param"].get(use.param, 0) | bit

    def mask(self, selector: ast.Selector) -> int:
        known = self._masks.get(selector)
        if known is None:
            known = self._masks[selector] = self._mask(selector)
        return known

    def _mask(self, selector: ast.Selector) -> int:
        match selector:
            case ast.All():
                return self.everything
            case ast.Not(inner):
                return self.everything & ~self.mask(inner)
            case ast.And(parts):
                mask = self.everything
                for part in parts:
                    mask &= self.mask(part)
                return mask
            case ast.Or(parts):
                mask = 0
                for part in parts:
                    mask |= self.mask(part)
                return mask
            case ast.Among(predicate, values):
                mask = 0
                for value in values:
                    mask |= self._by_value.get((predicate, value.text), 0)
                return mask
            case ast.Layers(ranges):
                mask = 0
                for layers in ranges:
                    mask |= self._layers(layers)
                return mask
            case ast.Shape(condition):
                return self._shape(condition)
            case ast.Glob(of, pattern):
                mask = 0
                for alternative in globs.expand(pattern.text):
                    mask |= self._glob(of, alternative, pattern.span)
                return mask
            case ast.Regex(pattern):
                return self._pattern("path", globs.compile_regex(pattern.text), pattern.span)
            case ast.SetRef():
                raise AssertionError("sets are written out when a spec is loaded")

    def _layers(self, layers: ast.LayerRange) -> int:
        first, last = (n + self.layer_count if n < 0 else n for n in (layers.first, layers.last))
        mask = 0
        for layer, bits in self._by_layer.items():
            if first <= layer <= last:
                mask |= bits
        return mask

    def _shape(self, condition: ast.Condition) -> int:
        mask = 0
        for i, use in enumerate(self.uses):
            if use.is_gemm and self.holds(condition, use) is True:
                mask |= 1 << i
        return mask

    def holds(self, condition: ast.Condition, use: OpUse) -> bool | None:
        """Whether a use's sizes meet a condition; None when that depends on a symbolic size (reported for `shape`)."""
        sizes = {"m": use.m, "n": use.n, "k": use.k, "experts": use.experts}
        unknown: ast.Term | None = None
        for terms in condition.any_of:
            results = [_term(term, sizes[term.variable]) for term in terms]
            if all(results):
                return True
            if None in results and False not in results:
                unknown = terms[results.index(None)]
        if unknown is None or use.param is None:
            return False  # a product of two activations has no size to select by, unless it is a constant
        if unknown.span not in self._reported:
            self._reported.add(unknown.span)
            self.diagnostics.append(
                Diagnostic(
                    "E0306",
                    f"{unknown.variable} of {use.key} is known only when the model runs",
                    unknown.span,
                    help="select by `n`, `k`, `experts`, an op, a role or a path",
                )
            )
        return None

    def _glob(self, of: str, alternative: str, span: Span) -> int:
        key = (of, alternative)
        if key not in self._globs:
            self._globs[key] = self._pattern(of, globs.compile_glob(alternative), span)
        return self._globs[key]

    def _pattern(self, of: str, pattern: globs.Pattern, span: Span) -> int:
        mask = 0
        try:
            for name, bits in self._names[of].items():
                if pattern.matches(name):
                    mask |= bits
        except globs.MatchTimeout:
            self.diagnostics.append(
                Diagnostic(
                    "E0307",
                    f"the pattern took longer than {globs.TIMEOUT_S * 1000:.0f} ms on `{name}`",
                    span,
                    help="repetitions inside repetitions, as in `(a+)+`, are what makes a pattern slow",
                )
            )
        return mask

    # -- what matched nothing ------------------------------------------------------------------------------------------

    def may_be_empty(self, selector: ast.Selector) -> bool:
        """Whether the `?`s of a selector allow it to match nothing as a whole."""
        match selector:
            case ast.Among(_, values):
                return all(v.maybe for v in values)
            case ast.Layers(ranges):
                return all(r.maybe for r in ranges)
            case ast.Glob(_, pattern) | ast.Regex(pattern):
                return pattern.maybe
            case ast.Shape():
                return selector.maybe
            case ast.And(parts):
                return any(self.may_be_empty(p) for p in parts)
            case ast.Or(parts):
                return all(self.may_be_empty(p) for p in parts)
        return False

    def unmatched(self, selector: ast.Selector, is_negated: bool = False) -> Iterator[Diagnostic]:
        """One E0302 for each alternative, anywhere in the selector, that matches nothing in this model.

        Alternatives under `!` count too: an exclusion that hits nothing leaves in what it was written to keep out.
        """
        match selector:
            case ast.Not(inner):
                yield from self.unmatched(inner, not is_negated)
            case ast.And(parts):
                for part in parts:
                    yield from self.unmatched(part, is_negated)
            case ast.Or(parts):
                for part in parts:
                    found = list(self.unmatched(part, is_negated))
                    yield from found
                    if not found and not self.mask(part) and not self.may_be_empty(part):
                        yield self._nothing("this branch", part.span, "", is_negated)
            case ast.Among(predicate, values):
                for value in values:
                    if not value.maybe and not self._by_value.get((predicate, value.text)):
                        found_values = sorted(v for p, v in self._by_value if p == predicate)
                        has = ", ".join(found_values) or "none"
                        yield self._nothing(
                            f"{predicate} `{value.text}`", value.span, f"this model has {predicate} {has}", is_negated
                        )
            case ast.Layers(ranges):
                for layers in ranges:
                    if not layers.maybe and not self._layers(layers):
                        has = (
                            f"this model has layers 0..{self.layer_count - 1}"
                            if self.layer_count
                            else "this model has no layers"
                        )
                        yield self._nothing("this range of layers", layers.span, has, is_negated)
            case ast.Glob(of, pattern):
                if not pattern.maybe:
                    for alternative in globs.expand(pattern.text):
                        if not self._glob(of, alternative, pattern.span):
                            yield self._nothing(
                                f"pattern `{alternative}`", pattern.span, self._near(of, alternative), is_negated
                            )
            case ast.Regex(pattern):
                if not pattern.maybe and not self.mask(selector):
                    yield self._nothing("the pattern", pattern.span, self._near("path", pattern.text), is_negated)
            case ast.Shape(_, span):
                if not selector.maybe and not self.mask(selector):
                    yield self._nothing("this condition", span, "", is_negated)

    def _nothing(self, what: str, span: Span, has: str, is_negated: bool) -> Diagnostic:
        notes = ("an exclusion that matches nothing leaves in what it should keep out",) if is_negated else ()
        help = "write `?` after it if it may match nothing"
        return Diagnostic("E0302", f"{what} matches nothing", span, notes=notes, help=f"{has}; {help}" if has else help)

    def _near(self, of: str, pattern: str) -> str:
        """The three real names most like a pattern; names that differ in numbers only count once."""
        distinct: dict[str, str] = {}
        for name in self._names[of]:
            shape = re.sub(r"\d+", "#", name)
            best = distinct.get(shape)
            if best is None or _likeness(pattern, name) > _likeness(pattern, best):
                distinct[shape] = name
        likeness = {name: _likeness(pattern, name) for name in distinct.values()}
        ranked = sorted(likeness, key=lambda name: (-likeness[name], name))[:3]
        near = [f"`{name}`" for name in ranked if likeness[name] >= 0.6 * likeness[ranked[0]]]
        if not near:
            return f"this model has no {of} names"
        return f"the nearest name{'s are' if len(near) > 1 else ' is'} {', '.join(near)}"


def _likeness(pattern: str, name: str) -> float:
    """How alike a pattern and a dotted name are, segment by segment from the end; a segment that agrees in full counts
    much more than two that agree by half."""
    wanted = re.sub(r"[*\\^$()?+]+", "", pattern).strip(".")
    left, right = wanted.split(".")[::-1], name.split(".")[::-1]
    ratios = (difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in zip(left, right))
    return sum(r * r for r in ratios) / (len(left) if "**" in pattern else max(len(left), len(right)))


def _term(term: ast.Term, size: int | None) -> bool | None:
    if size is None:
        return None
    return compare(size % term.modulo if term.modulo else size, term.compare, term.number)
