"""The four graphs a viewer shows of a build, each node in its module: before and after the rewrites, forward, backward.

Before is the captured graph, cut where the first node depends on a gradient; after are the two halves. Nodes the text
gives no module (sums of gradients, the loss) go where their inputs come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp8c.build import Build
from fp8c.tools.viewer.graph_reader import GEMM_KINDS, Graph, Node, read_graph

NOTES_FILE = "graphs/notes.json"
_REFERENCE = re.compile(r"%\w+")


@dataclass(frozen=True)
class Half:
    """One direction of one graph. By node name: `modules` its module's path, `types` type texts, also of what it reads
    from outside."""

    when: str  # before | after
    direction: str  # forward | backward
    nodes: tuple[Node, ...]
    modules: Mapping[str, str]
    types: Mapping[str, str]
    saved: frozenset[str] = frozenset()  # names that cross to backward

    @property
    def name(self) -> str:
        return f"{self.when} {self.direction}"


@dataclass(frozen=True)
class BuildGraphs:
    """halves: before forward, before backward, after forward, after backward. inputs: FQN and type of each graph input,
    "" for data."""

    halves: tuple[Half, ...]
    inputs: Mapping[str, tuple[str, str]]
    notes: Mapping[str, Any]

    def half(self, when: str, direction: str) -> Half:
        return next(h for h in self.halves if (h.when, h.direction) == (when, direction))


def read_graphs(build: Build, uses: Mapping[str, Mapping[str, Any]]) -> BuildGraphs:
    """Read a build's graphs. `uses`: those of plan.lock.json. Raises: DiagnosticError E0612 for a text that is none."""
    captured, forward, backward = (read_graph(build.graph_text(n), n) for n in ("captured", "forward", "backward"))
    notes: Mapping[str, Any] = build.json(NOTES_FILE) if build.has(NOTES_FILE) else {}
    roles = notes.get("roles", {})
    cut = _first_backward(captured)
    nodes = [_with_role(n, roles.get(n.name, "")) for n in captured.nodes]
    crossing = {n.name for n in backward.nodes if n.op == "input"}
    made = {n.name for n in forward.nodes if n.op != "input"}
    whole, none = {n.name: n.type for n in captured.nodes}, frozenset[str]()
    parts = (
        ("before", "forward", nodes[:cut], whole, none),
        ("before", "backward", nodes[cut:], whole, none),
        ("after", "forward", forward.nodes, {n.name: n.type for n in forward.nodes}, frozenset(crossing & made)),
        ("after", "backward", backward.nodes, {n.name: n.type for n in backward.nodes}, none),
    )
    halves: list[Half] = []
    for when, direction, part, types, saved in parts:
        calls = tuple(n for n in part if n.op != "input")
        outside = halves[-1].modules if direction == "backward" else {}
        outside = {f"{name}{end}": path for name, path in outside.items() for end in ("", "_q", "_s")}
        halves.append(Half(when, direction, calls, place_nodes(calls, uses, outside), types, saved))
    inputs = {n.name: (n.args, n.type) for g in (captured, forward) for n in g.nodes if n.op == "input"}
    return BuildGraphs(tuple(halves), inputs, notes)


def _with_role(node: Node, role: str) -> Node:
    first, _, key = role.partition(" ")
    if not role:
        return node
    gemm, where = (first, key) if first in GEMM_KINDS and key else ("", role)
    return Node(node.name, node.op, node.args, node.type, gemm, where, node.place, node.inputs)


def _first_backward(graph: Graph) -> int:
    """Index of the first node that depends on a gradient. Inputs stand first whatever they are."""
    gradients = {n.name for n in graph.nodes if n.op == "input" and n.name.startswith("tangents")}
    for index, node in enumerate(graph.nodes):
        if node.op != "input" and any(name in gradients for name in node.inputs):
            return index
    return len(graph.nodes)


# --- modules ----------------------------------------------------------------------------------------------------------


def place_nodes(
    nodes: Sequence[Node], uses: Mapping[str, Mapping[str, Any]], outside: Mapping[str, str]
) -> dict[str, str]:
    """Module path of every node. What the text says counts; a node without it goes to the module its inputs share, at
    most one level above the last of them, which keeps a layer's sums inside the layer, or else to that of its readers.

    outside: modules of values computed before these nodes (the forward's, for backward)
    """
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    placed = {n.name: module_of(n.where, uses) for n in nodes if n.where}
    inferred: set[str] = set()
    unknown = []
    for node in nodes:
        if node.where:
            continue
        near = [name for name in node.inputs if name in placed]
        paths = [placed[name] for name in near] or [outside[name] for name in node.inputs if name in outside]
        if not paths:
            unknown.append(node)
            continue
        last_is_inferred = bool(near) and near[-1] in inferred
        above = paths[-1] if last_is_inferred else _parent(paths[-1])
        if all(path == paths[0] for path in paths):
            stays = any(r.where and placed[r.name] == paths[0] for r in readers.get(node.name, ()))
            placed[node.name] = paths[0] if stays else above
        else:
            shared = _shared(paths)
            placed[node.name] = shared if len(shared) >= len(above) else above
        inferred.add(node.name)
    for node in reversed(unknown):
        later = [placed[r.name] for r in readers.get(node.name, ()) if r.name in placed]
        placed[node.name] = _shared(later) if later else ""
    return placed


def module_of(where: str, uses: Mapping[str, Mapping[str, Any]]) -> str:
    """`model.layers.0.mlp:swiglu` or `...#2` is a use, whose path the plan knows; a path stands for itself."""
    use = uses.get(where)
    return str(use["path"]) if use is not None else where.partition(":")[0].partition("#")[0]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _shared(paths: Iterable[str]) -> str:
    parts = [p.split(".") if p else [] for p in paths]
    common: list[str] = []
    for level in zip(*parts):
        if any(name != level[0] for name in level):
            break
        common.append(level[0])
    return ".".join(common)


# --- identical siblings -----------------------------------------------------------------------------------------------


def identical_siblings(graphs: BuildGraphs, signs: Mapping[str, str]) -> list[list[str]]:
    """Runs of numbered siblings (layers, experts) that hold the same operators, types and decisions, joined the same way.

    signs: a text per module path that has to agree as well (the decisions made for it)
    Two runs of one list are apart; a run of one is left out.
    """
    lists: dict[str, list[str]] = {}
    paths = {p for half in graphs.halves for p in half.modules.values()}
    for path in _with_ancestors(paths):
        parent, _, last = path.rpartition(".")
        if last.isdecimal():
            lists.setdefault(parent, []).append(path)
    members: dict[str, list[tuple[int, int]]] = {child: [] for found in lists.values() for child in found}
    for h, half in enumerate(graphs.halves):
        for i, node in enumerate(half.nodes):
            for path in _ancestors(half.modules[node.name]):
                if path in members:
                    members[path].append((h, i))
    runs = []
    for found in lists.values():
        found.sort(key=lambda p: int(p.rpartition(".")[2]))
        keys = [_structure(graphs, path, members[path], signs) for path in found]
        start = 0
        for end in range(1, len(found) + 1):
            if end == len(found) or keys[end] != keys[start]:
                if end - start > 1:
                    runs.append(found[start:end])
                start = end
    return sorted(runs)


def _structure(graphs: BuildGraphs, path: str, members: list[tuple[int, int]], signs: Mapping[str, str]) -> int:
    """A hash of what a module holds: of each node what it computes and from what, names and order left out."""
    at = len(path)
    keys: dict[tuple[int, str], int] = {}
    for h, i in members:
        half = graphs.halves[h]
        node = half.nodes[i]
        sources = []
        for name in node.inputs:
            inner = keys.get((h, name))
            if inner is None:  # from outside: its type, and for a parameter of this module its name in the module
                fqn, _ = graphs.inputs.get(name, ("", ""))
                own = fqn[at:] if fqn.startswith(f"{path}.") else ""
                inner = hash((own, half.types.get(name, "")))
            sources.append(inner)
        text = _REFERENCE.sub("%", node.args)
        own_path = half.modules[node.name][at:]
        keys[h, node.name] = hash((h, node.op, text, node.type, node.gemm, own_path, node.place, tuple(sources)))
    inside = sorted((p[at:], s) for p, s in signs.items() if p == path or p.startswith(f"{path}."))
    return hash((tuple(sorted(keys.values())), tuple(inside)))


def _ancestors(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _with_ancestors(paths: Iterable[str]) -> set[str]:
    return {a for path in paths for a in _ancestors(path)}
