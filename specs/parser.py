"""Text of a spec -> statements, with every piece's place. No torch here.

Words are not judged here (`grammar.lark` says why); `check.py` does that. What this module promises: any text at all
gives either a tuple of statements or a `DiagnosticError` whose caret is at the mistake; nothing recurses on the input.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8c.cache import cache_folder
from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Span
from fp8c.files import reason

MAX_BYTES = 1 << 20
MAX_DEPTH = 100

#: What a reader calls each terminal of the grammar.
PHRASES = {
    "WORD": "a word",
    "STRING": "a string",
    "REGEX": "a regular expression",
    "INTEGER": "an integer",
    "NUMBER": "a number",
    "GROUP": "a group such as 1x128",
    "MARK": "a mark",
    "SEMICOLON": "`;`",
    "LBRACE": "`{`",
    "RBRACE": "`}`",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "LSQB": "`[`",
    "RSQB": "`]`",
    "DOC": "a doc comment",
    "$END": "the end of the file",
}
_CLOSES = {"}": "{", ")": "(", "]": "["}


@dataclass(frozen=True)
class Source:
    """One file of spec text. `name` goes into locks (same on every machine), `path` into messages (clickable)."""

    name: str
    path: str
    text: str

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    def line(self, number: int) -> str:
        return self.lines[number - 1].rstrip("\r") if 0 < number <= len(self.lines) else ""

    def span(self, first: Token, last: Token | None = None) -> Span:
        """The place from `first` to the end of `last`, cut at the end of the line."""
        text = self.line(first.line)
        end = last if last is not None and last.line == first.line else first
        whole_line = last is not None and last.line != first.line
        length = len(text) - first.column + 1 if whole_line else end.column + len(end.text) - first.column
        return Span(self.path, first.line, first.column, max(1, length), text)


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` is a terminal of the grammar; `line` and `column` count from 1; `start` is the offset in the text."""

    kind: str
    text: str
    line: int
    column: int
    start: int

    @property
    def first(self) -> Token:
        return self

    @property
    def last(self) -> Token:
        return self


@dataclass(frozen=True, slots=True)
class Bracket:
    """`( ... )` or `[ ... ]`. `depth` is how deep brackets nest in it, itself included."""

    first: Token
    pieces: tuple[Piece, ...]
    last: Token
    depth: int

    @property
    def text(self) -> str:
        return self.first.text

    @property
    def kind(self) -> str:
        return self.first.kind


Piece = Token | Bracket


@dataclass(frozen=True, slots=True)
class Statement:
    """`pieces ;` or `pieces { block }`: `stop` is the `;` or the `{`, `end` the `;` or the `}`."""

    docs: tuple[Token, ...]
    pieces: tuple[Piece, ...]
    block: tuple[Statement, ...] | None
    stop: Token
    end: Token
    depth: int

    @property
    def first(self) -> Token:
        return self.pieces[0].first


def parse(source: Source) -> tuple[Statement, ...]:
    """The statements of a file. Raises DiagnosticError (E0101, E0102, E0104) at the first thing that is no statement."""
    from lark import exceptions

    try:
        statements: tuple[Statement, ...] = _parser().parse(source.text)
    except exceptions.UnexpectedCharacters as e:
        raise _bad_character(source, e.line, e.column, e.pos_in_stream) from None
    except exceptions.UnexpectedToken as e:
        raise _bad_token(source, _token(e.token)) from None
    for statement in statements:
        if statement.depth > MAX_DEPTH:
            deep = _deepest(statement)
            raise _error(
                "E0104",
                f"brackets nest {statement.depth} deep; {MAX_DEPTH} is the most a spec may have",
                source.span(deep),
            )
    return statements


def tokens(source: Source) -> list[Token]:
    """Every token of the text in order, comments (COMMENT, DOC) and white space (BLANK) too. Raises as `parse` does."""
    from lark import exceptions

    try:
        return [_token(t) for t in _parser().lex(source.text, dont_ignore=True)]
    except exceptions.UnexpectedCharacters as e:
        raise _bad_character(source, e.line, e.column, e.pos_in_stream) from None


def read(path: Path, name: str) -> Source:
    """Read a file of spec text. Raises DiagnosticError E0603 (no such file), E0103 (not text), E0104 (too large)."""
    try:
        with path.open("rb") as f:
            data = f.read(MAX_BYTES + 4)  # a byte order mark does not count
    except (OSError, ValueError) as e:
        raise _error("E0603", f"cannot read the spec: {reason(e)}", Span(str(path))) from None
    return decoded(data, name, str(path))


def decoded(data: bytes, name: str, path: str = "") -> Source:
    """Bytes as spec text. Raises DiagnosticError E0103 (not text), E0104 (too large)."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        if len(data) <= MAX_BYTES:
            line = data.count(b"\n", 0, e.start) + 1
            raise _error(
                "E0103", f"byte {e.start} is no UTF-8 text", Span(path or name, line), help="save the file as UTF-8"
            ) from None
        text = data.decode("utf-8", "replace")
    return source_of(text, name, path)


def source_of(text: str, name: str = "<spec>", path: str = "") -> Source:
    """Spec text from memory: a byte order mark is dropped; NUL, control characters and lone surrogates are rejected."""
    text = text.removeprefix("\ufeff")
    source = Source(name, path or name, text)
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise _error("E0104", "the file is larger than 1 MiB, the most a spec may have", Span(source.path))
    bad = next((i for i, c in enumerate(text) if _is_forbidden(c)), None)
    if bad is not None:
        line = text.count("\n", 0, bad) + 1
        column = bad - (text.rfind("\n", 0, bad) + 1) + 1
        raise _error(
            "E0103",
            f"character U+{ord(text[bad]):04X} cannot stand in a spec",
            Span(source.path, line, column),
            help="delete it",
        )
    return source


def _is_forbidden(char: str) -> bool:
    code = ord(char)
    return (code < 32 and char not in "\t\n\r\f") or code == 127 or 0xD800 <= code <= 0xDFFF


@functools.cache
def _parser() -> Any:
    from lark import Lark

    grammar = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", lexer="basic", transformer=_builder(), cache=_table_file())


def _table_file() -> str | bool:
    """Where Lark keeps the parse table, a third of the time of `spec check` to compute; it checks grammar and versions.

    False, no file, where the folder can't be written.
    """
    folder = cache_folder("grammar")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    version = ".".join(map(str, sys.version_info[:2]))
    return str(folder / f"spec-{version}.table") if os.access(folder, os.W_OK) else False


def _builder() -> Any:
    from lark import Transformer

    def start(self: Any, children: list[Statement]) -> tuple[Statement, ...]:
        return tuple(children)

    def statement(self: Any, children: list[Any]) -> Statement:
        docs = tuple(_token(c) for c in children if getattr(c, "type", "") == "DOC")
        *pieces, end = (_piece(c) for c in children[len(docs) :])
        if isinstance(end, Token):
            return Statement(docs, tuple(pieces), None, end, end, _depth(pieces))
        opened, inside, closed = end
        return Statement(docs, tuple(pieces), inside, opened, closed, max(_depth(pieces), 1 + _depth(inside)))

    def block(self: Any, children: list[Any]) -> tuple[Token, tuple[Statement, ...], Token]:
        return _token(children[0]), tuple(children[1:-1]), _token(children[-1])

    def bracket(self: Any, children: list[Any]) -> Bracket:
        first, *pieces, last = (_piece(c) for c in children)
        return Bracket(first, tuple(pieces), last, 1 + _depth(pieces))

    return type("Builder", (Transformer,), {f.__name__: f for f in (start, statement, block, bracket)})()


def _piece(child: Any) -> Any:
    return _token(child) if hasattr(child, "type") else child


def _token(token: Any) -> Token:
    return Token(token.type, str(token), token.line or 0, token.column or 0, token.start_pos or 0)


def _depth(children: Any) -> int:
    return max((getattr(c, "depth", 0) for c in children), default=0)


def _deepest(statement: Statement) -> Token:
    """The first token of the innermost statement or bracket, found without recursion."""
    at: Any = statement
    while True:
        inside = [*getattr(at, "pieces", ()), *(getattr(at, "block", None) or ())]
        inside = [c for c in inside if getattr(c, "depth", 0) > 0]
        if not inside:
            first: Token = at.first
            return first
        at = max(inside, key=lambda c: c.depth)


def _error(code: str, message: str, span: Span, help: str = "", related: tuple[Any, ...] = ()) -> DiagnosticError:
    return DiagnosticError([Diagnostic(code, message, span, help=help, related=related)], ExitCode.SPEC)


def _bad_character(source: Source, line: int, column: int, offset: int) -> DiagnosticError:
    char = source.text[offset]
    span = Span(source.path, line, column, 1, source.line(line))
    if char == '"':
        return _error("E0102", 'string is not closed on its line: expected `"`', span)
    if char == "/":
        return _error(
            "E0102",
            "regular expression is not closed on its line: expected `/`",
            span,
            help="write a path pattern as a string; `#` starts a comment",
        )
    return _error("E0101", f"unexpected character `{char}`", span)


def _bad_token(source: Source, at: Token) -> DiagnosticError:
    """Say what is missing. Brackets are followed up to the token where the parser stopped."""
    before: list[Token] = []
    open_brackets: list[Token] = []
    for token in tokens(source):
        if at.kind != "$END" and token.start >= at.start:
            break
        if token.kind in ("COMMENT", "BLANK"):
            continue
        before.append(token)
        if token.text in _CLOSES.values() and token.kind != "STRING":
            open_brackets.append(token)
        elif token.kind in ("RBRACE", "RPAR", "RSQB") and open_brackets:
            open_brackets.pop()
    inner = open_brackets[-1] if open_brackets else None
    previous = before[-1] if before else None
    in_statement = previous is not None and previous.kind not in ("SEMICOLON", "LBRACE", "RBRACE", "DOC")

    if inner is not None and inner.kind in ("LPAR", "LSQB"):
        close = {"(": ")", "[": "]"}[inner.text]
        found = PHRASES.get(at.kind, f"`{at.text}`")
        return _error(
            "E0101",
            f"`{inner.text}` is not closed: expected `{close}` before {found}",
            source.span(inner),
        )
    if previous is not None and previous.kind == "DOC" and at.kind in ("$END", "RBRACE", "SEMICOLON", "LBRACE"):
        return _error(
            "E0101",
            "a doc comment belongs to the statement after it, and there is none",
            source.span(previous),
            help="begin the line with a single `#`",
        )
    if at.kind in ("RPAR", "RSQB") or (at.kind == "RBRACE" and inner is None):
        return _error(
            "E0101", f"`{at.text}` closes nothing: there is no `{_CLOSES[at.text]}` before it", source.span(at)
        )
    if in_statement:
        assert previous is not None
        after = Span(
            source.path,
            previous.line,
            previous.column + len(previous.text),
            1,
            source.line(previous.line) + " ",
        )
        return _error("E0101", f"expected `;` or `{{` after `{previous.text}`", after)
    if at.kind == "$END":
        assert inner is not None
        return _error("E0101", "`{` is not closed: expected `}` before the end of the file", source.span(inner))
    return _error("E0101", f"expected a statement, found {PHRASES.get(at.kind, at.text)}", source.span(at))
