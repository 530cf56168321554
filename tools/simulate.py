"""`fp8c simulate`: a training step on a cluster, from a build or a table of durations, as a table, JSON and a trace.

The work is done by `fp8c/cluster.py` (the step), `fp8c/overlap.py` (chunks and pairs) and `fp8c/network.py` (hops); here
are the command's inputs, its report and its output formats. No torch here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fp8c.backends.costs import load_machine, load_whatif, machine_names, whatif_names
from fp8c.cluster import (
    ClusterRun,
    StepResult,
    gpu_hours_per_trillion_tokens,
    simulate_step,
    state_bytes,
    tokens_per_step,
    with_head,
)
from fp8c.cost_model import Machine, Operator, compute_stretch, estimate_us, hbm_bytes
from fp8c.diagnostics import ExitCode, Span, fail
from fp8c.durations import Deployment, DurationTable, load_durations
from fp8c.files import reason
from fp8c.overlap import PairReport, choose_comm_sms, schedule_pair, with_comm_sms
from fp8c.pipeline_schedule import Pair
from fp8c.workload import layer_work, predicted_table, with_transfers

SCHEMA = "fp8c.simulate/1"
DURATIONS_IN_BUILD = "durations.json"


@dataclass(frozen=True)
class PairFigures:
    """The main pair of the pipeline (the one run most often) on its own."""

    layers: int
    makespan_ms: float
    lower_bound_ms: float
    gap: float
    hidden_share: float
    program_order_ms: float
    serial_ms: float
    search_s: float


@dataclass(frozen=True)
class SimulationReport:
    """What `--json` prints. Times are those of one optimizer step; per-rank figures are means over pipeline ranks.

    exposed_comm_ms, hidden_share: expert-parallel communication; pipeline transfers show up as bubble
    bubble_share: share of the step in which a rank neither computes nor communicates, optimizer left out
    """

    name: str
    gpus: int
    topology: str
    pipeline: str
    pipeline_parallel: int
    data_parallel: int
    expert_parallel: int
    micro_batches: int
    comm_sms: int
    step_ms: float
    exposed_comm_ms: float
    hidden_share: float
    lower_bound_ms: float
    gap: float
    bubble_share: float
    compute_ms: float
    comm_ms: float
    optimizer_ms: float
    activations_gib: float
    state_gib: float
    tokens_per_s_per_gpu: float
    gpu_hours_per_trillion_tokens: float
    pair: PairFigures | None
    simulated_ops: int
    wall_s: float
    trace: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_durations(build: Path | None, durations: Path | None) -> DurationTable:
    """The table to simulate: `--durations`, or what a build wrote. Raises: E0910 to E0912, E0960 when neither is given
    or the build has none."""
    if (build is None) == (durations is None):
        raise fail(
            "E0960", "give either a build or --durations FILE", help="fp8c simulate build/", exit_code=ExitCode.USAGE
        )
    if durations is not None:
        return load_durations(durations)
    assert build is not None
    path = build / DURATIONS_IN_BUILD
    if not path.is_file():
        raise fail(
            "E0960",
            f"{build} holds no {DURATIONS_IN_BUILD}",
            help="compile it for a GPU (--target), or give --durations FILE",
            exit_code=ExitCode.USAGE,
        )
    return load_durations(path)


def simulate(table: DurationTable, run: ClusterRun, *, trace: Path | None = None) -> SimulationReport:
    """Simulate one step and write the trace. Raises: what `fp8c.cluster.simulate_step` raises, E0610."""
    started = time.perf_counter()
    result = simulate_step(table, run)
    comm_sms = run.comm_sms or table.measured.comm_sms
    pair = _pair_figures(with_comm_sms(with_head(table, run.machine), run.machine, comm_sms), result, run)
    wall_s = time.perf_counter() - started
    if trace is not None:
        _write_trace(trace, result)
    tokens = tokens_per_step(table)
    step_us, pipeline_us = result.step_us, result.step_us - result.optimizer_us
    comm_us, exposed_us = result.mean("comm_us"), result.mean("exposed_us")
    return SimulationReport(
        name=table.name,
        gpus=run.gpus,
        topology=run.machine.name,
        pipeline=result.pipeline.name,
        pipeline_parallel=result.mesh.pipeline,
        data_parallel=result.mesh.data,
        expert_parallel=result.mesh.expert,
        micro_batches=result.mesh.micro_batches,
        comm_sms=comm_sms,
        step_ms=step_us / 1e3,
        exposed_comm_ms=exposed_us / 1e3,
        hidden_share=1.0 - exposed_us / comm_us if comm_us else 1.0,
        lower_bound_ms=result.lower_bound_us / 1e3,
        gap=step_us / result.lower_bound_us - 1.0,
        bubble_share=result.mean("idle_us") / pipeline_us,
        compute_ms=result.mean("compute_us") / 1e3,
        comm_ms=comm_us / 1e3,
        optimizer_ms=result.optimizer_us / 1e3,
        activations_gib=max(r.peak_activation_bytes for r in result.ranks) / 2**30,
        state_gib=state_bytes(table, result.mesh, result.pipeline) / 2**30,
        tokens_per_s_per_gpu=tokens / (step_us / 1e6) / run.gpus,
        gpu_hours_per_trillion_tokens=gpu_hours_per_trillion_tokens(step_us, run.gpus, tokens),
        pair=pair,
        simulated_ops=result.simulated_ops,
        wall_s=wall_s,
        trace=str(trace) if trace is not None else None,
    )


def _write_trace(path: Path, result: StepResult) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(chrome_trace(result), separators=(",", ":")), encoding="utf-8")
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise fail(
            "E0610", f"cannot write {path}: {why}", help="name another file with --trace", exit_code=ExitCode.USAGE
        ) from None


def _pair_figures(table: DurationTable, result: StepResult, run: ClusterRun) -> PairFigures | None:
    counts: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
    for steps in result.pipeline.ranks:
        for step in steps:
            if isinstance(step, Pair):
                key = (result.stages[step.forward.stage], result.stages[step.backward.stage])
                counts[key] = counts.get(key, 0) + 1
    if not counts:
        return None
    forward, backward = max(counts, key=lambda k: (counts[k], k))
    started = time.perf_counter()
    report = schedule_pair(table, forward, backward, limits=run.limits)
    return pair_figures(report, len(forward), time.perf_counter() - started)


def pair_figures(report: PairReport, layers: int, search_s: float) -> PairFigures:
    return PairFigures(
        layers,
        report.schedule.makespan_us / 1e3,
        report.schedule.lower_bound_us / 1e3,
        report.schedule.gap,
        report.exposure.hidden_share,
        report.before.makespan_us / 1e3,
        report.serial_us / 1e3,
        search_s,
    )


# ----------------------------------------------------------------------------------------------------------- output


def chrome_trace(result: StepResult) -> dict[str, Any]:
    """Chrome trace events (Perfetto reads them): a process per pipeline rank, a thread per stream, microseconds."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(result.spans):
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"pipeline rank {rank}"}})
        for stream, name in enumerate(("compute", "communication")):
            events.append({"ph": "M", "pid": rank, "tid": stream, "name": "thread_name", "args": {"name": name}})
        for span in spans:
            if span.end_us > span.start_us:
                length = round(span.end_us - span.start_us, 3)
                start = round(span.start_us, 3)
                events.append(
                    {"ph": "X", "pid": rank, "tid": span.stream, "name": span.name, "ts": start, "dur": length}
                )
    return {"displayTimeUnit": "ms", "traceEvents": events}


def time_text(ms: float) -> str:
    """A duration for people: seconds, or milliseconds below a tenth of one."""
    return f"{ms:.3f} ms" if 0.0 < ms < 100.0 else f"{ms / 1e3:.3f} s"


def table_text(report: SimulationReport) -> str:
    """The table people read."""
    rows = [
        (
            "cluster",
            f"{report.gpus} {report.topology}: {report.pipeline_parallel} pipeline x {report.data_parallel} data",
        ),
        ("experts", f"over {report.expert_parallel} GPUs, {report.comm_sms} SMs for communication"),
        ("pipeline", f"{report.pipeline}, {report.micro_batches} micro-batches"),
        ("step", time_text(report.step_ms)),
        ("  lower bound", f"{time_text(report.lower_bound_ms)} (gap {report.gap:.1%})"),
        ("  compute", time_text(report.compute_ms)),
        ("  exposed communication", f"{time_text(report.exposed_comm_ms)} of {time_text(report.comm_ms)}"),
        ("  hidden", f"{report.hidden_share:.1%}"),
        ("  bubble", f"{report.bubble_share:.1%}"),
        ("  optimizer", time_text(report.optimizer_ms)),
        (
            "memory, at most",
            f"{report.activations_gib:.1f} GiB activations, {report.state_gib:.1f} GiB weights to moments",
        ),
        ("tokens/s per GPU", f"{report.tokens_per_s_per_gpu:,.0f}"),
        ("GPU hours per 1T tokens", f"{report.gpu_hours_per_trillion_tokens:,.0f}"),
    ]
    if report.pair is not None:
        pair = report.pair
        rows += [
            ("main pair", f"{pair.layers} layers forward beside {pair.layers} backward"),
            ("  makespan", f"{pair.makespan_ms:.2f} ms (bound {pair.lower_bound_ms:.2f} ms, gap {pair.gap:.2%})"),
            ("  hidden", f"{pair.hidden_share:.1%}"),
            ("  before", f"{pair.program_order_ms:.2f} ms in program order, {pair.serial_ms:.2f} ms one by one"),
        ]
    rows.append(("simulated", f"{report.simulated_ops:,} operators in {report.wall_s:.1f} s"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


# ---------------------------------------------------------------------------------------------------------- what if


@dataclass(frozen=True)
class WhatIfAnswer:
    """What one wish saves for one model: per step of the whole cluster run, and per micro-batch and MoE layer.

    saved_ms_per_step: simulated step now less simulated step with the wish; saved_hbm_gb_per_step: memory traffic one
    GPU no longer has in a step
    """

    name: str
    wish: str
    step_ms: float
    saved_ms_per_step: float
    saved_us_per_layer: float
    saved_hbm_mb_per_layer: float
    saved_hbm_gb_per_step: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def what_if(table: DurationTable, run: ClusterRun, names: Sequence[str] = ()) -> list[WhatIfAnswer]:
    """Ask every wish (or those named) what it saves.

    Measured durations are changed by the ratio of what the cost model says with and without the wish, operator by
    operator, so the answer keeps the measurement's level and takes only the change from the model.
    """
    base_run = replace(run, comm_sms=run.comm_sms or table.measured.comm_sms)
    base = simulate_step(table, base_run)
    answers = []
    for name in names or whatif_names():
        whatif = load_whatif(name)
        machine = _wished(run.machine, whatif.machine, whatif.base)
        changed = _wished_table(table, run.machine, machine)
        wished = simulate_step(changed, replace(base_run, machine=machine))
        saved_us, saved_bytes = _per_layer(table, run.machine, machine)
        layers = table.model.layers / table.deployment.pipeline_parallel * base.mesh.micro_batches
        answers.append(
            WhatIfAnswer(
                whatif.name,
                whatif.wish,
                wished.step_us / 1e3,
                (base.step_us - wished.step_us) / 1e3,
                saved_us,
                saved_bytes / 1e6,
                saved_bytes * layers / 1e9,
            )
        )
    return answers


def _wished(machine: Machine, wished: Machine, base: Machine) -> Machine:
    """The fields in which a what-if differs from its base, put on another machine."""
    changed = {k: v for k, v in asdict(wished).items() if k != "name" and v != getattr(base, k)}
    return replace(machine, name=f"{machine.name} with {wished.name}", **changed)


def _phase_us(table: DurationTable, machine: Machine, kind: str) -> dict[str, float]:
    sms = machine.sms - table.measured.comm_sms
    work = layer_work(table.model, kind, table.measured.tokens, table.measured.expert_parallel)
    return {key: sum(estimate_us(op, machine, sms) for op in ops) for key, ops in work.items()}


def _wished_table(table: DurationTable, now: Machine, wished: Machine) -> DurationTable:
    """Measured durations times the cost model's ratio for the operators behind each row. Which SMs communication holds
    is left to `with_comm_sms`, so both sides are estimated on the SMs it leaves today."""
    if table.measured.target == wished.name:
        return table
    kinds = {op.layer for op in table.ops} & {"moe", "dense"}
    before = {kind: _phase_us(table, now, kind) for kind in kinds}
    after = {kind: _phase_us(table, wished, kind) for kind in kinds}
    ops = []
    for op in table.ops:
        ratio = 1.0
        if op.layer in kinds and op.on == "compute" and before[op.layer].get(op.key):
            ratio = after[op.layer][op.key] / before[op.layer][op.key]
        elif op.kind == "dispatch":
            ratio = wished.comm_slowdown_dispatch / now.comm_slowdown_dispatch
        elif op.kind == "combine":
            ratio = wished.comm_slowdown_combine / now.comm_slowdown_combine
        elif op.kind == "quantize" and (wished.can_cast_in_tma or wished.can_cast_near_memory):
            ratio = 0.0
        ops.append(replace(op, ms=op.ms * ratio, fixed_ms=op.fixed_ms * ratio))
    return replace(table, ops=tuple(ops))


def _main_kind(table: DurationTable) -> str:
    """The kind of layer that figures of one layer are about: `moe` unless the model has none."""
    return "moe" if table.layer("moe", "F") else "dense"


def _per_layer(table: DurationTable, now: Machine, wished: Machine) -> tuple[float, float]:
    """(microseconds of compute, bytes of memory traffic) one MoE layer, or a dense one of a model without, saves for one
    micro-batch."""
    kind = _main_kind(table)
    work = layer_work(table.model, kind, table.measured.tokens, table.measured.expert_parallel)
    ops: list[Operator] = [op for row in work.values() for op in row]
    stretch = compute_stretch(wished, table.measured.comm_sms, table.measured.comm_sms)
    before = sum(_phase_us(table, now, kind).values())
    after = sum(_phase_us(table, wished, kind).values()) * stretch
    return before - after, hbm_bytes(ops, now) - hbm_bytes(ops, wished)


def what_if_text(answers: Sequence[WhatIfAnswer]) -> str:
    rows = [("wish", "step s", "saved ms/step", "saved us/layer", "saved MB/layer", "saved GB/step")]
    for a in answers:
        rows.append(
            (
                a.name,
                f"{a.step_ms / 1e3:.3f}",
                f"{a.saved_ms_per_step:.0f}",
                f"{a.saved_us_per_layer:.0f}",
                f"{a.saved_hbm_mb_per_layer:.0f}",
                f"{a.saved_hbm_gb_per_step:.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join(
        "  ".join(f"{cell:>{w}}" if i else f"{cell:<{w}}" for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )


# ---------------------------------------------------------------------------------------------------------- inputs


def inputs(
    build: Path | None,
    durations: Path | None,
    gpus: int | None,
    topology: str | None,
    *,
    pp: int | None = None,
    ep: int | None = None,
    schedule: str | None = None,
    sequences: int | None = None,
    comm_sms: int | None = None,
    zipf: float = 0.0,
    even: bool = False,
    overlap: bool = True,
    released: bool = False,
    predict: bool = False,
    choose_sms: bool = False,
    loads: Path | None = None,
    memory_gib: float | None = None,
    seed: int = 0,
    **_: object,
) -> tuple[DurationTable, ClusterRun]:
    """The command's options as a table and a run. Options that are None leave the table's deployment as it is.

    A build is simulated on the machine it is for, and on one replica, unless the options say otherwise.
    """
    table = with_deployment(
        find_durations(build, durations),
        pipeline_parallel=pp,
        expert_parallel=ep,
        schedule=schedule,
        sequences_per_step=sequences,
    )
    is_build = durations is None
    its_own = is_build and table.measured.target in machine_names()
    machine = load_machine(topology or (table.measured.target if its_own else "h800"))
    if gpus is None:
        gpus = table.deployment.pipeline_parallel * table.deployment.expert_parallel if is_build else 2048
    if build is not None:
        table = with_transfers(table, machine)
    if predict:
        table = predicted_table(table.model, table.deployment, machine, comm_sms or table.measured.comm_sms)
    if choose_sms:
        layers = (_main_kind(table),) * max(1, min(4, table.model.layers // table.deployment.pipeline_parallel))
        comm_sms = choose_comm_sms(table, machine, layers, layers)[0].comm_sms
    run = ClusterRun(
        gpus,
        machine,
        comm_sms=comm_sms,
        zipf=None if even and loads is None else zipf,
        expert_loads=read_loads(loads) if loads is not None else (),
        seed=seed,
        is_overlapping=overlap,
        is_released=released,
        memory_budget_bytes=None if memory_gib is None else int(memory_gib * 2**30),
    )
    return table, run


def read_loads(path: Path) -> tuple[float, ...]:
    """Load per expert from a JSON list of numbers. Raises: E0924 for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return tuple(float(v) for v in values)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise fail(
            "E0924", f"cannot read expert loads: {reason(error)}", span=Span(str(path)), exit_code=ExitCode.USAGE
        ) from None


def with_deployment(table: DurationTable, **changes: int | str | None) -> DurationTable:
    """The table with some fields of its deployment replaced; None leaves a field as it is."""
    kept = {key: value for key, value in changes.items() if value is not None}
    deployment: Deployment = replace(table.deployment, **kept)  # type: ignore[arg-type]
    return replace(table, deployment=deployment)
