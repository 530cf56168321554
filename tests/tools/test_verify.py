"""`--verify` can fail: a wrong GEMM, a GEMM that did not run, one nobody planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8c import cli
from fp8c.backends.reference.check import check_gemm
from fp8c.tools import verify

TINY = str(Path(__file__).parent / "models" / "tiny.py")
ARGUMENTS = ["compile", TINY, "--target", "cpu", "--no-baseline", "--verify", "-a", "layers=1", "--json"]


@pytest.fixture
def verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)

    def run() -> tuple[int, dict[str, Any]]:
        code = cli.main(ARGUMENTS)
        return code, json.loads(capsys.readouterr().out)["verify"]

    return run


def test_a_gemm_that_is_wrong_by_one_percent_fails(verified: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(op: str, args: Any, out: torch.Tensor) -> Any:
        return check_gemm(op, args, out * 1.01)

    monkeypatch.setattr(verify, "check_gemm", wrong)
    code, found = verified()
    assert code == 1 and not found["ok"]
    assert found["fp64_worst_ratio"] > 1
    assert found["gemms_ran"] == found["gemms_planned"] == 9


def test_a_gemm_that_did_not_run_in_fp8_fails(verified: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = verify.GemmLog.record

    def forgetful(self: verify.GemmLog, node: Any, args: Any, out: Any) -> None:
        if str(node.meta["fp8c_role"]) != "dgrad layers.0.up":
            original(self, node, args, out)

    monkeypatch.setattr(verify.GemmLog, "record", forgetful)
    code, found = verified()
    assert code == 1 and found["gemms_missing"] == ["dgrad layers.0.up"]


def test_a_gemm_that_is_not_planned_fails(verified: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = verify.planned_gemms
    monkeypatch.setattr(verify, "planned_gemms", lambda plan: original(plan) - {("layers.0.gate", "wgrad")})
    code, found = verified()
    assert code == 1 and found["gemms_unplanned"] == ["wgrad layers.0.gate"]


def test_relative_errors() -> None:
    one = torch.ones(4)
    assert verify.relative_error(one * 1.5, one) == pytest.approx(0.5)
    assert verify.relative_error(one * 0, one * 0) == 0
    assert verify.relative_error(one, one * 0) == float("inf")
