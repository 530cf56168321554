"""What a compile writes for those who read its graphs: source lines, roles, reasons, the schedule."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fp8c.build import Build, read_build
from fp8c.schedule import COMM, COMPUTE, Schedule, Slot, Task
from fp8c.tools.compile_command import Request, compile_model
from fp8c.tools.explain import explain
from fp8c.tools.graph_notes import schedule_trace
from fp8c.tools.viewer.build_graphs import identical_siblings, read_graphs
from fp8c.tools.viewer.page import page
from fp8c.tools.viewer.page_data import page_data
from fp8c.tools.viewer.text import inspect_text

MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(128)
        self.gate = nn.Linear(128, 256, bias=False)
        self.up = nn.Linear(128, 256, bias=False)
        self.down = nn.Linear(256, 128, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def model():
    return Model().bfloat16()


def example_inputs():
    return (torch.randn(128, 128, dtype=torch.bfloat16),)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "tiny_blocks.py").write_text(MODEL)
    request = Request(str(folder / "tiny_blocks.py"), target="cpu", out=folder / "build", baseline=False)
    compile_model(request)
    return read_build(folder / "build")


def test_places_have_their_source_line(built: Build) -> None:
    notes: dict[str, Any] = built.json("graphs/notes.json")
    lines = [text for name, found in notes["sources"].items() for _, text in found if name.startswith("tiny_blocks")]
    assert any("self.down(" in text for text in lines)
    assert any("for layer" not in text and "square().mean()" in text for text in lines)


def test_the_captured_graphs_gemms_have_their_roles(built: Build) -> None:
    roles = built.json("graphs/notes.json")["roles"]
    gemms = sorted(r for r in roles.values() if r.startswith(("fprop", "dgrad", "wgrad")))
    keys = [k for k, u in built.json("plan.lock.json")["uses"].items() if u["op"] == "linear"]
    missing = {"dgrad layers.0.gate", "dgrad layers.0.up"}  # the step's input needs no gradient through them
    assert {f"{w} {k}" for w in ("fprop", "wgrad") for k in keys} <= set(gemms)
    assert {f"dgrad {k}" for k in keys} - set(gemms) <= missing


def test_every_value_that_crosses_says_why(built: Build) -> None:
    lock = built.json("plan.lock.json")
    graphs = read_graphs(built, lock["uses"])
    saved = graphs.notes["saved"]
    assert saved and all(entry["why"] for entry in saved.values())
    assert set(graphs.half("after", "forward").saved) & set(saved)


def test_a_real_build_folds_explains_prints_and_draws(built: Build) -> None:
    graphs = read_graphs(built, built.json("plan.lock.json")["uses"])
    runs = identical_siblings(graphs, {})
    assert ["layers.1", "layers.2"] in runs or ["layers.0", "layers.1", "layers.2"] in runs
    [found] = explain(built, "layers.1.down")
    assert next(a for a in found.answers if a.field == "fprop.x").value.startswith("e4m3")
    text = inspect_text(built)
    assert "down" in text and "e4m3 x e4m3" in text and "traffic" in text
    assert "only" not in inspect_text(built, "layers.0").splitlines()[0]
    assert len(page(page_data(built))) < 1_000_000


def test_the_trace_has_two_streams_for_each_half() -> None:
    slots = (
        Slot(Task("mm", COMPUTE, 5.0, kind="compute"), 0.0),
        Slot(Task("all_to_all", COMM, 7.0, kind="collective"), 1.5),
    )
    trace = schedule_trace({"forward": Schedule(slots, 8.0, "exact", 0)})
    events = {e["name"]: e for e in trace["traceEvents"] if e["ph"] == "X"}
    assert (events["mm"]["tid"], events["all_to_all"]["tid"]) == (0, 1)
    assert (events["all_to_all"]["ts"], events["all_to_all"]["dur"]) == (1.5, 7.0)
    assert trace["otherData"]["forward"] == {"makespan_us": 8.5, "lower_bound_us": 8.0, "method": "exact"}
    json.dumps(trace)


COLLECTIVES = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(1024, 1024, bias=False)
        self.shared = nn.Linear(1024, 1024, bias=False)

    def forward(self, x):
        there = all_to_all_single_autograd(x, None, None, dist.group.WORLD)
        back = all_to_all_single_autograd(self.up(there), None, None, dist.group.WORLD)
        return (back + self.shared(x)).float().square().mean()


def model():
    return Model().bfloat16()


def example_inputs():
    return (torch.randn(2048, 1024, dtype=torch.bfloat16),)
"""


def test_a_build_with_collectives_has_its_schedule(built: Build, tmp_path: Path) -> None:
    assert not built.has("schedule.trace.json")  # no collectives, nothing to schedule
    (tmp_path / "spread.py").write_text(COLLECTIVES)
    command = [
        sys.executable,
        "-m",
        "fp8c",
        "compile",
        str(tmp_path / "spread.py"),
        "--no-baseline",
        "--target",
        "h800",
    ]
    command += ["--spec", "rowwise", "--weights", "meta", "-o", str(tmp_path / "build")]
    root = Path(__file__).parents[2]
    subprocess.run(command, check=True, cwd=root, capture_output=True)
    build = read_build(tmp_path / "build")
    events = [e for e in build.json("schedule.trace.json")["traceEvents"] if e["ph"] == "X"]
    sent = [e for e in events if e["tid"] == 1]
    assert [e["pid"] for e in sent].count(0) == 2 and 1 in {e["pid"] for e in sent}
    shared = [e for e in events if e["pid"] == 0 and e["tid"] == 0 and e["name"].startswith("scaled_mm")]
    first = min(sent, key=lambda e: (e["pid"], e["ts"]))
    assert any(e["ts"] < first["ts"] + first["dur"] for e in shared), "compute runs beside the first transfer"
    assert page_data(build)["schedule"] == build.json("schedule.trace.json")
