"""Machines for the cost model: a target record joined with a cost sheet of `costs/`. No torch here.

A sheet holds fields of `Machine` the target record does not have; `base = "h800"` starts from another sheet, which is how
the what-if machines of `costs/whatif/` are written: one file per wish, with the few fields it changes.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fp8c.backends.target import load_target
from fp8c.cost_model import Machine
from fp8c.diagnostics import DiagnosticError, ExitCode, Span, fail
from fp8c.files import reason

_COSTS = Path(__file__).resolve().parent / "costs"
SCHEMA = "fp8c.costs/1"
#: Machine fields a target record gives; a sheet may override them, a what-if may change them.
_FROM_TARGET = ("sms", "fp8_tflops", "bf16_tflops", "hbm_gb", "hbm_tb_per_s", "nvlink_gb_per_s", "nic_gb_per_s")


@dataclass(frozen=True)
class WhatIf:
    """A machine that does not exist, the wish it stands for, and the real one it starts from."""

    name: str
    wish: str
    machine: Machine
    base: Machine


def machine_names() -> list[str]:
    """Sheets that come with fp8c, the what-ifs left out."""
    return sorted(path.stem for path in _COSTS.glob("*.toml"))


def whatif_names() -> list[str]:
    return sorted(f"whatif/{path.stem}" for path in (_COSTS / "whatif").glob("*.toml"))


def load_machine(name: str | Path) -> Machine:
    """A machine by name (`h800`, `whatif/comm-engine`), or a sheet by path (`.toml`).

    Raises (exit code TARGET): E0930 no such machine, E0931 not a cost sheet, E0932 a field unknown, missing or of the
    wrong type; E0406 and E0408 for its target.
    """
    return _read(_find(name), frozenset())[0]


def load_whatif(name: str) -> WhatIf:
    """A what-if with what it is compared to. Raises as `load_machine`, and E0931 for a sheet that states no wish."""
    path = _find(name)
    machine, raw = _read(path, frozenset())
    if "wish" not in raw or "base" not in raw:
        raise fail("E0931", "a what-if sheet states `base` and `wish`", span=Span(str(path)), exit_code=ExitCode.TARGET)
    return WhatIf(path.stem, str(raw["wish"]), machine, _read(_find(str(raw["base"])), frozenset({path}))[0])


def _find(name: str | Path) -> Path:
    text = str(name)
    path = Path(text) if text.endswith(".toml") else _COSTS / f"{text}.toml"
    if not path.is_file():
        known = ", ".join([*machine_names(), *whatif_names()])
        raise fail("E0930", f"there is no machine {text!r}", help=f"known are {known}", exit_code=ExitCode.TARGET)
    return path


def _read(path: Path, seen: frozenset[Path]) -> tuple[Machine, dict[str, Any]]:
    def bad(code: str, message: str) -> DiagnosticError:
        return fail(code, message, span=Span(str(path)), exit_code=ExitCode.TARGET)

    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise bad("E0931", f"not a cost sheet: {reason(error)}") from None
    if raw.get("schema") != SCHEMA:
        raise bad("E0931", f'expected schema = "{SCHEMA}"')
    if path in seen:
        raise bad("E0931", "the sheet is based on itself")
    known = {f.name: str(f.type) for f in fields(Machine) if f.name != "name"}
    values = {key: value for key, value in raw.items() if key not in ("schema", "base", "target", "wish", "sources")}
    for key, value in values.items():
        if not _fits(value, known.get(key, "")):
            expected = known[key] + ", not negative" if key in known else "one of " + ", ".join(known)
            raise bad("E0932", f"{key} = {value!r}: expected {expected}")
    if "base" in raw:
        return replace(_read(_find(str(raw["base"])), seen | {path})[0], name=path.stem, **values), raw
    record = load_target(str(raw.get("target", path.stem)))
    from_target: dict[str, Any] = {key: getattr(record, key) for key in _FROM_TARGET}
    from_target["is_truncating"] = record.is_truncating
    from_target["has_group_scaling"] = "e4m3[1x128] fp32" in record.native_scaling
    return Machine(name=path.stem, **{**from_target, **values}), raw


def _fits(value: object, annotation: str) -> bool:
    if annotation == "bool":
        return isinstance(value, bool)
    is_number = isinstance(value, int if annotation == "int" else (int, float)) and not isinstance(value, bool)
    return annotation in ("int", "float") and is_number and 0 <= value < math.inf  # type: ignore[operator]
