"""Diagnostics: what fp8c tells a person who has to fix something.

A `Diagnostic` is one finding with a permanent code, the place it points at and a suggestion. Everything that can be
wrong in a spec, a model or a target is reported as one; `DiagnosticError` carries a tuple of them. No torch here.
"""

from __future__ import annotations

import enum
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class Severity(enum.Enum):
    ERROR = "error"
    WARNING = "warning"
    REMARK = "remark"


class ExitCode(enum.IntEnum):
    """Exit codes of the command line; `BUG` is the only one that comes with a traceback."""

    OK = 0
    CHECK_FAILED = 1
    USAGE = 2
    SPEC = 3
    MODEL = 4
    TARGET = 5
    BUG = 70


@dataclass(frozen=True)
class Span:
    """A stretch of one source line. `line` and `column` count from 1; `length` is in characters.

    `text` is the whole source line, kept so that a diagnostic can be printed after the file has changed.
    """

    file: str
    line: int = 0
    column: int = 0
    length: int = 1
    text: str = ""

    def __str__(self) -> str:
        parts = [self.file]
        if self.line:
            parts.append(str(self.line))
            if self.column:
                parts.append(str(self.column))
        return ":".join(parts)


@dataclass(frozen=True)
class Diagnostic:
    """One finding. `message` is lower case and has no full stop; `help` says what to type instead."""

    code: str
    message: str
    span: Span | None = None
    severity: Severity = Severity.ERROR
    notes: tuple[str, ...] = ()
    help: str = ""
    related: tuple[tuple[str, Span], ...] = field(default=())  # (label, place), printed with a caret of its own


class DiagnosticError(Exception):
    """The one exception fp8c raises for bad input; a traceback reaches the user only for a bug in fp8c."""

    def __init__(self, diagnostics: Iterable[Diagnostic], exit_code: ExitCode = ExitCode.CHECK_FAILED) -> None:
        self.diagnostics = tuple(diagnostics)
        self.exit_code = exit_code
        super().__init__("\n".join(render(d) for d in self.diagnostics))


def fail(
    code: str,
    message: str,
    *,
    span: Span | None = None,
    help: str = "",
    notes: tuple[str, ...] = (),
    exit_code: ExitCode = ExitCode.CHECK_FAILED,
) -> DiagnosticError:
    """Build the exception for one diagnostic; the caller raises it."""
    return DiagnosticError([Diagnostic(code, message, span, notes=notes, help=help)], exit_code)


def _caret_block(span: Span) -> list[str]:
    number = str(span.line)
    gutter = " " * len(number)
    text = span.text.replace("\t", " ").rstrip("\n")
    lines = [f" {gutter} |", f" {number} | {text}"]
    if span.column:
        before, marked = text[: span.column - 1], text[span.column - 1 :][: span.length]
        lines.append(f" {gutter} | {' ' * _width(before)}{'^' * max(1, _width(marked))}")
    return lines


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: two for wide characters, none for those that join others."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def render(diagnostic: Diagnostic) -> str:
    """The text a person reads: `file:line:col: error[CODE]: message`, the source line, a caret, the help."""
    place = f"{diagnostic.span}: " if diagnostic.span else ""
    lines = [f"{place}{diagnostic.severity.value}[{diagnostic.code}]: {diagnostic.message}"]
    if diagnostic.span and diagnostic.span.text:
        lines += _caret_block(diagnostic.span)
    for label, span in diagnostic.related:
        lines.append(f"   = {label}: {span}")
        if span.text:
            lines += _caret_block(span)
    lines += [f"   = note: {note}" for note in diagnostic.notes]
    if diagnostic.help:
        lines.append(f"   = help: {diagnostic.help}")
    return "\n".join(lines)


def diagnostic_json(diagnostic: Diagnostic) -> dict[str, Any]:
    """A diagnostic for `--json` documents."""

    def place(span: Span | None) -> dict[str, Any] | None:
        if span is None:
            return None
        return {"file": span.file, "line": span.line, "column": span.column, "length": span.length}

    return {
        "code": diagnostic.code,
        "severity": diagnostic.severity.value,
        "message": diagnostic.message,
        "span": place(diagnostic.span),
        "notes": list(diagnostic.notes),
        "help": diagnostic.help,
        "related": [{"label": label, "span": place(span)} for label, span in diagnostic.related],
    }
