"""A cursor over the pieces of one statement: reads them from left to right and says what it expected where. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from fp8c.diagnostics import Diagnostic, Span
from fp8c.specs.parser import Bracket, Piece, Source, Token
from fp8c.specs.vocabulary import did_you_mean

MAX_DIGITS = 9  # of an integer: more is no size of anything here, and Python refuses to read 4301 digits


class Mistake(Exception):
    """Ends the statement that is being checked; the next one is checked all the same."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        self.diagnostic = diagnostic


class Cursor:
    """Reads the pieces of one statement from left to right."""

    def __init__(self, source: Source, pieces: tuple[Piece, ...], end: Token) -> None:
        self.source, self.pieces, self.end = source, pieces, end
        self.at = 0

    @property
    def piece(self) -> Piece | None:
        return self.pieces[self.at] if self.at < len(self.pieces) else None

    @property
    def text(self) -> str:
        """The next word or mark, "(" or "[" for a bracket, "" at the end; strings give "" too."""
        piece = self.piece
        return "" if piece is None or piece.kind in ("STRING", "REGEX") else piece.text

    @property
    def kind(self) -> str:
        return self.piece.kind if self.piece is not None else ""

    def fail(self, message: str, *, code: str = "E0101", at: Piece | None = None, help: str = "") -> NoReturn:
        raise Mistake(Diagnostic(code, message, self.span(at or self.piece or self.end), help=help))

    def span(self, first: Piece, last: Piece | None = None) -> Span:
        return self.source.span(first.first, (last or first).last)

    def since(self, start: int) -> Span:
        """From the piece at index `start` to the piece read last."""
        return self.span(self.pieces[start], self.pieces[max(start, self.at - 1)])

    def found(self) -> str:
        piece = self.piece
        if piece is None:
            return f"found `{self.end.text}`"
        return f"found {piece.text}" if piece.kind == "STRING" else f"found `{piece.text}`"

    def take(self, kind: str, phrase: str, help: str = "") -> Token:
        piece = self.piece
        if not isinstance(piece, Token) or piece.kind != kind:
            self.fail(f"expected {phrase}, {self.found()}", help=help)
        self.at += 1
        return piece

    def accept(self, text: str) -> bool:
        if self.text != text:
            return False
        self.at += 1
        return True

    def expect(self, text: str) -> None:
        if not self.accept(text):
            help = did_you_mean(self.text, [text]) if self.kind == "WORD" else ""
            self.fail(f"expected `{text}`, {self.found()}", help=help)

    def bracket(self, mark: str, phrase: str) -> Cursor:
        piece = self.piece
        if not isinstance(piece, Bracket) or piece.text != mark:
            self.fail(f"expected {phrase}, {self.found()}")
        self.at += 1
        return Cursor(self.source, piece.pieces, piece.last)

    def choice(self, choices: Iterable[str], phrase: str) -> Token:
        """One word of a closed list."""
        if self.kind != "WORD":
            self.fail(f"expected {phrase}, {self.found()}", help=did_you_mean("", choices))
        if self.text not in choices:
            self.fail(
                f"unknown {phrase.removeprefix('a ').removeprefix('an ')} `{self.text}`",
                help=did_you_mean(self.text, choices),
            )
        return self.take("WORD", phrase)

    def integer(self, phrase: str, least: int, most: int) -> int:
        token = self.take("INTEGER", phrase)
        if len(token.text.lstrip("-")) > MAX_DIGITS:
            self.at -= 1
            self.fail(f"the number has more than {MAX_DIGITS} digits", code="E0104")
        value = int(token.text)
        if not least <= value <= most:
            self.at -= 1
            self.fail(f"{phrase.removeprefix('an integer ')} is {value}; it must be from {least} to {most}")
        return value

    def string(self, phrase: str) -> tuple[str, Token]:
        token = self.take("STRING", phrase)
        return unquote(token.text), token

    def done(self) -> None:
        piece = self.piece
        if piece is None:
            return
        before = self.pieces[self.at - 1].last if self.at else None
        if before is not None and piece.first.line > before.line and self.end.text in (";", "{"):
            # A new line begins with what cannot go on: it is the end of the line above that is missing.
            line = self.source.line(before.line)
            place = Span(self.source.path, before.line, before.column + len(before.text), 1, line + " ")
            raise Mistake(Diagnostic("E0101", f"expected `;` after `{before.text}`", place))
        self.fail(f"expected `{self.end.text}`, {self.found()}")


def unquote(text: str) -> str:
    r"""The text of a string: \" and \\ are the only escapes, any other backslash stands for itself."""
    return text[1:-1].replace('\\"', '"').replace("\\\\", "\\")
