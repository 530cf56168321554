"""Find a short schedule: branch and bound where the problem is small, beam and list scheduling where it is large.

`solve` is the one interface. Every choice is a function of the problem alone (limits count nodes, never seconds), so
ranks that agree on the problem agree on the schedule.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from fp8c.diagnostics import DiagnosticError, fail
from fp8c.schedule import (
    EPSILON_US,
    Problem,
    Schedule,
    Timeline,
    check_schedule,
    lower_bound_us,
    raise_if,
    schedule_in_order,
)


@dataclass(frozen=True)
class SearchLimits:
    """How much work a search may do.

    exact_tasks: above this many tasks branch and bound is not tried
    exact_nodes: partial schedules branch and bound may open before it stops and keeps its best
    beam_work:   tasks x beam width x tasks the beam may evaluate; the width follows from it, at most `beam_width`
    """

    exact_tasks: int = 64
    exact_nodes: int = 20_000
    beam_width: int = 128
    beam_work: int = 400_000


DEFAULT_LIMITS = SearchLimits()
#: Partial schedules of the same tasks the beam keeps: they differ in when streams and inputs come free.
KEPT_PER_SET = 16


def solve(problem: Problem, limits: SearchLimits = DEFAULT_LIMITS) -> Schedule:
    """The shortest schedule found, checked, with a proven lower bound; never longer than program order.

    Raises: E0905 when no schedule keeps within the memory budget (proven where the problem is small, else none found).
    """
    bound = lower_bound_us(problem)
    best = _best(problem, bound, limits)
    if (best is None or not _meets(best, bound)) and len(problem.tasks) <= limits.exact_tasks:
        best, bound, opened = branch_and_bound(problem, best, limits.exact_nodes)
        if best is not None:
            is_closed = _meets(best, bound)
            best = replace(best, lower_bound_us=bound, explored=opened, method="exact" if is_closed else best.method)
    if best is None:
        least = _least_memory_bytes(problem)
        raise fail(
            "E0905",
            f"no schedule was found that keeps memory within {problem.memory_budget_bytes:,} bytes;"
            f" the least a schedule was found to need is {least:,}",
            help="raise the memory budget, recompute more, or shorten the chunks",
        )
    raise_if(check_schedule(problem, best))
    return best


def heuristic(problem: Problem, limits: SearchLimits = DEFAULT_LIMITS) -> Schedule | None:
    """The best of program order, list scheduling and beam search; None when none of them meets the memory budget."""
    return _best(problem, lower_bound_us(problem), limits)


def roomy(problem: Problem, resource: str, factor: float) -> Iterator[Schedule]:
    """Schedules of `problem` in the orders that list scheduling finds when tasks of `resource` take `factor` times as
    long: what waits for them is put off where anything else can go first. Orders over the memory budget are left out.
    """
    longer = [
        replace(t, duration_us=t.duration_us * (factor if t.resource == resource else 1.0)) for t in problem.tasks
    ]
    stretched = replace(problem, tasks=tuple(longer))
    index = {task.name: i for i, task in enumerate(problem.tasks)}
    for priority in _priorities(stretched):
        found = list_schedule(stretched, priority)
        if found is not None:
            order = sorted((slot.start_us, index[slot.task.name]) for slot in found.slots)
            with contextlib.suppress(DiagnosticError):
                yield schedule_in_order(problem, [i for _, i in order], "roomy")


def _meets(schedule: Schedule, bound_us: float) -> bool:
    return schedule.makespan_us <= bound_us + EPSILON_US


def _best(problem: Problem, bound_us: float, limits: SearchLimits) -> Schedule | None:
    best: Schedule | None = None
    for make in _attempts(problem, bound_us, limits):
        found = make()
        if found is not None and (best is None or found.makespan_us < best.makespan_us - EPSILON_US):
            best = found
        if best is not None and _meets(best, bound_us):
            break
    return best


def _attempts(problem: Problem, bound_us: float, limits: SearchLimits) -> Iterator[Callable[[], Schedule | None]]:
    yield lambda: _in_program_order(problem, bound_us)
    for priority in _priorities(problem):
        yield functools.partial(list_schedule, problem, priority, bound_us)
    width = min(limits.beam_width, limits.beam_work // max(1, len(problem.tasks) ** 2))
    if width >= 2:
        yield lambda: beam_search(problem, width, bound_us)


def _in_program_order(problem: Problem, bound_us: float) -> Schedule | None:
    timeline = Timeline(problem)
    if not all(timeline.start(i) for i in range(len(problem.tasks))):
        return None
    return timeline.schedule("program", bound_us)


# -------------------------------------------------------------------------------------------------- list scheduling


def _priorities(problem: Problem) -> Iterable[list[float]]:
    """Rules by which a free stream picks among its waiting tasks; larger goes first."""
    count = len(problem.tasks)
    busiest = max(problem.resources, key=lambda r: sum(t.duration_us for t in problem.tasks if t.resource == r))
    feeds = [0.0] * count  # longest chain on streams other than the busiest one that a task opens
    for i in reversed(range(count)):
        for s in problem.successors[i]:
            own = problem.tasks[s].duration_us if problem.tasks[s].resource != busiest else 0.0
            feeds[i] = max(feeds[i], own + feeds[s])
    yield [problem.tails_us[i] + problem.tasks[i].duration_us for i in range(count)]
    yield list(problem.tails_us)
    yield feeds
    yield [problem.tails_us[i] - problem.tasks[i].duration_us for i in range(count)]


def list_schedule(problem: Problem, priority: list[float], bound_us: float = 0.0) -> Schedule | None:
    """Always issue the task that can start first; among those of one stream and time, the one of highest priority.

    O(n log n) for n tasks. With a memory budget a task that does not fit is passed over until memory is given back;
    None when nothing fits and nothing more is given back.
    """
    timeline = Timeline(problem)
    coming: dict[str, list[tuple[float, int]]] = {r: [] for r in problem.resources}  # (inputs there, task)
    waiting: dict[str, list[tuple[float, int]]] = {r: [] for r in problem.resources}  # (-priority, task), startable
    for i in range(len(problem.tasks)):
        if timeline.is_ready(i):
            heapq.heappush(coming[problem.tasks[i].resource], (0.0, i))
    blocked_us = 0.0  # before this time, no waiting task fits into memory
    while len(timeline.issued) < len(problem.tasks):
        best: tuple[float, str] | None = None
        for resource in problem.resources:
            if waiting[resource]:
                time = timeline.free_us[resource]
            elif coming[resource]:
                time = max(timeline.free_us[resource], coming[resource][0][0])
            else:
                continue
            time = max(time, blocked_us)
            if best is None or time < best[0]:
                best = (time, resource)
        assert best is not None, "a problem's tasks are in topological order, so one is always ready"
        for resource in problem.resources:
            while coming[resource] and coming[resource][0][0] <= best[0]:
                _, i = heapq.heappop(coming[resource])
                heapq.heappush(waiting[resource], (-priority[i], i))
        chosen = _pop_fitting(timeline, waiting[best[1]], best[0])
        if chosen is None:
            chosen = _any_fitting(problem, timeline, waiting, best[0])
        if chosen is None:
            later = [t for t, _ in timeline.frees if t > best[0]]
            later += [t for row in coming.values() for t, _ in row if t > best[0]]
            later += [t for r, t in timeline.free_us.items() if t > best[0] and waiting[r]]
            if not later:
                return None
            blocked_us = min(later)
            continue
        if not timeline.start(chosen):
            return None
        for s in problem.successors[chosen]:
            if timeline.missing[s] == 0:
                heapq.heappush(coming[problem.tasks[s].resource], (timeline.arrival_us(s), s))
    return timeline.schedule("list", bound_us)


def _pop_fitting(timeline: Timeline, waiting: list[tuple[float, int]], now_us: float) -> int | None:
    """The first waiting task, by priority, that memory lets start now."""
    if timeline.problem.memory_budget_bytes is None:
        return heapq.heappop(waiting)[1]
    for entry in sorted(waiting):
        time = timeline.earliest_us(entry[1])
        if time is not None and time <= now_us + EPSILON_US:
            waiting.remove(entry)
            heapq.heapify(waiting)
            return entry[1]
    return None


def _any_fitting(
    problem: Problem, timeline: Timeline, waiting: dict[str, list[tuple[float, int]]], now_us: float
) -> int | None:
    for resource in problem.resources:
        if timeline.free_us[resource] <= now_us and waiting[resource]:
            chosen = _pop_fitting(timeline, waiting[resource], now_us)
            if chosen is not None:
                return chosen
    return None


# ------------------------------------------------------------------------------------- branching, beam, exact search


def _branches(problem: Problem, timeline: Timeline) -> list[int]:
    """Tasks one of which comes next in at least one best completion of `timeline`.

    Without a memory budget: the stream on which some waiting task would end first, and the tasks of that stream that
    could start before it (B. Giffler and G. L. Thompson, Operations Research 8, 1960). With one: every waiting task
    that fits, because tasks are then issued in time order over all streams.
    """
    ready = [i for i in range(len(problem.tasks)) if timeline.is_ready(i)]
    starts = {i: start for i in ready if (start := timeline.earliest_us(i)) is not None}
    if problem.memory_budget_bytes is not None or not starts:
        return sorted(starts, key=lambda i: (starts[i], i))
    first = min(starts, key=lambda i: (starts[i] + problem.tasks[i].duration_us, starts[i], i))
    end_us, stream = starts[first] + problem.tasks[first].duration_us, problem.tasks[first].resource
    rivals = [i for i in starts if problem.tasks[i].resource == stream and starts[i] < end_us - EPSILON_US]
    return sorted({first, *rivals}, key=lambda i: (starts[i], i))


def _key(timeline: Timeline) -> int:
    mask = 0
    for i in timeline.issued:
        mask |= 1 << i
    return mask


def _profile(timeline: Timeline) -> tuple[float, ...]:
    """What the future of a partial schedule depends on, for comparing two that issued the same tasks: smaller in every
    place is at least as good. With a memory budget the ends of all tasks matter, not only of those still read."""
    problem = timeline.problem
    values = list(timeline.free_us.values())
    if problem.memory_budget_bytes is not None:
        return (*values, timeline.last_start_us, *timeline.end_us)
    for i in sorted(timeline.issued):
        if any(timeline.end_us[s] < 0.0 for s in problem.successors[i]):
            values.append(timeline.end_us[i])
    return (*values, timeline.makespan_us())


def beam_search(problem: Problem, width: int, bound_us: float = 0.0) -> Schedule | None:
    """Keep the `width` most promising partial schedules of each size; of those with the same tasks, the best few."""
    beam = [Timeline(problem)]
    for _ in problem.tasks:
        scored: dict[int, list[tuple[tuple[float, float], Timeline]]] = {}
        for timeline in beam:
            for i in _branches(problem, timeline):
                child = timeline.copy()
                child.start(i)
                score = (lower_bound_us(problem, child), sum(_profile(child)))
                scored.setdefault(_key(child), []).append((score, child))
        kept = [pair for same in scored.values() for pair in sorted(same, key=lambda p: p[0])[:KEPT_PER_SET]]
        kept.sort(key=lambda p: p[0])
        beam = [timeline for _, timeline in kept[:width]]
        if not beam:
            return None
    return min(beam, key=lambda t: t.makespan_us()).schedule("beam", bound_us)


def branch_and_bound(
    problem: Problem, incumbent: Schedule | None, max_nodes: int
) -> tuple[Schedule | None, float, int]:
    """Depth first, most promising child first, pruned by bound and by dominance.

    Returns the best schedule, the proven lower bound (its makespan when the search was exhausted) and the nodes opened.
    A branch is cut only when it cannot beat the best by more than EPSILON_US.
    """
    best = incumbent
    best_us = incumbent.makespan_us if incumbent is not None else float("inf")
    root = Timeline(problem)
    root_bound = lower_bound_us(problem)
    stack: list[tuple[float, Timeline]] = [(root_bound, root)]
    seen: dict[int, list[tuple[float, ...]]] = {}
    opened = 0
    while stack:
        if opened >= max_nodes or best_us <= root_bound + EPSILON_US:
            break
        bound, timeline = stack.pop()
        if bound >= best_us - EPSILON_US:
            continue
        opened += 1
        if len(timeline.issued) == len(problem.tasks):
            best, best_us = timeline.schedule("exact", root_bound), timeline.makespan_us()
            continue
        children: list[tuple[float, int, Timeline]] = []
        for i in _branches(problem, timeline):
            child = timeline.copy()
            child.start(i)
            child_bound = lower_bound_us(problem, child)
            if child_bound < best_us - EPSILON_US and not _is_dominated(child, seen):
                children.append((child_bound, len(children), child))
        children.sort(key=lambda c: (c[0], c[1]), reverse=True)
        stack.extend((child_bound, child) for child_bound, _, child in children)
    open_bounds = [b for b, _ in stack if b < best_us - EPSILON_US]
    proven = max(root_bound, min([best_us, *open_bounds]))
    return best, (root_bound if best is None and stack else proven), opened


def _is_dominated(timeline: Timeline, seen: dict[int, list[tuple[float, ...]]]) -> bool:
    profile = _profile(timeline)
    rivals = seen.setdefault(_key(timeline), [])
    if any(all(r <= p for r, p in zip(rival, profile)) for rival in rivals):
        return True
    rivals[:] = [r for r in rivals if not all(p <= q for p, q in zip(profile, r))]
    rivals.append(profile)
    return False


def _least_memory_bytes(problem: Problem) -> int:
    """The lowest peak seen over program order and list schedules that run one task at a time, as a hint for people."""
    free = replace(problem, memory_budget_bytes=None)
    one_stream = replace(free, tasks=tuple(replace(t, resource="all") for t in free.tasks))
    peaks = [schedule_in_order(one_stream, range(len(free.tasks)), "program").peak_bytes]
    for priority in _priorities(one_stream):
        found = list_schedule(one_stream, priority)
        if found is not None:
            peaks.append(found.peak_bytes)
    return min(peaks)
