"""The step simulator: closed forms, conservation, causality, determinism, meshes that do not fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from fp8c.backends.costs import load_machine
from fp8c.cluster import (
    ClusterRun,
    StepResult,
    gpu_hours_per_trillion_tokens,
    make_mesh,
    simulate_step,
    state_bytes,
    with_head,
)
from fp8c.diagnostics import DiagnosticError
from fp8c.durations import DurationTable, load_durations
from fp8c.pipeline_schedule import SCHEDULES, make_pipeline

EXAMPLE = Path(__file__).parents[2] / "examples" / "durations" / "deepseek_v3_h800.toml"
H800 = load_machine("h800")


@pytest.fixture(scope="module")
def table() -> DurationTable:
    return load_durations(EXAMPLE)


def small(table: DurationTable, schedule: str, micro_batches: int = 8, layers: int = 16, pp: int = 4) -> DurationTable:
    """`layers` MoE layers on 4 pipeline ranks x 16 data ranks (EP 16), no head."""
    return replace(
        table,
        model=replace(table.model, layers=layers, dense_layers=0, mtp_layers=0, vocabulary=0),
        deployment=replace(
            table.deployment,
            schedule=schedule,
            pipeline_parallel=pp,
            expert_parallel=16,
            nodes_per_token=2,
            sequences_per_step=16 * micro_batches,
        ),
    )


def run(table: DurationTable, **options: object) -> StepResult:
    base = ClusterRun(64, H800, zipf=None, has_optimizer=False, has_pipeline_transfers=False, splits=(1,))
    return simulate_step(table, replace(base, **options))  # type: ignore[arg-type]


def test_1f1b_without_overlap_is_the_closed_form(table: DurationTable) -> None:
    """(micro-batches + ranks - 1) x (forward + backward) of one stage, less what a rank need not wait for: the weight
    work of its neighbour's first layer comes after the gradient it sends."""
    found = run(small(table, "1f1b"), is_overlapping=False)
    layer_ms = sum(table.total_ms("moe", phase) for phase in "FBW")
    unwaited_ms = 3 * table.total_ms("moe", "W")
    assert found.step_us == pytest.approx(((8 + 4 - 1) * 4 * layer_ms - unwaited_ms) * 1e3)
    assert found.mean("exposed_us") == pytest.approx(found.mean("comm_us"))


def test_deepseeks_step_without_overlap_is_the_published_estimate(table: DurationTable) -> None:
    """1F1B on 16 ranks with 120 micro-batches and exposed transfers: 28.3 s, 256K GPU hours per trillion tokens."""
    plain = replace(
        table,
        model=replace(table.model, layers=64, dense_layers=0, mtp_layers=0, vocabulary=0),
        deployment=replace(table.deployment, schedule="1f1b"),
        ops=tuple(op for op in table.ops if op.kind not in ("layout", "quantize")),
    )
    ops = tuple(
        replace(o, after=tuple({"layout": "attention", "cast": "previous layer"}.get(a, a) for a in o.after))
        for o in plain.ops
    )
    found = simulate_step(
        replace(plain, ops=ops),
        ClusterRun(2048, H800, zipf=None, is_overlapping=False, has_optimizer=False, has_pipeline_transfers=False),
    )
    assert found.step_us / 1e6 == pytest.approx(28.3, abs=0.1)
    assert gpu_hours_per_trillion_tokens(found.step_us, 2048, 15360 * 4096) == pytest.approx(256e3, rel=0.01)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_conserves_work_and_keeps_order(table: DurationTable, schedule: str) -> None:
    layers = 32 if schedule in ("interleaved", "zbv", "dualpipev") else 16
    found = run(small(table, schedule, layers=layers))
    per_rank = 8 * layers / 4
    compute_ms = sum(table.total_ms("moe", phase, "compute") for phase in "FBW")
    for rank in found.ranks:
        assert rank.compute_us == pytest.approx(per_rank * compute_ms * 1e3)
        assert rank.compute_us + rank.exposed_us + rank.idle_us == pytest.approx(found.step_us)
    assert found.step_us >= found.lower_bound_us * (1 - 1e-9)
    for spans in found.spans:
        for stream in (0, 1):
            row = [s for s in spans if s.stream == stream]
            assert all(a.end_us <= b.start_us + 1e-6 for a, b in pairwise(row))


def test_overlap_and_pairing_pay_in_this_order(table: DurationTable) -> None:
    serial = run(small(table, "dualpipe", 32), is_overlapping=False).step_us
    paired = run(small(table, "dualpipe", 32)).step_us
    unpaired = run(small(table, "1f1b", 32)).step_us
    assert paired < unpaired < serial


def test_a_backward_never_starts_before_its_forward_has_passed(table: DurationTable) -> None:
    found = run(small(table, "dualpipe"))
    ends: dict[str, float] = {}
    starts: dict[str, float] = {}
    for spans in found.spans:
        for span in spans:
            action = span.name.split(" ")[1]
            ends[action] = max(ends.get(action, 0.0), span.end_us)
            starts[action] = min(starts.get(action, float("inf")), span.start_us)
    for stage in range(3):
        for micro_batch in range(4):
            assert starts[f"{stage + 1}F{micro_batch}"] >= ends[f"{stage}F{micro_batch}"] - 1e-6


def test_pipeline_transfers_and_the_optimizer_cost_time(table: DurationTable) -> None:
    bare = run(small(table, "dualpipe"))
    with_hops = run(small(table, "dualpipe"), has_pipeline_transfers=True)
    full = run(small(table, "dualpipe"), has_pipeline_transfers=True, has_optimizer=True)
    assert bare.step_us < with_hops.step_us < full.step_us
    assert full.optimizer_us == pytest.approx(full.step_us - with_hops.step_us)


def test_splitting_chunks_without_a_partner_shortens_the_step(table: DurationTable) -> None:
    whole, cut = (run(small(table, "dualpipe"), splits=s) for s in ((1,), (1, 2)))
    assert cut.step_us < whole.step_us
    assert cut.mean("compute_us") < 1.05 * whole.mean("compute_us"), "cutting adds a few percent of compute at most"
    assert max(plan.chunks for _, plan in cut.plans) == 2


def test_a_step_cut_into_chunks_is_not_shorter_than_its_bound(table: DurationTable) -> None:
    """One micro-batch on one rank: chunks overlap its own transfers, so operators in a row are no bound."""
    found = run(small(table, "1f1b", 1, layers=2, pp=1), gpus=16, splits=(1, 2, 3, 4))
    serial_us = 2e3 * sum(table.total_ms("moe", phase) for phase in "FB")
    assert found.lower_bound_us <= found.step_us < serial_us + 2e3 * table.total_ms("moe", "W")
    assert found.lower_bound_us < serial_us


def test_the_bound_under_drawn_loads_counts_every_rank(table: DurationTable) -> None:
    """Stages of a V: the first rank holds the larger ones, and the last rank is not the one that bounds the step."""
    found = run(small(table, "zbv", 8, layers=5, pp=2), gpus=32, zipf=0.0, patterns=2)
    assert found.step_us >= found.lower_bound_us >= max(rank.compute_us for rank in found.ranks)


def test_skew_costs_and_is_deterministic(table: DurationTable) -> None:
    even = run(small(table, "dualpipe"))
    skewed = [run(small(table, "dualpipe"), zipf=z, patterns=2) for z in (0.3, 0.8)]
    assert even.step_us < skewed[0].step_us < skewed[1].step_us
    again = run(small(table, "dualpipe"), zipf=0.3, patterns=2)
    assert again.step_us == skewed[0].step_us
    assert again.spans == skewed[0].spans
    for found in skewed:
        assert found.step_us >= found.lower_bound_us


def test_released_chunks_are_faster(table: DurationTable) -> None:
    assert run(small(table, "dualpipe"), is_released=True).step_us < run(small(table, "dualpipe")).step_us


def test_dualpipe_holds_one_more_micro_batch_than_1f1b(table: DurationTable) -> None:
    """Peak activations: PP micro-batches of a stage in 1F1B, PP + 1 in DualPipe (DeepSeek-V3, table 2)."""
    one = max(r.peak_activation_bytes for r in run(small(table, "1f1b")).ranks)
    dual = max(r.peak_activation_bytes for r in run(small(table, "dualpipe")).ranks)
    assert dual / one == pytest.approx(5 / 4)


def test_an_activation_budget_is_respected_or_named(table: DurationTable) -> None:
    peak = max(r.peak_activation_bytes for r in run(small(table, "1f1b")).ranks)
    run(small(table, "1f1b"), memory_budget_bytes=peak)
    with pytest.raises(DiagnosticError) as caught:
        run(small(table, "1f1b"), memory_budget_bytes=peak - 1)
    assert caught.value.diagnostics[0].code == "E0945"


@pytest.mark.parametrize(
    "gpus,changes,code",
    [
        (2000, {}, "E0943"),
        (0, {}, "E0943"),
        (2048, {"expert_parallel": 96}, "E0943"),
        (2048, {"sequences_per_step": 15361}, "E0944"),
        (2048 * 3, {"expert_parallel": 384, "sequences_per_step": 384 * 40}, "E0921"),
        (2048, {"schedule": "gpipe"}, "E0940"),
        (2048, {"sequences_per_step": 128 * 7}, "E0942"),
        (64 * 128, {"pipeline_parallel": 128, "sequences_per_step": 64 * 512}, "E0920"),
    ],
)
def test_meshes_that_do_not_fit_are_named(
    table: DurationTable, gpus: int, changes: dict[str, object], code: str
) -> None:
    wrong = replace(table, deployment=replace(table.deployment, **changes))  # type: ignore[arg-type]
    with pytest.raises(DiagnosticError) as caught:
        simulate_step(wrong, ClusterRun(gpus, H800, zipf=None))
    assert caught.value.diagnostics[0].code == code


def test_the_paper_mesh_is_2_groups_of_64_with_120_micro_batches(table: DurationTable) -> None:
    mesh = make_mesh(table, 2048, 8)
    assert (mesh.pipeline, mesh.data, mesh.expert, mesh.groups, mesh.micro_batches) == (16, 128, 64, 2, 120)


def test_deepseeks_memory_fits_an_h800(table: DurationTable) -> None:
    """61 / 8 layers on a rank of DualPipe: 7 bytes a parameter, and 8 more of the shard: a quarter of the experts (2 groups
    of 64 in each of 2 directions), a 256th of the rest."""
    mesh = make_mesh(table, 2048, 8)
    held = state_bytes(table, mesh, make_pipeline("dualpipe", 16, 120))
    experts = 4 * 3 * 7168 * 2048
    rest = 3 * 7168 * 2048 + 7168 * 256  # shared expert, router
    rest += 7168 * 2112 + 1536 * 24576 + 512 * 32768 + 16384 * 7168  # latent attention
    assert held == pytest.approx(61 / 8 * (experts * (7 + 8 / 4) + rest * (7 + 8 / 256)))
    assert held / 1e9 < 80 - 44.2 * 1.074


def test_the_head_is_added_once(table: DurationTable) -> None:
    once = with_head(table, H800)
    assert {op.layer for op in once.ops} == {"moe", "dense", "head"}
    assert with_head(once, H800) == once
