"""The memory of measured choices: one JSON file for each machine and set of versions, shared by all its processes.

    {"schema": "fp8c.gemms/1", "machine": {...}, "fastest": {CLASS: {"implementation": NAME, "us": {NAME: 12.3, ...}}}}

A file is written beside and renamed into place under a lock, and merged with what others wrote meanwhile: of two processes
that measured the same class the first decides for both. A file that cannot be read, is damaged, or belongs to another
machine or version is never trusted: it is rebuilt, with remark R0436. Nothing here waits for another process's GPU work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fp8c.backends.gemms.candidates import NAMES
from fp8c.diagnostics import Diagnostic, Severity, render

_LOG = logging.getLogger(__name__)
SCHEMA = "fp8c.gemms/1"
_LOCK_SECONDS = 10.0  # writing takes milliseconds: a lock held longer belongs to a file system that has none


@dataclass(frozen=True)
class Choice:
    """`us`: median microseconds of each implementation that served the class when it was measured."""

    implementation: str
    us: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"implementation": self.implementation, "us": dict(self.us)}


@dataclass
class Table:
    """Choices by the key of their shape class. `path` None: kept in this process alone.

    unmeasured: classes that could not be measured here, which a later process may try again
    """

    path: Path | None
    machine: Mapping[str, str]
    choices: dict[str, Choice] = field(default_factory=dict)
    unmeasured: set[str] = field(default_factory=set)

    @staticmethod
    def open(folder: Path, machine: Mapping[str, str]) -> Table:
        """The table of this machine in a folder, empty if there is none that can be trusted."""
        digest = hashlib.sha256(json.dumps(dict(machine), sort_keys=True).encode()).hexdigest()[:16]
        table = Table(folder / f"{digest}.json", machine)
        table.choices = table.read()
        return table

    def read(self) -> dict[str, Choice]:
        """What the file holds now; nothing, with a remark, when it can't be trusted."""
        if self.path is None:
            return {}
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            remark(f"measured choices of GEMMs can't be read and are made again: {self.path}: {error}")
            return {}
        try:
            return parsed(json.loads(text), self.machine)
        except ValueError as error:
            remark(f"measured choices of GEMMs are made again: {self.path}: {error}")
            return {}

    def remember(self, key: str, choice: Choice) -> Choice:
        """Keep a choice and write it; returns the one in force, which is another process's if that came first."""
        if self.path is not None:
            try:
                choice = self._merge(key, choice)
            except (OSError, Timeout) as error:
                remark(f"measured choices of GEMMs are kept for this process alone: {self.path}: {error}")
                self.path = None
        self.choices[key] = choice
        return choice

    def _merge(self, key: str, choice: Choice) -> Choice:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock"), timeout=_LOCK_SECONDS):
            found = self.read()
            self.choices = {**self.choices, **found}
            if key in found:
                return found[key]
            choices = {**self.choices, key: choice}
            document = {
                "schema": SCHEMA,
                "machine": dict(self.machine),
                "fastest": {name: choices[name].to_json() for name in sorted(choices)},
            }
            handle, part = tempfile.mkstemp(dir=self.path.parent, suffix=".part")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=1) + "\n")
            os.replace(part, self.path)
        return choice


def parsed(document: Any, machine: Mapping[str, str]) -> dict[str, Choice]:
    """Raises: ValueError that says why a document is not a table of this machine."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    if document.get("machine") != dict(machine):
        raise ValueError("it was written on another machine or by other versions")
    fastest = document.get("fastest")
    if not isinstance(fastest, dict):
        raise ValueError("it lists no choices")
    choices = {}
    for key, entry in fastest.items():
        choices[key] = parsed_choice(key, entry)
    return choices


def parsed_choice(key: str, entry: Any) -> Choice:
    wrong = ValueError(f"its entry for {key!r} is not a choice")
    times = entry.get("us") if isinstance(entry, dict) else None
    if not isinstance(times, dict) or not all(isinstance(t, (int, float)) and t > 0 for t in times.values()):
        raise wrong
    name = entry.get("implementation")
    if name not in NAMES or name not in times:
        raise wrong
    return Choice(name, {other: float(t) for other, t in times.items()})


@cache
def remark(message: str) -> None:
    _LOG.warning("%s", render(Diagnostic("R0436", message, severity=Severity.REMARK)))
