"""The kernels of a step, compiled for a GPU that is not here: what they became, and that no registers ran out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton compiles the kernels")

from fp8c.backends.cuda import build
from fp8c.backends.triton import KERNELS
from fp8c.backends.triton.ahead import Launch
from fp8c.cli import main
from fp8c.ops import empty_quantized, quantized_format
from fp8c.tools import opt
from tests.passes.steps import STEPS

ROW_FORMAT = "e4m3[1x128] fp32"


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


@pytest.mark.parametrize("kernel", ["quantize", "dequantize", "gather", "swiglu", "norm"])
def test_other_numbers_of_rows_need_no_other_machine_code(kernel: str) -> None:
    """1 and multiples of 16 are what Triton specialises on."""
    from fp8c.backends.triton.ahead import recording

    launches: dict[str, Launch] = {}
    with recording(launches):
        for rows in (1, 16, 17, 4096):
            start(kernel, rows)
    assert len(launches) == 1, [launch.divisible for launch in launches.values()]


def start(kernel: str, rows: int) -> None:
    x = torch.empty(rows, 256, dtype=torch.bfloat16, device="meta")
    q, s = empty_quantized(x, x.shape, quantized_format(ROW_FORMAT))
    index = torch.empty(rows, dtype=torch.int64, device="meta")
    arguments: dict[str, tuple[object, ...]] = {
        "quantize": (x, ROW_FORMAT),
        "dequantize": (q, s, ROW_FORMAT, torch.bfloat16),
        "gather": (q, s, index, ROW_FORMAT),
        "swiglu": (x[:, :128], x[:, 128:], None, ROW_FORMAT),
        "norm": (x, x[0], 1e-6, ROW_FORMAT),
    }
    operators = {"gather": "gather_quantized", "swiglu": "swiglu_quantize", "norm": "rms_norm_quantize"}
    KERNELS[operators.get(kernel, kernel)](*arguments[kernel])


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
