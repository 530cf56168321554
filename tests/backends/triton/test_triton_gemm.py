"""The Triton GEMMs: in Triton's interpreter against FP64, compiled for GPUs that are not here, and on one that is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels' compiler and interpreter come with triton")

from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.backends.triton import ahead
from fp8c.backends.triton import gemm as kernels

gemm: Any = kernels  # called with operands in tuples, as the operators are
ROOT = Path(__file__).parents[3]
CASES = Path(__file__).with_name("triton_gemm_cases.py")
ROW, BLOCK, TENSOR, MX = "e4m3[1x128] fp32", "e4m3[128x128] fp32", "e4m3[tensor] fp32", "e4m3[1x32] e8m0"
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.f32\.e4m3\.e4m3"
BLOCK_SCALED = r"tcgen05\.mma\.cta_group::1\.kind::mxf8f6f4\.block_scale"


def test_products_agree_with_fp64_within_the_bound_of_fp32() -> None:
    """In a process of its own: the interpreter is switched on by an environment variable that Inductor would see too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(CASES)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def payload(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta")


def scales(rows: int, groups: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of groups of one row, as `fp8c.ops.empty_scale` lays them out."""
    return torch.empty(groups, rows, dtype=dtype, device="meta").t()


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def dense() -> None:
    operands = payload(4096, 7168), scales(4096, 56), payload(2112, 7168), floats(17, 56)
    gemm.scaled_mm(*operands, ROW, BLOCK, 128, torch.bfloat16)


def few_rows() -> None:
    operands = payload(64, 7168), scales(64, 56), payload(2112, 7168), floats(17, 56)
    gemm.scaled_mm(*operands, ROW, BLOCK, 128, torch.bfloat16)


def weight_gradient() -> None:
    operands = payload(4096, 2048), scales(4096, 16), payload(7168, 2048), scales(7168, 16)
    gemm.scaled_mm_add_(floats(4096, 7168), *operands, ROW, ROW, 128)


def a_scale_a_tensor() -> None:
    operands = payload(4096, 7168), floats(1, 1), payload(2048, 7168), floats(1, 1)
    gemm.scaled_mm(*operands, TENSOR, TENSOR, 0, torch.bfloat16)


OFFSETS = torch.empty(32, dtype=torch.int32, device="meta")


def rows_of_experts() -> None:
    operands = payload(8192, 7168), scales(8192, 56), payload(32, 2048, 7168), floats(32, 16, 56)
    gemm.scaled_grouped_mm(*operands, OFFSETS, ROW, BLOCK, 128, torch.bfloat16)


def tokens_of_experts() -> None:
    operands = payload(2048, 8192), scales(2048, 64), payload(7168, 8192), scales(7168, 64)
    gemm.scaled_grouped_wgrad_add_(floats(32, 2048, 7168), *operands, OFFSETS, ROW, ROW, 128)


def microscaled() -> None:
    e8m0 = torch.float8_e8m0fnu
    operands = payload(4096, 7168), scales(4096, 224, e8m0), payload(2048, 7168), scales(2048, 224, e8m0)
    gemm.scaled_mm(*operands, MX, MX, 0, torch.bfloat16)


HOPPER = (dense, few_rows, weight_gradient, a_scale_a_tensor, rows_of_experts, tokens_of_experts)


def compiled(call: Callable[[], None], architecture: str) -> ahead.Compiled:
    launches: dict[str, ahead.Launch] = {}
    with ahead.recording(launches), gemm.compiled_for(architecture):
        call()
    (launch,) = launches.values()
    return ahead.compile_launch(launch, int(architecture.removeprefix("sm")))


@pytest.mark.parametrize("call", HOPPER, ids=lambda call: call.__name__)
def test_hopper_multiplies_in_fp8_and_promotes_outside_of_the_tensor_core(call: Callable[[], None]) -> None:
    kernel = compiled(call, "sm90")
    assert kernel.spilled_bytes == 0
    assert re.search(WGMMA, kernel.ptx)
    # 32 of K an instruction: a block of 128 is four (times the two row halves of a warpgroup), and then FMAs add it.
    assert len(re.findall(r"fma\.rn(?:\.f32|\.f32x2)", kernel.ptx)) >= 64


def test_blackwell_scales_groups_of_32_inside_the_tensor_core() -> None:
    kernel = compiled(microscaled, "sm100")
    assert re.search(BLOCK_SCALED, kernel.ptx) and kernel.spilled_bytes == 0
    assert not re.search(r"tcgen05\.mma\S*kind::f8f6f4", kernel.ptx)


@pytest.mark.parametrize("call", [dense, rows_of_experts], ids=lambda call: call.__name__)
def test_ada_multiplies_in_fp8(call: Callable[[], None]) -> None:
    kernel = compiled(call, "sm89")
    assert "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32" in kernel.ptx and kernel.spilled_bytes == 0
    assert kernel.metadata and json.loads(kernel.metadata)["shared"] <= 101_376  # of a block on 8.9


def test_other_gpus_scale_groups_of_32_in_registers() -> None:
    assert re.search(WGMMA, compiled(microscaled, "sm90").ptx)


def test_what_the_loop_cannot_do_is_said() -> None:
    odd = "e4m3[1x48] fp32"
    operands = payload(64, 480), scales(64, 10), payload(64, 480), scales(64, 10)
    with pytest.raises(Unsupported, match="no loop promotes every group of groups e4m3.1x48. fp32"):
        gemm.scaled_mm(*operands, odd, odd, 0, torch.bfloat16)
    with pytest.raises(Unsupported, match="no instance writes torch.float64"):
        gemm.scaled_mm(*operands, TENSOR, TENSOR, 0, torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_products_on_a_gpu_agree_with_fp64_within_the_bound_of_its_accumulator() -> None:
    spec = importlib.util.spec_from_file_location("triton_gemm_cases", CASES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    failed = []
    for name, case in module.cases():
        try:
            case("cuda")
        except Exception as error:  # noqa: BLE001 - every case is tried
            failed.append(f"{name}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)
