"""Overlap of communication and compute: chunks as scheduling problems, pairs, splitting, and what stays exposed.

A chunk is the forward or the backward of some layers for one micro-batch. A pair is a forward chunk and a backward
chunk of different micro-batches: nothing in one waits for the other, so the search interleaves them freely, with
weight-gradient work as filler. That is all DualPipe's pairing is; it is not written down here but found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from fp8c.cost_model import Machine, compute_stretch
from fp8c.diagnostics import fail
from fp8c.durations import DurationTable, OpDuration, layer_tasks
from fp8c.network import simulate_combine, simulate_dispatch
from fp8c.routing import Traffic, balanced_traffic
from fp8c.schedule import COMM, COMPUTE, Problem, Schedule, Slot, Task, lower_bound_us, make_problem, program_order
from fp8c.schedule_search import DEFAULT_LIMITS, SearchLimits, solve
from fp8c.workload import activation_bytes, combine_bytes, dispatch_bytes, routing_of

FORWARD_PHASES, BACKWARD_PHASES = ("F",), ("B", "W")


def chunk_tasks(
    table: DurationTable, layers: Sequence[str], phases: tuple[str, ...], prefix: str = "", *, has_memory: bool = False
) -> list[Task]:
    """One chunk over layers of the given kinds, named `prefix` + layer number + "/" + phase + "." + operator.

    phases: ("F",), ("B",), ("W",) or ("B", "W"). A chunk of weight work alone waits for nothing. `has_memory` adds what
    each layer's forward leaves behind and each layer's weight work (or backward, without it) gives back.
    """
    tasks: list[Task] = []
    previous = dict.fromkeys("FBW", "")
    numbered = list(enumerate(layers))
    for number, kind in numbered if "F" in phases else reversed(numbered):
        name = f"{prefix}{number}/"
        layer = layer_tasks(table, kind, name, previous, phases)
        if has_memory and kind in ("moe", "dense"):
            layer = _with_memory(layer, activation_bytes(table, kind), "F" in phases)
        tasks += layer
        for phase in ("F", "B"):
            if phase in phases:
                previous[phase] = f"{name}{phase}.{table.output(kind, phase)}"
    return tasks


def _with_memory(layer: list[Task], saved: int, is_forward: bool) -> list[Task]:
    """Activations are there from the first operator of a forward on; the last operator of a backward gives them back."""
    at = 0 if is_forward else len(layer) - 1
    changed = replace(layer[at], delta_bytes=saved if is_forward else -saved)
    return [*layer[:at], changed, *layer[at + 1 :]]


def pair_problem(
    table: DurationTable,
    forward_layers: Sequence[str],
    backward_layers: Sequence[str],
    *,
    memory_budget_bytes: int | None = None,
    split: int = 1,
) -> Problem:
    """A forward chunk beside a backward chunk of another micro-batch, in program order: all of F, then all of B and W.

    With a budget, the backward's activations are held at the start; the budget is for the two chunks' activations.
    """
    has_memory = memory_budget_bytes is not None
    forward = chunk_tasks(table, forward_layers, FORWARD_PHASES, "F", has_memory=has_memory)
    backward = chunk_tasks(table, backward_layers, BACKWARD_PHASES, "B", has_memory=has_memory)
    held = -sum(min(0, t.delta_bytes) for t in backward)
    tasks = split_tasks([*forward, *backward], split)
    return make_problem(tasks, memory_budget_bytes=memory_budget_bytes, base_bytes=held)


# -------------------------------------------------------------------------------------------------------- splitting


def split_tasks(tasks: Iterable[Task], parts: int) -> list[Task]:
    """Cut every splittable task into `parts` chunks of tokens; `fixed_us` is paid by each.

    A chunk waits for the same chunk of a splittable input and for all of any other; a task that cannot be cut waits
    for every chunk. Memory is divided over the chunks.
    """
    listed = list(tasks)
    if parts <= 1:
        return listed
    cut = {t.name for t in listed if t.is_splittable}

    def chunk_names(name: str, chunk: int | None) -> list[str]:
        if name not in cut:
            return [name]
        return [f"{name}#{c}" for c in range(parts)] if chunk is None else [f"{name}#{chunk}"]

    out: list[Task] = []
    for task in listed:
        if task.name not in cut:
            after = tuple(n for name in task.after for n in chunk_names(name, None))
            out.append(replace(task, after=after))
            continue
        each_us = task.fixed_us + max(0.0, task.duration_us - task.fixed_us) / parts
        for chunk in range(parts):
            out.append(
                replace(
                    task,
                    name=f"{task.name}#{chunk}",
                    duration_us=each_us,
                    after=tuple(n for name in task.after for n in chunk_names(name, chunk)),
                    output_bytes=task.output_bytes // parts,
                    delta_bytes=task.delta_bytes // parts,
                )
            )
    return out


@dataclass(frozen=True)
class Choice:
    """One setting that was tried, and what it gave."""

    setting: int
    schedule: Schedule
    problem: Problem


def choose(
    settings: Iterable[int], make: Callable[[int], Problem], limits: SearchLimits = DEFAULT_LIMITS
) -> tuple[Choice, list[Choice]]:
    """Schedule every setting (chunks, or SMs for communication); the shortest wins, the smaller setting on a tie."""
    tried: list[Choice] = []
    for setting in settings:
        problem = make(setting)
        tried.append(Choice(setting, solve(problem, limits), problem))
    if not tried:
        raise fail("E0950", "no setting was given to choose from")
    best = min(tried, key=lambda c: (round(c.schedule.makespan_us, 3), c.setting))
    return best, tried


#: For the many small searches behind a choice of chunks: chunks are alike, so orders of equal length abound.
CHUNK_LIMITS = SearchLimits(exact_nodes=1500, beam_width=16)


def choose_chunks(
    problem_tasks: Sequence[Task],
    settings: Iterable[int] = (1, 2, 3, 4, 6, 8),
    limits: SearchLimits = CHUNK_LIMITS,
) -> Choice:
    """How many chunks of tokens give the shortest schedule of these tasks, the fewest on a tie.

    Settings whose lower bound is no better than a schedule already found are not searched.
    """
    best: Choice | None = None
    for parts in settings:
        problem = make_problem(split_tasks(problem_tasks, parts))
        if best is not None and lower_bound_us(problem) >= best.schedule.makespan_us - 1e-3:
            continue
        found = Choice(parts, solve(problem, limits), problem)
        if best is None or found.schedule.makespan_us < best.schedule.makespan_us - 1e-3:
            best = found
    if best is None:
        raise fail("E0950", "no number of chunks was given to choose from")
    return best


# --------------------------------------------------------------------------------------------------------- exposure


@dataclass(frozen=True)
class Exposure:
    """Communication that ran while nothing was computed. All microseconds; `hidden_share` of the communication."""

    comm_us: float
    exposed_us: float
    compute_us: float
    makespan_us: float

    @property
    def hidden_share(self) -> float:
        return 1.0 - self.exposed_us / self.comm_us if self.comm_us > 0 else 1.0


def exposure(slots: Iterable[Slot]) -> Exposure:
    """Exposed time is what the union of communication leaves uncovered by the union of compute."""
    listed = [s for s in slots if s.task.duration_us > 0.0]
    comm = [(s.start_us, s.end_us) for s in listed if s.task.resource == COMM]
    compute = [(s.start_us, s.end_us) for s in listed if s.task.resource == COMPUTE]
    length = length_us(union(comm))
    both = length_us(union([*comm, *compute]))
    busy = length_us(union(compute))
    return Exposure(length, both - busy, busy, max((s.end_us for s in listed), default=0.0))


def union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    out: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length_us(spans: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


# --------------------------------------------------------------------------------------------------- the pair itself


@dataclass(frozen=True)
class PairReport:
    """A pair, scheduled. `serial_us` runs everything one after another; `program_us` is two streams in program order."""

    problem: Problem
    schedule: Schedule
    before: Schedule
    serial_us: float
    exposure: Exposure
    exposure_before: Exposure
    comm_sms: int
    chunks: int


def schedule_pair(
    table: DurationTable,
    forward_layers: Sequence[str],
    backward_layers: Sequence[str],
    *,
    memory_budget_bytes: int | None = None,
    splits: Sequence[int] = (1,),
    limits: SearchLimits = DEFAULT_LIMITS,
) -> PairReport:
    """The shortest schedule found for a forward and a backward chunk, over the given numbers of chunks."""

    def make(parts: int) -> Problem:
        return pair_problem(
            table, forward_layers, backward_layers, memory_budget_bytes=memory_budget_bytes, split=parts
        )

    best, _ = choose(splits, make, limits)
    plain = replace(make(1), memory_budget_bytes=None)
    before = program_order(plain)
    return PairReport(
        best.problem,
        best.schedule,
        before,
        sum(t.duration_us for t in plain.tasks),
        exposure(best.schedule.slots),
        exposure(before.slots),
        table.measured.comm_sms,
        best.setting,
    )


# --------------------------------------------------------------------------------------------------- SM share, skew


@dataclass(frozen=True)
class CommTimes:
    """Transfer times of one routing over those of even routing at the table's own SM share, per kind of kernel."""

    dispatch: float
    combine: float
    rows: float  # rows of the busiest GPU over the mean

    def of(self, kind: str) -> float:
        return {"dispatch": self.dispatch, "combine": self.combine}.get(kind, 1.0)


@lru_cache(maxsize=64)
def even_transfers_us(table: DurationTable, machine: Machine, comm_sms: int) -> tuple[float, float]:
    """(dispatch, combine) of an even routing from the hop simulator, alone on the network."""
    traffic = balanced_traffic(routing_of(table.model, table.deployment, machine.gpus_per_node))
    return transfers_us(table, machine, comm_sms, traffic)


def transfers_us(table: DurationTable, machine: Machine, comm_sms: int, traffic: Traffic) -> tuple[float, float]:
    net = machine.network(comm_sms)
    dispatch = simulate_dispatch(net, traffic, dispatch_bytes(table.model)).duration_us
    return dispatch, simulate_combine(net, traffic, combine_bytes(table.model)).duration_us


def with_comm_sms(table: DurationTable, machine: Machine, comm_sms: int) -> DurationTable:
    """The table as it would be with another number of SMs for communication: compute stretches by the SMs it loses,
    transfers by what the hop simulator says of fewer SMs. Nothing changes at the number it was measured with.

    Raises: E0951 when the number leaves no SM to one side.
    """
    if not 1 <= comm_sms < machine.sms:
        raise fail("E0951", f"{comm_sms} of {machine.sms} SMs cannot go to communication", help="leave at least one")
    if comm_sms == table.measured.comm_sms and not machine.has_comm_engine:
        return table
    stretch = compute_stretch(machine, comm_sms, table.measured.comm_sms)
    then = even_transfers_us(table, machine, table.measured.comm_sms)
    now = even_transfers_us(table, machine, comm_sms)
    # Without peers there is nothing to transfer, and no time to compare.
    dispatch, combine = (after / before if before else 1.0 for before, after in zip(then, now))
    ratio = CommTimes(dispatch, combine, 1.0)
    return replace(scaled_table(table, ratio, stretch), measured=replace(table.measured, comm_sms=comm_sms))


SM_SHARES = (2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)


def choose_comm_sms(
    table: DurationTable,
    machine: Machine,
    forward_layers: Sequence[str],
    backward_layers: Sequence[str],
    shares: Iterable[int] = SM_SHARES,
) -> tuple[PairReport, list[PairReport]]:
    """Schedule the pair with every number of SMs for communication; the shortest wins, the fewest SMs on a tie.

    Raises: E0950 when no number leaves SMs to both sides.
    """
    tried = [
        schedule_pair(with_comm_sms(table, machine, share), forward_layers, backward_layers)
        for share in shares
        if 1 <= share < machine.sms
    ]
    if not tried:
        raise fail("E0950", "no number of SMs was given to choose from")
    return min(tried, key=lambda r: (round(r.schedule.makespan_us, 3), r.comm_sms)), tried


def scaled_table(table: DurationTable, comm: CommTimes, compute: float = 1.0) -> DurationTable:
    """Durations times the given factors; `comm.rows` stretches the operators that run on experts' rows (`mlp`)."""

    def scale(op: OpDuration) -> OpDuration:
        factor = comm.of(op.kind) if op.on == COMM else compute
        if op.on == COMPUTE and op.name == "mlp" and op.layer == "moe":
            factor *= comm.rows
        return replace(op, ms=op.ms * factor, fixed_ms=op.fixed_ms * factor)

    return replace(table, ops=tuple(scale(op) for op in table.ops))


# ---------------------------------------------------------------------------------------------- layers onto stages


def stage_layers(table: DurationTable, stages: int) -> list[tuple[str, ...]]:
    """Layers of the model, the prediction module and the heads onto stages, in order, so that the stage with the most
    compute has the least possible. `head` layers appear when the table has them.

    Raises: E0920 when there are fewer layers than stages.
    """
    shape = table.model
    has_head = any(op.layer == "head" for op in table.ops)
    layers = ["dense"] * shape.dense_layers + ["moe"] * (shape.layers - shape.dense_layers)
    layers += ["head"] * has_head
    for _ in range(shape.mtp_layers):
        layers += ["moe"] + ["head"] * has_head
    if stages < 1 or len(layers) < stages:
        raise fail(
            "E0920",
            f"{len(layers)} layers cannot be spread over {stages} pipeline stages",
            help="use fewer pipeline stages, or a schedule with one stage per rank",
        )
    cost = {kind: sum(table.total_ms(kind, p, COMPUTE) for p in "FBW") for kind in set(layers)}
    return _partition(layers, [cost[kind] for kind in layers], stages)


def _partition(layers: list[str], costs: list[float], stages: int) -> list[tuple[str, ...]]:
    """Cut a row into `stages` non-empty runs with the least maximum sum; among those, the least sum of squares."""
    count = len(layers)
    sums = [0.0]
    for c in costs:
        sums.append(sums[-1] + c)
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for stage in range(1, stages + 1):
        row: dict[int, tuple[float, float, int]] = {}
        for end in range(stage, count - (stages - stage) + 1):
            options = []
            for start, (most, squares, _) in best[-1].items():
                if start < end:
                    size = sums[end] - sums[start]
                    options.append((round(max(most, size), 9), squares + size * size, start))
            row[end] = min(options)
        best.append(row)
    cuts = [count]
    for stage in range(stages, 0, -1):
        cuts.append(best[stage][cuts[-1]][2])
    cuts.reverse()
    return [tuple(layers[a:b]) for a, b in pairwise(cuts)]


def totals_ms(table: DurationTable, layers: Iterable[str]) -> Mapping[str, float]:
    """Serial time of each phase over these layers, communication included."""
    listed = list(layers)
    return {phase: sum(table.total_ms(kind, phase) for kind in listed) for phase in "FBW"}
