"""The tables of a compile as JSON, and the report page that shows them.

`tables` makes the data (`report.json`), `page` puts it into `report_page.html`: data and rendering meet only there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fp8c.diagnostics import Diagnostic, diagnostic_json, render
from fp8c.formats import Format
from fp8c.pass_manager import SavedValue
from fp8c.pipeline import Rewritten, count_gemms
from fp8c.saved import SavedReport, SavedTensor
from fp8c.specs.plan import Decision, PrecisionPlan, Reason, UsePlan

SCHEMA = "fp8c.report/1"
_PAGE = Path(__file__).with_name("report_page.html")
_PLACES = re.compile(r"(__SCRIPT_HASH__|__DATA__|__RUN__)")


class Rules:
    """The rules that decided something, each once; rows refer to them by number."""

    def __init__(self) -> None:
        self.numbers: dict[Reason, int] = {}

    def number(self, reason: Reason | None) -> int | None:
        return None if reason is None else self.numbers.setdefault(reason, len(self.numbers))

    def to_json(self) -> list[dict[str, Any]]:
        return [dict(vars(reason)) for reason in self.numbers]


def tables(
    rewritten: Rewritten,
    saved: SavedReport,
    baseline: SavedReport | None,
    remarks: Iterable[Diagnostic],
) -> dict[str, Any]:
    """Every table of one compile. Plain JSON, in an order that depends on the model and the spec only."""
    rules = Rules()
    plan = rewritten.plan
    uses = fold([use_row(use, rules) for use in plan.uses.values() if _decides(use)])
    kept = fold([saved_row(t, rewritten.ctx.saved.get(t.name), rules) for t in saved.tensors])
    return {
        "schema": SCHEMA,
        "gemms": count_gemms(rewritten),
        "uses": uses,
        "saved": kept,
        "layers": layer_rows(saved, baseline),
        "saved_bytes": {
            "fp8c": saved.total_bytes,
            "bf16": baseline.total_bytes if baseline else None,
            "logits": saved.logits_bytes,
        },
        "sections": section_rows(plan, rules),
        "rules": rules.to_json(),
        "remarks": [{**diagnostic_json(r), "text": render(r)} for r in remarks],
        "passes": [{"name": r.name, "changed": r.changed} for r in rewritten.records],
    }


def _decides(use: UsePlan) -> bool:
    return use.use.is_gemm or bool(use.fields)


def use_row(plan: UsePlan, rules: Rules) -> dict[str, Any]:
    """One operator use: what it is, the formats of its GEMMs, what backward keeps of it, each with its rule."""
    use = plan.use
    gemms: dict[str, Any] = {}
    if use.is_gemm:
        missing = {"fprop": "", "dgrad": use.no_dgrad, "wgrad": use.no_wgrad}
        for which in ("fprop", "dgrad", "wgrad"):
            if missing[which]:
                gemms[which] = {"missing": missing[which]}
                continue
            formats = plan.gemm(which)
            gemms[which] = {
                "a": formats.a.text,
                "b": formats.b.text,
                "out": formats.out.text,
                "promote_every": formats.promote_every,
                "is_fp8": formats.is_fp8,
                "rules": _rule_numbers(plan, (which, "precision"), rules),
            }
    kept = [
        {"value": name.partition(".")[2], "as": text(plan.fields[name]), "rule": rules.number(plan.fields[name].reason)}
        for name in sorted(plan.fields)
        if name.startswith("cache.")
    ]
    again = [
        {"value": name.partition(".")[2], "rule": rules.number(plan.fields[name].reason)}
        for name in sorted(plan.fields)
        if name.startswith("recompute.") and plan.fields[name].value
    ]
    return {
        "key": use.key,
        "path": use.path,
        "op": use.op.value,
        "kinds": sorted(use.kinds),
        "roles": sorted(use.roles),
        "layer": use.layer,
        "param": use.param,
        "shape": [use.m, use.n, use.k] if use.is_gemm else None,
        "experts": use.experts,
        "source": str(use.source) if use.source else "",
        "gemms": gemms,
        "cache": kept,
        "recompute": again,
    }


def _rule_numbers(plan: UsePlan, names: tuple[str, ...], rules: Rules) -> list[int]:
    """Numbers of the rules behind the fields of these groups, each once, in the order of the fields."""
    found: dict[int, None] = {}
    for name in sorted(plan.fields):
        number = rules.number(plan.fields[name].reason) if name.split(".")[0] in names else None
        if number is not None:
            found[number] = None
    return list(found)


def text(decision: Decision) -> str:
    value = decision.value
    return value.text if isinstance(value, Format) else str(value)


def saved_row(tensor: SavedTensor, planned: SavedValue | None, rules: Rules) -> dict[str, Any]:
    return {
        "path": tensor.path,
        "layer": tensor.layer,
        "type": tensor.dtype,
        "size_bytes": tensor.size_bytes,
        "is_logits": tensor.is_logits,
        "why": planned.why if planned else "",
        "rule": rules.number(planned.reason) if planned else None,
    }


def section_rows(plan: PrecisionPlan, rules: Rules) -> list[dict[str, Any]]:
    return [
        {"name": f"{section}.{key}", "value": text(decision), "rule": rules.number(decision.reason)}
        for section, values in sorted(plan.sections.items())
        for key, decision in sorted(values.items())
    ]


def layer_rows(saved: SavedReport, baseline: SavedReport | None) -> list[dict[str, Any]]:
    """Saved bytes of each layer, ours beside BF16 under PyTorch's default min-cut; layer None is outside of layers."""
    ours, theirs = saved.layer_bytes(), baseline.layer_bytes() if baseline else {}
    rows: list[dict[str, Any]] = [
        {"layer": layer, "bf16": theirs.get(layer, 0) if baseline else None, "fp8c": ours.get(layer, 0)}
        for layer in sorted({*ours, *theirs})
    ]
    rest = saved.total_bytes - sum(ours.values())
    rest_baseline = baseline.total_bytes - sum(theirs.values()) if baseline else None
    return [*rows, {"layer": None, "bf16": rest_baseline, "fp8c": rest}]


def fold(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ only in their layer become one, with the layers in `layers` and `*` in the names."""
    folded: dict[str, dict[str, Any]] = {}
    for row in rows:
        plain = {k: _without_layer(v, row["layer"]) for k, v in row.items() if k != "layer"}
        key = json.dumps(plain, sort_keys=True)
        into = folded.setdefault(key, {**plain, "layers": [], "count": 0})
        into["count"] += 1
        if row["layer"] is not None and row["layer"] not in into["layers"]:
            into["layers"].append(row["layer"])
    for row in folded.values():
        if len(row["layers"]) == 1:  # nothing was folded: show the layer where it stands
            layer = str(row["layers"][0])
            for k, v in row.items():
                row[k] = v.replace("*", layer) if isinstance(v, str) and k in ("key", "path", "param") else v
    return list(folded.values())


def _without_layer(value: Any, layer: int | None) -> Any:
    """A name with the layer's number replaced by `*`; anything else as it is."""
    if not isinstance(value, str) or layer is None:
        return value
    return re.sub(rf"(?<![^.]){layer}(?![^.:#])", "*", value, count=1)


def page(data: Mapping[str, Any], run: Mapping[str, Any]) -> bytes:
    """The report: one file that needs no network. `run` holds what differs from run to run (times)."""
    template = _PAGE.read_text(encoding="utf-8")
    start = template.index("<script>") + len("<script>")
    script = template[start : template.index("</script>", start)]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values = {"__SCRIPT_HASH__": digest, "__DATA__": embedded(data), "__RUN__": embedded(run)}
    return "".join(values.get(part, part) for part in _PLACES.split(template)).encode()


def embedded(value: Any) -> str:
    """JSON that can stand inside a script element whatever the names in it: no `<`, `>`, `&`, line separators."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
