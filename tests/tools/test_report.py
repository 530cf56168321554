"""The report page: whole in one file, harmless whatever the names in it, rows of equal layers folded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fp8c.tools import report

HOSTILE = '</script><img src=x onerror="document.title=1">__RUN__ \u2028 & __DATA__'


def data(name: str = "tiny") -> dict[str, Any]:
    """Tables with one row each, in the shape of `report.tables`."""
    gemm = {"a": "e4m3[1x128] fp32", "b": "e4m3[128x128] fp32", "out": "bf16", "promote_every": 128, "rules": [0]}
    return {
        "schema": report.SCHEMA,
        "model": {"name": name, "reference": name},
        "spec": {"name": name},
        "target": {"name": name, "description": name},
        "versions": {"fp8c": name},
        "plan": name,
        "gemms": {which: {"total": 1, "fp8": 1, "kept": 0} for which in ("fprop", "dgrad", "wgrad")},
        "uses": [
            {
                "key": name,
                "path": name,
                "op": "linear",
                "kinds": [],
                "roles": [name],
                "param": name,
                "shape": [None, 128, 128],
                "experts": 1,
                "source": name,
                "gemms": {"fprop": gemm, "dgrad": {"missing": name}, "wgrad": gemm},
                "cache": [{"value": "x", "as": name, "rule": 0}],
                "recompute": [{"value": "out", "rule": 0}],
                "layers": [0, 1, 3],
                "count": 3,
            }
        ],
        "saved": [
            {
                "path": name,
                "type": name,
                "size_bytes": 5,
                "is_logits": True,
                "why": name,
                "rule": 0,
                "layers": [],
                "count": 1,
            }
        ],
        "layers": [{"layer": 0, "bf16": 10, "fp8c": 5}, {"layer": None, "bf16": 1, "fp8c": 1}],
        "saved_bytes": {"fp8c": 6, "bf16": 11, "logits": 0},
        "sections": [{"name": name, "value": name, "rule": 0}],
        "rules": [{"rule": name, "spec": name, "file": name, "line": 3, "because": name}],
        "remarks": [{"text": name}],
        "passes": [{"name": name, "changed": 1}],
        "verify": None,
    }


RUN = {"argv": [HOSTILE], "passes": [{"name": "p", "pass_s": 0.1, "verify_s": 0.2}], "stages": []}


def test_names_cannot_leave_their_element() -> None:
    html = report.page(data(HOSTILE), RUN).decode()
    assert html.count("</script>") == 3 and "<img" not in html
    blocks = re.findall(r'<script type="application/json" id="[a-z-]+">(.*?)</script>', html, re.S)
    assert json.loads(blocks[0])["model"]["name"] == HOSTILE
    assert json.loads(blocks[1])["argv"] == [HOSTILE]


def test_the_policy_allows_the_pages_own_script_and_nothing_else() -> None:
    html = report.page(data(), {}).decode()
    script = re.search(r"<script>(.*?)</script>", html, re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html
    assert not re.search(r"https?://|src=|href=|@import|url\(|innerHTML|insertAdjacentHTML|document\.write", html)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium command")
def test_a_browser_draws_every_table(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_bytes(report.page(data(HOSTILE), RUN))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert drawn.count("<table") == 5 and "<title>fp8c: " in drawn
    assert "× 3, layers 0–1, 3" in drawn
    assert "<img" not in drawn


def test_rows_of_equal_layers_are_folded() -> None:
    def row(layer: int | None, path: str, size: int) -> dict[str, Any]:
        return {"path": path, "layer": layer, "size_bytes": size}

    rows = [row(i, f"model.layers.{i}.mlp.experts.{i}", 7 if i == 2 else 5) for i in range(4)] + [
        row(None, "head.1", 5)
    ]
    folded = report.fold(rows)
    # Only the layer's own number is a layer; an expert's number is not, so nothing is folded and names stay whole.
    assert [(r["path"], r["layers"]) for r in folded[:2]] == [
        ("model.layers.0.mlp.experts.0", [0]),
        ("model.layers.1.mlp.experts.1", [1]),
    ]
    assert [r["count"] for r in folded] == [1] * 5
    same = report.fold([row(i, f"model.layers.{i}.mlp", 5) for i in range(3)])
    assert [(r["path"], r["layers"], r["count"]) for r in same] == [("model.layers.*.mlp", [0, 1, 2], 3)]
