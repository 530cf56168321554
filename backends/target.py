"""Read target records from `targets/*.toml`, or from a user's own file. No torch here."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from fp8c.diagnostics import DiagnosticError, ExitCode, Span, fail
from fp8c.files import reason
from fp8c.target_record import TargetRecord

_FOLDER = Path(__file__).resolve().parent / "targets"
SCHEMA = "fp8c.target/1"


def names() -> list[str]:
    """Machines that come with fp8c."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_target(name: str | Path) -> TargetRecord:
    """A shipped machine by name, or a user's own `.toml` by path.

    Raises DiagnosticError with exit code TARGET: E0406 (no such target), E0408 (the file is not a target record).
    """
    text = str(name)
    if text in names():
        return _read(_FOLDER / f"{text}.toml", text)
    if not text.endswith(".toml"):
        raise _unknown(text)
    path = Path(name)
    if not path.is_file():
        raise fail("E0406", f"there is no target file {text}", exit_code=ExitCode.TARGET)
    return _read(path, path.stem)


def _unknown(name: str) -> DiagnosticError:
    import difflib

    close = difflib.get_close_matches(name.lower()[:64], names(), 1, 0.5)
    by_architecture = [n for n in names() if load_target(n).architecture == name.lower()]
    if by_architecture:
        help = f"`{name}` is an architecture; name a machine: {', '.join(by_architecture)}"
    elif close:
        help = f"did you mean `{close[0]}`?"
    else:
        help = f"write one of {', '.join(names())}, or the path of a .toml file"
    return fail("E0406", f"unknown target `{name}`", help=help, exit_code=ExitCode.TARGET)


def _read(path: Path, name: str) -> TargetRecord:
    def bad(message: str, help: str = "") -> DiagnosticError:
        return fail("E0408", message, span=Span(str(path)), help=help, exit_code=ExitCode.TARGET)

    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise bad(f"not a target file: {reason(e)}") from None
    if raw.pop("schema", None) != SCHEMA:
        raise bad(f'expected `schema = "{SCHEMA}"`')
    known = {f.name: str(f.type) for f in fields(TargetRecord) if f.name != "name"}
    missing = sorted(known.keys() - raw.keys())
    unknown = sorted(raw.keys() - known.keys())
    if missing or unknown:
        parts = [f"{word} {', '.join(keys)}" for word, keys in (("lacks", missing), ("has unknown", unknown)) if keys]
        raise bad(f"the target {' and '.join(parts)}", help="copy a file of fp8c/backends/targets and change it")
    values = {key: _convert(raw[key], known[key]) for key in known}
    wrong = sorted(key for key, value in values.items() if value is None)
    if wrong:
        raise bad(f"{wrong[0]} is {raw[wrong[0]]!r}; expected {known[wrong[0]]}, not negative")
    if values["accumulator"] not in ("fp32", "truncating"):
        raise bad('accumulator is "fp32" or "truncating"')
    return TargetRecord(name=name, **values)


def _convert(value: object, annotation: str) -> Any:
    """A TOML value as the field's type, None where it is not of that type."""
    match annotation:
        case "str":
            return value if isinstance(value, str) else None
        case "int":
            return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
        case "float":
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return float(value) if is_number and value >= 0 else None  # type: ignore[arg-type,operator]
    if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return None
    return frozenset(value) if annotation.startswith("frozenset") else tuple(value)


def record_json(record: TargetRecord) -> dict[str, Any]:
    """A record for `--json` documents; sets become sorted lists."""
    values = {f.name: getattr(record, f.name) for f in fields(TargetRecord)}
    return {
        k: sorted(v) if isinstance(v, frozenset) else list(v) if isinstance(v, tuple) else v for k, v in values.items()
    }
