"""Who may import whom: the table of STYLE 1.1, checked on every import statement, also those inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: The scheduler's model of time: tables of durations in, schedules out.
SCHEDULER = (
    *(
        "cluster",
        "contention",
        "cost_model",
        "durations",
        "graph_costs",
        "network",
        "overlap",
        "pipeline_schedule",
        "routing",
    ),
    *("schedule", "schedule_search", "workload"),
)
#: Layers from the left: a module may import its own layer and those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cache", "diagnostics", "error_codes", "files", "formats", "roles", "target_record", "user_code"),
    (
        "graph",
        "delayed",
        "ops",
        "grouped",
        "positions",
        "retrace",
    ),
    SCHEDULER,
    ("specs", "partition", "pass_manager", "verifier", "saved"),
    ("capture", "kept_weights", "main_grad", "models", "prepare", "passes", "backends", "graph_durations"),
    (
        "pipeline",
        "structured_trace",
        "baseline",
        "step_cache",
        "session",
        "driver",
        "dynamo",
        "optim",
        "distributed",
        "stage",
        "pipelining",
    ),
    ("build", "reload", "fingerprint"),
    ("tools",),
    ("command_options", "build_commands", "spec_commands", "cli", "__main__"),
)
#: Loaded on first use, so `import fp8c` costs nothing.
LAZY = frozenset({"__init__"})
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> list[Path]:
    folders = ("fp8c", "passes", "backends", "specs", "tools")
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py") if not any(q.is_symlink() for q in p.parents))


def part_of(path: Path) -> str:
    """`fp8c/prepare/hf.py` -> prepare, `passes/x.py` -> passes, `fp8c/graph.py` -> graph."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "fp8c" else parts[0]


def imports(path: Path) -> list[tuple[str, int]]:
    """The parts of fp8c a file imports, with the line. What only type checkers read does not count."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name.split(".")[1], node.lineno) for a in node.names if a.name.startswith("fp8c.")]
        elif isinstance(node, ast.ImportFrom) and node.module == "fp8c" and not node.level:
            found += [(a.name, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fp8c."):
            found.append(((node.module or "").split(".")[1], node.lineno))
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
    return [
        (name, line)
        for name, line in found
        if name not in ("compile", "load", "weights_changed", "DiagnosticError", "__version__")
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path: Path) -> None:
    importer = part_of(path)
    if importer in LAZY:
        return
    assert importer in RANK, f"put '{importer}' into a layer"
    wrong = [f"line {line}: {importer} imports {name}" for name, line in imports(path) if RANK[name] > RANK[importer]]
    assert not wrong, wrong


def test_the_core_does_not_import_tools() -> None:
    users = {part_of(p) for p in modules() for name, _ in imports(p) if name == "tools"}
    assert users <= {"tools", "cli", "build_commands", "command_options", "spec_commands"}


@pytest.mark.parametrize("part", ["specs", "diagnostics", "formats", "roles", "error_codes", "target_record"])
def test_the_language_does_not_import_torch(part: str) -> None:
    for path in modules():
        if part_of(path) != part:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "torch" for n in names), path


def test_passes_know_no_backend() -> None:
    users = [p for p in modules() if part_of(p) == "passes" and any(name == "backends" for name, _ in imports(p))]
    assert users == []
