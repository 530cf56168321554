"""The pictures of `docs/overlap.md`, as SVG, from the scheduler and the simulator: `fp8c simulate --figures DIR`.

Four pictures: a pair before and after scheduling, hidden share over communication's SM share, hidden share over routing
skew, chunks chosen over routing skew. Each is drawn from numbers that are returned as well. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from fp8c.cluster import ClusterRun, Mesh, StepResult, draw_loads, simulate_stream
from fp8c.cost_model import Machine
from fp8c.durations import DurationTable
from fp8c.files import check_writable, write_file
from fp8c.overlap import CHUNK_LIMITS, choose_comm_sms, schedule_pair
from fp8c.schedule import COMM, COMPUTE, Schedule

COLOURS = {"F": "#4c78a8", "B": "#e45756", "W": "#72b7b2", "axis": "#555555", "grid": "#dddddd"}
LINES = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518")
EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
CHUNKS = (1, 2, 3, 4)


@dataclass(frozen=True)
class SharePoint:
    """The published pair with another number of SMs for communication."""

    comm_sms: int
    makespan_ms: float
    hidden_share: float
    gap: float


@dataclass(frozen=True)
class SkewPoint:
    """Streams of micro-batches through 4 layers on one expert-parallel group under one strength of skew, per number of
    token chunks: pairs, and forwards alone. Milliseconds per micro-batch; hidden share is the mean over ranks."""

    zipf: float
    imbalance: float
    pair_ms: Mapping[int, float]
    pair_hidden_share: Mapping[int, float]
    forward_ms: Mapping[int, float]
    forward_hidden_share: Mapping[int, float]
    chosen_pair_chunks: int
    chosen_forward_chunks: int


def share_curve(table: DurationTable, machine: Machine, layers: tuple[str, ...]) -> list[SharePoint]:
    return [
        SharePoint(r.comm_sms, r.schedule.makespan_us / 1e3, r.exposure.hidden_share, r.schedule.gap)
        for r in choose_comm_sms(table, machine, layers, layers)[1]
    ]


def skew_curve(
    table: DurationTable,
    machine: Machine,
    layers: tuple[str, ...],
    *,
    exponents: Sequence[float] = EXPONENTS,
    micro_batches: int = 12,
    patterns: int = 4,
) -> list[SkewPoint]:
    """For each exponent, the streams with every number of chunks. The order is the one found for even durations, as a
    compiler has to fix it before the routing is known; loads differ by rank, layer and micro-batch."""
    points = []
    size = table.deployment.expert_parallel
    mesh = Mesh(1, size, size, micro_batches)
    for zipf in exponents:
        run = ClusterRun(size, machine, zipf=zipf, patterns=patterns, comm_sms=table.measured.comm_sms)
        loads = draw_loads(table, mesh, run)
        assert loads is not None
        found: dict[bool, dict[int, StepResult]] = {}
        for is_paired in (True, False):
            found[is_paired] = {}
            for n in CHUNKS:
                cut = replace(run, splits=(n,), pair_split=n, limits=CHUNK_LIMITS)
                found[is_paired][n] = simulate_stream(table, cut, layers, micro_batches, loads, is_paired=is_paired)
        ms = {
            is_paired: {n: r.step_us / 1e3 / micro_batches for n, r in by_chunks.items()}
            for is_paired, by_chunks in found.items()
        }
        hidden = {
            is_paired: {n: 1.0 - r.mean("exposed_us") / r.mean("comm_us") for n, r in by_chunks.items()}
            for is_paired, by_chunks in found.items()
        }
        points.append(
            SkewPoint(
                zipf,
                float(loads.experts.max(axis=1).mean()),
                ms[True],
                hidden[True],
                ms[False],
                hidden[False],
                min(ms[True], key=lambda n: (ms[True][n], n)),
                min(ms[False], key=lambda n: (ms[False][n], n)),
            )
        )
    return points


def write_figures(table: DurationTable, machine: Machine, folder: Path, layers: int = 4) -> dict[str, Any]:
    """Draw all pictures into `folder`; returns their numbers."""
    check_writable(folder / "pair.svg")
    chunk = ("moe",) * layers
    report = schedule_pair(table, chunk, chunk)
    shares = share_curve(table, machine, chunk)
    skews = skew_curve(table, machine, chunk)
    pictures = {
        "pair.svg": draw_pair(report.before, report.schedule),
        "sm_share.svg": draw_lines(
            "Communication hidden, and length of the pair, over SMs for communication",
            "SMs for communication (of 132)",
            "share of communication hidden; makespan / 200 ms",
            [p.comm_sms for p in shares],
            {
                "hidden": [p.hidden_share for p in shares],
                "makespan / 200 ms": [p.makespan_ms / 200.0 for p in shares],
            },
        ),
        "skew.svg": draw_lines(
            "Communication hidden over routing skew",
            "Zipf exponent of expert popularity",
            "share of communication hidden",
            [p.zipf for p in skews],
            {
                "pairs": [p.pair_hidden_share[1] for p in skews],
                **{f"forwards, {_chunks(n)}": [p.forward_hidden_share[n] for p in skews] for n in CHUNKS},
            },
        ),
        "chunks.svg": draw_lines(
            "Forwards alone: time for each number of token chunks, over the best",
            "Zipf exponent of expert popularity",
            "time over the best",
            [p.zipf for p in skews],
            {_chunks(n): [p.forward_ms[n] / min(p.forward_ms.values()) for p in skews] for n in CHUNKS},
        ),
    }
    for name, text in pictures.items():
        write_file(folder / name, text)
    return {
        "pair_ms": report.schedule.makespan_us / 1e3,
        "sm_share": [asdict(p) for p in shares],
        "skew": [asdict(p) for p in skews],
    }


def _chunks(n: int) -> str:
    return "whole" if n == 1 else f"{n} chunks"


# ------------------------------------------------------------------------------------------------------------- drawing


def draw_pair(before: Schedule, after: Schedule) -> str:
    """Two Gantt charts on one time axis: forward blue, input gradient red, weight gradient green."""
    width, left, row = 1100, 150, 26
    end_us = max(before.makespan_us, after.makespan_us)
    scale = (width - left - 20) / end_us
    parts: list[str] = []
    y = 40
    for title, schedule in (("program order", before), ("scheduled", after)):
        text = f"{title}: {schedule.makespan_us / 1e3:.1f} ms"
        parts.append(_text(left, y - 8, text, 13))
        for lane, resource in enumerate((COMPUTE, COMM)):
            top = y + lane * (row + 4)
            parts.append(_text(10, top + 17, {COMPUTE: "compute", COMM: "communication"}[resource], 13))
            for slot in schedule.slots:
                if slot.task.resource != resource or slot.task.duration_us <= 0:
                    continue
                phase = slot.task.name.split("/")[1][0]
                x, length = left + slot.start_us * scale, slot.task.duration_us * scale
                hint = f"{slot.task.name} {slot.start_us / 1e3:.2f} to {slot.end_us / 1e3:.2f} ms"
                parts.append(
                    f'<rect x="{x:.1f}" y="{top}" width="{max(length - 0.6, 0.3):.1f}" height="{row}"'
                    f' fill="{COLOURS[phase]}"><title>{escape(hint)}</title></rect>'
                )
        y += 2 * row + 60
    ticks = range(0, int(end_us / 1e3) + 1, 20)
    for tick in ticks:
        x = left + tick * 1e3 * scale
        parts.append(f'<line x1="{x:.1f}" y1="30" x2="{x:.1f}" y2="{y - 40}" stroke="{COLOURS["grid"]}"/>')
        parts.append(_text(x - 6, y - 24, str(tick), 11))
    parts.append(_text(width - 60, y - 8, "ms", 11))
    for i, (phase, label) in enumerate((("F", "forward"), ("B", "input gradient"), ("W", "weight gradient"))):
        x = left + i * 160
        parts.append(f'<rect x="{x}" y="{y - 14}" width="12" height="12" fill="{COLOURS[phase]}"/>')
        parts.append(_text(x + 18, y - 4, label, 12))
    # Grid lines first, so that bars cover them.
    parts.sort(key=lambda p: not p.startswith("<line"))
    return _svg(width, y + 10, parts)


def draw_lines(
    title: str, x_label: str, y_label: str, xs: Sequence[float], series: Mapping[str, Sequence[float]]
) -> str:
    """A line chart with a legend; the y axis starts at 0 unless all values are 1 or more."""
    width, height, left, top, right, bottom = 760, 380, 70, 40, 220, 330
    values = [v for row in series.values() for v in row]
    low, high = (1.0 if min(values) >= 1.0 else 0.0), max(values) * 1.05
    x0, x1 = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            bottom - (y - low) / (high - low) * (bottom - top),
        )

    parts = [_text(left, 22, title, 14)]
    for i in range(6):
        value = low + (high - low) * i / 5
        _, y = place(x0, value)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" stroke="{COLOURS["grid"]}"/>')
        parts.append(_text(left - 42, y + 4, f"{value:.2f}", 11))
    for x in xs:
        px, _ = place(x, low)
        parts.append(f'<line x1="{px:.1f}" y1="{bottom}" x2="{px:.1f}" y2="{bottom + 4}" stroke="{COLOURS["axis"]}"/>')
    for x in _few(xs):
        px, _ = place(x, low)
        parts.append(_text(px - 8, bottom + 18, f"{x:g}", 11))
    parts.append(_text(left, bottom + 38, x_label, 12))
    parts.append(f'<g transform="translate(16 {bottom}) rotate(-90)">{_text(0, 0, y_label, 12)}</g>')
    for i, (name, row) in enumerate(series.items()):
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in zip(xs, row)))
        colour = LINES[i % len(LINES)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in zip(xs, row):
            px, py = place(x, y)
            parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"><title>{escape(name)}: {x:g}, {y:.4f}'
                "</title></circle>"
            )
        parts.append(f'<rect x="{width - right + 14}" y="{top + i * 22}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(width - right + 32, top + i * 22 + 10, name, 12))
    return _svg(width, height, parts)


def _few(xs: Sequence[float]) -> list[float]:
    """Ticks far enough apart to be labelled."""
    span = max(xs) - min(xs)
    out: list[float] = []
    for x in xs:
        if not out or x - out[-1] >= span / 14:
            out.append(x)
    return out


def _text(x: float, y: float, text: str, size: int) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="#222222">{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )
