"""What a build needs in memory and moves through it: the budget tables of `fp8c inspect`. Bytes are of one device.

Traffic counts every operator as if it ran on its own, reading each input and writing its result once: what fusion then
saves is not taken off, on neither side of a comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp8c.formats import Format
from fp8c.tools.viewer.build_graphs import BuildGraphs
from fp8c.tools.viewer.graph_reader import ITEM_BYTES, bytes_moved, family, main_dtype, type_bytes

#: Families of operators, in the order tables show them.
FAMILIES = ("FP8 GEMMs", "other GEMMs", "attention", "FP8 casts", "collectives", "everything else")

_OPTIMIZER = (
    ("grad", "gradients"),
    ("master", "master weights"),
    ("exp_avg", "first moments"),
    ("exp_avg_sq", "second moments"),
    ("ema", "weight average"),
)


@dataclass(frozen=True)
class MemoryRow:
    """One thing that lives in memory. `note` says where the figure comes from."""

    name: str
    size_bytes: int
    note: str = ""


@dataclass(frozen=True)
class TrafficRow:
    """Operators of one family: how many and what they move, per half, before and after the rewrites."""

    family: str
    operators: Mapping[str, int]
    moved_bytes: Mapping[str, int]


def memory_rows(
    parameters: Mapping[str, str], sections: Mapping[str, Any], report: Mapping[str, Any]
) -> list[MemoryRow]:
    """Weights, what the spec's optimizer keeps beside them, and what forward leaves for backward.

    parameters: types of the manifest; sections: those of plan.lock.json
    """
    trained = [t for t in parameters.values() if main_dtype(t) in ("bf16", "f16", "f32") and not t.endswith(" frozen")]
    elements = sum(type_bytes(t) // ITEM_BYTES[main_dtype(t)] for t in trained)
    note = f"{elements:,} elements that train, buffers counted with them"
    rows = [MemoryRow("parameters and buffers", sum(map(type_bytes, parameters.values())), note)]
    optimizer = sections.get("optimizer", {})
    for key, name in _OPTIMIZER:
        decision = optimizer.get(key)
        if decision is None or decision["value"] == "off":
            continue
        place = optimizer.get(f"{key}_device", {}).get("value", "")
        note = f"{decision['value']}, rule {decision['reason']['rule']}" + (f", on the {place}" if place else "")
        rows.append(MemoryRow(name, elements * Format.parse(str(decision["value"])).bits // 8, note))
    saved = report["saved_bytes"]
    against = f"BF16 keeps {saved['bf16']:,} bytes" if saved["bf16"] is not None else ""
    rows.append(MemoryRow("saved for backward", saved["fp8c"], against))
    rows.append(
        MemoryRow("saved by the output head", saved["logits"], "logits, or gradients in their place; not counted above")
    )
    return rows


def traffic_rows(graphs: BuildGraphs) -> list[TrafficRow]:
    counts: dict[str, dict[str, int]] = {name: {} for name in FAMILIES}
    moved: dict[str, dict[str, int]] = {name: {} for name in FAMILIES}
    for half in graphs.halves:
        for node in half.nodes:
            name = family(node.op)
            if name not in counts:
                continue
            counts[name][half.name] = counts[name].get(half.name, 0) + 1
            moved[name][half.name] = moved[name].get(half.name, 0) + bytes_moved(node, half.types)
    return [TrafficRow(name, counts[name], moved[name]) for name in FAMILIES if counts[name]]


def gemm_flops(uses: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Floating-point operations of the step's GEMMs by operand formats, 2 m n k each; symbolic sizes are left out.

    The rows of a grouped GEMM are shared by its experts, so their number does not multiply."""
    found: dict[str, int] = {}
    for use in uses.values():
        shape = use["shape"]
        if use["op"] not in ("linear", "grouped_mm") or None in (shape["m"], shape["n"], shape["k"]):
            continue
        flops = 2 * shape["m"] * shape["n"] * shape["k"]
        missing = {"dgrad": use["no_dgrad"], "wgrad": use["no_wgrad"]}
        for gemm, operands in (("fprop", "xw"), ("dgrad", ("dy", "w")), ("wgrad", ("x", "dy"))):
            if not missing.get(gemm):
                key = " × ".join(element(use["fields"], gemm, operand) for operand in operands)
                found[key] = found.get(key, 0) + flops
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def element(fields: Mapping[str, Any], gemm: str, operand: str) -> str:
    """Element type of an operand: `e4m3`; what nobody quantized has the use's precision."""
    chosen = fields.get(f"{gemm}.{operand}") or fields.get("precision")
    return str(chosen["value"]).partition("[")[0] if chosen else "bf16"
