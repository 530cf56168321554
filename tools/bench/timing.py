"""Timing of contenders in turn, in one process, through CUDA graphs.

A GPU at its power limit runs a kernel up to a fifth slower or faster depending on what ran before it. So each contender is
timed twice: sustained (mean over `seconds` of back-to-back runs, in two turns, the second in reverse order) and burst (20 ms after
`idle_seconds` of rest), and only figures of one process are compared. On an H200 the clock follows the power of the last tenth of a second: contenders whose turns are
shorter all run at one clock, and the one that needs less energy for a result gains nothing by it. After another kernel it swings by 4 % for 0.4 s,
which is each turn's warm-up; turns should last half a second or more. (Turns of 0.3 s behind 0.12 s gave ratios that differed by 3 % and more from run to run, and at
times all of a row to the one whose place in the order was better; two turns of 1 s behind 0.4 s agree within 0.5 %.) Graphs keep launch overhead out of short kernels.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

TURNS = 2
WARMUP_SECONDS = 0.4
BURST_SECONDS = 0.02
GRAPH_MICROSECONDS = 2000  # of work in one graph, so that its replay hides the next one's launch


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    sustained_us: float
    burst_us: float


def time_in_turn(
    contenders: dict[str, Callable[[], object]], expected_us: float, seconds: float, idle_seconds: float
) -> dict[str, Timing]:
    """Time every contender that can be captured; one that fails is named on stderr and left out."""
    calls = max(1, round(GRAPH_MICROSECONDS / expected_us))
    graphs = {}
    for name, call in contenders.items():
        try:
            graphs[name] = _capture(call, calls)
        except Exception as error:
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
    sustained: dict[str, list[float]] = {name: [] for name in graphs}
    order = random.Random(0).sample(list(graphs), len(graphs))
    for turn in range(TURNS):
        for name in reversed(order) if turn % 2 else order:
            _times_us(graphs[name], calls, WARMUP_SECONDS)
            sustained[name] += _times_us(graphs[name], calls, seconds / TURNS)
    burst = {}
    for name, graph in graphs.items():
        torch.cuda.synchronize()
        time.sleep(idle_seconds)
        burst[name] = statistics.median(_times_us(graph, calls, BURST_SECONDS))
    return {name: Timing(statistics.fmean(sustained[name]), burst[name]) for name in graphs}


def _capture(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
    torch.cuda.synchronize()
    return graph


def _times_us(graph: torch.cuda.CUDAGraph, calls: int, seconds: float) -> list[float]:
    batch = 8
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(batch + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        events[-1].synchronize()
        times += [x.elapsed_time(y) * 1e3 / calls for x, y in zip(events, events[1:])]
    return times
