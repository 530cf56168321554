"""Print a spec the one way specs are printed: `fp8c spec fmt`. No torch here.

Two spaces of indent, one statement a line; a block stays on one line where its author wrote it so and it fits. Comments
and at most one blank line between statements are kept. The words of the spec are never changed: the result has the same
tokens in the same order, and printing it again gives the same text.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from fp8c.specs.parser import Source, Token, parse, tokens
from fp8c.specs.vocabulary import PREDICATES

WIDTH = 120
_INDENT = "  "
_CALLS = frozenset({*PREDICATES, "delayed"})
_TIGHT_BEFORE = frozenset({",", ".", "..", "?", ")", "]", ";"})
_TIGHT_AFTER = frozenset({"!", "@", ".", "..", "(", "["})


@dataclass(frozen=True)
class _Comment:
    """A comment on a line of its own."""

    text: str
    has_blank_before: bool


@dataclass(frozen=True)
class _Statement:
    """Pieces with comments between them; `block` is None for `;`. `tail` is the comment behind the `;` or `}`, `head` the
    one behind the `{`."""

    pieces: tuple[Token, ...]
    block: tuple[_Item, ...] | None
    is_inline: bool
    head: str
    tail: str
    has_blank_before: bool


_Item = _Comment | _Statement


def format_source(source: Source) -> str:
    """The text in its printed form. Raises DiagnosticError where the text is no list of statements."""
    parse(source)
    reader = _Reader(tokens(source))
    lines: list[str] = []
    _print(reader.items(), 0, lines)
    return "\n".join(lines) + "\n" if lines else ""


def diff(source: Source, formatted: str) -> str:
    """A unified diff from the text as it is to its printed form, "" when they agree."""
    before, after = source.text.splitlines(keepends=True), formatted.splitlines(keepends=True)
    return "".join(difflib.unified_diff(before, after, source.path, f"{source.path} (formatted)"))


class _Reader:
    """Groups tokens into statements and comments. The text has been parsed, so brackets and `;` are where they belong."""

    def __init__(self, all_tokens: Sequence[Token]) -> None:
        self.tokens: list[Token] = []
        self.newlines: list[int] = []  # line ends between a token and the one before it
        newlines = 2
        for token in all_tokens:
            if token.kind == "BLANK":
                newlines += token.text.count("\n")
                continue
            self.tokens.append(token)
            self.newlines.append(newlines)
            newlines = 0
        self.at = 0

    def items(self) -> tuple[_Item, ...]:
        """Up to the `}` that closes the block, or the end."""
        items: list[_Item] = []
        while self.at < len(self.tokens) and self.tokens[self.at].kind != "RBRACE":
            token = self.tokens[self.at]
            has_blank = self.newlines[self.at] > 1 and bool(items)
            if token.kind in ("COMMENT", "DOC"):
                self.at += 1
                items.append(_Comment(token.text.rstrip(), has_blank))
            else:
                items.append(self.statement(has_blank))
        return tuple(items)

    def statement(self, has_blank: bool) -> _Statement:
        start = self.at
        while self.tokens[self.at].kind not in ("SEMICOLON", "LBRACE"):
            self.at += 1
        pieces = tuple(self.tokens[start : self.at])
        opening = self.at
        self.at += 1
        if self.tokens[opening].kind == "SEMICOLON":
            return _Statement(pieces, None, False, "", self.trailing(), has_blank)
        head = self.trailing()
        block = self.items()
        closing = self.at
        self.at += 1
        is_inline = not any(self.newlines[opening + 1 : closing + 1]) and all(
            isinstance(item, _Statement) and item.block is None and not item.tail for item in block
        )
        return _Statement(pieces, block, is_inline and not head, head, self.trailing(), has_blank)

    def trailing(self) -> str:
        """The comment on the rest of the line, which is not one that documents the next statement."""
        if self.at < len(self.tokens) and self.tokens[self.at].kind == "COMMENT" and not self.newlines[self.at]:
            self.at += 1
            return self.tokens[self.at - 1].text.rstrip()
        return ""


def _print(items: tuple[_Item, ...], depth: int, lines: list[str]) -> None:
    indent = _INDENT * depth
    for item in items:
        if item.has_blank_before:
            lines.append("")
        if isinstance(item, _Comment):
            lines.append(indent + item.text)
            continue
        tail = f"  {item.tail}" if item.tail else ""
        pieces = _pieces(item.pieces)
        if item.block is None:
            lines.extend(_wrapped(pieces, ";", indent))
            lines[-1] += tail
            continue
        inline = _inline(item, pieces[0]) if len(pieces) == 1 else ""
        if inline and len(indent) + len(inline) <= WIDTH:
            lines.append(indent + inline + tail)
            continue
        lines.extend(_wrapped(pieces, " {", indent))
        lines[-1] += f"  {item.head}" if item.head else ""
        _print(item.block, depth + 1, lines)
        lines.append(indent + "}" + tail)


def _inline(item: _Statement, head: str) -> str:
    if not item.is_inline or item.block is None:
        return ""
    inside = ""
    for inner in item.block:
        assert isinstance(inner, _Statement)
        pieces = _pieces(inner.pieces)
        if len(pieces) > 1:
            return ""
        inside += pieces[0] + "; "
    return f"{head} {{ {inside}}}"


def _pieces(pieces: tuple[Token, ...]) -> list[str]:
    """The pieces as text, one string for each line that a comment between them forces."""
    lines = [""]
    before: Token | None = None
    for token in pieces:
        if token.kind == "COMMENT":
            lines[-1] += ("  " if lines[-1] else "") + token.text.rstrip()
            lines.append("")
            before = None
            continue
        if before is not None and _has_space(before, token):
            lines[-1] += " "
        lines[-1] += token.text
        before = token
    return lines


def _has_space(before: Token, token: Token) -> bool:
    if token.kind == "STRING" or before.kind == "STRING":
        return before.text not in _TIGHT_AFTER and token.text not in _TIGHT_BEFORE
    if before.text in _TIGHT_AFTER or token.text in _TIGHT_BEFORE:
        return False
    return not (token.text == "(" and before.text in _CALLS)


def _wrapped(pieces: list[str], end: str, indent: str) -> list[str]:
    """Lines of one statement. One that is too long is broken before its `|`s outside of brackets."""
    deeper = indent + _INDENT * 2
    lines = [(deeper if i else indent) + piece for i, piece in enumerate(pieces)]
    if not pieces[-1]:
        lines[-1] = deeper
    lines[-1] += end.lstrip() if not pieces[-1] else end
    if len(lines) > 1 or len(lines[0]) <= WIDTH:
        return lines
    branches = _branches(lines[0])
    return [branches[0], *(f"{deeper}{branch}" for branch in branches[1:])]


def _branches(line: str) -> list[str]:
    """Split before each ` | ` that stands outside of brackets, strings and regular expressions."""
    parts, depth, quote, start, at = [], 0, "", 0, 0
    while at < len(line):
        char = line[at]
        if quote:
            if char == "\\":
                at += 1
            elif char == quote:
                quote = ""
        elif char in '"/':
            quote = char
        elif char in "([":
            depth += 1
        elif char in ")]":
            depth -= 1
        elif char == "|" and depth == 0:
            parts.append(line[start:at].rstrip())
            start = at
        at += 1
    return [*parts, line[start:]]
