"""Simulate one training step on a whole cluster: pipeline ranks by name, data-parallel ranks as vectors.

Every pipeline rank runs its list of actions; an action is a few dozen operators in the issue order the search found, on
two streams that never reorder. All data-parallel ranks of a pipeline rank run the same order, so an operator's times
are one vector over them: starts differ because loads do, and a transfer starts when the last rank of its
expert-parallel group is there. Events are therefore processed operator by operator, not rank by rank, and 2048 ranks
take seconds. Times are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fp8c.cost_model import Machine, estimate_us
from fp8c.diagnostics import fail
from fp8c.durations import DurationTable, OpDuration
from fp8c.network import simulate_combine, simulate_dispatch
from fp8c.overlap import (
    CommTimes,
    choose_chunks,
    chunk_tasks,
    length_us,
    pair_problem,
    scaled_table,
    split_tasks,
    stage_layers,
    union,
    with_comm_sms,
)
from fp8c.pipeline_schedule import Action, Pair, Pipeline, Step, actions_of, inputs_of, make_pipeline
from fp8c.routing import Array, balanced_traffic, check_routing, sample_traffic
from fp8c.schedule import COMM, COMPUTE, Schedule, Task, lower_bound_us, make_problem
from fp8c.schedule_search import DEFAULT_LIMITS, SearchLimits, solve
from fp8c.workload import activation_bytes, combine_bytes, dispatch_bytes, head_work, parameter_counts, routing_of


@dataclass(frozen=True)
class ClusterRun:
    """What to simulate besides the table of durations.

    zipf:       exponent of expert popularity; 0.0 is even routing with sampling noise, None exactly even
    expert_loads: measured load per expert, in place of zipf; () for none
    patterns:   how many routings are drawn; layers and micro-batches take them in turn
    is_overlapping: False runs every chunk on one stream, forward and backward of a pair one after the other
    is_released: chunks that run alone get the SMs and the network their partner would have used (durations of the
                 table are those beside a partner)
    splits:     numbers of token chunks the search may try for a chunk that has no partner
    pair_split: token chunks in pairs
    """

    gpus: int
    machine: Machine
    comm_sms: int | None = None
    zipf: float | None = 0.0
    expert_loads: tuple[float, ...] = ()
    patterns: int = 4
    seed: int = 0
    is_overlapping: bool = True
    is_released: bool = False
    has_pipeline_transfers: bool = True
    has_optimizer: bool = True
    splits: tuple[int, ...] = (1, 2, 3, 4)
    pair_split: int = 1
    memory_budget_bytes: int | None = None
    sampled_ranks: int = 8
    limits: SearchLimits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Mesh:
    """How GPUs are divided: pipeline ranks, data-parallel ranks of each, expert-parallel groups among those."""

    pipeline: int
    data: int
    expert: int
    micro_batches: int

    @property
    def groups(self) -> int:
        return self.data // self.expert


def make_mesh(table: DurationTable, gpus: int, gpus_per_node: int) -> Mesh:
    """Raises: E0943 a mesh that does not divide the GPUs, E0944 one that does not divide the batch; E0921, E0922."""
    deployment = table.deployment
    pp, ep = deployment.pipeline_parallel, deployment.expert_parallel
    if gpus < 1 or pp < 1 or ep < 1 or gpus % pp or (gpus // pp) % ep:
        raise fail(
            "E0943",
            f"{gpus} GPUs cannot be divided into {pp} pipeline ranks with expert parallel groups of {ep}",
            help=f"use a multiple of {max(1, pp) * max(1, ep)} GPUs, or change the deployment",
        )
    data = gpus // pp
    per_step = deployment.sequences_per_step
    if per_step < 1 or per_step % (data * max(1, deployment.sequences_per_micro_batch)):
        raise fail(
            "E0944",
            f"a step of {per_step} sequence{'' if per_step == 1 else 's'} cannot be dealt to {data} data-parallel ranks in "
            f"micro-batches of {deployment.sequences_per_micro_batch}",
            help="change sequences_per_step (--sequences), or the number of GPUs (--gpus)",
        )
    check_routing(routing_of(table.model, deployment, gpus_per_node))
    return Mesh(pp, data, ep, per_step // (data * deployment.sequences_per_micro_batch))


def with_head(table: DurationTable, machine: Machine) -> DurationTable:
    """The table with rows for the output head from the cost model, where it has none and the model has a vocabulary."""
    if any(op.layer == "head" for op in table.ops) or not table.model.vocabulary:
        return table
    sms = machine.sms - table.measured.comm_sms
    work = head_work(table.model, table.measured.tokens)
    ms = {key: sum(estimate_us(op, machine, sms) for op in ops) / 1000.0 for key, ops in work.items()}
    rows = (
        OpDuration("head", "F", "head", COMPUTE, ms["F.head"], ("previous layer",), True),
        OpDuration("head", "B", "head", COMPUTE, ms["B.head"], ("previous layer",), True),
        OpDuration("head", "W", "head", COMPUTE, ms["W.head"], ("B.head",)),
    )
    return replace(table, ops=(*table.ops, *rows))


# ------------------------------------------------------------------------------------------------------- plans


@dataclass(frozen=True)
class PlannedOp:
    """One operator of an action, in issue order. `work_us` is its duration without what splitting added; `part` tells
    a pair's forward (0) from its backward (1); `entry` and `output` mark where data enters and leaves the action."""

    name: str
    stream: int
    base_us: float
    work_us: float
    kind: str
    layer: int
    part: int
    before: tuple[int, ...]
    entry: bool
    output: bool


@dataclass(frozen=True)
class ActionPlan:
    ops: tuple[PlannedOp, ...]
    schedule: Schedule
    chunks: int
    is_serial: bool = False  # nothing runs beside anything, not even across actions


@dataclass
class Planner:
    """Issue orders for every action a pipeline runs; each distinct one is searched once."""

    table: DurationTable
    stages: Sequence[tuple[str, ...]]
    run: ClusterRun
    plans: dict[tuple[object, ...], ActionPlan] = field(default_factory=dict)

    def plan(self, step: Step) -> ActionPlan:
        key: tuple[object, ...]
        if isinstance(step, Pair):
            key = ("pair", self.stages[step.forward.stage], self.stages[step.backward.stage])
        else:
            key = (step.kind, self.stages[step.stage])
        if key not in self.plans:
            if isinstance(step, Pair):
                plan = self._pair(self.stages[step.forward.stage], self.stages[step.backward.stage])
            else:
                plan = self._alone(step.kind, self.stages[step.stage])
            self.plans[key] = plan
        return self.plans[key]

    def _pair(self, forward: tuple[str, ...], backward: tuple[str, ...]) -> ActionPlan:
        if not self.run.is_overlapping:
            return self._finish(_serial(pair_problem(self.table, forward, backward).tasks), [forward, backward], 1)
        problem = pair_problem(self.table, forward, backward, split=self.run.pair_split)
        return self._finish(solve(problem, self.run.limits), [forward, backward], self.run.pair_split)

    def _alone(self, kind: str, layers: tuple[str, ...]) -> ActionPlan:
        table = _released(self.table, self.run.machine) if self.run.is_released else self.table
        phases = {"F": ("F",), "I": ("B",), "W": ("W",), "B": ("B", "W")}[kind]
        prefix = "F" if kind == "F" else "B"
        tasks = chunk_tasks(table, layers, phases, prefix)
        if not self.run.is_overlapping:
            return self._finish(_serial(tasks), [layers], 1)
        if kind == "W":
            return self._finish(solve(make_problem(tasks), self.run.limits), [layers], 1)
        best = choose_chunks(tasks, self.run.splits)
        return self._finish(best.schedule, [layers], best.setting)

    def _finish(self, schedule: Schedule, chunks: Sequence[tuple[str, ...]], parts: int) -> ActionPlan:
        position = {slot.task.name: i for i, slot in enumerate(schedule.slots)}
        ops = []
        for slot in schedule.slots:
            task = slot.task
            place, what = task.name.split("/", 1)
            phase, operator = what.split("#")[0].split(".", 1)
            part = 1 if len(chunks) == 2 and place.startswith("B") else 0
            layers, layer = chunks[part], int(place[1:])
            boundary = (0, len(layers) - 1) if phase == "F" else (len(layers) - 1, 0)
            is_output = phase in "FB" and layer == boundary[1] and operator == self.table.output(layers[layer], phase)
            before = tuple(position[name] for name in task.after if name in position)
            extra = task.fixed_us * (parts - 1) / parts if parts > 1 and task.is_splittable else 0.0
            is_entry = phase in "FB" and layer == boundary[0] and not before
            kind = task.kind if task.resource == COMM else ("experts" if _is_experts(layers[layer], operator) else "")
            ops.append(
                PlannedOp(
                    task.name,
                    0 if task.resource == COMPUTE else 1,
                    task.duration_us,
                    task.duration_us - extra,
                    kind,
                    layer,
                    part,
                    before,
                    is_entry,
                    is_output,
                )
            )
        return ActionPlan(tuple(ops), schedule, parts, not self.run.is_overlapping)


def _is_experts(layer: str, operator: str) -> bool:
    return layer == "moe" and operator == "mlp"


def _serial(tasks: Iterable[Task]) -> Schedule:
    """One thing after another, in program order: each task also waits for the one before."""
    chained: list[Task] = []
    for task in tasks:
        after = task.after + ((chained[-1].name,) if chained else ())
        chained.append(replace(task, after=after))
    return solve(make_problem(chained))


def _released(table: DurationTable, machine: Machine) -> DurationTable:
    """Durations of a chunk that runs alone: its GEMMs have all SMs, its transfers no GEMMs beside them."""
    comm = CommTimes(1.0 / machine.comm_slowdown_dispatch, 1.0 / machine.comm_slowdown_combine, 1.0)
    return scaled_table(table, comm, (machine.sms - table.measured.comm_sms) / machine.sms)


# ------------------------------------------------------------------------------------------------------- loads


@dataclass(frozen=True)
class Loads:
    """Factors on the even durations, per routing drawn and data-parallel rank: f64 [patterns, data ranks]."""

    dispatch: Array
    combine: Array
    experts: Array

    def factor(self, kind: str, pattern: int) -> Array | None:
        rows = {"dispatch": self.dispatch, "combine": self.combine, "experts": self.experts}.get(kind)
        if rows is None:
            return None
        factors: Array = rows[pattern]
        return factors


def draw_loads(table: DurationTable, mesh: Mesh, run: ClusterRun) -> Loads | None:
    """Draw routings and run each through the hop simulator; None for exactly even loads."""
    if run.zipf is None or mesh.expert == 1:
        return None
    spec = routing_of(table.model, table.deployment, run.machine.gpus_per_node, run.zipf)
    spec = replace(spec, popularity=run.expert_loads)
    check_routing(spec)
    net = run.machine.network(run.comm_sms or table.measured.comm_sms)
    sizes = dispatch_bytes(table.model), combine_bytes(table.model)
    even = balanced_traffic(replace(spec, zipf=0.0, popularity=()))
    even_us = simulate_dispatch(net, even, sizes[0]).duration_us, simulate_combine(net, even, sizes[1]).duration_us
    rows = []
    for k in range(run.patterns):
        traffic = sample_traffic(spec, run.seed * 1000 + k)
        dispatch = simulate_dispatch(net, traffic, sizes[0]).finish_us / even_us[0]
        combine = simulate_combine(net, traffic, sizes[1]).finish_us / even_us[1]
        shape = table.model
        relative = traffic.rows / traffic.rows.mean()
        experts = (shape.top_k * relative + shape.shared_experts) / (shape.top_k + shape.shared_experts)
        rows.append((dispatch, combine, experts))
    # Group g of a pattern takes the routing g places on, so that groups differ as they would.
    tiled = [
        np.stack([np.concatenate([rows[(k + g) % len(rows)][i] for g in range(mesh.groups)]) for k in range(len(rows))])
        for i in range(3)
    ]
    return Loads(*tiled)


# -------------------------------------------------------------------------------------------------------- the step


@dataclass(frozen=True)
class Span:
    """One operator as it ran on a sampled rank."""

    name: str
    stream: int
    start_us: float
    end_us: float


@dataclass(frozen=True)
class RankTimes:
    """One pipeline rank, averaged over its sampled data-parallel ranks. Communication is counted as a profile shows it,
    from when a kernel is launched: waiting for slower ranks is part of it."""

    compute_us: float
    comm_us: float
    exposed_us: float
    idle_us: float
    peak_activation_bytes: int


@dataclass(frozen=True)
class StepResult:
    """`step_us` covers pipeline and optimizer; `spans[r]` are the operators of pipeline rank r, first data rank."""

    step_us: float
    optimizer_us: float
    lower_bound_us: float
    ranks: tuple[RankTimes, ...]
    mesh: Mesh
    pipeline: Pipeline
    stages: tuple[tuple[str, ...], ...]
    plans: tuple[tuple[str, ActionPlan], ...]
    spans: tuple[tuple[Span, ...], ...]
    simulated_ops: int

    def mean(self, name: str) -> float:
        return sum(float(getattr(rank, name)) for rank in self.ranks) / len(self.ranks)


@dataclass
class _Rank:
    free: list[Array]
    at: int = 0
    compute_us: Array = field(default_factory=lambda: np.zeros(0))
    starts: list[Array] = field(default_factory=list)
    ends: list[Array] = field(default_factory=list)
    names: list[tuple[str, str, int]] = field(default_factory=list)


def simulate_step(table: DurationTable, run: ClusterRun) -> StepResult:
    """One optimizer step. Raises: E0920, E0921, E0922, E0940 to E0944 for a mesh that does not fit, E0945 when
    activations exceed the memory budget, E0951 for a wrong SM share."""
    machine = run.machine
    comm_sms = run.comm_sms or table.measured.comm_sms
    table = with_comm_sms(with_head(table, machine), machine, comm_sms)
    mesh = make_mesh(table, run.gpus, machine.gpus_per_node)
    pipeline = make_pipeline(table.deployment.schedule, mesh.pipeline, mesh.micro_batches)
    stages = stage_layers(table, pipeline.stage_count)
    peaks = [_peak_activations(table, stages, steps) for steps in pipeline.ranks]
    if run.memory_budget_bytes is not None and max(peaks) > run.memory_budget_bytes:
        raise fail(
            "E0945",
            f"activations need up to {max(peaks):,} bytes on a rank, the budget is {run.memory_budget_bytes:,}",
            help="use more pipeline ranks, a schedule with fewer micro-batches in flight, or recompute more",
        )
    run = replace(run, comm_sms=comm_sms)
    return _simulate(table, run, mesh, pipeline, stages, draw_loads(table, mesh, run), peaks)


def simulate_stream(
    table: DurationTable,
    run: ClusterRun,
    layers: tuple[str, ...],
    micro_batches: int,
    loads: Loads | None,
    *,
    is_paired: bool,
) -> StepResult:
    """One expert-parallel group and one stage in steady state: forwards one after another, or pairs of the forward of
    a micro-batch and the backward of the one before. For questions about chunks and skew, away from pipelines."""
    steps: list[Step] = [Action("F", 0, 0)]
    for mb in range(1, micro_batches):
        forward = Action("F", 0, mb)
        steps.append(Pair(forward, Action("B", 0, mb - 1)) if is_paired else forward)
    pipeline = Pipeline("stream", 1, micro_batches, (tuple(steps),))
    mesh = Mesh(1, table.deployment.expert_parallel, table.deployment.expert_parallel, micro_batches)
    bare = replace(run, has_optimizer=False, has_pipeline_transfers=False)
    return _simulate(table, bare, mesh, pipeline, [layers], loads, [0])


def _simulate(
    table: DurationTable,
    run: ClusterRun,
    mesh: Mesh,
    pipeline: Pipeline,
    stages: Sequence[tuple[str, ...]],
    loads: Loads | None,
    peaks: Sequence[int],
) -> StepResult:
    machine = run.machine
    planner = Planner(table, stages, run)
    sampled = np.unique(np.linspace(0, mesh.data - 1, min(run.sampled_ranks, mesh.data)).astype(int))
    ranks = [
        _Rank([np.zeros(mesh.data), np.zeros(mesh.data)], compute_us=np.zeros(mesh.data)) for _ in range(mesh.pipeline)
    ]
    _replay(pipeline, planner, ranks, mesh, loads, _hop_us(table, run), sampled)
    end_us = max(float(stream.max()) for rank in ranks for stream in rank.free)
    optimizer = optimizer_us(table, mesh, pipeline, machine) if run.has_optimizer else 0.0
    fastest = _released(table, machine) if run.is_released else table
    bound = _step_bound_us(pipeline, stages, fastest, run, ranks, loads) + optimizer
    times = tuple(_times(rank, end_us, peak) for rank, peak in zip(ranks, peaks))
    plans = tuple((" ".join(map(str, key)), plan) for key, plan in planner.plans.items())
    spans = tuple(
        tuple(
            Span(f"{name} {action}", stream, float(start[0]), float(end[0]))
            for (name, action, stream), start, end in zip(rank.names, rank.starts, rank.ends)
        )
        for rank in ranks
    )
    count = sum(len(rank.names) for rank in ranks)
    return StepResult(
        end_us + optimizer, optimizer, bound, times, mesh, pipeline, tuple(stages), plans, spans, count * mesh.data
    )


def _hop_us(table: DurationTable, run: ClusterRun) -> float:
    """One activation from a pipeline rank to its neighbour, BF16, over the NIC."""
    if not run.has_pipeline_transfers:
        return 0.0
    size = table.measured.tokens * table.model.hidden * 2.0
    return size / (run.machine.nic_gb_per_s * run.machine.nic_usable * 1e3) + run.machine.hop_us


def _replay(
    pipeline: Pipeline,
    planner: Planner,
    ranks: list[_Rank],
    mesh: Mesh,
    loads: Loads | None,
    hop_us: float,
    sampled: Array,
) -> None:
    """Run every rank's list; a rank waits at an action until its inputs are there."""
    ready: dict[Action, Array] = {}
    remaining = sum(len(steps) for steps in pipeline.ranks)
    while remaining:
        moved = False
        for index, steps in enumerate(pipeline.ranks):
            rank = ranks[index]
            while rank.at < len(steps):
                step = steps[rank.at]
                arrivals = _arrivals(step, pipeline, index, ready, hop_us, mesh)
                if arrivals is None:
                    break
                _run_action(step, planner.plan(step), arrivals, rank, mesh, loads, ready, sampled)
                rank.at += 1
                remaining -= 1
                moved = True
        if not moved:
            stuck = {r: str(steps[ranks[r].at]) for r, steps in enumerate(pipeline.ranks) if ranks[r].at < len(steps)}
            raise fail("E0755", f"the pipeline order cannot run: ranks wait for each other at {stuck}")


def _arrivals(
    step: Step, pipeline: Pipeline, rank: int, ready: dict[Action, Array], hop_us: float, mesh: Mesh
) -> list[Array] | None:
    """Per part of the step, when its inputs are there; None when one does not exist yet."""
    out = []
    for action in actions_of(step):
        time = np.zeros(mesh.data)
        for source in inputs_of(action, pipeline.stage_count):
            if source not in ready:
                return None
            is_remote = source.stage != action.stage and pipeline.rank_of(source.stage, source.way) != rank
            time = np.maximum(time, ready[source] + (hop_us if is_remote else 0.0))
        out.append(time)
    return out


def _run_action(
    step: Step,
    plan: ActionPlan,
    arrivals: list[Array],
    rank: _Rank,
    mesh: Mesh,
    loads: Loads | None,
    ready: dict[Action, Array],
    sampled: Array,
) -> None:
    actions = actions_of(step)
    labels = [str(a) for a in actions]
    ends: list[Array] = []
    outputs: list[Array] = [np.zeros(mesh.data) for _ in actions]
    for op in plan.ops:
        action = actions[op.part]
        start = np.maximum(*rank.free) if plan.is_serial else rank.free[op.stream]
        for i in op.before:
            start = np.maximum(start, ends[i])
        if op.entry:
            start = np.maximum(start, arrivals[op.part])
        length: Array | float = op.base_us
        if loads is not None and op.kind:
            factor = loads.factor(op.kind, (action.stage * 7 + op.layer * 3 + action.micro_batch) % len(loads.experts))
            if factor is not None:
                length = op.base_us * factor
        launched = start
        if op.kind in ("dispatch", "combine") and mesh.expert > 1:
            # A transfer needs every rank of its group: it moves data from when the last one is there. Its kernel is
            # resident, and waits, from when this rank is.
            start = np.repeat(start.reshape(mesh.groups, mesh.expert).max(axis=1), mesh.expert)
        end = start + length
        rank.free[op.stream] = end
        ends.append(end)
        if op.output:
            outputs[op.part] = np.maximum(outputs[op.part], end)
        if op.stream == 0:
            rank.compute_us = rank.compute_us + length * (op.work_us / op.base_us if op.base_us else 1.0)
        rank.starts.append(launched[sampled])
        rank.ends.append(end[sampled])
        rank.names.append((op.name, labels[op.part], op.stream))
    for action, output in zip(actions, outputs):
        if action.kind == "W":
            continue
        ready[action] = output
        if action.kind == "B":
            ready[Action("I", action.stage, action.micro_batch, action.way)] = output


def _times(rank: _Rank, end_us: float, peak_bytes: int) -> RankTimes:
    starts, ends = np.array(rank.starts), np.array(rank.ends)  # [operators, sampled ranks]
    stream = np.array([s for _, _, s in rank.names])
    totals = np.zeros(4)
    for column in range(starts.shape[1]):
        compute = _spans(starts, ends, stream == 0, column)
        comm = _spans(starts, ends, stream == 1, column)
        busy = length_us(union(compute))
        sent = length_us(union(comm))
        either = length_us(union([*compute, *comm]))
        totals += (busy, sent, either - busy, end_us - either)
    mean = totals / starts.shape[1]
    return RankTimes(float(mean[0]), float(mean[1]), float(mean[2]), float(mean[3]), peak_bytes)


def _spans(starts: Array, ends: Array, mask: Array, column: int) -> list[tuple[float, float]]:
    first, last = starts[mask, column], ends[mask, column]
    kept = last > first
    return list(zip(first[kept].tolist(), last[kept].tolist()))


def _peak_activations(table: DurationTable, stages: Sequence[tuple[str, ...]], steps: Sequence[Step]) -> int:
    """Most bytes of activations a rank holds: a forward leaves its stage's, the weight part (or a whole backward)
    gives them back. In a pair the forward's are taken before the backward's are given back."""
    size = [sum(activation_bytes(table, kind) for kind in layers) for layers in stages]
    held = peak = 0
    for step in steps:
        for action in sorted(actions_of(step), key=lambda a: a.kind != "F"):
            if action.kind == "F":
                held += size[action.stage]
            elif action.kind in "BW":
                held -= size[action.stage]
            peak = max(peak, held)
    return peak


def _step_bound_us(
    pipeline: Pipeline,
    stages: Sequence[tuple[str, ...]],
    table: DurationTable,
    run: ClusterRun,
    ranks: Sequence[_Rank],
    loads: Loads | None,
) -> float:
    """No order of this pipeline's actions ends earlier: a rank cannot start before a micro-batch has passed the stages
    before its own, and then has all its compute to do; and one micro-batch has to pass every stage and come back."""
    if loads is not None:
        # A transfer ends for a rank no earlier than the fastest rank of the lightest routing.
        least = CommTimes(*(float(factors.min()) for factors in (loads.dispatch, loads.combine, loads.experts)))
        table = scaled_table(table, least)
    parts = {1, run.pair_split, *run.splits}
    passing = {
        (layers, phase): min(_passing_us(table, layers, phase, count) for count in parts)
        for layers in set(stages)
        for phase in "FB"
    }
    forward = [passing[(layers, "F")] for layers in stages]
    bound = sum(forward) + sum(passing[(layers, "B")] for layers in stages)
    for index, rank in enumerate(ranks):
        held = {a.stage for step in pipeline.ranks[index] for a in actions_of(step)}
        bound = max(bound, sum(forward[: min(held)]) + float(rank.compute_us.max()))
    return bound


def _passing_us(table: DurationTable, layers: tuple[str, ...], phase: str, parts: int) -> float:
    """No order takes a micro-batch, cut into `parts`, through these layers in less time: a bound on all that waits for
    its arrival and that its result waits for."""
    tasks = make_problem(split_tasks(chunk_tasks(table, layers, (phase,)), parts)).tasks
    first, last = (0, len(layers) - 1) if phase == "F" else (len(layers) - 1, 0)
    result = f"{last}/{phase}.{table.output(layers[last], phase)}"
    behind: set[str] = set()
    for task in tasks:
        enters = not task.after and task.name.startswith(f"{first}/")
        if enters or not behind.isdisjoint(task.after):
            behind.add(task.name)
    needed: set[str] = set()
    for task in reversed(tasks):
        if task.name.split("#")[0] == result or task.name in needed:
            needed |= {task.name, *task.after}
    kept = [t for t in tasks if t.name in behind & needed]
    inside = {t.name for t in kept}
    return lower_bound_us(make_problem(replace(t, after=tuple(n for n in t.after if n in inside)) for t in kept))


def optimizer_us(table: DurationTable, mesh: Mesh, pipeline: Pipeline, machine: Machine) -> float:
    """Gradients reduced to their shards, AdamW on the shard, weights gathered again (ZeRO-1); nothing overlapped.

    Experts are replicated over the data-parallel ranks of other groups, everything else over all; in DualPipe each
    stage is on two pipeline ranks. FP32 gradients out, BF16 weights back; the update moves 26 bytes per parameter (FP32
    master weight and gradient, BF16 moments, BF16 weight).
    """
    experts, rest = parameter_counts(table.model)
    copies = pipeline.ways
    layers = table.model.layers / mesh.pipeline * copies
    nic = machine.nic_gb_per_s * machine.nic_usable * 1e3
    total = 0.0
    for parameters, replicas in ((experts / mesh.expert, mesh.groups * copies), (rest, mesh.data * copies)):
        held = parameters * layers
        share = (replicas - 1) / replicas
        total += held * share * (4.0 + 2.0) / nic
        total += held / replicas * 26.0 / (machine.hbm_tb_per_s * 1e6 * machine.hbm_usable)
    return total


def state_bytes(table: DurationTable, mesh: Mesh, pipeline: Pipeline) -> float:
    """Bytes one GPU keeps all step for its layers, embeddings left out: per parameter a BF16 weight, its FP8 copy and an
    FP32 gradient; per parameter of its shard (ZeRO-1) an FP32 master weight and two BF16 moments."""
    experts, rest = parameter_counts(table.model)
    layers = table.model.layers / mesh.pipeline * pipeline.ways
    total = 0.0
    for parameters, replicas in (
        (experts / mesh.expert, mesh.groups * pipeline.ways),
        (rest, mesh.data * pipeline.ways),
    ):
        total += parameters * layers * (2.0 + 1.0 + 4.0 + 8.0 / replicas)
    return total


def gpu_hours_per_trillion_tokens(step_us: float, gpus: int, tokens: int) -> float:
    return gpus * step_us / 1e6 / 3600.0 / tokens * 1e12


def tokens_per_step(table: DurationTable) -> int:
    return table.deployment.sequences_per_step * table.model.sequence
