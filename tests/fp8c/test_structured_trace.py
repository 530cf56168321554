"""PyTorch's trace channel holds what each pass did, in the form tlparse reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import torch
from torch import nn
import fp8c.dynamo

model = nn.Sequential(nn.Linear(128, 256, bias=False), nn.SiLU(), nn.Linear(256, 128, bias=False)).bfloat16()
step = torch.compile(lambda x: model(x).float().square().mean(), backend=fp8c.dynamo.backend,
                     options={"spec": "rowwise", "target": "cpu"})
step(torch.randn(64, 128, dtype=torch.bfloat16)).backward()
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    env = {**os.environ, "TORCH_TRACE": str(folder), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    env["PYTHONPATH"] = f"{root}{os.pathsep}{env.get('PYTHONPATH', '')}"
    subprocess.run([sys.executable, "-c", SCRIPT], env=env, check=True, capture_output=True)
    [found] = folder.glob("*.log")
    return found


def artifacts(log: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for line in log.read_text().splitlines():
        start = line.find("{")
        if start >= 0 and '"artifact"' in line:
            record = json.loads(line[start:])
            found[record["artifact"]["name"]] = record
    return found


def test_every_pass_is_an_artifact_of_the_compiled_frame(log: Path) -> None:
    from fp8c.passes import HALF_PASSES, JOINT_PASSES, ROLES

    found = artifacts(log)
    joint = [ROLES.name, *(p.name for p in JOINT_PASSES)]
    halves = [p.name for p in HALF_PASSES]
    names = [f"{i:02}_{name}" for i, name in enumerate(joint, 1)]
    names += [f"{i:02}_{name}_{h}" for i, name in enumerate(halves, len(joint) + 1) for h in ("forward", "backward")]
    wanted = {f"fp8c_{name}" for name in ("00_captured", *names)} | {"fp8c_passes", "fp8c_plan"}
    assert wanted <= set(found)
    assert {found[name]["frame_id"] for name in wanted} == {0}


def test_graphs_before_and_after_are_in_the_log(log: Path) -> None:
    text = log.read_text()
    assert "graph fp8c_00_captured" in text
    after = text[text.index("graph fp8c_03_") if "graph fp8c_03_insert" in text else text.index("insert-quantize\n") :]
    assert "fp8c.scaled_mm(" in after
    assert '"rule": "gemm_rowwise"' in text


TLPARSE = shutil.which("tlparse") or shutil.which("tlparse", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(TLPARSE is None, reason="tlparse is not installed")
def test_tlparse_lists_the_passes(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run([TLPARSE or "", str(log), "-o", str(out), "--no-browser"], check=True, capture_output=True)
    files = {p.name for p in out.rglob("fp8c_*")}
    assert any("insert-quantize" in name for name in files) and any("plan" in name for name in files)
    assert "insert-quantize" in (out / "index.html").read_text()
