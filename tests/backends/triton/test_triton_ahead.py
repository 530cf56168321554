"""The kernels of a step, compiled for a GPU that is not here: what they became, and that no registers ran out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton compiles the kernels")

from fp8c.backends.cuda import build
from fp8c.cli import main
from fp8c.tools import opt
from tests.passes.steps import STEPS


def test_kernels_of_an_expert_layer_compile_for_hopper_without_spills() -> None:
    from fp8c.backends.triton.ahead import compile_step

    result = opt.run_passes(STEPS["experts"](), "deepseek_v3", target="h200")
    assert result.halves is not None
    kernels = compile_step((result.halves.forward.graph, result.halves.backward.graph), "sm90")
    by_name = {k.name.rpartition("-")[0] for k in kernels}
    assert {"both_kernel", "forward_kernel", "backward_rows_kernel", "backward_columns_kernel"} <= by_name
    for kernel in kernels:
        assert kernel.spilled_bytes == 0, (kernel.name, kernel.spilled_bytes)
        assert kernel.cubin[:4] == b"\x7fELF"
        if kernel.name.startswith(("both", "row_", "forward")):
            assert "cvt.rn.satfinite.e4m3x2.f32" in kernel.ptx, kernel.name
            assert "ld.global.v4" in kernel.ptx, kernel.name  # 16 bytes at a time


@pytest.mark.skipif(not build.has_compiler(), reason="neither NVRTC nor nvcc is installed")
def test_a_build_holds_the_kernels(tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.write_text(MODEL)
    arguments = ["compile", str(model), "--target", "h200", "--no-baseline", "--kernels", "-o", str(tmp_path / "build")]
    assert main(arguments) == 0
    index = json.loads((tmp_path / "build" / "kernels" / "index.json").read_text())
    assert index["architecture"] == "sm90" and index["kernels"]
    for kernel in index["kernels"]:
        assert (tmp_path / "build" / "kernels" / f"{kernel['name']}.cubin").stat().st_size > 1000
    report = json.loads((tmp_path / "build" / "report.json").read_text())
    assert report["kernels"]["gemms"] == index["gemms"] and {g["implementation"] for g in index["gemms"]} == {"cuda"}
    assert index["cuda"][0]["name"] in (tmp_path / "build" / "report.html").read_text()


def test_the_cpu_has_no_kernels_to_compile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.py"
    model.write_text(MODEL)
    arguments = ["compile", str(model), "--target", "cpu", "--no-baseline", "--kernels", "-o", str(tmp_path / "build")]
    assert main(arguments) == 5
    assert "error[E0433]" in capsys.readouterr().err


MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(256, 256, bias=False) for _ in range(2))

    def forward(self, x):
        return self.down(nn.functional.silu(self.up(x))).float().square().mean()


def model():
    return Model().bfloat16()


def example_inputs():
    return (torch.randn(128, 256, dtype=torch.bfloat16),)
"""
