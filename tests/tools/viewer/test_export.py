"""A build in other tools' formats: traces with times that follow, JSON with edges that exist, Graphviz it can read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fp8c.build import Build, packed_json, read_build, write_build
from fp8c.build_commands import EXPORT_FORMATS
from fp8c.diagnostics import DiagnosticError
from fp8c.tools.viewer import export as e


def with_files(build: Path, out: Path, files: dict[str, bytes]) -> Build:
    read = read_build(build)
    manifest = {k: v for k, v in read.manifest.items() if k not in ("schema", "files", "run")}
    write_build(out, manifest, {**{n: read.read(n) for n in read.manifest["files"]}, **files}, {"argv": []}, {})
    return read_build(out)


def rows(layer: str) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "phase": phase, "name": name, "on": "compute", "ms": 0.5}
        for phase in "FBW"
        for name in ("attention", "mlp")
    ]


DURATIONS = {"name": "tiny on h200", "model": {"layers": 3, "dense_layers": 1}, "op": [*rows("dense"), *rows("moe")]}


def test_the_command_offers_the_formats_of_the_table() -> None:
    assert set(EXPORT_FORMATS) == set(e.FORMATS)


def test_a_schedule_is_copied(small_build: Path, tmp_path: Path) -> None:
    trace = {"traceEvents": [{"ph": "X", "pid": 0, "tid": 0, "name": "mm", "ts": 0, "dur": 1}]}
    build = with_files(small_build, tmp_path / "b", {e.TRACE_FILE: packed_json(trace)})
    assert "the schedule" in e.export(build, "perfetto", tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text()) == trace


def test_durations_are_drawn_in_program_order(small_build: Path, tmp_path: Path) -> None:
    build = with_files(small_build, tmp_path / "b", {"durations.json": packed_json(DURATIONS)})
    assert "estimated durations" in e.export(build, "perfetto", tmp_path / "t.json")
    events = [x for x in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if x["ph"] == "X"]
    names = [x["name"] for x in events]
    assert names[:6] == [f"layer {i} {n}" for i in range(3) for n in ("attention", "mlp")]
    assert names[6] == "layer 2 attention" and events[6]["cat"] == "moe B" and names[-1] == "layer 0 mlp"
    assert [x["ts"] for x in events] == [500.0 * i for i in range(18)]


def test_a_build_with_neither_says_so(small_build: Path, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError, match="E0963.*no schedule and no durations"):
        e.export(read_build(small_build), "perfetto", tmp_path / "t.json")


def test_model_explorer_gets_every_node_and_edge(small_build: Path, tmp_path: Path) -> None:
    e.export(read_build(small_build), "model-explorer", tmp_path / "m.json")
    document = json.loads((tmp_path / "m.json").read_text())
    assert [g["id"] for g in document["graphs"]] == [
        f"{w} {d}" for w in ("before", "after") for d in ("forward", "backward")
    ]
    for graph in document["graphs"]:
        known = {n["id"] for n in graph["nodes"]}
        assert len(known) == len(graph["nodes"])
        assert {x["sourceNodeId"] for n in graph["nodes"] for x in n.get("incomingEdges", ())} <= known
    gemm = next(n for n in document["graphs"][2]["nodes"] if n["label"] == "fp8c.scaled_mm")
    attributes = {a["key"]: a["value"] for a in gemm["attrs"]}
    assert gemm["namespace"] == "model/layers/0/attn/q_proj"
    assert attributes["fprop.x"] == "e4m3[1x128] fp32 (rule gemm_fp8, std:deepseek_v3:33)"


def test_dot_folds_identical_layers(small_build: Path, tmp_path: Path) -> None:
    e.export(read_build(small_build), "dot", tmp_path / "g.dot")
    text = (tmp_path / "g.dot").read_text()
    assert "model.layers.0-2 (3x).attn.q_proj" in text
    assert "layers.1" not in text
    nodes = set(re.findall(r'^    ("[^"]*") \[', text, re.MULTILINE))
    ends = set(re.findall(r'("[^"]*") -> ("[^"]*");', text))
    assert ends and {n for pair in ends for n in pair} <= nodes
    assert text.count("{") == text.count("}")


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_reads_the_dot(small_build: Path, tmp_path: Path) -> None:
    import subprocess

    e.export(read_build(small_build), "dot", tmp_path / "g.dot")
    subprocess.run(["dot", "-Tsvg", str(tmp_path / "g.dot"), "-o", str(tmp_path / "g.svg")], check=True)


def test_a_place_that_cannot_be_written_is_an_error(small_build: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiagnosticError, match="E0610"):
        e.export(read_build(small_build), "dot", tmp_path / "file" / "g.dot")
