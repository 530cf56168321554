"""A spec on a model: what each rule matches, which GEMMs run in which formats, and the lock."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fp8c import cli
from fp8c.backends.target import load_target
from fp8c.diagnostics import ExitCode
from fp8c.roles import OPERANDS
from fp8c.specs.load import load, loads

sys.path.insert(0, str(Path(__file__).parents[1] / "specs"))
import role_records

from fp8c.specs.plan_diff import Difference, diff_plans, diff_text
from fp8c.tools.spec_command import check_on_uses

H200 = load_target("h200")
MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(128, 256, bias=False, dtype=torch.bfloat16)
        self.down = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))).float().square().mean()

def model():
    return Model()

def example_inputs():
    return {"x": torch.randn(128, 128, dtype=torch.bfloat16)}
"""


def test_rules_are_counted_as_matched_and_as_deciding() -> None:
    spec = loads(
        'version 1; use "std:deepseek_v3" as ds; spec a extends ds {'
        " override rule all_back for op(linear, grouped_mm) & layers(0) { precision = bf16; wgrad { out = bf16; } } }"
    )
    uses = role_records.deepseek(layers=2, dense=1)
    result = check_on_uses(spec, uses, H200, "m")
    rules = {r.rule: r for r in result.rules}
    assert (rules["all_back"].matched, rules["all_back"].kept) == (8, 8)
    gemms = sum(u.is_gemm and not u.kinds & {"router", "lm_head"} for u in uses)
    assert rules["gemm_fp8"].matched == gemms and gemms - 8 <= rules["gemm_fp8"].kept <= gemms
    assert sum(result.gemms.values()) == 3 * sum(u.is_gemm for u in uses)
    assert result.gemms["wgrad bf16 x bf16 -> bf16"] == 8
    assert "a.all_back" in result.text()


def test_wrong_spec_is_a_result_with_its_counts() -> None:
    spec = loads("version 1; spec a { rule r for kind(lm_head) { precision = bf16; } }")
    result = check_on_uses(spec, role_records.llama(), H200, "m")
    assert result.plan is None and result.exit_code is ExitCode.SPEC
    assert [d.code for d in result.diagnostics] == ["E0303"] and result.rules[0].matched == 1


def test_gemms_that_do_not_exist_are_not_counted() -> None:
    result = check_on_uses(load("bf16"), role_records.llama(layers=1), H200, "m")
    linears, tables = 8, 1  # the rotary tables' product has no gradient
    assert sum(result.gemms.values()) == 3 * linears + tables


def test_difference_names_the_uses_and_the_rule() -> None:
    uses = role_records.deepseek(layers=2, dense=1)
    base = load("deepseek_v3")
    child = loads(
        'version 1;\nuse "std:deepseek_v3" as ds;\nspec a extends ds {\n'
        "  override rule head for kind(lm_head) { precision = fp32; }\n  override schedule { comm_sms = 24; }\n}",
        "a.fp8",
    )
    old, new = (check_on_uses(spec, uses, H200, "m").plan for spec in (base, child))
    assert old is not None and new is not None
    assert diff_plans(old, old) == ()
    found = {d.field: d for d in diff_plans(old, new)}
    assert set(found) == {
        "precision",
        *(f"{g}.{o}" for g, names in OPERANDS.items() for o in names),
        "schedule.comm_sms",
    }
    assert found["fprop.x"] == Difference("fprop.x", "bf16", "fp32", "head (a.fp8:4)", ("lm_head:linear",))
    sms = found["schedule.comm_sms"]
    assert (sms.old, sms.new, sms.uses) == ("20", "24", ("schedule",))
    text = diff_text(diff_plans(new, old))
    assert "fprop.x: fp32 -> bf16" in text and "lm_head:linear; keep_high (std:deepseek_v3:" in text


def test_difference_of_scales_is_counted_over_uses() -> None:
    """Transformer Engine rounds scales to powers of two by default, the paper does not: `diff` must show it."""
    uses = role_records.deepseek(layers=4, dense=1)
    old, new = (check_on_uses(load(n), uses, H200, "m").plan for n in ("deepseek_v3", "deepseek_v3_ue8m0"))
    assert old is not None and new is not None
    first = diff_plans(old, new)[0]
    assert first.field in ("dgrad.w", "fprop.w") and (first.old, first.new) == (
        "e4m3[128x128] fp32",
        "e4m3[128x128] e8m0",
    )
    assert len(first.uses) == sum(u.is_gemm and not u.kinds & {"router", "lm_head"} for u in uses)


@pytest.mark.slow
def test_check_and_lock_on_a_model_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, lock = tmp_path / "m.py", tmp_path / "plan.lock.json"
    model.write_text(MODEL)
    assert cli.main(["spec", "check", "deepseek_v3", "--model", str(model), "-t", "h200", "--json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)["specs"][0]["on_model"]
    assert document["uses"] == 2 and sum(document["gemms"].values()) == 5, "x needs no gradient: one dgrad less"
    assert (
        cli.main(["spec", "lock", "deepseek_v3", "--model", str(model), "-t", "h200", "-o", str(lock)]) == ExitCode.OK
    )
    uses = json.loads(lock.read_text())["uses"]
    assert {u["path"] for u in uses.values()} == {"up", "down"}
    assert all(f["reason"]["file"] == "std:deepseek_v3" for u in uses.values() for f in u["fields"].values())
    capsys.readouterr()
    assert cli.main(["spec", "diff", "bf16", "bf16", "--model", str(model), "-t", "cpu"]) == ExitCode.OK
    assert cli.main(["spec", "diff", "bf16", "mxfp8", "--model", str(model), "-t", "cpu"]) == ExitCode.CHECK_FAILED
    assert "fprop.x: bf16 -> e4m3[1x32] e8m0\n    up and 1 more; gemm_mx (std:mxfp8:" in capsys.readouterr().out
