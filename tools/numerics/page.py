"""What `fp8c numerics` shows: a table for the terminal, one JSON document, and a picture of the error over depth.

The picture is an SVG, the page that holds it a single HTML file with the table of every operand; neither loads anything.
"""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fp8c.tools.numerics.measure import SLACK, ErrorStats, Numerics, OperandStats, by_layer
from fp8c.tools.numerics.step import Part

OPERANDS = ("x", "w", "dy")
GEMMS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class LayerRow:
    """The worst of one layer: SQNR by operand, output error (and its tolerance) by GEMM; NaN where there is none."""

    layer: str
    sqnr_db: dict[str, float]
    tolerance_db: dict[str, float]
    error: dict[str, float]
    tolerance: dict[str, float]
    cosine: float
    underflow: float
    saturated: float
    is_within: bool


def layer_rows(found: Numerics) -> list[LayerRow]:
    rows = []
    for layer, parts in by_layer(found).items():
        operands = {name: [found.operands[p] for p in parts if p.operand == name] for name in OPERANDS}
        uses = {p.use for p in parts}
        outputs = {
            gemm: [o for (use, which), o in found.outputs.items() if use in uses and which == gemm and o.is_quantized]
            for gemm in GEMMS
        }
        worst = {gemm: max(given, key=_over, default=None) for gemm, given in outputs.items()}
        lowest = {
            name: min(given, key=lambda s: s.sqnr_db - s.tolerance_db, default=None) for name, given in operands.items()
        }
        everything = [found.operands[p] for p in parts]
        rows.append(
            LayerRow(
                "-" if layer is None else str(layer),
                {name: s.sqnr_db if s else math.nan for name, s in lowest.items()},
                {name: s.tolerance_db if s else math.nan for name, s in lowest.items()},
                {gemm: o.relative_error if o else math.nan for gemm, o in worst.items()},
                {gemm: o.tolerance if o else math.nan for gemm, o in worst.items()},
                min((o.cosine for o in outputs["wgrad"]), default=math.nan),
                max(s.underflow_share for s in everything),
                max(s.saturated_share for s in everything),
                all(s.is_within for s in everything) and all(o.is_within for group in outputs.values() for o in group),
            )
        )
    return rows


def _over(stats: ErrorStats) -> float:
    return stats.relative_error / stats.tolerance


def text(found: Numerics) -> str:
    """The table of layers, the losses, and where the tolerance is left first."""
    bf16, spec, ideal = found.losses[0]
    total = found.total_gradient
    lines = [
        f"{found.model} under {found.spec} for {found.target}: {found.batches} batch{'es' if found.batches > 1 else ''}, "
        f"{len(found.operands)} FP8 operands" + (f", fault {found.fault}" if found.fault else ""),
        f"  loss       {spec:.5f}, BF16 {bf16:.5f} ({found.loss_error:+.2e}), ideal rounding {ideal:.5f}",
        f"  gradients  relative error {total.relative_error:.2e}, explained {total.tolerance:.2e}, cosine {total.cosine:.6f}",
    ]
    if found.rerouted:
        lines.append(f"  routing    replayed from BF16; {found.rerouted:.2%} of the choices would differ")
    lines.append(
        f"  {'layer':>5}  {'SQNR x':>7} {'w':>6} {'dy':>6}  {'fprop':>8} {'dgrad':>8} {'wgrad':>8}  {'cosine':>8}  {'under':>6} {'sat':>6}"
    )
    for row in layer_rows(found):
        sqnr = " ".join(f"{_number(row.sqnr_db[name], '.1f'):>{w}}" for name, w in zip(OPERANDS, (7, 6, 6)))
        errors = " ".join(f"{_number(row.error[gemm], '.2e'):>8}" for gemm in GEMMS)
        shares = f"{row.underflow:>6.2%} {row.saturated:>6.2%}"
        mark = "" if row.is_within else "  outside its tolerance"
        lines.append(f"  {row.layer:>5}  {sqnr}  {errors}  {_number(row.cosine, '.5f'):>8}  {shares}{mark}")
    first = found.first_leaving()
    if first is None:
        lines.append("  every operand, output and gradient is within the tolerance of its formats")
    else:
        where = found.places[first[1]].layer_text if first[1] in found.places else "-"
        count = sum(1 for _ in found.leaving())
        lines.append(f"  the tolerance is first left in layer {where}, at {first[0]} ({count} values leave it)")
    return "\n".join(lines)


def _number(value: float, how: str) -> str:
    return "-" if math.isnan(value) else format(value, how)


def to_json(found: Numerics) -> dict[str, Any]:
    total = found.total_gradient
    first = found.first_leaving()
    return {
        "model": found.model,
        "spec": found.spec,
        "target": found.target,
        "batches": found.batches,
        "fault": found.fault,
        "slack": SLACK,
        "losses": [{"bf16": a, "spec": b, "ideal": c} for a, b, c in found.losses],
        "loss_error": found.loss_error,
        "rerouted": found.rerouted,
        "first_leaving": first[0] if first else None,
        "gradient": _error_json(total),
        "operands": [_operand_json(found, part, stats) for part, stats in found.operands.items()],
        "outputs": [{"use": use, "gemm": gemm, **_error_json(o)} for (use, gemm), o in found.outputs.items()],
        "gradients": [{"parameter": name, **_error_json(o)} for name, o in found.gradients.items()],
    }


def _error_json(stats: ErrorStats) -> dict[str, Any]:
    return {
        "relative_error": _finite(stats.relative_error),
        "tolerance": _finite(stats.tolerance),
        "cosine": _finite(stats.cosine),
        "within": stats.is_within,
    }


def _operand_json(found: Numerics, part: Part, stats: OperandStats) -> dict[str, Any]:
    place, reason = found.places.get(part.use), found.reasons.get(part)
    return {
        "use": part.use,
        "layer": place.layer if place else None,
        "role": place.roles if place else "",
        "gemm": part.gemm,
        "operand": part.operand,
        "format": stats.format,
        "roundings": stats.roundings,
        "sqnr_db": _finite(stats.sqnr_db),
        "tolerance_db": _finite(stats.tolerance_db),
        "bf16_sqnr_db": _finite(stats.bf16_db),
        "underflow": stats.underflow_share,
        "saturated": stats.saturated_share,
        "scales": {str(exponent): count for exponent, count in sorted(stats.scales.items())},
        "within": stats.is_within,
        "rule": f"{reason.rule} ({reason.file}:{reason.line})" if reason else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- the picture ------------------------------------------------------------------------------------------------------

_COLOURS = {"fprop": "#0072b2", "dgrad": "#d55e00", "wgrad": "#009e73", "x": "#0072b2", "w": "#009e73", "dy": "#d55e00"}
_SHAPES = {"fprop": "circle", "x": "circle", "dgrad": "square", "dy": "square", "wgrad": "diamond", "w": "diamond"}
_WIDTH, _PANEL, _LEFT, _TOP = 760, 190, 64, 54


def svg(found: Numerics) -> str:
    """Error over depth: outputs against BF16 (above), operands against what they were quantized from, scales (below)."""
    rows = layer_rows(found)
    errors = {gemm: [row.error[gemm] for row in rows] for gemm in GEMMS}
    limits = {gemm: [row.tolerance[gemm] for row in rows] for gemm in GEMMS}
    noise = {name: [10 ** (-row.sqnr_db[name] / 20) for row in rows] for name in OPERANDS}
    bounds = {name: [10 ** (-row.tolerance_db[name] / 20) for row in rows] for name in OPERANDS}
    layers = [row.layer for row in rows]
    body = [
        *_panel(_TOP, "worst relative error of a layer's GEMM outputs against BF16", layers, errors, limits),
        *_panel(
            _TOP + _PANEL + 80,
            "worst relative error of its operands against what they were quantized from",
            layers,
            noise,
            bounds,
        ),
        *_histogram(_TOP + 2 * (_PANEL + 80), found),
    ]
    height = _TOP + 2 * (_PANEL + 80) + 150
    title = f"{found.model} under {found.spec}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" '
        f'font-size="12" role="img" aria-label="Error over depth, {html.escape(title)}">'
    )
    background = f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>'
    caption = f'<text x="{_LEFT}" y="20" font-size="14" fill="#222222">{html.escape(title)}</text>'
    return "\n".join([head, background, caption, *body, "</svg>"]) + "\n"


def _panel(
    top: int, title: str, layers: Sequence[str], series: dict[str, list[float]], limits: dict[str, list[float]]
) -> Iterable[str]:
    values = [v for line in (*series.values(), *limits.values()) for v in line if math.isfinite(v) and v > 0]
    if not values:
        return
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.01))
    right, bottom = _WIDTH - 20, top + _PANEL

    def x(i: int) -> float:
        return _LEFT + (right - _LEFT) * (i + 0.5) / len(layers)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (math.log10(value) - low) / max(1, high - low)

    yield f'<text x="{_LEFT}" y="{top - 10}" fill="#222222">{title}; dashed: its tolerance</text>'
    for power in range(low, high + 1):
        label = f"{10.0 ** (power + 2):g} %"
        yield f'<line x1="{_LEFT}" x2="{right}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}" stroke="#dddddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y(10.0**power) + 4:.1f}" text-anchor="end" fill="#555555">{label}</text>'
    step = max(1, len(layers) // 20)
    for i, layer in enumerate(layers[::step]):
        yield f'<text x="{x(i * step):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555555">{html.escape(layer)}</text>'
    for k, (name, line) in enumerate(series.items()):
        colour = _COLOURS[name]
        yield _polyline(
            [(x(i), y(v)) for i, v in enumerate(limits[name]) if math.isfinite(v) and v > 0], colour, dashed=True
        )
        points = [(x(i), y(v)) for i, v in enumerate(line) if math.isfinite(v) and v > 0]
        yield _polyline(points, colour)
        yield from (_mark(px, py, name) for px, py in points)
        yield _mark(_LEFT + 10 + 90 * k, bottom + 34, name)
        yield f'<text x="{_LEFT + 20 + 90 * k}" y="{bottom + 38}" fill="#222222">{name}</text>'


def _polyline(points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> str:
    place = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dash = ' stroke-dasharray="4 4" opacity="0.7"' if dashed else ""
    return f'<polyline points="{place}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'


def _mark(x: float, y: float, name: str) -> str:
    colour = _COLOURS[name]
    match _SHAPES[name]:
        case "circle":
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        case "square":
            return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="{colour}"/>'
        case _:
            return f'<path d="M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z" fill="{colour}"/>'


def _histogram(top: int, found: Numerics) -> Iterable[str]:
    """How many scales have which power of two, for each operand, every operand's row scaled to its own largest count."""
    counts: dict[str, Counter[int]] = {name: Counter() for name in OPERANDS}
    for part, stats in found.operands.items():
        if part.operand in counts:
            counts[part.operand].update(stats.scales)
    exponents = sorted({e for count in counts.values() for e in count})
    if not exponents:
        return
    low, high = exponents[0], exponents[-1]
    wide = (_WIDTH - 20 - _LEFT) / (high - low + 1)
    yield f'<text x="{_LEFT}" y="{top - 10}" fill="#222222">scales by power of two: share of an operand\'s scales</text>'
    for k, (name, count) in enumerate(counts.items()):
        base = top + 30 + 34 * k
        yield f'<text x="{_LEFT - 8}" y="{base - 6}" text-anchor="end" fill="#222222">{name}</text>'
        most = max(count.values(), default=1)
        for exponent, number in sorted(count.items()):
            tall = max(1.0, 26 * number / most)
            yield (
                f'<rect x="{_LEFT + wide * (exponent - low) + 1:.1f}" y="{base - tall:.1f}" width="{max(1.0, wide - 2):.1f}" '
                f'height="{tall:.1f}" fill="{_COLOURS[name]}"><title>2^{exponent}: {number} scales</title></rect>'
            )
    for exponent in range(low, high + 1, max(1, (high - low) // 12)):
        place = _LEFT + wide * (exponent - low + 0.5)
        yield f'<text x="{place:.1f}" y="{top + 118}" text-anchor="middle" fill="#555555">2^{exponent}</text>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; background: #fff }}
svg {{ max-width: 100%; height: auto }} pre {{ overflow-x: auto; background: #f6f6f6; padding: 1em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: 0.1em 0.7em; text-align: left; border-bottom: 1px solid #ddd }}
tr.out td {{ background: #fdecea }}
</style></head><body>
<h1>{title}</h1>
<pre>{summary}</pre>
{picture}
<h2>Operands</h2>
<table><tr><th>layer<th>operand<th>role<th>format<th>SQNR<th>tolerance<th>against BF16<th>underflow<th>saturated<th>scales<th>rule</tr>
{rows}
</table>
</body></html>
"""


def page(found: Numerics, notes: Sequence[str] = ()) -> str:
    """The HTML page. Every name of the model is escaped; nothing is loaded."""
    rows = []
    for part, stats in found.operands.items():
        item = _operand_json(found, part, stats)
        exponents = sorted(stats.scales)
        scales = f"2^{exponents[0]} to 2^{exponents[-1]}" if exponents else "-"
        cells = [
            "-" if item["layer"] is None else item["layer"],
            str(part),
            item["role"],
            stats.format,
            f"{stats.sqnr_db:.1f} dB",
            f"{stats.tolerance_db:.1f} dB",
            "-" if math.isnan(stats.bf16_db) else f"{stats.bf16_db:.1f} dB",
            f"{stats.underflow_share:.2%}",
            f"{stats.saturated_share:.2%}",
            scales,
            item["rule"] or "-",
        ]
        row = "".join(f"<td>{html.escape(str(cell))}" for cell in cells)
        rows.append(f"<tr{'' if stats.is_within else ' class=out'}>{row}</tr>")
    summary = "\n".join([text(found), *notes])
    title = html.escape(f"fp8c numerics: {found.model} under {found.spec}")
    return _PAGE.format(title=title, summary=html.escape(summary), picture=svg(found), rows="\n".join(rows))
