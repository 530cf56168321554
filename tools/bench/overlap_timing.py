"""Times for the overlap benchmark: nodes alone, compute beside transfers, and traces."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from fp8c.contention import Interference
from fp8c.graph_costs import WAIT, is_collective, node_operator, reads_on_host
from fp8c.ops.exchange import all_to_all
from fp8c.overlap import length_us, union


class Clock:
    """Milliseconds of device work, by events on a GPU and by the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def time_ms(self, run: Callable[[], object]) -> float:
        """From a barrier to the end of the slowest rank."""
        self.synchronize()
        dist.barrier()
        started = time.perf_counter()
        run()
        self.synchronize()
        took = torch.tensor([(time.perf_counter() - started) * 1e3], dtype=torch.float64)
        took = took.cuda() if self.is_cuda else took
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        return float(took)


class Timed(fx.Interpreter):
    """Runs a graph node by node and takes the time of each: the device is kept busy while a node's kernels are queued,
    so that what is timed is the device's work and not the host's."""

    def __init__(self, module: fx.GraphModule, clock: Clock) -> None:
        super().__init__(module)
        self.clock = clock
        self.sleep_cycles = 1_500_000  # under a millisecond on an H200
        self.events: dict[str, tuple[Any, Any]] = {}
        self.wall_us: dict[str, float] = {}
        self.moved: dict[str, Tensor] = {}  # what collectives gave

    def run_node(self, n: fx.Node) -> Any:
        launches = n.op == "call_function" and (is_collective(n) or node_operator(n) is not None)
        if not launches or reads_on_host(n):
            return super().run_node(n)
        if not self.clock.is_cuda:
            started = time.perf_counter()
            found = super().run_node(n)
            if is_collective(n):
                found = self.moved[n.name] = WAIT(found)
            self.wall_us[n.name] = (time.perf_counter() - started) * 1e6
            return found
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(self.sleep_cycles)  # type: ignore[no-untyped-call]
        first.record()
        found = super().run_node(n)
        if is_collective(n):
            found = self.moved[n.name] = WAIT(found)
        last.record()
        self.events[n.name] = first, last
        return found

    def durations_us(self) -> dict[str, float]:
        self.clock.synchronize()
        return self.wall_us | {name: a.elapsed_time(b) * 1e3 for name, (a, b) in self.events.items()}


def measured_durations(
    pair: fx.GraphModule, arguments: Callable[[], list[Any]], clock: Clock, repeats: int = 3
) -> dict[str, float]:
    """Microseconds of every node that launches something, alike on all ranks: compute as the slowest rank has it, the
    least of several runs; transfers as the last rank to arrive sees them."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        dist.barrier()
        timed = Timed(pair, clock)
        timed.run(*arguments())
        runs.append(timed.durations_us())
    best = {name: min(run[name] for run in runs) for name in runs[0]}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, best)
    moves = {n.name for n in pair.graph.nodes if is_collective(n)}
    return {n: (min if n in moves else max)(found[n] for found in everyone) for n in best}


def host_read_us(device: str) -> float:
    """Microseconds to copy a few numbers from an idle device to the host: the least of many."""
    numbers = torch.arange(4, device=device)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        numbers.cpu()
        times.append((time.perf_counter() - started) * 1e6)
    return min(times)


# Compute beside transfers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What a setting costs, found without running the schedule it is for. Milliseconds of one pair on this rank.

    compute_ms: all compute of a pair, transfers left out;  beside_ms: the same while unrelated transfers run throughout
    transfer_ms, transfer_beside_ms: one of those transfers alone, and beside that compute
    """

    compute_ms: float
    beside_ms: float
    transfer_ms: float
    transfer_beside_ms: float

    @property
    def interference(self) -> Interference:
        return Interference(
            max(1.0, self.beside_ms / self.compute_ms), max(1.0, self.transfer_beside_ms / self.transfer_ms)
        )


def without_transfers(pair: fx.GraphModule, moved: Sequence[str]) -> fx.GraphModule:
    """The graph with what its collectives `moved` give as further inputs, in that order."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in pair.graph.find_nodes(op="placeholder"):
        copies[node] = graph.placeholder(str(node.target))
    recorded = {name: graph.placeholder(f"recorded_{name}") for name in moved}
    for node in pair.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.name in recorded:
            copies[node] = recorded[node.name]
        elif node.target is WAIT:
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return fx.GraphModule(pair, graph)


#: Rows of the transfers that calibration runs beside compute: short against a pair, long against a launch.
BACKGROUND_ROWS = 8192


def calibrate(
    pair: fx.GraphModule, arguments: list[Any], clock: Clock, group: str, hidden: int, repeats: int = 2
) -> Calibration:
    """Time a pair's compute alone and beside transfers of `group` that have nothing to do with it."""
    with torch.no_grad():
        timed = Timed(pair, clock)
        timed.sleep_cycles = 0
        timed.run(*arguments)
        compute = without_transfers(pair, list(timed.moved))
        inputs = [*arguments, *timed.moved.values()]
        compute(*inputs)
        clock.synchronize()
        if not clock.is_cuda:  # nothing runs beside on a CPU
            alone_ms = min(clock.time_ms(lambda: compute(*inputs)) for _ in range(repeats))
            return Calibration(alone_ms, alone_ms, 1.0, 1.0)
        return _calibrate_on_gpu(lambda: compute(*inputs), clock, group, hidden, repeats)


def _calibrate_on_gpu(
    compute: Callable[[], object], clock: Clock, group: str, hidden: int, repeats: int
) -> Calibration:
    def event() -> Any:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def timed_compute() -> tuple[Any, Any]:
        first, last = event(), event()
        first.record()
        compute()
        last.record()
        return first, last

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    world = dist.get_world_size()
    rows = torch.zeros(BACKGROUND_ROWS, hidden, dtype=torch.bfloat16, device="cuda")
    even = [BACKGROUND_ROWS // world] * world

    def transfers(count: int) -> list[Any]:
        marks = [event()]
        with torch.cuda.stream(side):
            marks[0].record()
            for _ in range(count):
                all_to_all(rows, even, even, group)
                marks.append(event())
                marks[-1].record()
        return marks

    def between_ms(marks: Sequence[Any]) -> list[float]:
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]

    def start_together() -> None:
        clock.synchronize()
        dist.barrier()
        clock.synchronize()

    transfers(2)
    start_together()
    alone = transfers(6)
    clock.synchronize()
    transfer_ms = statistics.median(between_ms(alone)[1:])
    start_together()
    compute_ms = min(_elapsed_ms(timed_compute(), clock) for _ in range(repeats))
    most: list[Any] = [None] * world  # all ranks send as often
    dist.all_gather_object(most, int(2.0 * compute_ms / transfer_ms) + 2)
    beside_ms, beside = [], []
    for _ in range(repeats):
        start_together()
        marks = transfers(max(most))
        first, last = timed_compute()
        clock.synchronize()
        beside_ms.append(first.elapsed_time(last))
        covered = [ms for mark, ms in zip(marks[1:], between_ms(marks)) if mark.elapsed_time(last) > 0.0]
        beside += covered[1:]
    return Calibration(compute_ms, min(beside_ms), transfer_ms, statistics.median(beside))


def _elapsed_ms(marks: tuple[Any, Any], clock: Clock) -> float:
    clock.synchronize()
    return float(marks[0].elapsed_time(marks[1]))


# Traces --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill of a trace, microseconds."""

    name: str
    stream: str
    start_us: float
    end_us: float

    @property
    def is_transfer(self) -> bool:
        return "nccl" in self.name.lower()


def trace(run: Callable[[], object], file: Path) -> list[Kernel]:
    """Everything the device did during `run`, by start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    file.unlink()
    kernels = [
        Kernel(e["name"], str(e.get("args", {}).get("stream", "")), e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(kernels, key=lambda k: k.start_us)


def transfer_times_us(kernels: Sequence[Kernel]) -> dict[str, list[float]]:
    """How long each transfer's kernel ran, by stream, in order."""
    found: dict[str, list[float]] = {}
    for kernel in kernels:
        if kernel.is_transfer:
            found.setdefault(kernel.stream, []).append(kernel.end_us - kernel.start_us)
    return found


def exposed_share(kernels: Sequence[Kernel], everyone: Sequence[dict[str, list[float]]] = ()) -> dict[str, float]:
    """Communication and how much of it nothing was computed beside: unions of spans, milliseconds.

    A transfer's kernel also waits for the other ranks. With `everyone`, the ranks' `transfer_times_us`, a transfer
    counts from when its last rank has come: it takes what it took on the rank that waited least.
    """
    computed = [(k.start_us, k.end_us) for k in kernels if not k.is_transfer]
    moved: list[tuple[float, float]] = []
    at: dict[str, int] = {}
    for kernel in kernels:
        if kernel.is_transfer:
            place = at[kernel.stream] = at.get(kernel.stream, -1) + 1
            took = min((times[kernel.stream][place] for times in everyone), default=kernel.end_us - kernel.start_us)
            moved.append((kernel.end_us - took, kernel.end_us))
    comm, compute = length_us(union(moved)), length_us(union(computed))
    exposed = length_us(union([*moved, *computed])) - compute
    return {
        "comm_ms": comm / 1e3,
        "compute_ms": compute / 1e3,
        "exposed_ms": exposed / 1e3,
        "hidden_share": 1.0 - exposed / comm if comm else 1.0,
    }


def hidden(run: Callable[[], object], out: Path) -> dict[str, Any]:
    """Trace `run` on every rank. What rank 0 saw, the least hidden share, and what every rank saw: with `transfers_only`
    the waiting for other ranks is left out."""
    rank, world = dist.get_rank(), dist.get_world_size()
    kernels = trace(run, out / f"overlap_rank{rank}.json")
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, transfer_times_us(kernels))
    shape = [{stream: len(times) for stream, times in one.items()} for one in everyone]
    span = kernels[-1].end_us - kernels[0].start_us
    seen = {**exposed_share(kernels), "span_ms": span / 1e3, "classes": classes_ms(kernels)}
    if all(one == shape[0] for one in shape):
        seen["transfers_only"] = exposed_share(kernels, everyone)
    ranks: list[Any] = [None] * world
    dist.all_gather_object(ranks, seen)
    found = {**ranks[0], "hidden_share": min(r["hidden_share"] for r in ranks)}
    found["by_rank"] = [{key: value for key, value in r.items() if key != "classes"} for r in ranks]
    return found


def classes_ms(kernels: Sequence[Kernel], most: int = 24) -> dict[str, float]:
    """Milliseconds by kernel name, the longest first: what slows down beside transfers."""
    found: dict[str, float] = {}
    for kernel in kernels:
        name = kernel.name[:80]
        found[name] = found.get(name, 0.0) + (kernel.end_us - kernel.start_us) / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1])[:most])
