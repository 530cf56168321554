"""Schedules: exactness against brute force, never worse than program order, checks that find what is wrong."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from fp8c.diagnostics import DiagnosticError
from fp8c.schedule import (
    COMM,
    COMPUTE,
    CollectiveCall,
    Problem,
    Schedule,
    Slot,
    Task,
    check_ranks,
    check_schedule,
    lower_bound_us,
    make_problem,
    one_machine_bound_us,
    program_order,
)
from fp8c.schedule_search import SearchLimits, beam_search, branch_and_bound, heuristic, list_schedule, solve


def random_problem(seed: int, count: int, *, has_memory: bool = False) -> Problem:
    """Tasks on two streams with random dependences; integer times, so equal makespans are equal numbers."""
    rng = random.Random(seed)
    density = rng.choice([0.1, 0.2, 0.35])
    tasks = []
    for i in range(count):
        after = tuple(f"t{j}" for j in range(i) if rng.random() < density)
        size = rng.randint(0, 10) if has_memory else 0
        tasks.append(Task(f"t{i}", rng.choice([COMPUTE, COMM]), float(rng.randint(0, 20)), after, size))
    return make_problem(tasks)


def brute_force_us(problem: Problem) -> float:
    """The optimum without a memory budget, by trying every order of every stream: the longest path of the dependences
    and the orders together, found by relaxing until nothing changes; an order that is circular never settles."""
    tasks = problem.tasks
    by_stream = [[i for i, t in enumerate(tasks) if t.resource == r] for r in problem.resources]
    best = float("inf")
    for orders in itertools.product(*(itertools.permutations(row) for row in by_stream)):
        edges = [(p, i) for i, before in enumerate(problem.predecessors) for p in before]
        edges += [pair for order in orders for pair in itertools.pairwise(order)]
        end = [t.duration_us for t in tasks]
        for _ in range(len(tasks) + 1):
            changed = False
            for a, b in edges:
                if end[a] + tasks[b].duration_us > end[b]:
                    end[b] = end[a] + tasks[b].duration_us
                    changed = True
            if not changed:
                best = min(best, max(end))
                break
    return best


def brute_force_with_memory_us(problem: Problem) -> float:
    """The optimum under a budget by trying every integer start time up to the sum of durations (an optimum with
    integer durations has integer starts); infinity when there is none."""
    assert problem.memory_budget_bytes is not None
    tasks, budget = problem.tasks, problem.memory_budget_bytes
    total = int(sum(t.duration_us for t in tasks))
    best = float("inf")
    start = [0] * len(tasks)

    def fits() -> bool:
        end = [start[i] + tasks[i].duration_us for i in range(len(tasks))]
        for i in range(len(tasks)):
            for j in range(i):
                clash = start[i] < end[j] and start[j] < end[i]
                if tasks[i].resource == tasks[j].resource and clash:
                    return False
        until = [max((end[s] for s in problem.successors[i]), default=float("inf")) for i in range(len(tasks))]
        return all(
            sum(t.output_bytes for t, s, u in zip(tasks, start, until) if s <= time < u) <= budget for time in start
        )

    def place(i: int) -> None:
        nonlocal best
        if i == len(tasks):
            makespan = max(s + t.duration_us for s, t in zip(start, tasks))
            if makespan < best and fits():
                best = makespan
            return
        first = max((int(start[p] + tasks[p].duration_us) for p in problem.predecessors[i]), default=0)
        for time in range(first, total + 1 - int(tasks[i].duration_us)):
            start[i] = time
            place(i + 1)

    place(0)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_exact_search_finds_the_brute_force_optimum(seed: int) -> None:
    problem = random_problem(seed, 4 + seed % 4)
    assert solve(problem).makespan_us == brute_force_us(problem)


def small_memory_problem(seed: int) -> Problem:
    rng = random.Random(seed)
    tasks = []
    for i in range(4):
        after = tuple(f"t{j}" for j in range(i) if rng.random() < 0.35)
        tasks.append(Task(f"t{i}", rng.choice([COMPUTE, COMM]), float(rng.randint(1, 4)), after, rng.randint(1, 6)))
    free = make_problem(tasks)
    return replace(free, memory_budget_bytes=max(t.output_bytes for t in tasks) + rng.randint(0, 12))


@pytest.mark.parametrize("seed", range(30))
def test_exact_search_under_a_budget_finds_the_brute_force_optimum(seed: int) -> None:
    problem = small_memory_problem(seed)
    best = brute_force_with_memory_us(problem)
    if best == float("inf"):
        with pytest.raises(DiagnosticError) as caught:
            solve(problem)
        assert caught.value.diagnostics[0].code == "E0905"
    else:
        schedule = solve(problem)
        assert schedule.makespan_us == best
        assert schedule.peak_bytes <= (problem.memory_budget_bytes or 0)


def test_heuristic_is_within_2_percent_of_the_optimum_on_1000_graphs() -> None:
    """The search for large problems (list and beam, no branch and bound) against the exact optimum; and neither is ever
    worse than program order."""
    for seed in range(1000):
        problem = random_problem(10_000 + seed, 5 + seed % 9)
        exact, bound, _ = branch_and_bound(problem, None, 100_000)
        found = heuristic(problem)
        assert exact is not None and found is not None
        assert exact.makespan_us == bound, "the exact search was not exhausted"
        assert found.makespan_us <= 1.02 * exact.makespan_us, seed
        assert found.makespan_us <= program_order(problem).makespan_us
        assert not check_schedule(problem, exact)
        assert not check_schedule(problem, found)


def test_list_scheduling_alone_is_never_worse_than_program_order_once_the_best_is_kept() -> None:
    """With the beam and the exact search switched off, as for a graph of 30,000 nodes."""
    limits = SearchLimits(exact_tasks=0, beam_width=0)
    for seed in range(200):
        problem = random_problem(seed, 30)
        assert solve(problem, limits).makespan_us <= program_order(problem).makespan_us


@pytest.mark.parametrize("seed", range(50))
def test_lower_bound_holds_and_budgets_are_met(seed: int) -> None:
    problem = random_problem(seed, 9, has_memory=True)
    best = solve(problem)
    assert lower_bound_us(problem) <= best.makespan_us
    tight = replace(problem, memory_budget_bytes=best.peak_bytes)
    again = solve(tight)
    assert again.peak_bytes <= best.peak_bytes
    assert again.makespan_us == best.makespan_us
    assert not check_schedule(tight, again)


def test_search_is_deterministic() -> None:
    for seed in range(20):
        first, second = (solve(random_problem(seed, 25)) for _ in range(2))
        assert first == second
        assert first.digest() == second.digest()


def test_beam_and_list_are_valid_on_larger_graphs() -> None:
    for seed in range(5):
        problem = random_problem(seed, 60)
        for found in (beam_search(problem, 4), list_schedule(problem, list(problem.tails_us))):
            assert found is not None
            assert not check_schedule(problem, found)


def test_one_machine_bound_of_two_jobs() -> None:
    # Job a: head 0, 3 long, tail 10; job b: head 1, 2 long, tail 20. Preempting a at 1 ends b at 3 + 20 = 23.
    assert one_machine_bound_us([(0.0, 3.0, 10.0), (1.0, 2.0, 20.0)]) == 23.0


# ------------------------------------------------------------------------------------------------------- bad input


def code_of(tasks: list[Task]) -> tuple[str, str]:
    with pytest.raises(DiagnosticError) as caught:
        make_problem(tasks)
    found = caught.value.diagnostics[0]
    return found.code, found.message


def test_a_circle_is_named_in_the_order_work_would_flow() -> None:
    tasks = [
        Task("a", COMPUTE, 1, ("c",)),
        Task("b", COMM, 1, ("a",)),
        Task("c", COMPUTE, 1, ("b",)),
        Task("d", COMM, 1),
    ]
    code, message = code_of(tasks)
    assert code == "E0902"
    assert message.endswith(("a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c"))


@pytest.mark.parametrize(
    "tasks,code,word",
    [
        ([Task("a", COMPUTE, 1, ("ghost",))], "E0901", "ghost"),
        ([Task("a", COMPUTE, 1), Task("a", COMM, 1)], "E0903", "a"),
        ([Task("a", COMPUTE, -1)], "E0904", "-1"),
        ([Task("a", COMPUTE, float("nan"))], "E0904", "nan"),
    ],
)
def test_wrong_tables_are_named(tasks: list[Task], code: str, word: str) -> None:
    found, message = code_of(tasks)
    assert found == code and word in message


def test_a_budget_nothing_meets_is_named_with_what_would_do() -> None:
    problem = make_problem(
        [Task("a", COMPUTE, 1, output_bytes=60), Task("b", COMPUTE, 1, ("a",), output_bytes=50)],
        memory_budget_bytes=100,
    )
    with pytest.raises(DiagnosticError) as caught:
        solve(problem)
    assert caught.value.diagnostics[0].code == "E0905"
    assert "110" in caught.value.diagnostics[0].message


# ---------------------------------------------------------------------------------------------------------- checks


def three() -> tuple[Problem, dict[str, Task]]:
    problem = make_problem([Task("a", COMPUTE, 2), Task("b", COMM, 3, ("a",)), Task("c", COMPUTE, 4)])
    return problem, {t.name: t for t in problem.tasks}


@pytest.mark.parametrize(
    "starts,bound,code",
    [
        ({"a": 0, "b": 1, "c": 2}, 6, "E0751"),  # b starts before a has ended
        ({"a": 0, "b": 2, "c": 1}, 5, "E0752"),  # a and c overlap on one stream
        ({"a": 0, "b": 2}, 5, "E0750"),  # c is missing
        ({"a": 0, "b": 2, "c": 2}, 7, "E0754"),  # a bound above the makespan
    ],
)
def test_wrong_schedules_are_found(starts: dict[str, float], bound: float, code: str) -> None:
    problem, tasks = three()
    schedule = Schedule(tuple(Slot(tasks[n], float(t)) for n, t in starts.items()), bound, "test", 0)
    assert [d.code for d in check_schedule(problem, schedule)] == [code]


def test_right_schedule_passes() -> None:
    problem, tasks = three()
    schedule = Schedule(tuple(Slot(tasks[n], t) for n, t in {"a": 0.0, "b": 2.0, "c": 2.0}.items()), 6, "test", 0)
    assert check_schedule(problem, schedule) == []
    assert schedule.is_optimal


def test_ranks_that_wait_for_each_other_are_found() -> None:
    both = (0, 1)
    x, y = CollectiveCall("x", both), CollectiveCall("y", both)
    assert check_ranks({0: [x, y], 1: [x, y]}) == []
    found = check_ranks({0: [x, y], 1: [y, x]})
    assert [d.code for d in found] == ["E0755", "E0755"]
    assert "rank 0 waits in 'x' for rank 1, which is at 'y'" in found[0].message


def test_a_deadlock_over_three_groups_is_found_though_no_two_ranks_disagree() -> None:
    """Each pair of ranks shares one call, in a circle: every rank's order is legal on its own."""
    ab, bc, ca = CollectiveCall("ab", (0, 1)), CollectiveCall("bc", (1, 2)), CollectiveCall("ca", (2, 0))
    assert check_ranks({0: [ab, ca], 1: [ab, bc], 2: [bc, ca]}) == []
    assert len(check_ranks({0: [ab, ca], 1: [bc, ab], 2: [ca, bc]})) == 3


def test_a_call_one_rank_never_makes_is_found() -> None:
    x = CollectiveCall("x", (0, 1))
    found = check_ranks({0: [x], 1: []})
    assert [d.code for d in found] == ["E0755"]
    assert "has no such call left" in found[0].message
