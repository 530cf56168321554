"""Observers of the pass manager: print the graph around passes, dump it, and keep what a reproducer needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from torch import fx

from fp8c import graph as g
from fp8c.build import spec_file
from fp8c.diagnostics import DiagnosticError, ExitCode, fail
from fp8c.files import write_file
from fp8c.passes import ALL_PASSES, HALF_PASSES, ROLES

_ON_HALVES = frozenset(p.name for p in HALF_PASSES)
_NAMES = tuple(p.name for p in ALL_PASSES)


@dataclass(frozen=True)
class Printing:
    """Which graphs to print. Names are passes; each is checked by `checked`."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    after_all: bool = False
    after_change: bool = False
    dump_dir: Path | None = None

    def checked(self) -> Printing:
        """Raises: DiagnosticError E0701 (usage) for a name that is no pass."""
        for name in (*self.before, *self.after):
            check_pass(name)
        return self


def check_pass(name: str) -> None:
    """Raises: DiagnosticError E0701 (usage) for a name that is no pass."""
    if name not in _NAMES:
        raise unknown_pass(name)


def unknown_pass(name: str) -> DiagnosticError:
    import difflib

    near = difflib.get_close_matches(name, _NAMES, 1, 0.5)
    help = f"did you mean '{near[0]}'?" if near else f"the passes are {', '.join(_NAMES)}"
    return fail("E0701", f"there is no pass '{name}'", help=help, exit_code=ExitCode.USAGE)


@dataclass
class Observer:
    """Called with ("before" | "after", index, pass, graph). A pass on the halves comes twice: forward, then backward.

    running: the pass that began and has not ended, with the graph it was given; what a reproducer is made of
    joint:   the joint graph after the last pass on it
    roles:   the captured graph with the roles that assign-roles found
    """

    printing: Printing = field(default_factory=Printing)
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    running: tuple[str, fx.Graph] | None = None
    ended: list[str] = field(default_factory=list)
    joint: fx.Graph | None = None
    roles: fx.Graph | None = None
    _hashes: dict[str, str] = field(default_factory=dict)
    _seen: set[tuple[str, str]] = field(default_factory=set)
    _dumped: int = 0

    def __call__(self, event: str, index: int, name: str, graph: fx.Graph) -> None:
        which = "joint"
        if name in _ON_HALVES:
            which = "backward" if (event, name) in self._seen else "forward"
            self._seen.add((event, name))
        if event == "before":
            self.running = (name, graph)
            if name in self.printing.before:
                self._print(f"before {name}", which, graph)
            if self._compares and which not in self._hashes:
                self._hashes[which] = g.structural_hash(graph)
            return
        self.running = None
        self.ended.append(name)
        if which == "joint":
            self.joint = graph
        if name == ROLES.name:
            self.roles = graph
        changed = False
        if self._compares:
            after = g.structural_hash(graph)
            changed = after != self._hashes.get(which)
            self._hashes[which] = after
        if name in self.printing.after or self.printing.after_all or (self.printing.after_change and changed):
            self._print(f"after {name}", which, graph)
        if self.printing.dump_dir is not None:
            self._dump(name, which, graph)

    @property
    def _compares(self) -> bool:
        return self.printing.after_change

    def _print(self, title: str, which: str, graph: fx.Graph) -> None:
        self.stream.write(f"// ----- IR {title} -----\n{g.graph_text(graph, which)}")

    def _dump(self, name: str, which: str, graph: fx.Graph) -> None:
        assert self.printing.dump_dir is not None
        suffix = "" if which == "joint" else f"-{which}"
        path = self.printing.dump_dir / f"{self._dumped:02}-{name}{suffix}.txt"
        self._dumped += 1
        write_file(path, g.graph_text(graph, which))


def write_reproducer(
    running: tuple[str, fx.Graph],
    ended: Sequence[str],
    *,
    error: BaseException,
    reference: str,
    spec_texts: Sequence[tuple[str, str]],
    command: Sequence[str],
    folder: Path | None = None,
) -> Path:
    """Leave what is needed to run a failing pass again in `fp8c-repro-NNN/`: its graph, the spec, the model, the command."""
    import shlex
    import traceback

    number, base = 1, folder or Path()
    while True:
        place = base / f"fp8c-repro-{number:03}"
        try:
            place.mkdir()
            break
        except FileExistsError:
            number += 1
    name, graph = running
    (place / "graph-before.txt").write_text(g.graph_text(graph, name.replace("-", "_")), encoding="utf-8")
    (place / "passes.txt").write_text("".join(f"{p}\n" for p in (*ended, name)), encoding="utf-8")
    (place / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
    (place / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    for file, text in spec_texts:
        target = place / spec_file(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    source = Path(reference.partition(".py:")[0] + (".py" if ".py:" in reference else ""))
    text = source.read_text(encoding="utf-8") if source.is_file() else f"# the model is {reference}\n"
    (place / "model.py").write_text(text, encoding="utf-8")
    return place
