"""What `fp8c spec check` and `fp8c spec new` say. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8c.diagnostics import Diagnostic, DiagnosticError, ExitCode, diagnostic_json, fail
from fp8c.specs import ast
from fp8c.specs.load import Spec, load, load_file, shipped
from fp8c.specs.merge import merge_sections


@dataclass(frozen=True)
class Summary:
    """The check of one spec. `text` is the line for a spec without mistakes."""

    name: str
    text: str
    diagnostics: tuple[Diagnostic, ...]

    @property
    def is_ok(self) -> bool:
        return not self.diagnostics

    def to_json(self) -> dict[str, Any]:
        return {
            "spec": self.name,
            "ok": self.is_ok,
            "summary": self.text,
            "diagnostics": [diagnostic_json(d) for d in self.diagnostics],
        }


def summarize(spec: str) -> Summary:
    """Check a shipped spec or a file without a model; mistakes are in the result."""
    try:
        loaded = load_file(Path(spec)) if spec.endswith(".fp8") else load(spec)
    except DiagnosticError as e:
        return Summary(spec, "", e.diagnostics)
    if isinstance(loaded, ast.File):
        return Summary(spec, f"{spec}: ok: {len(loaded.formats)} formats, {len(loaded.sets)} sets, no spec", ())
    _, conflicts = merge_sections(loaded)
    return Summary(spec, _line(spec, loaded), tuple(conflicts))


def _line(name: str, spec: Spec) -> str:
    rules = sum(len(layer.rules) for layer in spec.layers)
    target = spec.target
    parts = [f"{rules} rule{'s' * (rules != 1)}"]
    if len(spec.layers) > 1:
        parts.append("extends " + ", ".join(layer.name for layer in reversed(spec.layers[:-1])))
    if target is not None:
        parts.append("for " + ", ".join(a.text for a in target.architectures))
    return f"{name}: ok: spec {spec.name}, {', '.join(parts)}"


def new_spec(name: str, extends: str) -> str:
    """The text of a spec that extends a shipped one and changes nothing yet. Raises DiagnosticError (usage)."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise fail(
            "E0101",
            f"`{name}` cannot name a spec",
            help="a name is letters, digits and `_`, and begins with no digit",
            exit_code=ExitCode.USAGE,
        )
    parent = load(extends)
    if extends.removeprefix("std:") not in shipped() or parent.name == name:
        raise fail("E0205", f"spec `{name}` cannot extend itself", exit_code=ExitCode.USAGE)
    return f"""version 1;
use "std:{parent.name}" as base;

## What this spec changes, and why.
spec {name} extends base {{
  # A rule that changes what `{parent.name}` decided says so with `override`, for example:
  #
  # override rule last_layers for layers(-2..-1) & op(linear) {{
  #   precision = bf16;
  #   because "the run or the paper that shows it";
  # }}
}}
"""
