"""Tables of durations, pairs, splitting, SM shares: the published pair and what bad tables are told."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fp8c.backends.costs import load_machine
from fp8c.diagnostics import DiagnosticError
from fp8c.durations import DurationTable, load_durations, parse_durations
from fp8c.overlap import (
    Exposure,
    choose_chunks,
    choose_comm_sms,
    chunk_tasks,
    exposure,
    pair_problem,
    schedule_pair,
    split_tasks,
    stage_layers,
    union,
    with_comm_sms,
)
from fp8c.schedule import COMM, COMPUTE, Slot, Task, check_schedule, make_problem
from fp8c.schedule_search import solve
from fp8c.workload import predicted_table

EXAMPLE = Path(__file__).parents[2] / "examples" / "durations" / "deepseek_v3_h800.toml"
FOUR = ("moe",) * 4


@pytest.fixture(scope="module")
def table() -> DurationTable:
    return load_durations(EXAMPLE)


def test_the_table_adds_up_to_the_published_chunks(table: DurationTable) -> None:
    """Per 4-layer chunk: forward 77.2, input backward 97.7, weight gradient 35.1 ms, without layout and cast."""
    payload = {
        phase: 4 * sum(op.ms for op in table.layer("moe", phase) if op.kind not in ("layout", "quantize"))
        for phase in "FBW"
    }
    assert payload == {
        "F": pytest.approx(77.2, abs=0.05),
        "B": pytest.approx(97.7, abs=0.05),
        "W": pytest.approx(35.1, abs=0.05),
    }


def test_the_published_pair_is_scheduled_to_its_bound(table: DurationTable) -> None:
    report = schedule_pair(table, FOUR, FOUR)
    assert check_schedule(report.problem, report.schedule) == []
    assert report.schedule.is_optimal
    compute_us = 4000.0 * (4.36 + 4.60 + 9.34 + 5.31 + 2.39 + 6.38)
    assert report.schedule.makespan_us == pytest.approx(compute_us)
    assert report.exposure.hidden_share == pytest.approx(1.0)
    assert report.before.makespan_us > 1.5 * report.schedule.makespan_us
    assert report.serial_us == pytest.approx(4000.0 * (77.2 + 97.69 + 35.08 + 4 * (0.10 + 0.27)) / 4.0, rel=1e-3)


def test_forward_and_backward_of_a_pair_are_independent_and_interleaved(table: DurationTable) -> None:
    problem = pair_problem(table, FOUR, FOUR)
    for task in problem.tasks:
        assert {name[0] for name in task.after} <= {task.name[0]}
    order = solve(problem).order(COMM)
    switches = sum(a[0] != b[0] for a, b in pairwise(order))
    assert switches >= 8, "transfers of the two chunks take turns, as in DualPipe"


def test_weight_work_fills_in(table: DurationTable) -> None:
    """Without weight work there is not enough compute to hide the transfers of the backward alone; with it more is."""
    bare = solve(make_problem(chunk_tasks(table, FOUR, ("B",))))
    filled = solve(make_problem(chunk_tasks(table, FOUR, ("B", "W"))))
    assert exposure(filled.slots).exposed_us < exposure(bare.slots).exposed_us
    weight_us = 4000.0 * (2.39 + 6.38)
    assert filled.makespan_us < bare.makespan_us + 0.5 * weight_us


def test_memory_budget_changes_the_schedule_or_is_named(table: DurationTable) -> None:
    free = solve(pair_problem(table, FOUR, FOUR, memory_budget_bytes=10**12))
    tight = solve(pair_problem(table, FOUR, FOUR, memory_budget_bytes=free.peak_bytes))
    assert tight.peak_bytes <= free.peak_bytes
    held = pair_problem(table, FOUR, FOUR, memory_budget_bytes=1).base_bytes
    lean = solve(pair_problem(table, FOUR, FOUR, memory_budget_bytes=int(held * 1.5)))
    assert lean.peak_bytes <= 1.5 * held
    assert lean.makespan_us >= free.makespan_us
    with pytest.raises(DiagnosticError) as caught:
        solve(pair_problem(table, FOUR, FOUR, memory_budget_bytes=held // 2))
    assert caught.value.diagnostics[0].code == "E0905"


# -------------------------------------------------------------------------------------------------------- splitting


def test_splitting_keeps_the_work_and_pays_the_fixed_part_per_chunk() -> None:
    tasks = [
        Task("a", COMPUTE, 10),
        Task("b", COMM, 8, ("a",), is_splittable=True, fixed_us=1.0),
        Task("c", COMPUTE, 6, ("b",), is_splittable=True),
        Task("d", COMPUTE, 5, ("c", "b")),
    ]
    out = {t.name: t for t in split_tasks(tasks, 2)}
    assert set(out) == {"a", "b#0", "b#1", "c#0", "c#1", "d"}
    assert out["b#0"].duration_us == 1.0 + 7.0 / 2
    assert out["c#1"].after == ("b#1",)
    assert out["d"].after == ("c#0", "c#1", "b#0", "b#1")
    assert split_tasks(tasks, 1) == tasks


def test_chunks_are_chosen_where_they_pay(table: DurationTable) -> None:
    """A forward alone hides transfers behind its own experts when cut; a pair has nothing left to hide."""
    alone = choose_chunks(chunk_tasks(table, FOUR, ("F",)))
    assert alone.setting > 1
    assert alone.schedule.makespan_us < 0.9 * solve(make_problem(chunk_tasks(table, FOUR, ("F",)))).makespan_us
    assert schedule_pair(table, FOUR, FOUR, splits=(1, 2)).chunks == 1
    costly = [replace(t, fixed_us=t.duration_us) for t in chunk_tasks(table, FOUR, ("F",))]
    assert choose_chunks(costly).setting == 1


def test_exposed_time_is_what_compute_leaves_uncovered() -> None:
    slots = [
        Slot(Task("c1", COMPUTE, 4), 0.0),
        Slot(Task("t1", COMM, 4), 2.0),
        Slot(Task("c2", COMPUTE, 2), 8.0),
        Slot(Task("t2", COMM, 1), 8.5),
    ]
    found = exposure(slots)
    assert found == Exposure(comm_us=5.0, exposed_us=2.0, compute_us=6.0, makespan_us=10.0)
    assert found.hidden_share == pytest.approx(0.6)
    assert union([(3, 5), (0, 1), (1, 2), (4, 7)]) == [(0, 2), (3, 7)]


# -------------------------------------------------------------------------------------------------- SM share, stages


def test_sm_share_stretches_compute_and_starves_transfers(table: DurationTable) -> None:
    machine = load_machine("h800")
    few, same, many = (with_comm_sms(table, machine, s) for s in (2, 20, 40))
    assert same == table
    attention = [t.layer("moe", "F")[0].ms for t in (few, same, many)]
    dispatch = [next(o.ms for o in t.layer("moe", "F") if o.name == "dispatch") for t in (few, same, many)]
    assert attention == pytest.approx([4.36 * 112 / 130, 4.36, 4.36 * 112 / 92])
    assert dispatch[0] > 2 * dispatch[1] and dispatch[2] <= dispatch[1]
    for share in (0, 132):
        with pytest.raises(DiagnosticError) as caught:
            with_comm_sms(table, machine, share)
        assert caught.value.diagnostics[0].code == "E0951"


def test_the_sm_share_with_the_shortest_pair_is_chosen(table: DurationTable) -> None:
    best, tried = choose_comm_sms(table, load_machine("h800"), FOUR, FOUR, shares=(2, 4, 20, 48))
    assert best.comm_sms == 4
    assert best.schedule.makespan_us == min(r.schedule.makespan_us for r in tried)
    assert [r.comm_sms for r in tried] == [2, 4, 20, 48]
    with pytest.raises(DiagnosticError) as caught:
        choose_comm_sms(table, load_machine("h800"), FOUR, FOUR, shares=(132, 0))
    assert caught.value.diagnostics[0].code == "E0950"


def test_layers_are_dealt_to_stages_in_order_and_evenly(table: DurationTable) -> None:
    stages = stage_layers(table, 16)
    assert [kind for stage in stages for kind in stage] == ["dense"] * 3 + ["moe"] * 59
    assert max(len(s) for s in stages) == 4
    with pytest.raises(DiagnosticError) as caught:
        stage_layers(table, 63)
    assert caught.value.diagnostics[0].code == "E0920"


def test_the_cost_model_predicts_the_published_table_from_sizes_alone(table: DurationTable) -> None:
    """From the model's sizes and the machine, no measured duration: every operator within 40 %, transfers within 20 %.
    Published times are those of kernels beside each other, so predictions fall short of them rather than exceed."""
    predicted = predicted_table(table.model, table.deployment, load_machine("h800"), 20)
    published = {(op.layer, op.key): op.ms for op in table.ops}
    for op in predicted.ops:
        ratio = op.ms / published[(op.layer, op.key)]
        assert 0.6 < ratio < (1.2 if op.on == COMM else 1.1), (op.key, ratio)
        if op.on == COMM:
            assert ratio > 0.8
    assert schedule_pair(predicted, FOUR, FOUR).exposure.hidden_share > 0.9


# --------------------------------------------------------------------------------------------------------- bad input


def document() -> dict[str, Any]:
    return json.loads(json.dumps(load_durations(EXAMPLE).to_json()))  # type: ignore[no-any-return]


def test_a_table_survives_its_json(table: DurationTable, tmp_path: Path) -> None:
    path = tmp_path / "durations.json"
    path.write_text(json.dumps(table.to_json()))
    assert load_durations(path) == table


def broken(change: str) -> dict[str, Any]:
    doc = document()
    rows: list[dict[str, Any]] = doc["op"]
    match change:
        case "no W":
            doc["op"] = [r for r in rows if r["phase"] != "W"]
        case "no dispatch":
            doc["op"] = [{**r, "kind": "compute"} if r["kind"] == "dispatch" else r for r in rows]
        case "missing op":
            doc["op"] = [r for r in rows if (r["layer"], r["phase"], r["name"]) != ("moe", "F", "mlp")]
        case "cycle":
            doc["op"] = [
                {**r, "after": ["combine"]} if (r["phase"], r["name"]) == ("F", "attention") else r for r in rows
            ]
        case "no output":
            doc["op"] = [{**r, "output": False} for r in rows]
        case "no dense":
            doc["op"] = [r for r in rows if r["layer"] != "dense"]
        case "negative":
            rows[0]["ms"] = -1.0
        case "no tokens":
            doc["measured"]["tokens"] = 0
        case "too many dense layers":
            doc["model"]["dense_layers"] = doc["model"]["layers"] + 1
        case "text":
            rows[0]["ms"] = "fast"
        case "unknown field":
            rows[0]["millis"] = 3
        case "phase":
            rows[0]["phase"] = "X"
        case "no model":
            del doc["model"]
        case "no hidden":
            del doc["model"]["hidden"]
        case "empty":
            doc["op"] = []
    return doc


@pytest.mark.parametrize(
    "change,code,word",
    [
        ("no W", "E0912", "phase W"),
        ("no dispatch", "E0912", "dispatch"),
        ("missing op", "E0901", "F.mlp"),
        ("cycle", "E0902", "->"),
        ("no output", "E0912", "output"),
        ("no dense", "E0912", "dense"),
        ("negative", "E0911", "-1"),
        ("no tokens", "E0911", "expected 1 or more"),
        ("too many dense layers", "E0911", "cannot be dense"),
        ("text", "E0911", "fast"),
        ("unknown field", "E0911", "millis"),
        ("phase", "E0911", "X"),
        ("no model", "E0911", "[model]"),
        ("no hidden", "E0911", "hidden"),
        ("empty", "E0912", "no operators"),
    ],
)
def test_wrong_tables_are_named(change: str, code: str, word: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        parse_durations(broken(change))
    assert caught.value.diagnostics[0].code == code
    assert word in caught.value.diagnostics[0].message


@pytest.mark.parametrize("text", ["", "][", 'schema = "fp8c.durations/9"', "\x00"])
def test_files_that_are_no_tables_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    with pytest.raises(DiagnosticError) as caught:
        load_durations(path)
    assert caught.value.diagnostics[0].code == "E0910"
    with pytest.raises(DiagnosticError) as caught:
        load_durations(tmp_path / "absent.toml")
    assert caught.value.diagnostics[0].code == "E0910"
