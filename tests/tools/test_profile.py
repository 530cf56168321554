"""Reading Chrome traces: kernels joined to their annotations, exposed time, costs for the scheduler."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fp8c.cli import main
from fp8c.diagnostics import DiagnosticError
from fp8c.durations import load_durations
from fp8c.tools.profile import measured_costs, profile, read_kernels, totals_ms, with_measured

EXAMPLE = Path(__file__).parents[2] / "examples" / "durations" / "deepseek_v3_h800.toml"


def kernel(name: str, start: float, length: float, correlation: int, stream: int = 7) -> dict[str, Any]:
    arguments = {"correlation": correlation, "stream": stream, "grid": [4, 5, 1]}
    return {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": length, "tid": stream, "args": arguments}


def launch(time: float, correlation: int, thread: int = 1) -> dict[str, Any]:
    arguments = {"correlation": correlation}
    return {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "ts": time,
        "dur": 1,
        "tid": thread,
        "args": arguments,
    }


def annotation(name: str, start: float, length: float, thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": length, "tid": thread}


#: Host launches three kernels under two nested annotations and one under none; transfers run on stream 9.
EVENTS = [
    annotation("moe.F.attention", 0, 10),
    annotation("inner", 4, 3),
    launch(1, 1),
    launch(5, 2),
    annotation("moe.F.dispatch", 11, 5),
    launch(12, 3),
    launch(90, 4, thread=2),
    kernel("gemm", 100, 40, 1),
    kernel("softmax", 140, 10, 2),
    kernel("deep_ep::dispatch<8>", 130, 60, 3, stream=9),
    kernel("deep_ep::notify_dispatch", 120, 10, 3, stream=9),
    kernel("wgrad", 170, 30, 4),
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": EVENTS}))
    return path


def test_kernels_belong_to_the_innermost_annotation_of_their_launch(trace: Path) -> None:
    found = {k.name: k.annotation for k in read_kernels(trace)}
    assert found["gemm"] == "moe.F.attention"
    assert found["softmax"] == "inner"
    assert found["deep_ep::dispatch<8>"] == "moe.F.dispatch"
    assert found["wgrad"] == "", "its thread carries no annotation"
    assert {k.blocks for k in read_kernels(trace)} == {20}


def test_exposed_time_is_communication_outside_compute(trace: Path) -> None:
    """Compute 100-150 and 170-200, payload 130-190: 150-170 is exposed; the notify kernel counts for neither."""
    exposure = profile(trace).exposure
    assert (exposure.comm_us, exposure.exposed_us, exposure.compute_us) == (60.0, 20.0, 80.0)
    assert exposure.hidden_share == pytest.approx(2 / 3)


def test_compressed_traces_read_the_same(trace: Path, tmp_path: Path) -> None:
    packed = tmp_path / "trace.json.gz"
    packed.write_bytes(gzip.compress(trace.read_bytes()))
    assert read_kernels(packed) == read_kernels(trace)


def test_costs_by_annotation_feed_a_table(trace: Path) -> None:
    kernels = read_kernels(trace)
    assert measured_costs(kernels) == {"moe.F.attention": 40.0, "inner": 10.0, "moe.F.dispatch": 70.0}
    table = load_durations(EXAMPLE)
    measured = with_measured(table, totals_ms(kernels), layers=2)
    attention, dispatch = (
        next(o for o in measured.layer("moe", "F") if o.name == n) for n in ("attention", "dispatch")
    )
    assert attention.ms == pytest.approx(0.020)
    assert dispatch.ms == pytest.approx(0.035)
    assert measured.layer("moe", "B") == table.layer("moe", "B")
    with pytest.raises(DiagnosticError) as caught:
        with_measured(table, {"other": 1.0}, layers=2)
    assert caught.value.diagnostics[0].code == "E0912"


def test_the_verb_prints_and_bad_files_are_named(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(trace), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hidden_share"] == pytest.approx(2 / 3)
    assert main(["profile", str(trace)]) == 0
    assert "66.7%" in capsys.readouterr().out
    for text in ("", "{}", "[1, 2]", '{"traceEvents": []}', '{"traceEvents": [{"cat": "kernel", "ph": "X"}]}'):
        bad = tmp_path / "bad.json"
        bad.write_text(text)
        assert main(["profile", str(bad)]) == 2
        assert "E0961" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "no such file or directory"),
        ('{"traceEvents": [', "line 1, column 18: expecting value"),
        ("[" * 100_000, "nested too deep"),
        ('[{"cat": "kernel", "ph": "X", "name": "k", "ts": 1, "dur": 1, "args": [1]}]', "as a profiler writes it"),
        ('[{"cat": "kernel", "ph": "X", "name": "k", "ts": NaN, "dur": 1}]', "kernel k has ts nan"),
        ('[{"cat": "kernel", "ph": "X", "name": "k", "ts": 1, "dur": -1}]', "kernel k has dur -1"),
    ],
    ids=["missing", "cut", "deep", "arguments", "no number", "negative"],
)
def test_what_is_wrong_with_a_trace_is_said_in_words(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    if text is not None:
        path.write_text(text)
    assert main(["profile", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Errno" not in error


def test_a_damaged_archive_is_named(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "trace.json.gz"
    data = bytearray(gzip.compress(trace.read_bytes()))
    data[20:30] = b"\xff" * 10
    packed.write_bytes(data)
    assert main(["profile", str(packed)]) == 2
    assert "E0961" in capsys.readouterr().err
