"""`fp8c export`: a build in the formats of other tools. One entry of FORMATS is one format.

perfetto        Chrome trace events: the build's schedule, else the estimated durations of its layers in program order
model-explorer  the JSON that Google's Model Explorer opens: four graphs, modules as namespaces
dot             Graphviz: modules with identical ones folded, and what flows between them
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8c.build import Build
from fp8c.diagnostics import ExitCode, fail
from fp8c.files import write_file
from fp8c.tools.build_contents import read_contents
from fp8c.tools.viewer.build_graphs import BuildGraphs, Half, identical_siblings, read_graphs
from fp8c.tools.viewer.graph_reader import PLUMBING, precision

TRACE_FILE = "schedule.trace.json"


@dataclass(frozen=True)
class ExportFormat:
    """A format: one line about it, the name of what it writes unless another is given, and what writes it.

    write: takes the build and the output path; returns the line that says what was written
    """

    summary: str
    name: str
    write: Callable[[Build, Path], str]


def perfetto(build: Build, out: Path) -> str:
    """Raises: DiagnosticError E0963 for a build with neither a schedule nor durations."""
    if build.has(TRACE_FILE):
        write_file(out, build.read(TRACE_FILE))
        return f"{out}: the schedule; open it at ui.perfetto.dev"
    if not build.has("durations.json"):
        raise fail(
            "E0963",
            f"{build.path} has no schedule and no durations to draw",
            help="compile for a target with a cost sheet, such as --target h200",
            exit_code=ExitCode.USAGE,
        )
    document = duration_trace(build.json("durations.json"))
    write_file(out, json.dumps(document, separators=(",", ":")) + "\n")
    return f"{out}: estimated durations in program order, {len(document['traceEvents'])} events; open it at ui.perfetto.dev"


def duration_trace(table: Mapping[str, Any]) -> dict[str, Any]:
    """Layers one after the other, forward, then backward in reverse, on one compute stream. Microseconds."""
    shape = table["model"]
    dense = shape["dense_layers"]
    kinds = ["dense"] * dense + ["moe"] * (shape["layers"] - dense)
    known = {row["layer"] for row in table["op"]}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": table["name"]}}]
    events += [{"ph": "M", "pid": 0, "tid": 0, "name": "thread_name", "args": {"name": "compute, in program order"}}]
    layers = [(i, kind) for i, kind in enumerate(kinds) if kind in known]
    order: list[tuple[int, str, tuple[str, ...]]] = [(i, kind, ("F",)) for i, kind in layers]
    order += [(-1, "head", ("F", "B", "W"))] if "head" in known else []
    order += [(i, kind, ("B", "W")) for i, kind in reversed(layers)]
    now_us = 0.0
    for layer, kind, phases in order:
        for phase in phases:
            rows = [r for r in table["op"] if (r["layer"], r["phase"]) == (kind, phase) and r["on"] == "compute"]
            for row in rows:
                length_us = row["ms"] * 1e3
                name = f"layer {layer} {row['name']}" if layer >= 0 else row["name"]
                times = {"ts": round(now_us, 3), "dur": round(length_us, 3)}
                events.append({"ph": "X", "pid": 0, "tid": 0, "name": name, "cat": f"{kind} {phase}", **times})
                now_us += length_us
    return {"displayTimeUnit": "ms", "traceEvents": events}


def model_explorer(build: Build, out: Path) -> str:
    uses = read_contents(build).uses
    graphs = read_graphs(build, uses)
    document = {
        "label": f"{build.manifest['model']['name']} under {build.manifest['spec']['name']}",
        "graphs": [explorer_graph(half, graphs, uses) for half in graphs.halves],
    }
    write_file(out, json.dumps(document, separators=(",", ":")) + "\n")
    count = sum(len(half.nodes) for half in graphs.halves)
    return f"{out}: {len(graphs.halves)} graphs, {count:,} nodes; open it with `model-explorer {out}`"


def explorer_graph(half: Half, graphs: BuildGraphs, uses: Mapping[str, Any]) -> dict[str, Any]:
    """A graph of Model Explorer's JSON: nodes with namespaces, attributes, edges by source and output."""
    own = {node.name for node in half.nodes}
    nodes: list[dict[str, Any]] = []
    outside: dict[str, None] = {}
    for node in half.nodes:
        attributes = {"precision": precision(node), "source": node.place, "arguments": node.args}
        if node.gemm:
            attributes["gemm"] = node.gemm
        if node.name in half.saved:
            attributes["saved for backward"] = "yes"
        decided = uses.get(node.where)
        if node.gemm and decided is not None:
            for name, decision in decided["fields"].items():
                if name.startswith(f"{node.gemm}."):
                    reason = decision["reason"]
                    place = f"rule {reason['rule']}, {reason['file']}:{reason['line']}"
                    attributes[name] = f"{decision['value']} ({place})"
        outside |= dict.fromkeys(n for n in node.inputs if n not in own)
        nodes.append(
            {
                "id": node.name,
                "label": node.op,
                "namespace": half.modules[node.name].replace(".", "/"),
                "attrs": [{"key": k, "value": v} for k, v in attributes.items() if v],
                "incomingEdges": [
                    {"sourceNodeId": n, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
                    for i, n in enumerate(node.inputs)
                ],
                "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": node.type}]}],
            }
        )
    inputs = [
        {
            "id": name,
            "label": graphs.inputs.get(name, ("", ""))[0] or name,
            "namespace": "inputs",
            "attrs": [],
            "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": half.types.get(name, "")}]}],
        }
        for name in outside
    ]
    return {"id": half.name, "nodes": [*inputs, *nodes]}


# --- dot --------------------------------------------------------------------------------------------------------------

_COLOURS = {"e4m3": "#dcecfb", "e5m2": "#fde5d3", "e5m6": "#fae0f0", "bf16": "#fbf0cc", "f32": "#d9f3e9"}


def dot(build: Build, out: Path) -> str:
    uses = read_contents(build).uses
    graphs = read_graphs(build, uses)
    signs = {use["path"]: str(sorted((k, str(d["value"])) for k, d in use["fields"].items())) for use in uses.values()}
    folds = identical_siblings(graphs, signs)
    text = dot_text(graphs, folds)
    write_file(out, text)
    return f"{out}: {text.count('[label=')} modules; draw it with `dot -Tsvg {out} -o graph.svg`"


def dot_text(graphs: BuildGraphs, folds: list[list[str]]) -> str:
    """Modules of both halves as nodes, nested in clusters; of identical siblings the first stands for all."""
    first = {path: run[0] for run in folds for path in run}
    size = {run[0]: len(run) for run in folds}
    lines = ["digraph step {", '  compound=true; node [shape=box style="filled,rounded" fontname="Helvetica"];']
    for half in (graphs.half("after", direction) for direction in ("forward", "backward")):
        kinds: dict[str, dict[str, int]] = {}
        edges: dict[tuple[str, str], None] = {}
        where = {name: _shown(path, first) for name, path in half.modules.items()}
        for node in half.nodes:
            place = where[node.name]
            if node.op not in PLUMBING:
                word = precision(node) if node.gemm and "×" in precision(node) else ""
                counts = kinds.setdefault(place, {})
                counts[word or precision(node)] = counts.get(word or precision(node), 0) + (1000 if word else 1)
            for name in node.inputs:
                if name in where and where[name] != place:
                    edges[where[name], place] = None
        lines += [f"  subgraph cluster_{half.direction} {{", f'    label="{half.direction}";']
        for path, counts in kinds.items():
            best = max(counts, key=lambda k: counts[k])
            names = [_label(p, size) for p in _prefixes(path)] or ["step"]
            colour = next((c for e, c in _COLOURS.items() if best.startswith(e)), "#eceff3")
            label = _quoted(".".join(names) + f"\\n{best}")
            lines.append(f'    {_quoted(half.direction + path)} [label={label} fillcolor="{colour}"];')
        lines.append("  }")
        lines += [
            f"  {_quoted(half.direction + a)} -> {_quoted(half.direction + b)};"
            for a, b in edges
            if a in kinds and b in kinds
        ]
    return "\n".join([*lines, "}"]) + "\n"


def _shown(path: str, first: Mapping[str, str]) -> str:
    """The path with every folded module replaced by the first of its run."""
    for prefix in _prefixes(path):
        if prefix in first and first[prefix] != prefix:
            return _shown(first[prefix] + path[len(prefix) :], first)
    return path


def _label(prefix: str, size: Mapping[str, int]) -> str:
    name = prefix.rpartition(".")[2]
    if prefix in size:
        return f"{name}-{int(name) + size[prefix] - 1} ({size[prefix]}x)"
    return name


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'


FORMATS: dict[str, ExportFormat] = {
    "perfetto": ExportFormat("Chrome trace of the schedule, or of estimated durations", "step.trace.json", perfetto),
    "model-explorer": ExportFormat("JSON for Google's Model Explorer", "step.model-explorer.json", model_explorer),
    "dot": ExportFormat("Graphviz, one node for each module", "step.dot", dot),
}


def export(build: Build, format_name: str, out: Path | None) -> str:
    """Write a build in another tool's format; returns the line that says so.

    Raises: DiagnosticError E0610 when the file cannot be written.
    """
    chosen = FORMATS[format_name]
    return chosen.write(build, out or Path(chosen.name))
