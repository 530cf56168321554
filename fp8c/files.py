"""Files that commands read and write: what is wrong with one is said in words, and none is left half written. No torch."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp8c.diagnostics import DiagnosticError, ExitCode, fail


def reason(error: Exception) -> str:
    """Why a file could not be read or written: no number of the system's, and not the path again."""
    match error:
        case OSError():
            return (error.strerror or str(error)).lower()
        case RecursionError():
            return "nested too deep"
        case UnicodeDecodeError():
            return f"byte {error.start} is no UTF-8 text"
        case json.JSONDecodeError():
            return f"line {error.lineno}, column {error.colno}: {error.msg[:1].lower()}{error.msg[1:]}"
    return str(error) or type(error).__name__


def write_file(path: Path, content: str | bytes) -> None:
    """Write beside the file and swap in whole, so that no killed run leaves half of it; a device or a pipe is written to.

    Raises: DiagnosticError E0610, exit code USAGE.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with _explained(path):
        place = _place(path)
        if place.exists() and not place.is_file():
            place.write_bytes(data)
            return
        temporary = _beside(place)
        try:
            temporary.write_bytes(data)
            if place.exists():
                temporary.chmod(place.stat().st_mode & 0o777)
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Fail before the work whose result goes there. Raises: DiagnosticError E0610, exit code USAGE."""
    with _explained(path):
        place = _place(path)
        if place.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if place.exists() and not place.is_file():
            return
        probe = _beside(place)
        probe.touch(exist_ok=False)
        probe.unlink()


def output_file(text: str) -> Path:
    """`check_writable` as a type of argparse's: a measurement of minutes is not lost to a folder that is not there."""
    import argparse

    try:
        check_writable(Path(text))
    except DiagnosticError as error:
        raise argparse.ArgumentTypeError(error.diagnostics[0].message) from None
    return Path(text)


def _place(path: Path) -> Path:
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise fail(
            "E0610", f"cannot write {path}: {reason(error)}", help="name another file", exit_code=ExitCode.USAGE
        ) from None
