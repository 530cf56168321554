"""`fp8c doctor` on machines with and without what kernels need."""

from __future__ import annotations

import json

import pytest

from fp8c.cli import main
from fp8c.tools import doctor
from fp8c.tools.doctor import Machine


def machine(capability: tuple[int, int] | None, compiler: str | None = "nvrtc 13.0") -> Machine:
    return Machine("a GPU", capability, {}, compiler)


def test_every_operator_is_served_and_none_is_forgotten() -> None:
    served = doctor.implementations(machine((9, 0)))
    assert served["scaled_mm"] == "cuda" and served["attention"] == "aten"
    assert {"quantize", "requantize", "quantize_both", "scaled_grouped_wgrad", "swiglu_quantize"} <= set(served)
    assert set(doctor.implementations(machine(None)).values()) == {"reference"}


def test_kernels_are_served_by_triton_where_it_is_installed() -> None:
    pytest.importorskip("triton")
    served = doctor.implementations(machine((9, 0)))
    assert served["quantize"] == served["swiglu_backward_quantize"] == "triton"


def test_what_is_missing_is_said() -> None:
    assert "no NVRTC" in doctor.implementations(machine((9, 0), None))["scaled_mm"]
    assert "this is 10.0" in doctor.implementations(machine((10, 0)))["scaled_grouped_mm"]
    assert "portable" in doctor.implementations(machine((8, 0)))["quantize"]


def test_the_command_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == doctor.SCHEMA and found["packages"]["torch"] and found["operators"]
    assert main(["doctor"]) == 0
    assert "quantize" in capsys.readouterr().out
