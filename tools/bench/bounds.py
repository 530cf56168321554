"""What a step must cost at least, and what FP8 can give at most: shown beside every figure of `bench layer|step`.

roofline   every GEMM's operations at the rate measured for its precision, attention's at the BF16 rate; nothing else
amdahl     the BF16 step with its FP8 GEMMs sped up by the ratio of the two measured rates, all else as it is
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fp8c import graph as g
from fp8c import ops
from fp8c.cost_model import Attention, Gemm
from fp8c.graph_costs import node_operator
from fp8c.pipeline import Rewritten


def operations(rewritten: Rewritten) -> dict[str, float]:
    """Floating-point operations of one step by what they run as; causal attention counts the half it needs."""
    counts = {"fp8": 0.0, "bf16": 0.0, "attention": 0.0}
    seen: set[tuple[str, str]] = set()  # a GEMM that backward computes again is one GEMM of the step
    for half in (rewritten.halves.forward, rewritten.halves.backward):
        for node in half.graph.nodes:
            if node.op != "call_function":
                continue
            match node_operator(node):
                case Gemm() as gemm:
                    role = node.meta.get(g.ROLE)
                    if role is not None and role.gemm:
                        if (role.use, role.gemm) in seen:
                            continue
                        seen.add((role.use, role.gemm))
                    counts["bf16" if gemm.is_bf16 else "fp8"] += gemm.tflop * 1e12
                case Attention():
                    counts["attention"] += attention_operations(node)
    return counts


def attention_operations(node: fx.Node) -> float:
    """2 products forward, 5 backward (scores again, dP, dV, dQ, dK), over the causal half."""
    backward = node.target is ops.ATTENTION_BACKWARD
    q, k, v = (g.value(n) for n in node.args[1:4] if isinstance(n, fx.Node)) if backward else _qkv(node)
    batch, heads, rows, width = (g.size_hint(s) for s in q.shape)
    pairs = batch * heads * rows * g.size_hint(k.shape[2]) / 2
    value_width = g.size_hint(v.shape[3])
    scores, values = 2.0 * pairs * width, 2.0 * pairs * value_width
    return 3 * scores + 2 * values if backward else scores + values


def _qkv(node: fx.Node) -> Any:
    return (g.value(n) for n in node.args[:3] if isinstance(n, fx.Node))


def bounds(counts: dict[str, float], rates: dict[str, float], bf16: dict[str, Any] | None) -> dict[str, float]:
    """Milliseconds and ratios. bf16: the BF16 contender's record, with its profile; without it no Amdahl bound."""
    fp8_rate, bf16_rate = rates.get("fp8_tflop_s"), rates["bf16_tflop_s"]
    if not isinstance(fp8_rate, float):
        return {}
    others_ms = (counts["bf16"] + counts["attention"]) / bf16_rate / 1e9
    found = {"roofline_ms": counts["fp8"] / fp8_rate / 1e9 + others_ms}
    if bf16 is not None and "profile" in bf16:
        total_ms = float(bf16["median_ms"])
        gemms_ms = bf16["profile"]["classes_us"].get("bf16 gemm", 0.0) / 1e3
        share = counts["fp8"] / (counts["fp8"] + counts["bf16"])
        saved_ms = gemms_ms * share * (1 - bf16_rate / fp8_rate)
        found |= {"amdahl_ms": total_ms - saved_ms, "amdahl_ratio": total_ms / (total_ms - saved_ms)}
    return {k: round(v, 3) for k, v in found.items()}
