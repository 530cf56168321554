"""`fp8c inspect --text`: the build for a terminal. Modules with identical siblings folded, then the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fp8c.build import Build
from fp8c.diagnostics import ExitCode, fail
from fp8c.tools.build_contents import read_contents
from fp8c.tools.explain import ranges, size
from fp8c.tools.viewer.build_graphs import BuildGraphs, identical_siblings, read_graphs
from fp8c.tools.viewer.figures import element, gemm_flops, memory_rows, traffic_rows
from fp8c.tools.viewer.graph_reader import is_gemm, type_bytes


def inspect_text(build: Build, only: str = "") -> str:
    """The whole page as text; `only` keeps modules whose path contains it. Raises: DiagnosticError E0615 when none does."""
    contents = read_contents(build)
    lock, report, uses = contents.lock, contents.report, contents.uses
    graphs = read_graphs(build, uses)
    saved = report["saved_bytes"]
    rows = module_rows(graphs, uses, only)
    if len(rows) == 1 and only:  # a layer that stands behind an identical one
        rows = module_rows(graphs, uses, only, folds=False)
    if len(rows) == 1 and only:
        raise fail(
            "E0615",
            f"{build.path} has no module whose path contains '{only}'",
            help="without --only all modules are listed",
            exit_code=ExitCode.USAGE,
        )
    lines = [
        f"{report['model']['reference']} under {build.manifest['spec']['name']} for {build.manifest['target']['name']}",
        "",
        *columns(rows),
        "",
        *columns([("GEMMs", "total", "FP8", "kept"), *_gemm_rows(report["gemms"])]),
        "",
        *columns([("operands of the GEMMs", "FLOPs"), *((k, f"{n:.3e}") for k, n in gemm_flops(uses).items())]),
        "",
        *columns(_layer_rows(report["layers"])),
        f"saved for backward, without logits: {size(saved['fp8c'])}"
        + (f", {saved['fp8c'] / saved['bf16']:.3f}x of BF16" if saved["bf16"] else ""),
        "",
        *columns([("memory", "bytes", "from"), *_memory(build, lock, report)], left=(0, 2)),
        "",
        *columns([("traffic, unfused", "before", "after"), *_traffic(graphs)]),
    ]
    messages = [r["text"] for r in report["remarks"]]
    return "\n".join([*lines, *(["", *messages] if messages else [])])


def module_rows(
    graphs: BuildGraphs, uses: Mapping[str, Any], only: str = "", *, folds: bool = True
) -> list[tuple[str, ...]]:
    """A row for each module that holds operators: its name, operators of both halves, formats, saved bytes."""
    signs = {use["path"]: str(sorted((k, str(d["value"])) for k, d in use["fields"].items())) for use in uses.values()}
    runs = identical_siblings(graphs, signs) if folds else []
    hidden = {path: run for run in runs for path in run[1:]}
    heads = {run[0]: run for run in runs}
    counts: dict[str, list[int]] = {}
    saved: dict[str, int] = {}
    formats: dict[str, set[str]] = {}
    for h, half in enumerate(graphs.half("after", d) for d in ("forward", "backward")):
        for node in half.nodes:
            path = half.modules[node.name]
            counts.setdefault(path, [0, 0])[h] += 1
            if node.name in half.saved:
                saved[path] = saved.get(path, 0) + type_bytes(node.type)
            if is_gemm(node.op) and node.gemm == "fprop" and node.where in uses:
                fields = uses[node.where]["fields"]
                formats.setdefault(path, set()).add(" x ".join(element(fields, "fprop", o) for o in "xw"))
    order: dict[str, int] = {}  # when the graph first meets a module or anything inside it
    for i, path in enumerate(counts):
        for cut in _cuts(path):
            order.setdefault(path[: cut if cut >= 0 else None], i)
    rows: list[tuple[str, ...]] = [("module", "forward", "backward", "fprop", "saved")]
    for path in sorted(_tree(counts), key=lambda p: _place(p, order)):
        above = [path[: i if i >= 0 else None] for i in _cuts(path)]
        if any(a in hidden for a in above) or only not in path:
            continue
        own = counts.get(path)
        run = heads.get(path)
        name = path.rpartition(".")[2] or "(outside of modules)"
        if run is not None:
            name = f"{name} to {run[-1].rpartition('.')[2]}, {len(run)} identical"
        indent = "  " * (path.count(".") if path else 0)
        cells = (f"{own[0]:,}", f"{own[1]:,}") if own else ("", "")
        kept = size(saved[path]) if path in saved else ""
        rows.append((indent + name, *cells, ", ".join(sorted(formats.get(path, ()))), kept))
    return rows


def _tree(paths: Iterable[str]) -> set[str]:
    return {path[: i if i >= 0 else None] for path in paths for i in _cuts(path)}


def _cuts(path: str) -> list[int]:
    return [*(i for i, c in enumerate(path) if c == "."), -1]


def _place(path: str, order: Mapping[str, int]) -> tuple[int, ...]:
    """Modules by their names' parts: numbers as numbers, others as the graph meets them first."""
    parts = path.split(".")
    firsts = [order[".".join(parts[: i + 1])] for i in range(len(parts))]
    return tuple(int(part) if part.isdecimal() else first for part, first in zip(parts, firsts))


def _gemm_rows(gemms: Mapping[str, Mapping[str, int]]) -> list[tuple[str, ...]]:
    return [(which, *(f"{n[k]:,}" for k in ("total", "fp8", "kept"))) for which, n in gemms.items()]


def _layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    groups: dict[tuple[Any, Any], list[int]] = {}
    rest = []
    for row in layers:
        if row["layer"] is None:
            rest.append(("outside of layers", row["bf16"], row["fp8c"]))
        else:
            groups.setdefault((row["bf16"], row["fp8c"]), []).append(row["layer"])
    named = [(f"layer {n[0]}" if len(n) == 1 else f"layers {ranges(n)}, each", *pair) for pair, n in groups.items()]
    cells: list[tuple[str, ...]] = [
        (name, "-" if old is None else size(old), size(new)) for name, old, new in [*named, *rest]
    ]
    return [("saved bytes", "BF16", "fp8c"), *cells]


def _memory(build: Build, lock: Mapping[str, Any], report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = memory_rows(build.manifest["parameters"], lock["sections"], report)
    return [(r.name, size(r.size_bytes), r.note) for r in rows]


def _traffic(graphs: BuildGraphs) -> list[tuple[str, ...]]:
    def both(moved: Mapping[str, int], when: str) -> str:
        return size(sum(moved.get(f"{when} {d}", 0) for d in ("forward", "backward")))

    return [(r.family, both(r.moved_bytes, "before"), both(r.moved_bytes, "after")) for r in traffic_rows(graphs)]


def columns(rows: Sequence[tuple[str, ...]], left: tuple[int, ...] = (0,)) -> list[str]:
    """Text columns: those in `left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
