"""Running a user's model code: every way it can fail becomes one diagnostic at the user's own line.

A model file is a program: it may raise, exit, or print. None of that may end the compiler, reach stdout (which is the
result's), or show a traceback through fp8c.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, Span, fail

_OWN_FOLDER = Path(__file__).resolve().parent
_OWN_FOLDERS = (_OWN_FOLDER, *((_OWN_FOLDER / name).resolve() for name in ("passes", "backends", "specs", "tools")))
_LIBRARY_FOLDERS = tuple(
    {str(Path(sysconfig.get_paths()[key]).resolve()) for key in ("stdlib", "purelib", "platlib")}
    | {str(folder) for folder in _OWN_FOLDERS}
)


class _ProcessExit(BaseException):
    """Stands in for `os._exit` and `os.abort` while user code runs; no `except Exception` swallows it."""

    def __init__(self, call: str) -> None:
        self.call = call
        super().__init__(call)


@contextlib.contextmanager
def _caught_exits() -> Iterator[None]:
    """Make `os._exit` and `os.abort` raise in this process; a forked child still ends for real."""
    owner, real_exit, real_abort = os.getpid(), os._exit, os.abort

    def soft_exit(status: int) -> NoReturn:
        if os.getpid() != owner:
            real_exit(status)
        raise _ProcessExit(f"os._exit({status})")

    def soft_abort() -> NoReturn:
        if os.getpid() != owner:
            real_abort()
        raise _ProcessExit("os.abort()")

    os._exit, os.abort = soft_exit, soft_abort
    try:
        yield
    finally:
        os._exit, os.abort = real_exit, real_abort


@contextlib.contextmanager
def user_code(what: str, source: str, *, extra_help: str = "") -> Iterator[None]:
    """Run the block as user code: stdout goes to stderr, and what it raises becomes a diagnostic.

    what:   the words for the message, e.g. `model()` or `importing model.py`
    source: the model file, or the module or configuration name, where no frame of the user's is found
    Raises: DiagnosticError E0803 (it raised) or E0808 (it tried to exit), exit code MODEL. A DiagnosticError and a
            KeyboardInterrupt pass through.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), _caught_exits():
            yield
    except (DiagnosticError, KeyboardInterrupt):
        raise
    except (SystemExit, _ProcessExit) as error:
        call = error.call if isinstance(error, _ProcessExit) else f"SystemExit({error.code!r})"
        raise fail(
            "E0808",
            f"{what} ended the process with {call}, expected it to return",
            span=span_of_exception(error, source),
            help="put command-line code under `if __name__ == '__main__':`; fp8c only needs the functions",
            exit_code=ExitCode.MODEL,
        ) from None
    except Exception as error:  # noqa: BLE001 - whatever a model raises is the model's fault, and reported as such
        raise DiagnosticError([diagnose(error, what, source, extra_help)], ExitCode.MODEL) from None


def diagnose(error: Exception, what: str, source: str, help: str = "") -> Diagnostic:
    """E0803 for an exception of user code, at the innermost line that is the user's."""
    text = str(error).strip() or "no message"
    first, *rest = text.splitlines()
    notes = tuple(line.strip() for line in rest[:6] if line.strip())
    span = span_of_exception(error, source)
    frames = traceback.extract_tb(error.__traceback__)
    if frames and Path(frames[-1].filename).is_file():
        place = frames[-1].filename
        if not _is_users(place) and not _is_own(place):
            notes += (f"raised in {_short(place)}:{frames[-1].lineno}, in {frames[-1].name}",)
    return Diagnostic("E0803", f"{what} raised {type(error).__name__}: {first}", span, notes=notes, help=help)


def span_of_exception(error: BaseException, source: str) -> Span | None:
    """The innermost frame outside of Python, its packages and fp8c; the place of a syntax error; else `source` alone."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        column = error.offset or 1
        length = max(1, (error.end_offset or column + 1) - column) if error.end_lineno in (None, error.lineno) else 1
        text = error.text or linecache.getline(error.filename, error.lineno)
        return Span(_short(error.filename), error.lineno, column, length, text.rstrip("\n"))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    return span_of_frame(frames[-1]) if frames else Span(source)


def span_of_frame(frame: traceback.FrameSummary) -> Span:
    """The place of a traceback frame, with the columns Python 3.11 keeps for it."""
    assert frame.lineno is not None
    text = linecache.getline(frame.filename, frame.lineno).rstrip("\n")
    start = frame.colno if frame.colno is not None else len(text) - len(text.lstrip())
    one_line = frame.end_lineno in (None, frame.lineno) and frame.end_colno is not None
    end = frame.end_colno if one_line and frame.end_colno is not None else len(text)
    return Span(_short(frame.filename), frame.lineno, start + 1, max(1, end - start), text)


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = str(Path(filename).resolve())
    return not any(path.startswith(folder + os.sep) for folder in _LIBRARY_FOLDERS)


def _is_own(filename: str) -> bool:
    return str(Path(filename).resolve()).startswith(str(_OWN_FOLDER) + os.sep)


@functools.lru_cache(maxsize=4096)
def is_model_file(filename: str) -> bool:
    """Whether a source file is neither torch's nor fp8c's own: a model's, perhaps one from an installed package."""
    return (
        "/torch/" not in filename
        and not filename.startswith("<")
        and not any(str(Path(filename).resolve()).startswith(str(folder) + os.sep) for folder in _OWN_FOLDERS)
    )


def short_path(filename: str) -> str:
    """The name of a source file in messages and locks: the same on every machine for a package's file."""
    return _short_in(filename, os.getcwd())


@functools.lru_cache(maxsize=4096)
def _short_in(filename: str, folder: str) -> str:
    return _short(filename)


def _short(filename: str) -> str:
    """Relative to the current folder where that is shorter to read, without any folder for installed packages."""
    path = Path(filename)
    for folder in _LIBRARY_FOLDERS:
        if str(path).startswith(folder + os.sep):
            return str(path.relative_to(folder))
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
