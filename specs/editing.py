"""What an editor asks about a spec that is being written: mistakes, what stands here, what could stand here. No torch here.

Places are (line, column) from 1 in characters, as in `Span`. With the operator uses of a model, mistakes and hovers
are about that model; without, about the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fp8c.diagnostics import Diagnostic, DiagnosticError, Span
from fp8c.roles import Op, OpUse
from fp8c.specs import ast
from fp8c.specs import vocabulary as vocab
from fp8c.specs.check import examine
from fp8c.specs.load import Scope, Spec, load_source, shipped
from fp8c.specs.merge import merge_sections
from fp8c.specs.parser import Source
from fp8c.specs.resolve import resolve
from fp8c.specs.select import Selection, indices
from fp8c.specs.vocabulary import FormatValue, Type, Words
from fp8c.target_record import TargetRecord


@dataclass(frozen=True)
class Model:
    """The operator uses of a model, and the machine its spec is checked for."""

    name: str
    uses: tuple[OpUse, ...]
    target: TargetRecord


@dataclass(frozen=True)
class Hover:
    """Markdown, and the place it is about."""

    text: str
    span: Span | None


@dataclass
class Document:
    """One spec as it stands in the editor."""

    source: Source
    root: Path | None
    model: Model | None = None
    diagnostics: tuple[Diagnostic, ...] = ()
    file: ast.File | None = None
    scope: Scope | None = None
    spec: Spec | None = None
    _selection: Selection | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.file, self.diagnostics = examine(self.source)
        try:
            self.scope = Scope(self.source, self.root)
            loaded = load_source(self.source, self.root)
        except DiagnosticError as e:
            self.diagnostics = self.diagnostics or e.diagnostics
            return
        if isinstance(loaded, ast.File):
            return
        self.spec = loaded
        self.diagnostics = tuple(merge_sections(loaded)[1])
        if self.model is not None:
            self._selection = Selection(self.model.uses)
            if not self.diagnostics:
                self.diagnostics = self._resolved(self.model)

    def _resolved(self, model: Model) -> tuple[Diagnostic, ...]:
        assert self.spec is not None
        try:
            return resolve(self.spec, model.uses, model.target).diagnostics
        except DiagnosticError as e:
            return e.diagnostics

    # -- what stands here ----------------------------------------------------------------------------------------------

    def hover(self, line: int, column: int) -> Hover | None:
        """What a selector matches, what a name stands for, what a word means."""
        selector = self._selector_at(line, column)
        if isinstance(selector, ast.SetRef):
            named = self._named_set(selector.name)
            text = f"`@{selector.name}`" + (f": {named.doc}" if named and named.doc else "")
            return Hover(f"{text}\n\n{self._matches(selector)}", selector.span)
        if selector is not None:
            word = self.word(line, column)
            meaning = vocab.MEANINGS.get(word, "") if isinstance(selector, (ast.Among, ast.Layers, ast.Shape)) else ""
            return Hover("\n\n".join(filter(None, (meaning, self._matches(selector)))), selector.span)
        rule = next((r for r in self._rules() if _holds(r.span, line, column)), None)
        if rule is not None:
            head = f"rule `{rule.name}`" + (f": {rule.doc}" if rule.doc else "")
            return Hover(f"{head}\n\n{self._matches(rule.selector)}", rule.span)
        name = self.word(line, column, dotted=True)
        if self.scope is not None and name in self.scope.formats():
            named_format = self.scope.formats()[name]
            doc = f": {named_format.doc}" if named_format.doc else ""
            return Hover(f"`{name}` is `{self.scope.format(name).text}`{doc}", None)
        meaning = vocab.MEANINGS.get(self.word(line, column), "")
        return Hover(meaning, None) if meaning else None

    def definition(self, line: int, column: int) -> Span | None:
        """Where the set or format under the cursor is named."""
        selector = self._selector_at(line, column)
        if isinstance(selector, ast.SetRef):
            named = self._named_set(selector.name)
            return named.span if named else None
        found = self.scope.formats().get(self.word(line, column, dotted=True)) if self.scope else None
        return found.span if found else None

    def _named_set(self, name: str) -> ast.NamedSet | None:
        return self.scope.sets().get(name) if self.scope is not None else None

    def _matches(self, selector: ast.Selector) -> str:
        """`matches 12 of 40 uses of model.py: layers.0.gate (and 11 more uses)`."""
        if self._selection is None or self.model is None or self.scope is None:
            return "" if self.model is not None else "no model is known: start the server with `--model`"
        found = [self.model.uses[i].key for i in indices(self._selection.mask(self.scope.selector(selector)))]
        count = f"matches {len(found)} of {len(self.model.uses)} uses of {self.model.name}"
        shown = "".join(f"\n- `{key}`" for key in found[:6])
        more = f"\n- and {len(found) - 6} more" if len(found) > 6 else ""
        return f"{count}{shown}{more}"

    def _rules(self) -> tuple[ast.Rule, ...]:
        return self.file.spec.rules if self.file is not None and self.file.spec is not None else ()

    def _selectors(self) -> Iterator[ast.Selector]:
        if self.file is None:
            return
        yield from (s.selector for s in self.file.sets)
        yield from (r.selector for r in self._rules())
        if self.file.spec is not None:
            yield from (e.selector for e in self.file.spec.expects)

    def _selector_at(self, line: int, column: int) -> ast.Selector | None:
        """The innermost selector at a place."""
        found = [s for whole in self._selectors() for s in _within(whole) if _holds(s.span, line, column)]
        return min(found, key=lambda s: s.span.length, default=None)

    def word(self, line: int, column: int, *, dotted: bool = False) -> str:
        text = self.source.line(line)
        pattern = r"\w+(?:\.\w+)?" if dotted else r"\w+"
        return next((m[0] for m in re.finditer(pattern, text) if m.start() < column <= m.end() + 1), "")

    # -- what could stand here -----------------------------------------------------------------------------------------

    def completions(self, line: int, column: int) -> list[str]:
        """Words that may stand at a place, in the order in which they should be shown."""
        lines = self.source.text.split("\n")
        before = "\n".join([*lines[: line - 1], lines[line - 1][: column - 1]] if line <= len(lines) else lines)
        heads, current, string = _unfinished(before)
        if string is not None:
            if current[:1] == ["use"]:
                return [f"std:{name}" for name in shipped()]
            return sorted({use.path for use in self.model.uses}) if self.model is not None else []
        return list(dict.fromkeys(self._words(heads, current)))

    def _words(self, heads: Sequence[str], current: Sequence[str]) -> Iterable[str]:
        before = current[-1] if current else ""
        open_word = _open_bracket(current)
        if open_word in vocab.PREDICATE_VALUES:
            return sorted(vocab.PREDICATE_VALUES[open_word])
        if open_word == "shape":
            return vocab.SHAPE_VARIABLES
        if open_word == "[":
            return ("1x128", "128x1", "128x128", "1x32", *vocab.GROUP_WORDS)
        if open_word == "delayed":
            return ("history", "algo", "margin", *vocab.DELAYED_ALGORITHMS)
        if before == "@":
            return self._named("set")
        if before == "scale":
            return vocab.SCALES
        if before == "extends":
            return self.scope.aliases() if self.scope is not None else ()
        if before in ("for", "&", "|", "!", "(", "expect"):
            return (*vocab.PREDICATES, "all")
        if before in ("=", "as"):
            return self._values(heads, current)
        if current and current[0] == "cache":
            return vocab.CACHED_VALUES if len(current) == 1 else ("as", "off", "retile", "exact")
        if current and current[0] == "recompute":
            return vocab.RECOMPUTED_VALUES
        if current and current[0] == "target":
            return (*vocab.ARCHITECTURES, "requires")
        if not current:
            return _statements(heads)
        if all(word in vocab.MODIFIERS for word in current):
            return ("rule", *vocab.SECTIONS, *vocab.MODIFIERS)
        return ("scale", "online", "delayed", *vocab.ROUNDINGS) if "]" in current else ()

    def _named(self, what: str) -> list[str]:
        """Names of formats or sets; of a file whose brackets are still open, those that its lines define."""
        if self.scope is not None:
            return [*(self.scope.sets() if what == "set" else self.scope.formats())]
        return re.findall(rf"^\s*{what}\s+(\w+)\s*=", self.source.text, re.MULTILINE)

    def _values(self, heads: Sequence[str], current: Sequence[str]) -> Iterable[str]:
        formats = self._named("format")
        inner = heads[-1] if heads else ""
        types: dict[str, Type] = vocab.GEMM_FIELDS.get(inner, vocab.SECTIONS.get(inner, {}))
        name = current[-2] if len(current) > 1 else ""
        if len(current) > 3 and current[1] == ".":
            types = vocab.GEMM_FIELDS.get(current[0], {})
        type_ = types.get(name, FormatValue())
        if isinstance(type_, Words):
            return type_.choices
        if not isinstance(type_, FormatValue):
            return ()
        plain = [e for e in vocab.ELEMENTS if not e.startswith("e")]
        if name == "precision" or type_.plain:
            return [*plain, *(["off"] if type_.or_off else [])]
        return [*formats, *vocab.ELEMENTS]


def _statements(heads: Sequence[str]) -> Iterable[str]:
    """Words that begin a statement inside these blocks."""
    if not heads:
        return vocab.TOP_LEVEL
    inner = heads[-1]
    if inner == "spec":
        return (*vocab.SPEC_STATEMENTS, *vocab.MODIFIERS)
    if inner == "rule":
        return vocab.RULE_STATEMENTS
    if inner in vocab.GEMM_FIELDS:
        return vocab.GEMM_FIELDS[inner]
    return (*vocab.SECTIONS.get(inner, ()), "because")


def _holds(span: Span, line: int, column: int) -> bool:
    return span.line == line and span.column <= column <= span.column + span.length


def _within(selector: ast.Selector) -> Iterator[ast.Selector]:
    yield selector
    match selector:
        case ast.Not(inner):
            yield from _within(inner)
        case ast.And(parts) | ast.Or(parts):
            for part in parts:
                yield from _within(part)


_TOKEN = re.compile(r'#[^\n]*|"(?:[^"\\\n]|\\[^\n])*(?P<closed>")?|\w+|[^\s\w]')


def _unfinished(text: str) -> tuple[list[str], list[str], str | None]:
    """(first words of the open blocks, tokens of the unfinished statement without the word at the end, an open string)."""
    heads: list[str] = []
    current: list[str] = []
    for found in _TOKEN.finditer(text):
        token = found[0]
        if token.startswith("#"):
            if found.end() == len(text):
                return heads, ["#"], None  # in a comment nothing is completed
            continue
        if token.startswith('"') and not found["closed"] and found.end() == len(text):
            return heads, current, token[1:]
        if token == "{":
            heads.append(next((w for w in current if w not in vocab.MODIFIERS), ""))
            current = []
        elif token == "}":
            del heads[-1:]
            current = []
        elif token == ";":
            current = []
        elif not (found.end() == len(text) and re.fullmatch(r"\w+", token)):
            current.append(token)
    return heads, current, None


def _open_bracket(tokens: Sequence[str]) -> str:
    """The word in front of the innermost open `(`, or `[` for an open `[`; "" when none is open or no word is there."""
    opened: list[str] = []
    for i, token in enumerate(tokens):
        if token == "(":
            opened.append(tokens[i - 1] if i else "")
        elif token == "[":
            opened.append("[")
        elif token in (")", "]"):
            del opened[-1:]
    return opened[-1] if opened else ""


def use_json(use: OpUse) -> dict[str, Any]:
    """A role record as plain JSON, and `use_from_json` back; its place in the model's source is left out."""
    item = asdict(use) | {"op": use.op.value, "kinds": sorted(use.kinds), "roles": sorted(use.roles)}
    del item["source"]
    return item


def use_from_json(item: dict[str, Any]) -> OpUse:
    item = item | {"op": Op(item["op"]), "kinds": frozenset(item["kinds"]), "roles": frozenset(item["roles"])}
    return OpUse(**item)
