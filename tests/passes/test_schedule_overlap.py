"""schedule-overlap on real FX graphs with functional collectives: order only, same numbers, better overlap."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

import fp8c.ops  # noqa: F401  (defines the operators the passes name)
from fp8c.backends.costs import load_machine
from fp8c.contention import Interference, replay
from fp8c.diagnostics import DiagnosticError
from fp8c.graph_costs import collective, is_collective, node_us
from fp8c.partition import Halves
from fp8c.pass_manager import PassContext
from fp8c.passes.schedule_overlap import (
    ScheduleOverlap,
    agree,
    collective_calls,
    common_costs,
    disagreements,
    exchange_orders,
    issued_tasks,
    order_digest,
    order_only,
    pair_graphs,
    schedule_graph,
    share_costs,
    snapshot,
    with_room,
)
from fp8c.schedule import (
    COMM,
    COMPUTE,
    Schedule,
    Task,
    check_ranks,
    check_schedule,
    make_problem,
    schedule_in_order,
)
from fp8c.schedule_search import solve

RANKS = 8
T, D = 64, 16


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[Any]:
    """A real group of one rank: the graph can be run."""
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield dist.group.WORLD
    dist.destroy_process_group()


def send(x: Tensor, group: Any) -> Tensor:
    even = [x.shape[0] // dist.get_world_size()] * dist.get_world_size()
    functional: Any = collectives
    sent: Tensor = functional.wait_tensor(functional.all_to_all_single(x, even, even, group))
    return sent


def moe_forward(group: Any) -> Any:
    """Two layers of attention, dispatch, expert, combine, written the way a model is."""

    def step(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, w4: Tensor) -> Tensor:
        for attention, expert in ((w1, w2), (w3, w4)):
            x = x + x @ attention
            x = x + send(send(x, group) @ expert, group)
        return x

    return step


def moe_backward(group: Any) -> Any:
    """Input gradients with dispatch and combine, weight gradients behind them."""

    def step(dy: Tensor, x: Tensor, h: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        grads = []
        for _ in range(2):
            received = send(dy, group)
            grads.append(h.t() @ received)
            dy = dy + send(received @ w2.t(), group)
            grads.append(x.t() @ dy)
            dy = dy + dy @ w1.t()
        return (dy, *grads)

    return step


def square(count: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(D, D, generator=rng) for _ in range(count)]


def tokens(count: int, seed: int = 1) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(T, D, generator=rng) for _ in range(count)]


def traced(step: Any, inputs: list[Tensor]) -> fx.GraphModule:
    return make_fx(step, tracing_mode="fake")(*inputs)


def pair(group: Any) -> tuple[fx.GraphModule, list[Tensor]]:
    forward_inputs, backward_inputs = [*tokens(1), *square(4)], [*tokens(3, 2), *square(2, 3)]
    forward = traced(moe_forward(group), forward_inputs)
    backward = traced(moe_backward(group), backward_inputs)
    return pair_graphs(forward, backward), [*forward_inputs, *backward_inputs]


def unit_cost(node: fx.Node) -> float:
    """Transfers cost 4, GEMMs 3, everything else a little: about as much communication as compute."""
    if is_collective(node):
        return 4.0
    return 3.0 if node.target is torch.ops.aten.mm.default else 0.1 if node.target is torch.ops.aten.add.Tensor else 0.0


def test_independent_compute_moves_between_a_transfer_and_its_wait(group: Any) -> None:
    """The case PyTorch's own scheduler leaves exposed: the independent product stands last in program order."""

    def step(x: Tensor, w: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return send(x, group) @ w, u @ v

    gm = traced(step, [*tokens(1), *square(3)])
    report = schedule_graph(gm.graph, unit_cost)
    names = [n.name for n in gm.graph.nodes]
    assert names.index("all_to_all_single") < names.index("mm_1") < names.index("wait_tensor") < names.index("mm")
    assert report.before.exposed_us == 4.0
    assert report.after.exposed_us == 1.0
    assert report.schedule.is_optimal


def test_a_pair_of_plain_graphs_is_interleaved(group: Any) -> None:
    gm, _ = pair(group)
    report = schedule_graph(gm.graph, unit_cost)
    assert report.before.hidden_share < 0.2
    assert report.after.hidden_share > 0.8
    order = [
        "forward" if "w1" in str(n.args) or n.name in forward_names(gm) else "backward"
        for n in gm.graph.nodes
        if is_collective(n)
    ]
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches >= 4, "forward and backward transfers take turns"


def forward_names(gm: fx.GraphModule) -> set[str]:
    """Nodes that depend on forward inputs only."""
    mine: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if str(node.target).startswith("forward_chunk_"):
                mine.add(node.name)
        elif node.op != "output" and node.all_input_nodes and all(n.name in mine for n in node.all_input_nodes):
            mine.add(node.name)
    return mine


def test_scheduled_graph_gives_the_same_bits(alone: Any) -> None:
    gm, inputs = pair(alone)
    before = gm(*inputs)
    schedule_graph(gm.graph, unit_cost)
    gm.recompile()
    after = gm(*inputs)
    for a, b in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after)):
        assert torch.equal(a, b)


def test_only_the_order_changes_and_a_second_run_changes_nothing(group: Any) -> None:
    gm, _ = pair(group)
    before = snapshot(gm.graph)
    first = schedule_graph(gm.graph, unit_cost)
    assert first.moved > 0
    assert order_only(before, gm.graph) == []
    names = [n.name for n in gm.graph.nodes]
    second = schedule_graph(gm.graph, unit_cost)
    assert second.schedule.makespan_us == first.schedule.makespan_us
    gm2, _ = pair(group)
    schedule_graph(gm2.graph, unit_cost)
    assert [n.name for n in gm2.graph.nodes] == names, "two ranks with the same graph get the same order"


def test_a_lost_or_changed_node_is_found(group: Any) -> None:
    gm, _ = pair(group)
    before = snapshot(gm.graph)
    mm = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mm.default)
    mm.args = (mm.args[1], mm.args[0])
    assert [d.code for d in order_only(before, gm.graph)] == ["E0756"]


def test_writes_and_random_numbers_keep_their_order(alone: Any) -> None:
    """`y` is read, overwritten and read again; two random draws follow each other."""

    def step(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        sent = send(x, alone) @ w
        first = y + 1
        view = y.view(-1)
        view.copy_(torch.zeros_like(view))
        second = y + 2
        a, b = torch.rand_like(x), torch.rand_like(x)
        return sent, first, second, a, b

    inputs = [*tokens(1), *square(1), *tokens(1, 5)]
    gm = make_fx(step)(*[t.clone() for t in inputs])
    torch.manual_seed(0)
    before = gm(*[t.clone() for t in inputs])
    # A cost that tempts the search to move the cheap operators about.
    schedule_graph(gm.graph, lambda n: 50.0 if is_collective(n) else float(len(n.name) % 7 + 1))
    gm.recompile()
    torch.manual_seed(0)
    for a, b in zip(before, gm(*[t.clone() for t in inputs])):
        assert torch.equal(a, b)


def test_graph_without_collectives_is_left_alone(group: Any) -> None:
    gm = traced(lambda x, w: (x @ w) @ w, [*tokens(1), *square(1)])
    names = [n.name for n in gm.graph.nodes]
    halves = Halves(gm, gm, 1)
    assert ScheduleOverlap(load_machine("h800")).run(halves, PassContext()) == 0
    assert [n.name for n in gm.graph.nodes] == names


def test_pass_on_halves_with_the_cost_model(group: Any) -> None:
    forward = traced(moe_forward(group), [*tokens(1), *square(4)])
    backward = traced(moe_backward(group), [*tokens(3, 2), *square(2, 3)])
    before = [snapshot(half.graph) for half in (forward, backward)]
    ctx = PassContext()
    moved = ScheduleOverlap(load_machine("h800")).run(Halves(forward, backward, 1), ctx)
    assert list(ctx.schedules) == ["forward", "backward"], "what was chosen is kept for the build's trace"
    assert {s.task.name for s in ctx.schedules["backward"].slots} <= {n.name for n in backward.graph.nodes}
    assert moved > 0, "the weight gradients of the backward can hide its transfers"
    for half, was in zip((forward, backward), before):
        assert order_only(was, half.graph) == []


def test_memory_budget_is_respected_or_named(group: Any) -> None:
    gm, _ = pair(group)
    free = schedule_graph(gm.graph, unit_cost, memory_budget_bytes=10**9).schedule
    gm, _ = pair(group)
    tight = schedule_graph(gm.graph, unit_cost, memory_budget_bytes=free.peak_bytes).schedule
    assert tight.peak_bytes <= free.peak_bytes
    gm, _ = pair(group)
    with pytest.raises(DiagnosticError) as caught:
        schedule_graph(gm.graph, unit_cost, memory_budget_bytes=T * D * 4)
    assert caught.value.diagnostics[0].code == "E0905"


def test_ranks_with_one_graph_cannot_deadlock(group: Any) -> None:
    gm, _ = pair(group)
    schedule_graph(gm.graph, unit_cost)
    name = str(next(n for n in gm.graph.nodes if is_collective(n)).args[-1])
    calls = collective_calls(gm.graph, {name: tuple(range(RANKS))})
    assert len(calls) == 8
    assert check_ranks({rank: calls for rank in range(RANKS)}) == []
    assert order_digest(gm.graph) == order_digest(gm.graph)
    agree(gm.graph)  # a fake group has nobody to compare with


def test_ranks_that_differ_are_named() -> None:
    a, b = ("a2a_1", "0"), ("a2a_2", "0")
    assert disagreements([[a, b], [a, b]]) == []
    found = disagreements([[a, b], [b, a]])
    assert found[0].code == "E0757"
    assert "call 0: a2a_1 and a2a_2" in found[0].message
    assert {d.code for d in found[1:]} == {"E0755"}


def test_ranks_compare_orders_without_a_collective() -> None:
    """Four ranks as threads over one store; a rank that never comes is named instead of waited for."""
    orders = [[("a", "0"), ("b", "0")]] * 3 + [[("b", "0"), ("a", "0")]]
    store = hash_store()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(exchange_orders, store, orders[r], r, 4, 30.0, 0) for r in range(4)]
        assert all(job.result() == orders for job in jobs)
    with pytest.raises(DiagnosticError) as caught:
        exchange_orders(store, orders[0], 0, 2, 0.2, 1)
    assert caught.value.diagnostics[0].code == "E0757"
    assert "rank 1" in caught.value.diagnostics[0].message


def hash_store() -> Any:
    distributed: Any = dist
    return distributed.HashStore()


def test_an_all_to_alls_bytes_follow_the_group(group: Any) -> None:
    gm = traced(lambda x: send(x, group), tokens(1))
    node = next(n for n in gm.graph.nodes if is_collective(n))
    size = T * D * 4
    within = collective(node, gpus_per_node=8)
    assert within.nic_bytes == 0.0
    assert within.nvlink_bytes == size * 7 / 8
    across = collective(node, gpus_per_node=4)
    assert across.nic_bytes == size * 4 / 8
    assert node_us(node, load_machine("h800"), 20) > 0.0


def chain(graph: fx.Graph, value: fx.Node, weights: fx.Node, count: int, forks: list[fx.Node]) -> fx.Node:
    """`count` calls one after another, a product every tenth; forks are work nobody waits for."""
    for i in range(count):
        if i % 10 == 0:
            value = graph.call_function(torch.ops.aten.mm.default, (value, weights))
        else:
            value = graph.call_function(torch.ops.aten.mul.Tensor, (value, 2.0))
        if i % 25 == 0:
            forks.append(graph.call_function(torch.ops.aten.mm.default, (weights, value)))
    return value


def sent(graph: fx.Graph, value: fx.Node) -> fx.Node:
    c10d = torch.ops._c10d_functional
    moved = graph.call_function(c10d.all_to_all_single.default, (value, [1], [1], "0"))
    return graph.call_function(c10d.wait_tensor.default, (moved,))


def test_a_step_of_30000_nodes_is_scheduled_within_a_minute() -> None:
    """A whole 61-layer step, forward of one micro-batch beside the backward of another, of the size of DeepSeek-V3's
    joint graph (31,617 nodes)."""
    graph = fx.Graph()
    x, dy, w = (graph.placeholder(n) for n in ("x", "dy", "w"))
    results: list[fx.Node] = []
    for start, calls in ((x, 40), (dy, 75)):
        value = start
        for _ in range(61):
            for _ in range(4):
                value = chain(graph, value, w, calls, results)
                value = sent(graph, value)
        results.append(value)
    graph.output(tuple(results))
    assert len(graph.nodes) > 29_000

    def cost(node: fx.Node) -> float:
        if is_collective(node):
            return 5000.0
        return 900.0 if node.target is torch.ops.aten.mm.default else 10.0

    started = time.perf_counter()
    report = schedule_graph(graph, cost)
    assert time.perf_counter() - started < 60.0
    assert report.after.hidden_share > 0.95
    assert report.schedule.gap < 0.05


def test_ranks_that_own_fewer_experts_take_the_first_rank_s_costs() -> None:
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    first, second = {"mm": 4.0, "send": 2.0}, {"mm": 1.0, "send": 2.0}
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(share_costs, store, costs, costs is first, 0, "0,3", 30.0) for costs in (second, first)]
        assert [job.result() for job in jobs] == [first, first]
    with pytest.raises(DiagnosticError) as caught:
        share_costs(store, second, False, 0, "0,3", 0.2)
    assert caught.value.diagnostics[0].code == "E0757"
    assert "rank 0 has not compiled graph 1" in caught.value.diagnostics[0].message


def test_costs_of_one_process_are_its_own(group: Any) -> None:
    graph = fx.Graph()
    assert common_costs(graph, node_cost := lambda node: 1.0) is node_cost


def test_what_streams_cost_each_other_lengthens_what_is_expected(group: Any) -> None:
    """Beside the order for transfers twice as slow: the search sees that, the expected slots see compute slowed too."""
    module, _ = pair(group)

    def cost_us(node: fx.Node) -> float:
        return 10.0 if is_collective(node) or node.target is torch.ops.aten.mm.default else 0.0

    report = schedule_graph(module.graph, cost_us, interference=Interference(1.5, 2.0))
    alone = sum(cost_us(n) for n in module.graph.nodes if not is_collective(n))
    compute = sum(s.end_us - s.start_us for s in report.expected if s.task.resource == COMPUTE)
    comm = [s for s in report.expected if s.task.resource == COMM]
    assert alone < compute <= 1.5 * alone
    assert all(10.0 - 1e-6 <= s.end_us - s.start_us <= 20.0 + 1e-6 for s in comm)
    assert {s.task.duration_us for s in report.schedule.slots if s.task.resource == COMM} == {20.0}


def test_room_for_longer_transfers_costs_nothing_where_they_are_not() -> None:
    """Two orders are as short as each other; with room, compute that nothing waits for stands behind the transfer."""
    tasks = [
        Task("first", COMPUTE, 10.0),
        Task("send", COMM, 20.0, ("first",)),
        Task("filler", COMPUTE, 20.0),
        Task("more", COMPUTE, 10.0),
        Task("rest", COMPUTE, 10.0),
        Task("reader", COMPUTE, 10.0, ("send",)),
        Task("second", COMM, 5.0, ("reader",)),
        Task("last", COMPUTE, 5.0, ("second",)),
    ]
    problem = make_problem(tasks)
    alone_us = {task.name: task.duration_us for task in tasks}
    tight = schedule_in_order(problem, [0, 1, 2, 5, 6, 3, 4, 7], "tight")
    found = with_room(problem, tight, alone_us, Interference(), 1.4)
    assert found.makespan_us == tight.makespan_us == 65.0

    def longer_us(schedule: Schedule) -> float:
        return max(slot.end_us for slot in replay(issued_tasks(schedule, alone_us, 1.4), Interference()))

    assert longer_us(tight) == 73.0
    assert longer_us(found) == 65.0
    assert with_room(problem, tight, alone_us, Interference(), 1.0) is tight


def test_room_is_kept_out_of_the_budget_of_memory() -> None:
    """Orders that would need more memory than there is are no candidates."""
    tasks = [
        Task("make", COMPUTE, 10.0, output_bytes=8),
        Task("send", COMM, 10.0, ("make",), output_bytes=8),
        Task("other", COMPUTE, 10.0, output_bytes=8),
        Task("use", COMPUTE, 10.0, ("other", "send")),
    ]
    problem = make_problem(tasks, memory_budget_bytes=24)
    alone_us = {task.name: task.duration_us for task in tasks}
    found = with_room(problem, solve(problem), alone_us, Interference(), 2.0)
    assert not check_schedule(problem, found)
