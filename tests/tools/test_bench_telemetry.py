"""The cost of telemetry: measured on a small model, and what follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8c.tools.bench import telemetry
from fp8c.tools.bench.telemetry import Cost


def test_the_share_falls_with_the_interval_and_the_shortest_one_is_named() -> None:
    cost = Cost(plain_ms=10.0, observed_ms=32.5, tensors=4, tokens=8)
    assert cost.share(1) == 2.25 and cost.share(225) == 0.01
    assert cost.least_every == 225 and Cost(10.0, 9.0, 4, 8).least_every == 1


@pytest.mark.slow
def test_it_is_measured_on_a_training_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    small = "--device cpu --dim 128 --n-layers 1 --n-experts 2 --batch 2 --length 128 --rounds 1".split()
    assert telemetry.main([*small, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["tensors"] > 50 and found["observed_ms"] > 0 and found["tokens"] == 256
    assert f"whose {found['tensors']} quantized tensors are read" in capsys.readouterr().out
