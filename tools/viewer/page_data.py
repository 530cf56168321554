"""What the viewer's page is given: graphs as columns, decisions, tables, as one JSON document, packed into the page.

Columns hold numbers into one list of strings, so that a step of 75,000 nodes is a few megabytes of JSON and half a
megabyte packed. `viewer.js` takes it apart; both sides name the columns in the same words.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fp8c.build import Build
from fp8c.tools.build_contents import read_contents
from fp8c.tools.explain import value_words
from fp8c.tools.viewer.build_graphs import BuildGraphs, Half, identical_siblings, read_graphs
from fp8c.tools.viewer.figures import gemm_flops, memory_rows, traffic_rows
from fp8c.tools.viewer.graph_reader import GEMM_KINDS, PLUMBING, precision, type_bytes

SCHEMA = "fp8c.viewer/1"
TRACE_FILE = "schedule.trace.json"


class Strings:
    """Strings by number, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def to_json(self) -> list[str]:
        return list(self.numbers)


class Decisions:
    """Decisions of uses: equal ones of several layers are kept once, and so is every rule."""

    def __init__(self) -> None:
        self.rules: dict[str, int] = {}
        self.sets: dict[str, int] = {}

    def number(self, fields: Mapping[str, Any]) -> int:
        rows = []
        for name, decision in sorted(fields.items()):
            overrode = [[value_words(o["value"]), self.rule(o["reason"])] for o in decision["overrode"]]
            rows.append([name, value_words(decision["value"]), self.rule(decision["reason"]), overrode])
        return self.sets.setdefault(json.dumps(rows), len(self.sets))

    def rule(self, reason: Mapping[str, Any] | None) -> int:
        if reason is None:
            return -1
        row = [reason["rule"], reason["spec"], reason["file"], reason["line"], reason["because"]]
        return self.rules.setdefault(json.dumps(row), len(self.rules))


def page_data(build: Build) -> dict[str, Any]:
    """Everything the page shows. Raises: DiagnosticError E0612 for a build whose files are not what they should be."""
    contents = read_contents(build)
    lock, report, uses = contents.lock, contents.report, contents.uses
    graphs = read_graphs(build, uses)
    decisions = Decisions()
    sets = {key: decisions.number(use["fields"]) for key, use in uses.items()}
    strings = Strings()
    paths = Strings()
    paths("")
    columns = [half_columns(half, graphs, strings, paths, decisions) for half in graphs.halves]
    signs: dict[str, str] = {}
    for key, use in uses.items():
        signs[use["path"]] = signs.get(use["path"], "") + f"{key[len(use['path']) :]} {sets[key]};"
    folds = [[paths(path) for path in run] for run in identical_siblings(graphs, signs)]
    return {
        "schema": SCHEMA,
        "model": {"name": report["model"]["name"], "reference": report["model"]["reference"]},
        "spec": build.manifest["spec"]["name"],
        "target": {"name": report["target"]["name"], "description": report["target"].get("description", "")},
        "versions": build.manifest["versions"],
        "plan": build.manifest["plan"],
        "halves": columns,
        "inputs": [[name, fqn, type_] for name, (fqn, type_) in graphs.inputs.items()],
        "folds": folds,
        "sources": graphs.notes.get("sources", {}),
        "uses": [_use(key, use, sets[key]) for key, use in uses.items()],
        "decisions": [json.loads(text) for text in decisions.sets],
        "rules": [json.loads(text) for text in decisions.rules],
        "memory": [asdict(row) for row in memory_rows(build.manifest["parameters"], lock["sections"], report)],
        "traffic": [asdict(row) for row in traffic_rows(graphs)],
        "flops": gemm_flops(uses),
        "tables": {k: report[k] for k in ("gemms", "uses", "saved", "layers", "saved_bytes", "sections", "rules")},
        "messages": [r["text"] for r in report["remarks"]],
        "schedule": build.json(TRACE_FILE) if build.has(TRACE_FILE) else None,
        "strings": strings.to_json(),
        "paths": paths.to_json(),
        "bytes": [type_bytes(text) for text in strings.to_json()],
    }


def _use(key: str, use: Mapping[str, Any], decisions: int) -> list[Any]:
    shape = use["shape"]
    sizes = [shape["m"], shape["n"], shape["k"], shape["experts"]]
    words = [use["op"], " ".join(use["kinds"]), " ".join(use["roles"])]
    missing = [use["no_dgrad"], use["no_wgrad"]]
    return [key, use["path"], *words, use["param"] or "", sizes, decisions, use["source"] or "", missing]


def half_columns(
    half: Half, graphs: BuildGraphs, strings: Strings, paths: Strings, decisions: Decisions
) -> dict[str, Any]:
    """The half as columns, one entry for each node.

    name:  the node's name as [string, number]: `mm_15` is ["mm", 15], so that names share strings
    args:  argument text with every reference replaced by `%`; `inputs` are those references in order: the node's index,
           or minus one minus the index of a string that names a value from outside (a parameter, a saved value)
    saved: [index, why, rule] of values that cross to backward
    """
    index = {node.name: i for i, node in enumerate(half.nodes)}
    columns: dict[str, list[Any]] = {
        k: [] for k in ("base", "number", "op", "args", "inputs", "type", "module", "use", "gemm", "place", "precision")
    }
    for node in half.nodes:
        base, number = _split_name(node.name)
        row = {
            "base": strings(base),
            "number": number,
            "op": strings(node.op),
            "args": strings(re.sub(r"%\w+", "%", node.args)),
            "inputs": [index[n] if n in index else -1 - strings(n) for n in node.inputs],
            "type": strings(node.type),
            "module": paths(half.modules[node.name]),
            "use": strings(node.where),
            "gemm": GEMM_KINDS.index(node.gemm) + 1 if node.gemm else 0,
            "place": strings(node.place),
            "precision": strings(precision(node)),
        }
        for name, value in row.items():
            columns[name].append(value)
    why = graphs.notes.get("saved", {})
    saved = []
    for name in sorted(half.saved, key=index.__getitem__):
        noted = why.get(name, {})
        saved.append([index[name], noted.get("why", ""), decisions.rule(noted.get("reason"))])
    plumbing = sorted({strings(node.op) for node in half.nodes if node.op in PLUMBING})
    return {"when": half.when, "direction": half.direction, "plumbing": plumbing, "saved": saved, **columns}


def _split_name(name: str) -> tuple[str, int]:
    """`mm_15` -> ("mm", 15); a name without a number, or whose number would not print the same, has -1."""
    base, mark, number = name.rpartition("_")
    if mark and base and number.isdecimal() and str(int(number)) == number:
        return base, int(number)
    return name, -1


def packed(data: Mapping[str, Any]) -> str:
    """JSON, compressed, as text that may stand in a page."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def unpacked(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)))
