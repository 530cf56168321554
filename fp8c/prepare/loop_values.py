"""The kinds of values in a loop over experts, as `fp8c.prepare.lift` tells them apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

GROUPED = "_fp8c"  # the name of fp8c.grouped inside a rewritten function


class CannotLift(Exception):
    """A construct without a known meaning over all experts; `node` is where it stands."""

    def __init__(self, node: ast.AST, message: str, help: str = "") -> None:
        self.node, self.message, self.help = node, message, help
        super().__init__(message)


@dataclass(frozen=True)
class Same:
    """The same for every expert."""

    text: str


@dataclass(frozen=True)
class Index:
    """The expert's number; `boxed` when it is a row of a tensor (`for e in hit`), so that `e[0]` is the number."""

    boxed: bool = False


@dataclass(frozen=True)
class Expert:
    """Each expert's own object at `path`; `text` is the list of all experts."""

    text: str
    objects: tuple[Any, ...]
    path: str = ""

    @property
    def list_text(self) -> str:
        return f"[m{self.path} for m in {self.text}]" if self.path else self.text


@dataclass(frozen=True)
class Slice:
    """One expert's entry of a tensor (or list) `text` whose first axis counts experts."""

    text: str
    transposed: bool = False


@dataclass(frozen=True)
class Mask:
    """Where the decision of `rows` equals the expert: over its last axis reduced (`any`), or flattened, or neither."""

    rows: str
    reduced: bool = False
    flat: bool = False

    @property
    def positions(self) -> str:
        """Text of the tuple of positions, as `torch.where` gives it."""
        match self.reduced, self.flat:
            case False, False:
                return f"{GROUPED}.positions({self.rows})"
            case True, False:
                return f"{GROUPED}.positions({self.rows})[:-1]"
            case False, True:
                return f"({self.rows}.order,)"
            case _:
                return f"({self.rows}.order // {self.rows}.shape[-1],)"

    @property
    def axes(self) -> tuple[int, ...] | None:
        return () if self.reduced else None


@dataclass(frozen=True)
class Where:
    """The tuple of positions of a mask."""

    mask: Mask

    def element(self, k: int, text: str = "") -> PerRow:
        axes: tuple[int, ...] | None = self.mask.axes if self.mask.flat else (k,)
        return PerRow(text or f"{self.mask.positions}[{k}]", self.mask.rows, axes, is_position=True, at_home=True)


@dataclass(frozen=True)
class Table:
    """`mask.nonzero()`: positions as one tensor, a column per axis."""

    mask: Mask


@dataclass(frozen=True)
class PerRow:
    """One value per selected row. A position (of the decision's `axes`) may index an output to add to.

    at_home: it is on the rank of the row's token; otherwise on that of its expert
    """

    text: str
    rows: str
    axes: tuple[int, ...] | None = None
    is_position: bool = False
    at_home: bool = False

    @property
    def away(self) -> str:
        """Its text where the experts are."""
        return f"{GROUPED}.sent({self.text}, {self.rows})" if self.at_home else self.text


@dataclass(frozen=True)
class Shape:
    of: PerRow


@dataclass(frozen=True)
class Count:
    """How many rows the expert has."""


@dataclass(frozen=True)
class Bound:
    """Where the expert's rows begin or end among rows that are sorted by expert already."""


@dataclass(frozen=True)
class Run:
    """`start:end`, the expert's rows among sorted ones."""


@dataclass(frozen=True)
class Empty:
    """True exactly when the expert has no rows (`when`), or exactly when it has some (not `when`)."""

    when: bool


@dataclass(frozen=True)
class Known:
    """A condition with the same outcome for every expert."""

    value: bool


@dataclass(frozen=True)
class Column:
    """`x[..., i]`: the expert's column of a table over tokens; `keepdim` for `x[..., i:i+1]`."""

    text: str
    keepdim: bool = False


@dataclass(frozen=True)
class Several:
    """A tuple or list of values."""

    items: tuple[Value, ...]
    brackets: str = "()"


Value = (
    Same
    | Index
    | Expert
    | Slice
    | Mask
    | Where
    | Table
    | PerRow
    | Shape
    | Count
    | Bound
    | Run
    | Empty
    | Known
    | Column
    | Several
)


@dataclass(frozen=True)
class OneHot:
    """A known one-hot mask: `order` gives, for each of its axes, the axis of the decision (-1: the experts' axis)."""

    decision: str
    order: tuple[int, ...] | None  # None: the decision's axes, then the experts'
    names: frozenset[str]  # what the decision's text reads


@dataclass
class Accumulation:
    """An output that the loop adds to: which statement, to be rewritten as an assignment when it starts from zeros."""

    name: str
    statement: ast.stmt
    nested: bool


_WORDS: dict[type[object], str] = {
    Same: "a value that is the same for all experts",
    Index: "the expert's index",
    Expert: "the expert",
    Slice: "the expert's entry of a tensor",
    Mask: "the mask of the expert's tokens",
    Where: "the positions of the expert's tokens",
    Table: "the positions of the expert's tokens",
    PerRow: "a value per selected token",
    Shape: "the shape of the expert's tokens",
    Count: "the number of the expert's tokens",
    Bound: "where the expert's tokens begin or end",
    Run: "the expert's run of tokens",
    Empty: "whether the expert has tokens",
    Known: "a constant",
    Column: "the expert's column of a table",
    Several: "a tuple",
}


def describe(value: Value) -> str:
    return _WORDS[type(value)]


def flat(values: Sequence[Value]) -> Iterator[Value]:
    for value in values:
        if isinstance(value, Several):
            yield from flat(value.items)
        else:
            yield value
