"""`fp8c bench compile`: processes with caches of their own, their answers, its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8c.tools.bench import compile_time

TINY = {
    **{"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "vocab_size": 128, "n_routed_experts": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 64, "num_experts_per_tok": 2},
    **{"n_group": 2, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
}


def test_figures_of_what_succeeded() -> None:
    found = {
        "cold": {"bf16": {"first_step_s": 20.0}, "fp8c": {"first_step_s": 25.0}, "other": {"error": "out of memory"}},
        "warm": {"bf16": {"first_step_s": 5.0}, "fp8c": {"first_step_s": 5.0}, "other": {"error": "out of memory"}},
    }
    expected = {"cold fp8c over bf16": 1.25, "warm over cold, bf16": 0.25, "warm over cold, fp8c": 0.2}
    assert compile_time.ratios(found) == expected
    assert "failed" in compile_time.table(found)


@pytest.mark.slow
def test_a_contender_has_caches_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = [f"{name}={value}" for name, value in TINY.items()]
    arguments = ["--device", "cpu", "--length", "32", "--contender", "fp8c", "--out", str(out), "--set", *sizes]
    assert compile_time.main(arguments) == 0
    document = json.loads(out.read_text())
    assert document["schema"] == compile_time.SCHEMA and document["tokens"] == 32
    for temperature in compile_time.TEMPERATURES:
        entry = document[temperature]["fp8c"]
        assert entry["first_step_s"] > 0 and entry["result"] == document["cold"]["fp8c"]["result"]


@pytest.mark.slow
def test_a_process_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"{name}={value}" for name, value in {**TINY, "hidden_size": -1}.items()]
    assert compile_time.main(["--device", "cpu", "--length", "32", "--contender", "fp8c", "--set", *sizes]) == 1
    seen = capsys.readouterr()
    assert "failed" in seen.out and "Traceback" in seen.err
