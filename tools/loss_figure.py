"""Draw the runs of `fp8c.tools.loss_gap` as one SVG: losses beside BF16 above, the gap below.

    python -m fp8c.tools.loss_figure tools/bench/results/loss_gap_100m_h200_shared.jsonl -o docs/images/loss_gap.svg

Losses are means over the seeds that BF16 and every variant of three seeds or more have in common, smoothed by an
exponential average of 0.9 per 10 steps; variants of fewer seeds have no curve. The gap is of means over 250 steps, seed
by seed, and its band is one standard error on either side. Runs that were stopped before a variant's third longest are
left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, GAP_TOP, RIGHT, BOTTOM = 760, 520, 62, 34, 330, 20, 40
COLOURS = {
    "bf16": "#555555",
    "spec": "#0072b2",
    "blocks": "#d55e00",
    "forward": "#56b4e9",
    "backward": "#cc79a7",
    "dgrad": "#e69f00",
    "bf16-flipped": "#009e73",
    "bf16-again": "#a0a0a0",
    "bf16-launched": "#b0b080",
}
NAMES = {
    "bf16": "BF16",
    "spec": "FP8 (deepseek_v3)",
    "blocks": "128x128 gradients",
    "forward": "fprop alone in FP8",
    "backward": "dgrad and wgrad alone in FP8",
    "dgrad": "dgrad alone in FP8",
    "bf16-flipped": "BF16, batches flipped",
    "bf16-again": "BF16 a second time",
    "bf16-launched": "BF16 without a CUDA graph",
}
WINDOW, ENOUGH = 250, 3  # steps of a gap; seeds of a curve

Runs = dict[tuple[str, int], list[float]]


def read(path: Path) -> Runs:
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {(r["variant"], r["seed"]): r["losses"] for r in records}


def counted(runs: Runs) -> Runs:
    """Without the runs that stopped before their variant's third longest (or shortest, when there are fewer)."""
    lengths: dict[str, list[int]] = {}
    for (variant, _), losses in runs.items():
        lengths.setdefault(variant, []).append(len(losses))
    least = {variant: sorted(found, reverse=True)[:ENOUGH][-1] for variant, found in lengths.items()}
    return {(variant, seed): losses for (variant, seed), losses in runs.items() if len(losses) >= least[variant]}


def in_common(runs: Runs) -> Runs:
    """The runs of variants of three seeds or more, of the seeds that all of these have."""
    seeds = {variant: {s for v, s in runs if v == variant} for variant, _ in runs}
    shown = {variant: found for variant, found in seeds.items() if len(found) >= min(ENOUGH, len(seeds["bf16"]))}
    common = set.intersection(*shown.values())
    return {(v, s): losses for (v, s), losses in runs.items() if v in shown and s in common}


def smoothed(runs: Runs, variant: str) -> list[tuple[int, float]]:
    """Mean over seeds of means over ten steps, then the exponential average."""
    own = [losses for (v, _), losses in runs.items() if v == variant]
    steps = min(map(len, own), default=0)
    points: list[tuple[int, float]] = []
    for start in range(0, steps - 9, 10):
        now = statistics.fmean(statistics.fmean(losses[start : start + 10]) for losses in own)
        points.append((start + 10, now if not points else 0.9 * points[-1][1] + 0.1 * now))
    return points


def gaps(runs: Runs, variant: str) -> list[tuple[int, float, float]]:
    """(last step of a window, mean gap to BF16 in percent, standard error)."""
    seeds = [s for v, s in runs if v == variant and ("bf16", s) in runs]
    steps = min((len(runs[v, s]) for v in (variant, "bf16") for s in seeds), default=0)
    found = []
    for start in range(0, steps - WINDOW + 1, WINDOW):
        part = slice(start, start + WINDOW)
        each = [
            100 * (statistics.fmean(runs[variant, s][part]) / statistics.fmean(runs["bf16", s][part]) - 1)
            for s in seeds
        ]
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0.0
        found.append((start + WINDOW, statistics.fmean(each), error))
    return found


def draw(runs: Runs) -> str:
    runs = counted(runs)
    variants = [v for v in COLOURS if any(v == name for name, _ in runs)]
    last = max(map(len, runs.values()))
    shared = in_common(runs)
    curves = {v: smoothed(shared, v) for v in variants}
    values = [y for curve in curves.values() for x, y in curve if x > last / 30]
    low, high = min(values) * 0.97, max(values)
    differences = {v: gaps(runs, v) for v in variants if v != "bf16"}
    bounds = [y + sign * e for rows in differences.values() for _, y, e in rows for sign in (-1, 1)] or [0.0]
    bottom, top = min(-0.5, *bounds), max(0.5, *bounds)

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / last

    def up(y: float) -> float:
        return TOP + (GAP_TOP - 40 - TOP) * (1 - (min(y, high) - low) / (high - low))

    def down(y: float) -> float:
        return GAP_TOP + (HEIGHT - BOTTOM - GAP_TOP) * (1 - (y - bottom) / (top - bottom))

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18">Loss, mean over seeds; below: gap to BF16 in percent, with one standard error</text>',
    ]
    for number in range(5):
        y = low + (high - low) * number / 4
        lines.append(_rule(up(y), f"{y:.2f}"))
    for tick in (bottom, 0.0, top):
        lines.append(_rule(down(tick), f"{tick:+.2f}", "#999" if tick == 0.0 else "#ddd"))
    for number in range(6):
        x = last * number / 5
        lines.append(f'<text x="{across(x):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{x:.0f}</text>')
    lines.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    for number, variant in enumerate(variants):
        colour = COLOURS[variant]
        points = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curves[variant])
        if points:
            lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.3" points="{points}"/>')
        seeds = sum(v == variant for v, _ in (shared if points else runs))
        place = f'x="{WIDTH - 230}" y="{TOP + 16 + 16 * number}"'
        lines.append(f'<text {place} fill="{colour}">{NAMES[variant]}, {_count(seeds)}</text>')
        rows = differences.get(variant, [])
        if rows:
            band = [(x, y + e) for x, y, e in rows] + [(x, y - e) for x, y, e in reversed(rows)]
            area = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in band)
            points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y, _ in rows)
            lines.append(f'<polygon fill="{colour}" fill-opacity="0.15" points="{area}"/>')
            lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.3" points="{points}"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _count(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def _rule(y: float, text: str, colour: str = "#ddd") -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="loss_figure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    given.out.write_text(draw(read(given.runs)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
