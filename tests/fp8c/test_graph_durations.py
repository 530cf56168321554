"""Durations of a captured step: sizes, phases, and a build that can be simulated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fp8c import driver
from fp8c.backends.costs import load_machine
from fp8c.cli import main
from fp8c.durations import DurationTable, load_durations
from fp8c.graph_durations import step_durations
from fp8c.models import load_model
from fp8c.prepare import prepare
from fp8c.workload import with_transfers

EXAMPLE = Path(__file__).parents[2] / "examples" / "moe_transformer.py"


@pytest.fixture(scope="module")
def table() -> DurationTable:
    loaded = load_model(str(EXAMPLE))
    session = driver.new_session("deepseek_v3", "h800")
    prepare(loaded.module, loaded.example_inputs)
    rewritten = driver.capture_step(loaded.step(), loaded.example_inputs, session)
    found = step_durations(rewritten.halves, rewritten.ctx.uses.values(), load_machine("h800"), "example")
    assert found is not None
    return found


def test_sizes_are_read_from_the_gemms(table: DurationTable) -> None:
    model = table.model
    assert (model.hidden, model.layers, model.dense_layers, model.experts) == (256, 4, 1, 8)
    assert (model.top_k, model.expert_ffn, model.vocabulary, model.shared_experts) == (2, 256, 256, 1)
    assert model.sequence == 512, "tokens of the example's batch"


def test_every_part_of_every_phase_costs_time(table: DurationTable) -> None:
    for kind in ("dense", "moe"):
        for phase in "FBW":
            assert {op.name for op in table.layer(kind, phase)} == {"attention", "mlp"}
            assert all(op.ms > 0.0 for op in table.layer(kind, phase))
    # The backward computes norms, latents' projections and SwiGLU again, and has two GEMMs for each of the forward's.
    assert table.total_ms("moe", "B") > table.total_ms("moe", "F") > table.total_ms("moe", "W")
    assert dict(table.saved_bytes)["moe"] > 0


def test_a_table_from_a_graph_survives_its_file(table: DurationTable, tmp_path: Path) -> None:
    path = tmp_path / "durations.json"
    path.write_text(json.dumps(table.to_json()))
    assert load_durations(path) == table


def test_transfers_come_with_the_deployment(table: DurationTable) -> None:
    machine = load_machine("h800")
    assert with_transfers(table, machine) == table, "one GPU holds all experts"
    spread = with_transfers(replace(table, deployment=replace(table.deployment, expert_parallel=8)), machine)
    assert {op.kind for op in spread.layer("moe", "F")} == {"compute", "dispatch", "combine"}
    assert spread.layer("dense", "F") == table.layer("dense", "F")
    assert spread.total_ms("moe", "F", "compute") == table.total_ms("moe", "F", "compute")


def test_a_build_can_be_simulated(table: DurationTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `fp8c compile` leaves it: one pipeline rank, one GPU; the options spread it."""
    (tmp_path / "durations.json").write_text(json.dumps(table.to_json()))
    mesh = ["--gpus", "16", "--pp", "2", "--ep", "8", "--sequences", "64", "--schedule", "dualpipe", "--even"]
    assert main(["simulate", str(tmp_path), *mesh, "--json", "--trace", str(tmp_path / "t.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pipeline_parallel"] == 2 and report["expert_parallel"] == 8
    assert report["comm_ms"] > 0.0 and 0.0 <= report["hidden_share"] <= 1.0
