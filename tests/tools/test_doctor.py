"""`fp8c doctor` on machines with and without what kernels need."""

from __future__ import annotations

import json

import pytest
import torch

from fp8c.backends.gemms import candidates, measured
from fp8c.backends.gemms.table import Choice, Table
from fp8c.cli import main
from fp8c.tools import doctor
from fp8c.tools.doctor import Machine


def machine(capability: tuple[int, int] | None, compiler: str | None = "nvrtc 13.0") -> Machine:
    return Machine("a GPU", capability, {}, compiler)


def test_every_operator_is_served_and_none_is_forgotten() -> None:
    served = doctor.implementations(machine((9, 0)))
    assert served["scaled_mm"].startswith("cuda, and ") and served["attention"] == "aten"
    assert {"quantize", "requantize", "quantize_both", "scaled_grouped_wgrad", "swiglu_quantize"} <= set(served)
    assert set(doctor.implementations(machine(None)).values()) == {"reference"}


def test_kernels_are_served_by_triton_where_it_is_installed() -> None:
    pytest.importorskip("triton")
    assert doctor.implementations(machine((9, 0)))["quantize_weight"] == "triton"
    assert doctor.implementations(machine((10, 0)))["swiglu_backward_quantize"] == "triton"


def test_hopper_has_fused_kernels_of_its_own() -> None:
    pytest.importorskip("triton")
    assert doctor.on_gpu("swiglu_backward_quantize", machine((9, 0))) == "cuda, and triton for what it doesn't take"
    assert "kernel cache" in doctor.on_gpu("rms_norm_quantize", machine((9, 0), None))


def test_what_is_missing_is_said() -> None:
    assert "no NVRTC" in doctor.implementations(machine((9, 0), None))["scaled_mm"]
    assert "this is 10.0" in doctor.implementations(machine((10, 0)))["scaled_grouped_mm"]
    old = doctor.implementations(machine((8, 0)))
    assert "portable" in old["quantize"] and old["scaled_mm"].startswith("portable (FP8 tensor cores begin with 8.9")


def test_gemms_without_a_cuda_kernel_are_served_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "reason_not_installed", lambda name: "")
    assert doctor.implementations(machine((10, 0)))["scaled_mm_add_"].startswith("triton (the CUDA GEMMs are for")
    monkeypatch.setattr(candidates, "reason_not_installed", lambda name: f"{name} is not installed")
    assert doctor.gemm_on_gpu(machine((12, 0))).startswith("portable (triton is not installed)")


def test_measured_choices_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(None, {}, {"scaled_mm 1 x 8": Choice("triton", {"cuda": 2.0, "triton": 1.5})})
    monkeypatch.setattr(measured, "table_of", lambda index: table)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("FP8C_GEMM", "measure")
    gemms = doctor.gemm_choice(machine((9, 0)))
    assert gemms["policy"] == "measure" and gemms["measured"]["scaled_mm 1 x 8"]["implementation"] == "triton"
    document = {
        "device": "a GPU",
        "capability": "9.0",
        "compiler": None,
        "packages": {},
        "operators": {},
        "gemms": gemms,
    }
    assert "scaled_mm 1 x 8: triton (cuda 2.0 us, triton 1.5 us)" in doctor.text(document)


def test_the_command_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == doctor.SCHEMA and found["packages"]["torch"] and found["operators"]
    assert main(["doctor"]) == 0
    assert "quantize" in capsys.readouterr().out
