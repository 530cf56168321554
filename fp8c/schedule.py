"""A scheduling problem and a schedule as plain data, with the checks and the lower bound both searches share. No torch.

A task runs on one stream (`resource`), starts when every task it names in `after` has ended, and is never interrupted;
a stream runs one task at a time in the order of the schedule. That is how a GPU runs a compute stream and a
communication stream, so a schedule is no more than an issue order per stream plus the times that follow from it.
Times are microseconds, memory is bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from fp8c.diagnostics import Diagnostic, DiagnosticError, fail

COMPUTE = "compute"
COMM = "comm"
EPSILON_US = 1e-6  # times are sums of doubles of at most 1e9 us: rounding stays far below this


@dataclass(frozen=True)
class Task:
    """One kernel, or a run of kernels that nobody wants to separate.

    after:        names of the tasks whose results it reads
    output_bytes: memory its result holds from its start until every task that names it in `after` has ended; a result
                  nobody names is kept to the end
    delta_bytes:  memory it takes at its start (positive) or gives back at its end (negative) for good, such as an
                  activation a forward chunk leaves for its backward
    kind:         free text for people and traces: `gemm`, `dispatch`, `wgrad`, ...
    is_splittable: whether it may be cut along tokens into chunks; `fixed_us` is the part of the duration every chunk
                  pays again (launch, pipeline fill)
    """

    name: str
    resource: str
    duration_us: float
    after: tuple[str, ...] = ()
    output_bytes: int = 0
    delta_bytes: int = 0
    kind: str = ""
    is_splittable: bool = False
    fixed_us: float = 0.0


@dataclass(frozen=True)
class Problem:
    """Tasks in program order, which must be one of the orders their dependences allow (`make_problem` sees to it)."""

    tasks: tuple[Task, ...]
    memory_budget_bytes: int | None = None
    base_bytes: int = 0

    @cached_property
    def index(self) -> dict[str, int]:
        return {task.name: i for i, task in enumerate(self.tasks)}

    @cached_property
    def resources(self) -> tuple[str, ...]:
        return tuple(sorted({task.resource for task in self.tasks}))

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted({self.index[name] for name in task.after})) for task in self.tasks)

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        out: list[list[int]] = [[] for _ in self.tasks]
        for i, before in enumerate(self.predecessors):
            for j in before:
                out[j].append(i)
        return tuple(tuple(s) for s in out)

    @cached_property
    def tails_us(self) -> tuple[float, ...]:
        """For each task the longest chain of durations after its end, over any streams."""
        tails = [0.0] * len(self.tasks)
        for i in reversed(range(len(self.tasks))):
            tails[i] = max((self.tasks[s].duration_us + tails[s] for s in self.successors[i]), default=0.0)
        return tuple(tails)

    def digest(self) -> str:
        """SHA-256 of everything that decides the schedule: ranks that agree on it get the same schedule."""
        body = [self.memory_budget_bytes, self.base_bytes]
        rows = [[t.name, t.resource, t.duration_us, t.after, t.output_bytes, t.delta_bytes] for t in self.tasks]
        return hashlib.sha256(json.dumps([body, rows]).encode()).hexdigest()


@dataclass(frozen=True)
class Slot:
    task: Task
    start_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.task.duration_us


@dataclass(frozen=True)
class Schedule:
    """Slots in issue order. `lower_bound_us` is proven: no schedule of this problem is shorter.

    method: which search found it: `exact` (search space exhausted or bound met), `beam`, `list`, `program`
    """

    slots: tuple[Slot, ...]
    lower_bound_us: float
    method: str
    peak_bytes: int
    explored: int = 0
    makespan_us: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "makespan_us", max((s.end_us for s in self.slots), default=0.0))

    @property
    def gap(self) -> float:
        """How far above the proven lower bound, as a share of it; 0.0 means proven optimal."""
        if self.lower_bound_us <= 0.0:
            return 0.0
        return max(0.0, self.makespan_us / self.lower_bound_us - 1.0)

    @property
    def is_optimal(self) -> bool:
        return self.makespan_us <= self.lower_bound_us + EPSILON_US

    def order(self, resource: str | None = None) -> tuple[str, ...]:
        """Task names in issue order, of one stream or of all."""
        return tuple(s.task.name for s in self.slots if resource in (None, s.task.resource))

    def digest(self) -> str:
        """SHA-256 of the issue order per stream: what every rank of a collective has to agree on."""
        streams = sorted({s.task.resource for s in self.slots})
        return hashlib.sha256(json.dumps([[r, self.order(r)] for r in streams]).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- building a problem


def make_problem(tasks: Iterable[Task], *, memory_budget_bytes: int | None = None, base_bytes: int = 0) -> Problem:
    """Check a table of tasks and put it into an order its dependences allow (the given one where it does).

    Raises: E0901 unknown task in `after`, E0902 cycle, E0903 duplicate name, E0904 a duration that is no time.
    """
    listed = tuple(tasks)
    names: set[str] = set()
    for task in listed:
        if task.name in names:
            raise fail("E0903", f"task {task.name!r} is listed twice", help="give each task its own name")
        names.add(task.name)
        if not 0.0 <= task.duration_us < float("inf"):
            raise fail("E0904", f"task {task.name!r} has duration {task.duration_us} us, expected a time of 0 or more")
    for task in listed:
        for name in task.after:
            if name not in names:
                raise fail(
                    "E0901",
                    f"task {task.name!r} waits for {name!r}, which the table does not have",
                    help=f"add a row for {name!r}, or take it out of `after`",
                )
    return Problem(_topological(listed), memory_budget_bytes, base_bytes)


def _topological(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    position = {task.name: i for i, task in enumerate(tasks)}
    waiting = [len(set(task.after)) for task in tasks]
    readers: dict[str, list[int]] = {task.name: [] for task in tasks}
    for i, task in enumerate(tasks):
        for name in set(task.after):
            readers[name].append(i)
    ready = [i for i, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    order: list[Task] = []
    while ready:
        task = tasks[heapq.heappop(ready)]
        order.append(task)
        for i in readers[task.name]:
            waiting[i] -= 1
            if waiting[i] == 0:
                heapq.heappush(ready, i)
    if len(order) < len(tasks):
        left = {task.name: task for task in tasks if waiting[position[task.name]] > 0}
        cycle = find_cycle(left)
        raise fail(
            "E0902",
            f"the tasks wait for each other in a circle: {' -> '.join([*cycle, cycle[0]])}",
            help="an entry of `after` in this circle is wrong: a task can only wait for work that does not need it",
        )
    return tuple(order)


def find_cycle(tasks: Mapping[str, Task]) -> list[str]:
    """One circle of waiting, in the order work would have to flow; every task given has to be on or behind one."""
    name = min(tasks)
    seen: dict[str, int] = {}
    path: list[str] = []
    while name not in seen:
        seen[name] = len(path)
        path.append(name)
        name = min(n for n in tasks[name].after if n in tasks)
    return path[seen[name] :][::-1]


# ------------------------------------------------------------------------------------------------------ evaluation


def schedule_in_order(problem: Problem, order: Sequence[int], method: str, lower_bound_us: float = 0.0) -> Schedule:
    """Times that follow from one issue order (indices of tasks): each task starts as soon as its stream and its inputs
    allow, in time order when a memory budget holds it back. Raises E0905 when this order cannot meet the budget."""
    state = Timeline(problem)
    for i in order:
        if not state.start(i):
            raise fail("E0905", _over_budget(problem, None), help="raise the budget, or recompute more")
    return state.schedule(method, lower_bound_us)


def program_order(problem: Problem) -> Schedule:
    """The schedule a plain run has: every stream issues its tasks in program order."""
    return schedule_in_order(problem, range(len(problem.tasks)), "program", lower_bound_us(problem))


def _over_budget(problem: Problem, best_bytes: int | None) -> str:
    budget = problem.memory_budget_bytes
    found = "" if best_bytes is None else f"; the least that a schedule was found to need is {best_bytes:,}"
    return f"no schedule keeps memory within {budget:,} bytes{found}"


class Timeline:
    """A partial schedule that grows task by task; holds that streams and memory are never oversubscribed.

    With a memory budget, tasks are issued in time order over all streams: what is held when the next one starts is then
    known. Some shortest schedule is always reached that way (sort its tasks by start; none starts later here).
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.start_us = [-1.0] * len(problem.tasks)
        self.end_us = [-1.0] * len(problem.tasks)
        self.free_us = dict.fromkeys(problem.resources, 0.0)
        self.last_start_us = 0.0
        self.issued: list[int] = []
        self.missing = [len(p) for p in problem.predecessors]
        self.held_bytes = problem.base_bytes  # at `last_start_us`, kept only with a budget
        self.frees: list[tuple[float, int]] = []  # heap of (time, bytes given back)
        self.readers_left = [len(s) for s in problem.successors] if problem.memory_budget_bytes is not None else []

    def copy(self) -> Timeline:
        other = Timeline.__new__(Timeline)
        other.problem = self.problem
        other.start_us, other.end_us = self.start_us.copy(), self.end_us.copy()
        other.free_us, other.last_start_us = self.free_us.copy(), self.last_start_us
        other.issued, other.missing = self.issued.copy(), self.missing.copy()
        other.held_bytes, other.frees = self.held_bytes, self.frees.copy()
        other.readers_left = self.readers_left.copy()
        return other

    def is_ready(self, i: int) -> bool:
        return self.missing[i] == 0 and self.start_us[i] < 0.0

    def arrival_us(self, i: int) -> float:
        """When the inputs of task `i`, all issued, have ended."""
        return max((self.end_us[p] for p in self.problem.predecessors[i]), default=0.0)

    def earliest_us(self, i: int) -> float | None:
        """When task `i`, whose inputs are all issued, can start; None when memory never suffices without others."""
        time = max(self.free_us[self.problem.tasks[i].resource], self.arrival_us(i))
        budget = self.problem.memory_budget_bytes
        return time if budget is None else self._first_fit_us(i, max(time, self.last_start_us), budget)

    def _first_fit_us(self, i: int, time: float, budget: int) -> float | None:
        task = self.problem.tasks[i]
        over = self.held_bytes + task.output_bytes + max(0, task.delta_bytes) - budget
        if over <= 0:
            return time
        for free_us, size in sorted(self.frees):
            over -= size
            if over <= 0:
                return max(time, free_us)
        return None

    def start(self, i: int) -> bool:
        """Issue task `i` at its earliest time; False when memory forbids it."""
        time = self.earliest_us(i)
        if time is None:
            return False
        task = self.problem.tasks[i]
        self.start_us[i] = time
        self.end_us[i] = time + task.duration_us
        self.free_us[task.resource] = self.end_us[i]
        self.last_start_us = max(self.last_start_us, time)
        self.issued.append(i)
        for s in self.problem.successors[i]:
            self.missing[s] -= 1
        if self.problem.memory_budget_bytes is not None:
            self._take_memory(i, time)
        return True

    def _take_memory(self, i: int, time: float) -> None:
        tasks = self.problem.tasks
        while self.frees and self.frees[0][0] <= time:
            self.held_bytes -= heapq.heappop(self.frees)[1]
        self.held_bytes += tasks[i].output_bytes + max(0, tasks[i].delta_bytes)
        if tasks[i].delta_bytes < 0:
            heapq.heappush(self.frees, (self.end_us[i], -tasks[i].delta_bytes))
        for p in self.problem.predecessors[i]:
            self.readers_left[p] -= 1
            if self.readers_left[p] == 0 and tasks[p].output_bytes:
                last_us = max(self.end_us[s] for s in self.problem.successors[p])
                heapq.heappush(self.frees, (last_us, tasks[p].output_bytes))

    def makespan_us(self) -> float:
        return max(self.end_us, default=0.0)

    def schedule(self, method: str, bound_us: float, explored: int = 0) -> Schedule:
        # Program order is topological, so it also puts zero-length tasks that start together in a legal order.
        order = sorted(self.issued, key=lambda i: (self.start_us[i], self.end_us[i], i))
        slots = tuple(Slot(self.problem.tasks[i], self.start_us[i]) for i in order)
        return Schedule(slots, bound_us, method, peak_bytes(self.problem, slots), explored)


def peak_bytes(problem: Problem, slots: Sequence[Slot]) -> int:
    """The most memory held at any time; what is freed at a time is free for what starts at it."""
    end = {s.task.name: s.end_us for s in slots}
    events: list[tuple[float, int, int]] = []
    for slot in slots:
        task = slot.task
        events.append((slot.start_us, 1, task.output_bytes + max(0, task.delta_bytes)))
        events.append((slot.end_us, 0, min(0, task.delta_bytes)))
        readers = [problem.tasks[s].name for s in problem.successors[problem.index[task.name]]]
        if readers:
            events.append((max(end[name] for name in readers), 0, -task.output_bytes))
    held = peak = problem.base_bytes
    for _, _, size in sorted(events):
        held += size
        peak = max(peak, held)
    return peak


# ------------------------------------------------------------------------------------------------------ lower bound


def one_machine_bound_us(jobs: Iterable[tuple[float, float, float]]) -> float:
    """Jackson's preemptive schedule of (head, duration, tail) on one stream: no order of these jobs ends earlier.

    Source: J. R. Jackson, 1955; as a bound for job shops, J. Carlier and E. Pinson, Management Science 35 (1989).
    """
    waiting = sorted(jobs)
    time, bound, k = 0.0, 0.0, 0
    ready: list[tuple[float, float]] = []  # (-tail, time still needed)
    while k < len(waiting) or ready:
        if not ready:
            time = max(time, waiting[k][0])
        while k < len(waiting) and waiting[k][0] <= time:
            heapq.heappush(ready, (-waiting[k][2], waiting[k][1]))
            k += 1
        minus_tail, left = heapq.heappop(ready)
        until = waiting[k][0] if k < len(waiting) else float("inf")
        if time + left <= until:
            time += left
            bound = max(bound, time - minus_tail)
        else:
            heapq.heappush(ready, (minus_tail, left - (until - time)))
            time = until
    return bound


def heads_us(problem: Problem, timeline: Timeline | None = None) -> list[float]:
    """Earliest start of every task by its chain of inputs, and by its stream's free time where `timeline` is given."""
    heads = [0.0] * len(problem.tasks)
    ends = [0.0] * len(problem.tasks)
    for i, task in enumerate(problem.tasks):
        if timeline is not None and timeline.start_us[i] >= 0.0:
            heads[i], ends[i] = timeline.start_us[i], timeline.end_us[i]
            continue
        head = timeline.free_us[task.resource] if timeline is not None else 0.0
        for p in problem.predecessors[i]:
            head = max(head, ends[p])
        heads[i], ends[i] = head, head + task.duration_us
    return heads


def lower_bound_us(problem: Problem, timeline: Timeline | None = None) -> float:
    """A time no completion of `timeline` (or no schedule at all) can beat: every chain, and every stream with the
    earliest arrival and the remaining chain of each of its tasks."""
    heads = heads_us(problem, timeline)
    bound = 0.0
    jobs: dict[str, list[tuple[float, float, float]]] = {resource: [] for resource in problem.resources}
    for i, task in enumerate(problem.tasks):
        bound = max(bound, heads[i] + task.duration_us + problem.tails_us[i])
        if timeline is None or timeline.start_us[i] < 0.0:
            jobs[task.resource].append((heads[i], task.duration_us, problem.tails_us[i]))
    return max(bound, *(one_machine_bound_us(j) for j in jobs.values())) if jobs else bound


# ----------------------------------------------------------------------------------------------------------- checks


def check_schedule(problem: Problem, schedule: Schedule) -> list[Diagnostic]:
    """What is wrong with a schedule, nothing assumed of how it was made: all tasks once, inputs before readers, one
    task at a time per stream, memory within the budget, and no makespan below the bound it claims."""
    found: list[Diagnostic] = []
    slots = {s.task.name: s for s in schedule.slots}
    if sorted(s.task.name for s in schedule.slots) != sorted(problem.index):
        missing = sorted(set(problem.index) - set(slots))
        found.append(Diagnostic("E0750", f"the schedule does not hold every task once: missing {missing}"))
        return found
    for task in problem.tasks:
        for name in task.after:
            if slots[name].end_us > slots[task.name].start_us + EPSILON_US:
                found.append(Diagnostic("E0751", f"{task.name!r} starts before its input {name!r} has ended"))
    for resource in problem.resources:
        row = sorted((s for s in schedule.slots if s.task.resource == resource), key=lambda s: (s.start_us, s.end_us))
        for a, b in pairwise(row):
            if a.end_us > b.start_us + EPSILON_US:
                found.append(Diagnostic("E0752", f"{a.task.name!r} and {b.task.name!r} overlap on stream {resource!r}"))
    peak = peak_bytes(problem, schedule.slots)
    if problem.memory_budget_bytes is not None and peak > problem.memory_budget_bytes:
        found.append(Diagnostic("E0753", f"{peak:,} bytes are held, the budget is {problem.memory_budget_bytes:,}"))
    if schedule.makespan_us < schedule.lower_bound_us - EPSILON_US * max(1.0, schedule.lower_bound_us):
        found.append(Diagnostic("E0754", "the makespan is below the proven lower bound: one of the two is wrong"))
    return found


@dataclass(frozen=True)
class CollectiveCall:
    """One collective as a rank issues it: same name and same group on every member, in the order of one stream."""

    name: str
    group: tuple[int, ...]
    stream: str = COMM


def check_ranks(orders: Mapping[int, Sequence[CollectiveCall]]) -> list[Diagnostic]:
    """Rank agreement and deadlock freedom: replay every rank's streams, where a collective runs when it is the next on
    its stream at every member of its group. What can never run is reported with who waits for whom."""
    queues: dict[tuple[int, str], list[CollectiveCall]] = {}
    for rank, calls in orders.items():
        for call in calls:
            queues.setdefault((rank, call.stream), []).append(call)
    position = dict.fromkeys(queues, 0)

    def head(rank: int, stream: str) -> CollectiveCall | None:
        row = queues.get((rank, stream), [])
        at = position.get((rank, stream), 0)
        return row[at] if at < len(row) else None

    pending = sorted(queues)
    while pending:
        key = pending.pop()
        ready = head(*key)
        if ready is None or any(head(member, ready.stream) != ready for member in ready.group):
            continue
        for member in ready.group:
            position[(member, ready.stream)] += 1
            pending.append((member, ready.stream))
    found: list[Diagnostic] = []
    for rank, stream in sorted(queues):
        stuck = head(rank, stream)
        if stuck is None:
            continue
        others = [(m, head(m, stuck.stream)) for m in stuck.group if head(m, stuck.stream) != stuck]
        member, other = others[0] if others else (rank, None)
        doing = f"is at {other.name!r}" if other else "has no such call left"
        found.append(Diagnostic("E0755", f"rank {rank} waits in {stuck.name!r} for rank {member}, which {doing}"))
    return found


def raise_if(found: list[Diagnostic]) -> None:
    if found:
        raise DiagnosticError(found)
