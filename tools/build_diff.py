"""`fp8c diff A B`: what two builds decide, keep, cast and say differently; B may be a spec, resolved on A's model.

Everything is read from the builds' files; neither the model nor torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fp8c.backends.target import load_target
from fp8c.build import MANIFEST, Build, read_build
from fp8c.diagnostics import ExitCode, fail, render
from fp8c.specs.load import load
from fp8c.specs.plan import PrecisionPlan, plan_from_json
from fp8c.specs.plan_diff import Difference, diff_plans
from fp8c.specs.resolve import resolve
from fp8c.tools.build_contents import read_contents, read_lock
from fp8c.tools.explain import ranges, size
from fp8c.tools.viewer.graph_reader import formats_in, is_cast, read_graph

SCHEMA = "fp8c.diff/1"


@dataclass(frozen=True)
class Change:
    """A named figure on both sides; None where a side has none."""

    name: str
    old: int | None
    new: int | None


@dataclass(frozen=True)
class Comparison:
    """What differs. `unknown`: what a spec alone cannot tell, for a comparison with one.

    inputs:   model, spec, target, versions that differ, as (what, old, new)
    saved:    bytes kept for backward by layer; casts: by half, operator and format; gemms: by kind
    messages: diagnostics of one side only, as (gone, added)
    """

    inputs: tuple[tuple[str, str, str], ...]
    decisions: tuple[Difference, ...]
    saved: tuple[Change, ...] = ()
    casts: tuple[Change, ...] = ()
    gemms: tuple[Change, ...] = ()
    gone: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def is_same(self) -> bool:
        return not (self.decisions or self.saved or self.casts or self.gemms or self.gone or self.added)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(old: str, new: str) -> Comparison:
    """Raises: DiagnosticError E0612 for what is no build, and whatever a spec does wrong."""
    a = read_build(old)
    if (Path(new) / MANIFEST).exists() or Path(new).is_dir():
        return compare_builds(a, read_build(new))
    return compare_with_spec(a, new)


def compare_builds(a: Build, b: Build) -> Comparison:
    reports = read_contents(a).report, read_contents(b).report
    texts = [[r["text"] for r in report["remarks"]] for report in reports]
    return Comparison(
        _inputs(a, b),
        diff_plans(_plan(a), _plan(b)),
        _changes(_saved(reports[0]), _saved(reports[1])),
        _changes(_casts(a), _casts(b)),
        _changes(_gemms(reports[0]), _gemms(reports[1])),
        tuple(t for t in texts[0] if t not in texts[1]),
        tuple(t for t in texts[1] if t not in texts[0]),
    )


def compare_with_spec(a: Build, spec: str) -> Comparison:
    """The build beside what a spec decides on the same uses and target."""
    before = _plan(a)
    loaded = load(spec)
    after = resolve(loaded, [plan.use for plan in before.uses.values()], load_target(a.manifest["target"]["name"]))
    said = read_contents(a).report["remarks"]
    new = [render(d) for d in after.diagnostics]
    own = [r["text"] for r in said if r["code"] in {d.code for d in after.diagnostics}]
    inputs = (("spec", before.spec, after.spec),) if before.spec != after.spec else ()
    unknown = ("saved bytes", "casts", "messages of the passes")
    return Comparison(inputs, diff_plans(before, after), added=tuple(t for t in new if t not in own), unknown=unknown)


def _plan(build: Build) -> PrecisionPlan:
    try:
        return plan_from_json(read_lock(build))
    except (TypeError, ValueError) as error:  # a value that no plan has
        message = f"{build.path / 'plan.lock.json'} is no plan: {error}"
        raise fail("E0612", message, help="build it again with `fp8c compile`", exit_code=ExitCode.USAGE) from None


def _inputs(a: Build, b: Build) -> tuple[tuple[str, str, str], ...]:
    found = []
    pairs: list[tuple[str, Any, Any]] = [
        (f"model {key}", a.manifest["model"].get(key), b.manifest["model"].get(key))
        for key in ("reference", "overrides", "batch", "seq")
    ]
    pairs += [("spec", a.manifest["spec"]["name"], b.manifest["spec"]["name"])]
    pairs += [("target", a.manifest["target"]["name"], b.manifest["target"]["name"])]
    names = dict.fromkeys([*a.manifest["versions"], *b.manifest["versions"]])
    pairs += [(name, a.manifest["versions"].get(name), b.manifest["versions"].get(name)) for name in names]
    for what, old, new in pairs:
        if old != new:
            found.append((what, str(old), str(new)))
    return tuple(found)


def _saved(report: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by layer, neighbours of equal bytes each under one name."""
    found = {
        f"layer {row['layer']}" if row["layer"] is not None else "outside of layers": row["fp8c"]
        for row in report["layers"]
    }
    return {**found, "together": report["saved_bytes"]["fp8c"]}


def _gemms(report: Mapping[str, Any]) -> dict[str, int]:
    return {f"{which} {kind}": n for which, row in report["gemms"].items() for kind, n in row.items()}


def _casts(build: Build) -> dict[str, int]:
    counts: dict[str, int] = {}
    for half in ("forward", "backward"):
        for node in read_graph(build.graph_text(half), half).nodes:
            if is_cast(node.op):
                formats = formats_in(node.args)
                name = f"{half} {node.op.removeprefix('fp8c.')} {' to '.join(formats)}"
                counts[name] = counts.get(name, 0) + 1
    return counts


def _changes(old: Mapping[str, int], new: Mapping[str, int]) -> tuple[Change, ...]:
    names = dict.fromkeys([*old, *new])
    return tuple(Change(n, old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n))


# --- text -------------------------------------------------------------------------------------------------------------


def comparison_text(found: Comparison, limit: int = 40) -> str:
    lines = [f"{what}: {old} -> {new}" for what, old, new in found.inputs]
    if found.decisions:
        lines += [
            "",
            f"decisions: {len(found.decisions)} differ" if len(found.decisions) > 1 else "decisions: 1 differs",
        ]
        for d in found.decisions[:limit]:
            lines += [f"  {d.field}: {d.old} -> {d.new}", f"      {_uses(d.uses)}; {d.reason}"]
        if len(found.decisions) > limit:
            lines.append(f"  and {len(found.decisions) - limit} more; --json has them")
    for title, changes, is_bytes in (
        ("saved for backward", _grouped(found.saved), True),
        ("casts", found.casts, False),
        ("GEMMs", found.gemms, False),
    ):
        if changes:
            lines += ["", title, *_table(changes, is_bytes)]
    lines += ["", "no longer said", *_indented(found.gone)] if found.gone else []
    lines += ["", "now said", *_indented(found.added)] if found.added else []
    if found.unknown and found.decisions:
        lines += ["", f"only a build of it can tell: {', '.join(found.unknown)}"]
    return "\n".join(lines).strip() or "no difference"


def _uses(keys: Sequence[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def _grouped(changes: Sequence[Change]) -> list[Change]:
    """Layers with the same bytes on both sides share a line."""
    layers: dict[tuple[int | None, int | None], list[int]] = {}
    rest = []
    for c in changes:
        word, _, number = c.name.partition(" ")
        if word == "layer" and number.isdecimal():
            layers.setdefault((c.old, c.new), []).append(int(number))
        else:
            rest.append(c)
    rows = []
    for (old, new), numbers in layers.items():
        name = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {ranges(numbers)}, each"
        rows.append(Change(name, old, new))
    return [*rows, *rest]


def _table(changes: Sequence[Change], is_bytes: bool) -> list[str]:
    def cell(n: int | None) -> str:
        return "-" if n is None else size(n) if is_bytes else f"{n:,}"

    def ratio(c: Change) -> str:
        return f"{c.new / c.old:.3f}x" if c.old and c.new is not None else ""

    rows = [(c.name, cell(c.old), "->", cell(c.new), ratio(c)) for c in changes]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return [
        ("  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))).rstrip()
        for row in rows
    ]


def _indented(texts: Sequence[str]) -> list[str]:
    return [f"  {line}" for text in texts for line in text.splitlines()]
