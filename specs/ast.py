"""The syntax tree of a spec, each node with its place. No torch here.

`check.py` builds it from statements; names of formats and sets are still names (`FormatRef`, `SetRef`), which `load.py`
replaces by what they stand for, so that after loading no reference is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8c.diagnostics import Span
from fp8c.formats import Format


@dataclass(frozen=True)
class FormatRef:
    """A format by name: `act`, or `ds.act` for one of a file that `use ... as ds` brought in."""

    name: str
    span: Span


Value = Format | FormatRef | str | int | float | bool | tuple[str, bool]


# -- selectors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alternative:
    """One value of a predicate. `maybe` (a `?` after it) allows it to match nothing."""

    text: str
    span: Span
    maybe: bool = False


@dataclass(frozen=True)
class LayerRange:
    """Layers first to last, both included; negative numbers count from the last layer (-1)."""

    first: int
    last: int
    span: Span
    maybe: bool = False


@dataclass(frozen=True)
class Term:
    """`k % 128 == 0`: `modulo` is 0 when there is no `%`."""

    variable: str
    modulo: int
    compare: str
    number: int
    span: Span


@dataclass(frozen=True)
class Condition:
    """An `or` of `and`s of terms."""

    any_of: tuple[tuple[Term, ...], ...]
    span: Span


@dataclass(frozen=True)
class All:
    span: Span


@dataclass(frozen=True)
class Among:
    """`op(...)`, `kind(...)`, `role(...)`: the use has one of the values."""

    predicate: str
    values: tuple[Alternative, ...]
    span: Span


@dataclass(frozen=True)
class Layers:
    ranges: tuple[LayerRange, ...]
    span: Span


@dataclass(frozen=True)
class Shape:
    condition: Condition
    span: Span
    maybe: bool = False


@dataclass(frozen=True)
class Glob:
    """A path pattern on the module path (`of` is "path") or the parameter's name ("param")."""

    of: str
    pattern: Alternative
    span: Span


@dataclass(frozen=True)
class Regex:
    pattern: Alternative
    span: Span


@dataclass(frozen=True)
class SetRef:
    name: str
    span: Span


@dataclass(frozen=True)
class Not:
    inner: Selector
    span: Span


@dataclass(frozen=True)
class And:
    parts: tuple[Selector, ...]
    span: Span


@dataclass(frozen=True)
class Or:
    parts: tuple[Selector, ...]
    span: Span


Selector = All | Among | Layers | Shape | Glob | Regex | SetRef | Not | And | Or


# -- statements --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Modifiers:
    override: bool = False
    optional: bool = False
    final: bool = False


@dataclass(frozen=True)
class Field:
    """One value a rule or section gives: `fprop.x`, `cache.x`, `payload`; `span` is the value's place."""

    name: str
    value: Value
    span: Span


@dataclass(frozen=True)
class Rule:
    name: str
    modifiers: Modifiers
    selector: Selector
    fields: tuple[Field, ...]
    because: str
    doc: str
    span: Span  # the rule's name


@dataclass(frozen=True)
class Section:
    """`dispatch { ... }` and its kin, `defaults` included."""

    name: str
    modifiers: Modifiers
    fields: tuple[Field, ...]
    because: str
    doc: str
    span: Span


@dataclass(frozen=True)
class Target:
    architectures: tuple[Alternative, ...]
    requires: Condition | None
    span: Span


@dataclass(frozen=True)
class Expect:
    selector: Selector
    compare: str
    count: int
    span: Span


@dataclass(frozen=True)
class Use:
    """`use "std:deepseek_v3" as ds;`"""

    file: str
    alias: str
    span: Span


@dataclass(frozen=True)
class NamedFormat:
    name: str
    value: Format | FormatRef
    span: Span
    doc: str = ""


@dataclass(frozen=True)
class NamedSet:
    name: str
    selector: Selector
    span: Span
    doc: str = ""


@dataclass(frozen=True)
class SpecDecl:
    name: str
    extends: str  # alias of a used file, "" when the spec stands alone
    extends_span: Span | None
    target: Target | None
    rules: tuple[Rule, ...]
    sections: tuple[Section, ...]
    expects: tuple[Expect, ...]
    doc: str
    span: Span


@dataclass(frozen=True)
class File:
    """One file: what it uses, the formats and sets it names, and at most one spec."""

    name: str  # stable across machines: "std:deepseek_v3", or the path below the spec root
    path: str
    uses: tuple[Use, ...]
    formats: tuple[NamedFormat, ...]
    sets: tuple[NamedSet, ...]
    spec: SpecDecl | None
