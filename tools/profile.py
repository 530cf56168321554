"""`fp8c profile`: read a Chrome trace of GPU kernels (torch.profiler, kineto) as measured costs.

A kernel belongs to the innermost annotation around the host call that launched it: kernel, its `correlation`, the
`cuda_runtime` event of that number, the `user_annotation` around it on the same thread. Exposed time is what the union
of communication kernels leaves uncovered by the union of compute kernels, over all streams. No torch here.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import statistics
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fp8c.diagnostics import ExitCode, Span, fail
from fp8c.durations import DurationTable, OpDuration
from fp8c.files import reason
from fp8c.overlap import Exposure, length_us, union
from fp8c.schedule import COMM, COMPUTE

#: Kernels that move data between GPUs: NCCL's, DeepEP's, and what PyTorch's symmetric memory calls its own.
COMM_KERNELS = re.compile(r"nccl|deep_?ep|dispatch|combine|all_?to_?all|symm_mem|nvshmem", re.IGNORECASE)
#: Kernels of those libraries that only wait for or count for others; they are no payload.
NOTIFY_KERNELS = re.compile(r"notify|barrier|layout", re.IGNORECASE)


@dataclass(frozen=True)
class Kernel:
    """One kernel run. `blocks` is the number of thread blocks; `annotation` is "" when nothing encloses its launch."""

    name: str
    annotation: str
    stream: int
    start_us: float
    duration_us: float
    blocks: int

    @property
    def is_comm(self) -> bool:
        return bool(COMM_KERNELS.search(self.name)) and not NOTIFY_KERNELS.search(self.name)

    @property
    def span(self) -> tuple[float, float]:
        return self.start_us, self.start_us + self.duration_us


@dataclass(frozen=True)
class CostRow:
    """Kernels of one annotation on one kind of stream, over the whole trace."""

    annotation: str
    on: str
    runs: int
    total_us: float
    median_us: float
    blocks: int


@dataclass(frozen=True)
class ProfileReport:
    """A trace in numbers; `rows` by total time."""

    kernels: int
    span_us: float
    exposure: Exposure
    rows: tuple[CostRow, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "hidden_share": self.exposure.hidden_share}


def read_kernels(path: Path) -> list[Kernel]:
    """Kernels of a Chrome trace (`.json` or `.json.gz`) in order of start.

    Raises: E0961 when the file is no such trace, or holds no kernels.
    """
    span = Span(str(path))
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        document = json.loads(data)
        events = document["traceEvents"] if isinstance(document, dict) else document
        kernels = _kernels([e for e in events if isinstance(e, dict)])
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        why = f"cannot read a Chrome trace: {reason(error)}"
        raise fail("E0961", why, span=span, exit_code=ExitCode.USAGE) from None
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise fail(
            "E0961",
            f"no Chrome trace as a profiler writes it: {type(error).__name__}: {error}",
            span=span,
            exit_code=ExitCode.USAGE,
        ) from None
    if not kernels:
        raise fail(
            "E0961",
            "the trace holds no GPU kernels",
            span=span,
            help="record it with torch.profiler and ProfilerActivity.CUDA",
            exit_code=ExitCode.USAGE,
        )
    return kernels


def _kernels(events: list[dict[str, Any]]) -> list[Kernel]:
    launches: dict[Any, tuple[Any, float]] = {}
    around: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        category = str(event.get("cat", ""))
        arguments = event.get("args") or {}
        if category in ("cuda_runtime", "cuda_driver") and "correlation" in arguments:
            launches[arguments["correlation"]] = (event.get("tid"), float(event["ts"]))
        elif category == "user_annotation" and "dur" in event:
            start = float(event["ts"])
            around.setdefault(event.get("tid"), []).append((start, start + float(event["dur"]), str(event["name"])))
    kernels = []
    for event in events:
        if event.get("cat") != "kernel" or event.get("ph") != "X":
            continue
        arguments = event.get("args") or {}
        launch = launches.get(arguments.get("correlation"))
        blocks = 1
        for size in arguments.get("grid") or (1,):
            blocks *= int(size)
        kernels.append(
            Kernel(
                str(event["name"]),
                _innermost(around.get(launch[0], []), launch[1]) if launch else "",
                int(arguments.get("stream", event.get("tid", 0))),
                _time_us(event, "ts"),
                _time_us(event, "dur"),
                blocks,
            )
        )
    return sorted(kernels, key=lambda k: (k.start_us, k.name))


def _time_us(event: dict[str, Any], key: str) -> float:
    time_us = float(event[key])
    if not math.isfinite(time_us) or (key == "dur" and time_us < 0):
        raise ValueError(f"kernel {event['name']} has {key} {event[key]}")
    return time_us


def _innermost(annotations: list[tuple[float, float, str]], time_us: float) -> str:
    enclosing = [(end - start, name) for start, end, name in annotations if start <= time_us <= end]
    return min(enclosing)[1] if enclosing else ""


def profile(path: Path) -> ProfileReport:
    """What a trace says: cost per annotation, and how much communication is exposed."""
    kernels = read_kernels(path)
    compute = [k.span for k in kernels if not COMM_KERNELS.search(k.name)]
    comm = [k.span for k in kernels if k.is_comm]
    sent, busy = length_us(union(comm)), length_us(union(compute))
    either = length_us(union([*comm, *compute]))
    first, last = min(k.start_us for k in kernels), max(k.span[1] for k in kernels)
    exposed = Exposure(sent, either - busy, busy, last - first)
    return ProfileReport(len(kernels), last - first, exposed, tuple(cost_rows(kernels)))


def cost_rows(kernels: Iterable[Kernel]) -> list[CostRow]:
    """Totals per annotation (per kernel name where there is none) and kind of stream, largest first."""
    grouped: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        key = (kernel.annotation or kernel.name, COMM if kernel.is_comm else COMPUTE)
        grouped.setdefault(key, []).append(kernel)
    rows = [
        CostRow(
            name,
            on,
            len(found),
            sum(k.duration_us for k in found),
            statistics.median(k.duration_us for k in found),
            max(k.blocks for k in found),
        )
        for (name, on), found in grouped.items()
    ]
    return sorted(rows, key=lambda r: (-r.total_us, r.annotation, r.on))


def measured_costs(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Microseconds per annotation: what `schedule_graph` needs when annotations are node names.

    A node is taken to launch each of its kernels once per run, so the medians of its kernels are added.
    """
    grouped: dict[str, dict[str, list[float]]] = {}
    for kernel in kernels:
        if kernel.annotation:
            grouped.setdefault(kernel.annotation, {}).setdefault(kernel.name, []).append(kernel.duration_us)
    return {name: sum(statistics.median(times) for times in by_kernel.values()) for name, by_kernel in grouped.items()}


def with_measured(table: DurationTable, measured_ms: Mapping[str, float], layers: int) -> DurationTable:
    """The table with durations replaced where the trace has an annotation `layer.phase.operator` (`moe.F.attention`);
    `measured_ms` are totals over `layers` layers of that kind.

    Raises: E0912 when no annotation names an operator of the table.
    """
    if layers < 1:
        raise fail("E0911", f"a trace covers at least 1 layer, found {layers}", exit_code=ExitCode.USAGE)
    used = 0
    ops: list[OpDuration] = []
    for op in table.ops:
        total = measured_ms.get(f"{op.layer}.{op.key}")
        used += total is not None
        ops.append(op if total is None else replace(op, ms=total / layers))
    if not used:
        known = ", ".join(f"{op.layer}.{op.key}" for op in table.ops[:4])
        raise fail(
            "E0912",
            "no annotation of the trace names an operator of the table",
            help=f"annotate the step with names such as {known}",
        )
    return replace(table, ops=tuple(ops))


def totals_ms(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds per annotation over the whole trace."""
    out: dict[str, float] = {}
    for kernel in kernels:
        if kernel.annotation:
            out[kernel.annotation] = out.get(kernel.annotation, 0.0) + kernel.duration_us / 1000.0
    return out


def profile_text(report: ProfileReport, limit: int = 20) -> str:
    exposed = report.exposure
    lines = [
        f"kernels        {report.kernels:,} in {report.span_us / 1e3:.3f} ms",
        f"compute        {exposed.compute_us / 1e3:.3f} ms",
        f"communication  {exposed.comm_us / 1e3:.3f} ms, exposed {exposed.exposed_us / 1e3:.3f} ms",
        f"hidden         {exposed.hidden_share:.1%}",
        "",
        f"{'total ms':>10}  {'runs':>6}  {'median us':>10}  {'blocks':>6}  where",
    ]
    for row in report.rows[:limit]:
        lines.append(
            f"{row.total_us / 1e3:>10.3f}  {row.runs:>6}  {row.median_us:>10.1f}  {row.blocks:>6}  "
            f"{row.annotation} ({row.on})"
        )
    return "\n".join(lines)
