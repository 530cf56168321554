"""The parts of a build that readers of it need, checked before they are used: a folder whose hashes agree may still hold
something else, such as what another program or an older version wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fp8c.build import Build
from fp8c.diagnostics import DiagnosticError, ExitCode, fail

LOCK_FILE = "plan.lock.json"
REPORT_FILE = "report.json"

_USE_KEYS = ("op", "path", "param", "kinds", "roles", "shape", "no_dgrad", "no_wgrad", "source", "fields")
_REPORT_KEYS = ("gemms", "uses", "saved", "layers", "saved_bytes", "sections", "rules", "remarks", "model", "target")
_MANIFEST_KEYS = ("model", "spec", "target", "versions", "parameters", "plan")
_REASON_KEYS = ("rule", "spec", "file", "line", "because")


@dataclass(frozen=True)
class Contents:
    """A build with its plan (`plan.lock.json`) and tables (`report.json`)."""

    build: Build
    lock: Mapping[str, Any]
    report: Mapping[str, Any]

    @property
    def uses(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.lock["uses"]
        return found


def read_lock(build: Build) -> Mapping[str, Any]:
    """The plan. Raises: DiagnosticError E0612 for a file that is no lock."""
    lock = _object(build, LOCK_FILE)
    _require(build, LOCK_FILE, lock, ("uses", "sections", "spec", "spec_hash", "target"))
    for key, use in lock["uses"].items():
        _require(build, f"{LOCK_FILE}, use {key}", use, _USE_KEYS)
        _require(build, f"{LOCK_FILE}, shape of {key}", use["shape"], ("m", "n", "k", "experts"))
        for name, decision in use["fields"].items():
            _decision(build, f"{LOCK_FILE}, {name} of {key}", decision)
    for section, values in lock["sections"].items():
        for name, decision in values.items():
            _decision(build, f"{LOCK_FILE}, {section}.{name}", decision)
    return lock


def read_contents(build: Build) -> Contents:
    """Plan and tables. Raises: DiagnosticError E0612 when either, or the manifest, is not what fp8c writes."""
    _require(build, "manifest.json", build.manifest, _MANIFEST_KEYS)
    for name in ("captured", "forward", "backward"):
        if not (build.has(f"graphs/{name}.txt") or build.has(f"graphs/{name}.txt.gz")):
            raise _other(build, f"it has no graphs/{name}.txt")
    lock, report = read_lock(build), _object(build, REPORT_FILE)
    _require(build, REPORT_FILE, report, _REPORT_KEYS)
    _require(build, f"{REPORT_FILE}, saved_bytes", report["saved_bytes"], ("fp8c", "bf16", "logits"))
    return Contents(build, lock, report)


def _decision(build: Build, where: str, decision: Any) -> None:
    _require(build, where, decision, ("value", "reason", "overrode"))
    for reason in (decision["reason"], *(o.get("reason") for o in decision["overrode"])):
        _require(build, where, reason, _REASON_KEYS)


def _object(build: Build, name: str) -> Mapping[str, Any]:
    if not build.has(name):
        raise _other(build, f"it has no {name}")
    found = build.json(name)
    _require(build, name, found, ())
    return found  # type: ignore[no-any-return]


def _require(build: Build, where: str, value: Any, keys: Iterable[str]) -> None:
    if not isinstance(value, Mapping):
        raise _other(build, f"{where} is no object")
    missing = [key for key in keys if key not in value]
    if missing:
        raise _other(build, f"{where} lacks {', '.join(missing)}")


def _other(build: Build, why: str) -> DiagnosticError:
    return fail(
        "E0612",
        f"{build.path} does not hold what this fp8c writes: {why}",
        help="build it again with `fp8c compile`",
        exit_code=ExitCode.USAGE,
    )
