"""`fp8c simulate`: keys, table, trace, what-if, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp8c.backends.costs import load_machine
from fp8c.cli import main
from fp8c.cluster import ClusterRun
from fp8c.durations import DurationTable, load_durations
from fp8c.tools.simulate import what_if

EXAMPLE = Path(__file__).parents[2] / "examples" / "durations" / "deepseek_v3_h800.toml"

MLP = """
import torch
from torch import nn

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(256, 256, bias=False, dtype=torch.bfloat16) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x.float().mean()

def model():
    return Layers()

def example_inputs():
    return {"x": torch.zeros(384, 256, dtype=torch.bfloat16)}
"""


def small() -> DurationTable:
    """16 layers on 2 pipeline ranks x 16 GPUs: seconds to simulate."""
    table = load_durations(EXAMPLE)
    model = replace(table.model, layers=8, dense_layers=1, mtp_layers=0)
    deployment = replace(
        table.deployment, pipeline_parallel=2, expert_parallel=16, nodes_per_token=2, sequences_per_step=16 * 8
    )
    return replace(table, model=model, deployment=deployment)


@pytest.fixture
def build(tmp_path: Path) -> Path:
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "durations.json").write_text(json.dumps(small().to_json()))
    return folder


def simulated(build: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    trace = build / "trace.json"
    assert main(["simulate", str(build), "--gpus", "32", "--even", "--json", "--trace", str(trace), *options]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_json_has_the_promised_keys_and_they_agree(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = simulated(build, capsys)
    assert report["schema"] == "fp8c.simulate/1"
    tokens = 16 * 8 * 4096
    assert report["tokens_per_s_per_gpu"] == pytest.approx(tokens / (report["step_ms"] / 1e3) / 32)
    per_trillion = 1e12 / report["tokens_per_s_per_gpu"] / 3600
    assert report["gpu_hours_per_trillion_tokens"] == pytest.approx(per_trillion)
    assert report["hidden_share"] == pytest.approx(1 - report["exposed_comm_ms"] / report["comm_ms"])
    assert 0.0 < report["bubble_share"] < 1.0
    assert report["lower_bound_ms"] <= report["step_ms"]
    assert report["pair"]["gap"] == pytest.approx(report["pair"]["makespan_ms"] / report["pair"]["lower_bound_ms"] - 1)
    assert simulated(build, capsys, "--no-overlap")["step_ms"] > report["step_ms"]


def test_trace_opens_in_perfetto_and_covers_the_step(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = simulated(build, capsys)
    events = json.loads(Path(report["trace"]).read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in spans} == {0, 1}
    assert {e["tid"] for e in spans} == {0, 1}
    assert max(e["ts"] + e["dur"] for e in spans) <= report["step_ms"] * 1e3 + 1
    compute = sum(e["dur"] for e in spans if e["tid"] == 0) / 2
    assert compute == pytest.approx(report["compute_ms"] * 1e3, rel=1e-3)
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"pipeline rank 0", "compute", "communication"} <= names


def test_table_is_for_people(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = build / "t.json"
    assert main(["simulate", str(build), "--gpus", "32", "--even", "--trace", str(trace)]) == 0
    text = capsys.readouterr().out
    for word in ("lower bound", "exposed communication", "GPU hours per 1T tokens", "main pair"):
        assert word in text


def test_a_build_is_simulated_on_its_own_machine_and_one_replica(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers without attention: their GEMMs' rows are the tokens."""
    path = tmp_path / "model.py"
    path.write_text(MLP, encoding="utf-8")
    folder = tmp_path / "build"
    assert main(["compile", str(path), "--target", "h200", "--no-baseline", "-o", str(folder)]) == 0
    table = json.loads((folder / "durations.json").read_text(encoding="utf-8"))
    assert table["model"]["sequence"] == 384
    capsys.readouterr()
    assert main(["simulate", str(folder), "--json", "--trace", str(tmp_path / "t.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["topology"] == "h200" and report["gpus"] == 1
    assert report["tokens_per_s_per_gpu"] == pytest.approx(384 / report["step_ms"] * 1e3, rel=1e-6)
    assert main(["simulate", str(folder), "--trace", str(tmp_path / "t.json")]) == 0
    assert f"{report['step_ms']:.3f} ms" in capsys.readouterr().out
    for option in ("--choose-sms", "--what-if"):  # dense layers, no peers: nothing is transferred
        assert main(["simulate", str(folder), option, "--trace", str(tmp_path / "t.json")]) == 0


@pytest.mark.parametrize(
    "options,exit_code,code",
    [
        ([], 2, "E0960"),
        (["BUILD", "--durations", str(EXAMPLE)], 2, "E0960"),
        (["BUILD", "--topology", "h900"], 5, "E0930"),
        (["BUILD", "--gpus", "33"], 1, "E0943"),
        (["BUILD", "--gpus", "32", "--schedule", "dualpip"], 1, "E0940"),
        (["BUILD", "--gpus", "32", "--comm-sms", "140"], 1, "E0951"),
        (["BUILD", "--gpus", "32", "--memory-gib", "0.5"], 1, "E0945"),
        (["BUILD", "--gpus", "32", "--ep", "48"], 1, "E0943"),
        (["BUILD", "--gpus", "32", "--trace", str(EXAMPLE / "trace.json")], 2, "E0610"),
        (["BUILD", "--gpus", "32", "--seed", "-1"], 2, "--seed"),
        (["BUILD", "--gpus", "32", "--comm-sms", "0"], 2, "--comm-sms"),
        (["BUILD", "--gpus", "32", "--zipf", "nan"], 2, "--zipf"),
        (["BUILD", "--gpus", "32", "--memory-gib", "inf"], 2, "--memory-gib"),
    ],
)
def test_bad_input_is_named(
    build: Path, capsys: pytest.CaptureFixture[str], options: list[str], exit_code: int, code: str
) -> None:
    filled = [str(build) if o == "BUILD" else o for o in options]
    assert main(["simulate", *filled]) == exit_code
    assert code in capsys.readouterr().err


def test_sms_of_a_table_without_peers(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Experts on one GPU: there is no transfer whose time changes with its SMs; compute takes those left."""
    few, many = (
        simulated(build, capsys, "--ep", "1", "--gpus", "2", "--sequences", "8", "--comm-sms", n) for n in ("4", "40")
    )
    assert few["compute_ms"] < many["compute_ms"]


def test_measured_loads_are_an_input(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loads = build / "loads.json"
    loads.write_text(json.dumps([5.0] * 16 + [1.0] * 240))
    even = simulated(build, capsys)
    skewed = simulated(build, capsys, "--loads", str(loads))
    assert skewed["step_ms"] > 1.2 * even["step_ms"]
    loads.write_text("[1, 2]")
    assert main(["simulate", str(build), "--gpus", "32", "--loads", str(loads)]) == 1
    assert "E0924" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--loads", "--durations"])
def test_a_file_that_is_not_there_is_said_in_words(
    build: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [str(build)] if option == "--loads" else []
    assert main(["simulate", *first, option, "nob.json"]) == 2
    error = capsys.readouterr().err
    assert "no such file or directory" in error and "Errno" not in error


def test_a_build_without_durations_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(tmp_path)]) == 2
    assert "durations.json" in capsys.readouterr().err


def test_wishes_answer_in_time_and_bytes() -> None:
    run = ClusterRun(32, load_machine("h800"), zipf=None, splits=(1,))
    answers = {a.name: a for a in what_if(small(), run)}
    assert len(answers) >= 6
    for answer in answers.values():
        assert answer.saved_ms_per_step >= -1e-6
        assert answer.saved_hbm_mb_per_layer >= 0.0
    # Scales are still multiplied every 128 of K, so a full accumulator alone frees no time; with group scaling it does.
    assert answers["full-accumulator"].saved_ms_per_step == 0.0
    assert answers["accumulator-and-scaling"].saved_ms_per_step > 0.0
    assert answers["comm-engine"].saved_ms_per_step > answers["transposed-operands"].saved_ms_per_step > 0.0
    assert answers["cast-near-memory"].saved_hbm_mb_per_layer > answers["cast-in-tma"].saved_hbm_mb_per_layer > 0.0
