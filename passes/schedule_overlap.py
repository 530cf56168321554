"""schedule-overlap: order compute and collectives so that transfers run beside compute.

Before:  %a = all_to_all(%x);  %b = wait(%a);  %y = mm(%b, %w);  %z = mm(%u, %v)      z needs nothing of a
After:   %a = all_to_all(%x);  %z = mm(%u, %v);  %b = wait(%a);  %y = mm(%b, %w)

A collective is issued where the schedule starts it and waited for in front of its first reader. Compute is reordered
against compute too, which is what lets two independent streams of work (a forward and a backward, two micro-batches)
hide each other's transfers.

Contract: the same nodes with the same arguments, in another order their dependences allow (invariant order-only);
operators that write memory or draw random numbers keep their order. The schedule is a function of the graph and the
machine alone, so every rank finds the same; `agree` compares them where a process group is set up.
Source:   DeepSeek-V3 (arXiv:2412.19437), section 3.2.1.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fp8c import graph as g
from fp8c.contention import Interference, replay
from fp8c.cost_model import Machine
from fp8c.diagnostics import Diagnostic, fail
from fp8c.graph_costs import WAIT, group_of, is_collective, members_of, node_us, stream_of
from fp8c.overlap import Exposure, exposure
from fp8c.partition import Halves
from fp8c.pass_manager import PassContext
from fp8c.schedule import (
    COMM,
    CollectiveCall,
    Problem,
    Schedule,
    Slot,
    Task,
    check_ranks,
    make_problem,
    program_order,
    raise_if,
)
from fp8c.schedule_search import DEFAULT_LIMITS, SearchLimits, roomy, solve

NodeCost = Callable[[fx.Node], float]


@dataclass(frozen=True)
class OverlapReport:
    """What scheduling one graph gave. `before` is the given order on two streams, waits blocking where they stand.

    expected: the schedule as it should run, with compute and transfers slowing each other down where they meet
    """

    schedule: Schedule
    before: Exposure
    after: Exposure
    moved: int
    expected: tuple[Slot, ...] = ()


@dataclass(frozen=True)
class ScheduleOverlap:
    """`machine` is the context's where None. A graph without collectives, or a target without a cost sheet, stays as it
    is."""

    name: ClassVar[str] = "schedule-overlap"
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset({"order-only"})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    machine: Machine | None = None
    comm_sms: int = 20
    memory_budget_bytes: int | None = None
    limits: SearchLimits = field(default=DEFAULT_LIMITS)

    def run(self, halves: Halves, ctx: PassContext) -> int:
        """Reorder both halves in place; return the number of nodes moved."""
        moved = 0
        for name, half in (("forward", halves.forward), ("backward", halves.backward)):
            machine = self.machine or ctx.machine
            if machine is None or not any(is_collective(n) for n in half.graph.nodes):
                continue
            cost_us = functools.partial(node_us, machine=machine, comm_sms=self.comm_sms)
            report = schedule_graph(
                half.graph,
                common_costs(half.graph, cost_us),
                interference=machine.interference,
                memory_budget_bytes=self.memory_budget_bytes,
                limits=self.limits,
            )
            ctx.schedules[name] = report.schedule
            agree(half.graph)
            if report.moved:
                half.graph.lint()
                half.recompile()
            moved += report.moved
        return moved


def schedule_graph(
    graph: fx.Graph,
    cost_us: NodeCost,
    *,
    interference: Interference = Interference(),
    memory_budget_bytes: int | None = None,
    limits: SearchLimits = DEFAULT_LIMITS,
    room: float = 1.0,
) -> OverlapReport:
    """Reorder `graph` in place. `cost_us` gives each node's time by itself in microseconds; nodes of cost 0 follow their
    readers. The search takes transfers as slow as they are beside compute.

    room: above 1, that of several orders about as short is taken which is shortest when transfers take so many times as
          long, as they do where routing is uneven

    Raises: E0905 when no order keeps what the graph computes within the budget; E0756 if a node was lost (a bug).
    """
    before = snapshot(graph)
    order = list(graph.nodes)

    def beside_us(node: fx.Node) -> float:
        return cost_us(node) * (interference.comm if stream_of(node) == COMM else 1.0)

    problem, anchors = graph_problem(graph, beside_us, memory_budget_bytes)
    alone_us = {task.name: cost_us(anchors[task.name]) for task in problem.tasks}
    schedule = with_room(problem, solve(problem, limits), alone_us, interference, room)
    issued = issued_tasks(schedule, alone_us)
    given = program_order(issue_order_problem(graph, cost_us))
    found = emission_order(graph, [anchors[name] for name in issue_order(schedule)])
    _apply(graph, found)
    raise_if(order_only(before, graph))
    moved = sum(a is not b for a, b in zip(order, graph.nodes))
    expected = replay(issued, interference)
    return OverlapReport(schedule, exposure(given.slots), exposure(schedule.slots), moved, expected)


#: Of the shortest order's makespan: what another may take longer and still count as about as short.
ABOUT_AS_SHORT = 0.002
#: Shares of the room asked for with which orders are looked for.
_ROOM_SHARES = (0.0, 0.5, 1.0)


def with_room(
    problem: Problem, shortest: Schedule, alone_us: Mapping[str, float], interference: Interference, room: float
) -> Schedule:
    """Of `shortest` and orders about as short, the one that takes least when transfers take `room` times as long."""
    if room <= 1.0:
        return shortest

    def replayed_us(schedule: Schedule, factor: float) -> float:
        return max((s.end_us for s in replay(issued_tasks(schedule, alone_us, factor), interference)), default=0.0)

    shares = (1.0 + share * (room - 1.0) for share in _ROOM_SHARES)
    found = [shortest, *(other for factor in shares for other in roomy(problem, COMM, factor))]
    even_us = [replayed_us(schedule, 1.0) for schedule in found]
    limit_us = min(even_us) * (1.0 + ABOUT_AS_SHORT)
    best = min((replayed_us(s, room), us, at) for at, (s, us) in enumerate(zip(found, even_us)) if us <= limit_us)
    return replace(found[best[2]], lower_bound_us=shortest.lower_bound_us)


def issued_tasks(schedule: Schedule, alone_us: Mapping[str, float], factor: float = 1.0) -> list[Task]:
    """Tasks in issue order with their times by themselves, transfers `factor` times as long."""
    tasks = {slot.task.name: slot.task for slot in schedule.slots}
    scales = {name: factor if task.resource == COMM else 1.0 for name, task in tasks.items()}
    return [replace(tasks[name], duration_us=alone_us[name] * scales[name]) for name in issue_order(schedule)]


def issue_order(schedule: Schedule) -> list[str]:
    """Compute in its order, and each transfer as soon as its inputs have been issued, transfers in their own order.

    A transfer waits for all compute that was issued before it, and for the transfers in front of it anyway. Issued only
    when the schedule starts it, it would wait for the operator that happens to run then.
    """
    ordered = sorted(schedule.slots, key=lambda s: s.start_us)
    transfers = [s.task for s in ordered if s.task.resource == COMM]
    issued: list[str] = []
    done: set[str] = set()

    def issue(name: str) -> None:
        issued.append(name)
        done.add(name)

    for slot in (None, *ordered):
        if slot is not None and slot.task.resource != COMM:
            issue(slot.task.name)
        while transfers and done.issuperset(transfers[0].after):
            issue(transfers.pop(0).name)
    assert not transfers, "a transfer waits for what is never issued"
    return issued


# ------------------------------------------------------------------------------------------- graph to problem and back


def graph_problem(
    graph: fx.Graph, cost_us: NodeCost, memory_budget_bytes: int | None = None
) -> tuple[Problem, dict[str, fx.Node]]:
    """The graph's scheduling problem, and the node behind each task.

    A task is a call that costs time. What lies between two tasks (views, waits, free calls) becomes a dependence.
    """
    anchors: dict[str, fx.Node] = {}
    reach: dict[fx.Node, frozenset[str]] = {}  # tasks a node's value comes from, over free nodes
    tasks: list[Task] = []
    extra = ordering_constraints(graph)
    for node in graph.nodes:
        sources = [*node.all_input_nodes, *extra.get(node, ())]
        after = frozenset[str]().union(*(reach[n] for n in sources)) if sources else frozenset[str]()
        time_us = cost_us(node) if node.op == "call_function" else 0.0
        if time_us <= 0.0 and not is_collective(node):
            reach[node] = after
            continue
        anchors[node.name] = node
        reach[node] = frozenset({node.name})
        size = g.size_bytes(node.meta.get("val")) if memory_budget_bytes is not None else 0
        kind = "collective" if is_collective(node) else "compute"
        tasks.append(Task(node.name, stream_of(node), time_us, tuple(sorted(after)), output_bytes=size, kind=kind))
    return make_problem(tasks, memory_budget_bytes=memory_budget_bytes), anchors


def issue_order_problem(graph: fx.Graph, cost_us: NodeCost) -> Problem:
    """The graph as it stands: one host issues nodes in order, so a compute node behind a wait waits with it."""
    tasks: list[Task] = []
    reach: dict[fx.Node, frozenset[str]] = {}
    blocked: frozenset[str] = frozenset()
    for node in graph.nodes:
        sources = node.all_input_nodes
        after = frozenset[str]().union(*(reach[n] for n in sources)) if sources else frozenset[str]()
        if node.op == "call_function" and node.target is WAIT:
            blocked |= after
        time_us = cost_us(node) if node.op == "call_function" else 0.0
        if time_us <= 0.0 and not is_collective(node):
            reach[node] = after
            continue
        reach[node] = frozenset({node.name})
        waits = blocked if not is_collective(node) else frozenset()
        tasks.append(Task(node.name, stream_of(node), time_us, tuple(sorted(after | waits))))
        if not is_collective(node):
            blocked = frozenset()  # the next compute node comes after this one on the stream anyway
    return make_problem(tasks)


def ordering_constraints(graph: fx.Graph) -> Mapping[fx.Node, tuple[fx.Node, ...]]:
    """Nodes that must stay behind others without reading them: writes behind earlier reads of the same memory, reads
    behind earlier writes, and everything impure (random numbers, asserts, effects) in its order."""
    behind: dict[fx.Node, list[fx.Node]] = {}
    memory: dict[fx.Node, fx.Node] = {}  # the node whose memory a view shows
    readers: dict[fx.Node, list[fx.Node]] = {}
    writer: dict[fx.Node, fx.Node] = {}
    impure: fx.Node | None = None
    for node in graph.nodes:
        if node.op != "call_function":
            memory[node] = node
            continue
        inputs = node.all_input_nodes
        is_alias = node.target in g.VIEWS and bool(inputs)
        memory[node] = memory[inputs[0]] if is_alias else node
        written = {memory[n] for n in _written(node)}
        for source in {memory[n] for n in inputs}:
            if source in writer:
                behind.setdefault(node, []).append(writer[source])
            if source in written:
                behind.setdefault(node, []).extend(readers.get(source, ()))
                writer[source] = node
                readers[source] = []
            readers.setdefault(source, []).append(node)
        # FX calls waits and collectives impure; their order is what is being decided.
        if (node.is_impure() or _draws_random(node)) and node.target is not WAIT and not is_collective(node):
            if impure is not None:
                behind.setdefault(node, []).append(impure)
            impure = node
    return {node: tuple(n for n in found if n is not node) for node, found in behind.items()}


def _written(node: fx.Node) -> list[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found = []
    for argument, value in zip(schema.arguments, node.args):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            found.append(value)
    return found


def _draws_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def emission_order(graph: fx.Graph, tasks: Iterable[fx.Node]) -> list[fx.Node]:
    """A full order of the graph's calls: tasks as given, each free node directly before the first that needs it.

    A wait is a free node, so it stands in front of the first reader of what was sent. Free nodes nothing needs keep
    their order at the end.
    """
    extra = ordering_constraints(graph)
    done: set[fx.Node] = {n for n in graph.nodes if n.op not in ("call_function", "call_module", "call_method")}
    order: list[fx.Node] = []

    def emit(node: fx.Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            if top in done:
                stack.pop()
                continue
            missing = [n for n in (*top.all_input_nodes, *extra.get(top, ())) if n not in done]
            if missing:
                stack.extend(reversed(missing))
            else:
                done.add(top)
                order.append(top)
                stack.pop()

    for node in tasks:
        emit(node)
    for node in graph.nodes:
        if node not in done and node.op != "output":
            emit(node)
    return order


def _apply(graph: fx.Graph, order: list[fx.Node]) -> None:
    output = g.output_node(graph)
    for node in order:
        output.prepend(node)


# ------------------------------------------------------------------------------------------------------------ checks

Snapshot = dict[str, tuple[str, Any, str]]


def snapshot(graph: fx.Graph) -> Snapshot:
    """What must not change: every node's operator and arguments, by name."""
    return {n.name: (n.op, n.target, repr((n.args, sorted(n.kwargs.items())))) for n in graph.nodes}


def order_only(before: Snapshot, graph: fx.Graph) -> list[Diagnostic]:
    """Invariant: the graph holds the nodes of `before`, unchanged, each behind everything it reads."""
    found = []
    after = snapshot(graph)
    for name in sorted(before.keys() ^ after.keys()):
        found.append(Diagnostic("E0756", f"node %{name} was {'lost' if name in before else 'added'} by scheduling"))
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            found.append(Diagnostic("E0756", f"node %{name} was changed by scheduling"))
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        late = [n for n in node.all_input_nodes if n not in seen]
        if late:
            found.append(Diagnostic("E0756", f"node %{node.name} stands before its input %{late[0].name}"))
        seen.add(node)
    return found


def collective_calls(graph: fx.Graph, groups: Mapping[str, tuple[int, ...]]) -> list[CollectiveCall]:
    """The graph's collectives in issue order; `groups` gives the ranks of each process group by name."""
    return [CollectiveCall(n.name, groups.get(group_of(n), ()), COMM) for n in graph.nodes if is_collective(n)]


def order_digest(graph: fx.Graph) -> str:
    """SHA-256 of the collectives in issue order, with their groups: what all ranks have to share."""
    text = "\n".join(f"{n.name} {n.target} {group_of(n)}" for n in graph.nodes if is_collective(n))
    return hashlib.sha256(text.encode()).hexdigest()


def agree(graph: fx.Graph, patience_s: float = 600.0) -> None:
    """Compare the order of collectives over the ranks that take part in them. Stages of a pipeline differ, and compile
    when they get there: only those that exchange something have to agree.

    Orders are exchanged through the group's key-value store, not by a collective: a rank that never compiles this graph
    is reported after `patience_s` instead of hanging the others.
    Raises: E0757 when ranks differ or one is missing, with E0755 where their orders would wait for each other.
    """
    distributed: Any = torch.distributed
    members = other_ranks(graph)
    if not members:
        return
    groups: dict[str, str] = {}  # numbered: ranks of different groups run the same program
    calls = [n for n in graph.nodes if is_collective(n)]
    mine = [(n.name, groups.setdefault(group_of(n), str(len(groups)))) for n in calls]
    store = distributed.distributed_c10d._get_default_store()
    position = members.index(distributed.get_rank())
    scope = ",".join(map(str, members))
    orders = exchange_orders(store, mine, position, len(members), patience_s, scope=scope)
    raise_if(disagreements(orders, members))


def other_ranks(graph: fx.Graph) -> tuple[int, ...]:
    """The ranks that take part in the graph's collectives, this one among them; none where there are no others."""
    distributed: Any = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return ()
    members = members_of(graph) if distributed.get_backend() != "fake" else ()
    return members if len(members) > 1 else ()


def common_costs(graph: fx.Graph, cost_us: NodeCost, patience_s: float = 600.0) -> NodeCost:
    """The first rank's costs, for all ranks that take part: a rank that owns fewer experts would find another order.

    Raises: E0757 when the first rank has not come to this graph in time.
    """
    members = other_ranks(graph)
    if not members:
        return cost_us
    distributed: Any = torch.distributed
    store = distributed.distributed_c10d._get_default_store()
    mine = {node.name: cost_us(node) for node in graph.nodes}
    is_first = distributed.get_rank() == members[0]
    costs = share_costs(store, mine, is_first, members[0], ",".join(map(str, members)), patience_s)
    return lambda node: costs.get(node.name, 0.0)


def share_costs(
    store: Any, mine: Mapping[str, float], is_first: bool, first: int, scope: str, patience_s: float
) -> Mapping[str, float]:
    """`mine` of the first rank. Raises: E0757 when it has not written in time."""
    number = _exchanges[f"costs {scope} {is_first}"] = _exchanges.get(f"costs {scope} {is_first}", -1) + 1
    key = f"fp8c/node-costs/{scope}/{number}"
    if is_first:
        store.set(key, json.dumps(dict(mine)))
        return mine
    try:
        store.wait([key], datetime.timedelta(seconds=patience_s))
    except RuntimeError as error:
        raise fail(
            "E0757",
            f"rank {first} has not compiled graph {number} within {patience_s:g} s, so its order is unknown",
            help="all ranks have to compile the same graphs; look for a recompilation on one of them",
        ) from error
    found: dict[str, float] = json.loads(store.get(key))
    return found


_exchanges: dict[str, int] = {}  # how many graphs this process has compared with the same others, in one order


def exchange_orders(
    store: Any,
    mine: list[tuple[str, str]],
    rank: int,
    ranks: int,
    patience_s: float,
    number: int | None = None,
    scope: str = "",
) -> list[list[tuple[str, str]]]:
    """Every rank's order of (collective, group), by rank. `number` tells exchanges apart; counted up where None.

    scope: who exchanges, where not everyone does; `rank` counts from 0 among them

    Raises: E0757 when a rank has not written its order in time.
    """
    if number is None:
        number = _exchanges[scope] = _exchanges.get(scope, -1) + 1
    members = scope.split(",") if scope else [str(r) for r in range(ranks)]
    keys = [f"fp8c/collective-order/{scope}/{number}/{r}" for r in range(ranks)]
    store.set(keys[rank], json.dumps(mine))
    found: list[list[tuple[str, str]]] = []
    for other, key in enumerate(keys):
        try:
            store.wait([key], datetime.timedelta(seconds=patience_s))
        except RuntimeError as error:  # DistStoreError, a RuntimeError, when time is up
            raise fail(
                "E0757",
                f"rank {members[other]} has not compiled graph {number} within {patience_s:g} s, so its order is unknown",
                help="all ranks have to compile the same graphs; look for a recompilation on one of them",
            ) from error
        found.append([(name, group) for name, group in json.loads(store.get(key))])
    return found


def disagreements(orders: list[list[tuple[str, str]]], members: Sequence[int] = ()) -> list[Diagnostic]:
    """What differs between ranks' orders of (collective, group), and who would wait for whom."""
    if all(order == orders[0] for order in orders):
        return []
    members = members or range(len(orders))
    everyone = tuple(range(len(orders)))
    found = check_ranks({r: [CollectiveCall(n, everyone) for n, _ in order] for r, order in enumerate(orders)})
    other = next(r for r, order in enumerate(orders) if order != orders[0])
    at = next((i for i, (a, b) in enumerate(zip(orders[0], orders[other])) if a != b), -1)
    what = f"call {at}: {orders[0][at][0]} and {orders[other][at][0]}" if at >= 0 else "another number of calls"
    return [
        Diagnostic("E0757", f"ranks {members[0]} and {members[other]} issue collectives in different orders ({what})"),
        *found,
    ]


# ----------------------------------------------------------------------------------------------------------- pairing


def pair_graphs(forward: fx.GraphModule, backward: fx.GraphModule) -> fx.GraphModule:
    """One graph that runs a forward and a backward of different micro-batches: inputs of the first, then of the second;
    returns (forward's outputs, backward's outputs).

    Nothing of one reads the other, so `schedule_graph` interleaves them: DualPipe's overlapped pair, from plain graphs.
    Attributes of both modules are kept under `forward_chunk.` and `backward_chunk.`.
    """
    root = torch.nn.Module()
    merged = fx.Graph()
    halves = (("forward_chunk", forward), ("backward_chunk", backward))
    copies: dict[fx.Node, fx.Node] = {}
    for name, half in halves:
        root.add_module(name, _bare(half))
        for node in half.graph.find_nodes(op="placeholder"):
            copies[node] = merged.placeholder(f"{name}_{node.target}")
            copies[node].meta = dict(node.meta)
    outputs: list[Any] = []
    for name, half in halves:
        for node in half.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                outputs.append(fx.map_arg(node.args[0], lambda n: copies[n]))
                continue
            copies[node] = merged.node_copy(node, lambda n: copies[n])
            if node.op in ("get_attr", "call_module"):
                copies[node].target = f"{name}.{node.target}"
    merged.output(tuple(outputs))
    return fx.GraphModule(root, merged)


def _bare(module: fx.GraphModule) -> torch.nn.Module:
    holder = torch.nn.Module()
    for key, value in module._modules.items():
        holder.add_module(key, value)
    for key, parameter in module._parameters.items():
        holder.register_parameter(key, parameter)
    for key, buffer in module._buffers.items():
        holder.register_buffer(key, buffer)
    for key, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            setattr(holder, key, value)
    return holder
