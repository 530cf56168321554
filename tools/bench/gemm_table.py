"""`python -m fp8c.tools.bench gemm-table FILE`: the figures of a `gemm` run as a Markdown table, with geometric means."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_COLUMNS = ("deepgemm", "cublaslt", "cublaslt per tensor", "triton", "fp8c", "fp8c 128x128 activations")
_HEADER = (
    "| GEMM | DeepGEMM | cuBLASLt | per tensor | Triton | fp8c | 128x128 act. | to DeepGEMM, sustained (burst) | tile |"
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fp8c.tools.bench gemm-table", description=__doc__)
    parser.add_argument("file", help="what `gemm --out` wrote")
    results = json.loads(Path(parser.parse_args(arguments).file).read_text())["results"]
    print("\n".join(table(results)))
    return 0


def table(results: list[dict[str, Any]]) -> Iterable[str]:
    """Sustained TFLOP/s of each problem; the geometric mean of the ratios to DeepGEMM after each kind of problem."""
    yield _HEADER
    yield "| --- " * _HEADER[2:-2].count("|") + "| --- |"
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        kinds.setdefault(kind_of(result["problem"]), []).append(result)
    for kind, members in kinds.items():
        yield from map(_row, members)
        ratios = [r for r in map(ratio, members) if r is not None]
        if ratios:
            burst = [r for r in (ratio(m, "burst_us") for m in members) if r is not None]
            low = min(ratios)
            yield (
                f"| **{kind}, geometric mean** | | | | | | | **{_mean(ratios):.3f}** ({_mean(burst):.3f}); "
                f"lowest {low:.3f} | |"
            )


def kind_of(problem: dict[str, Any]) -> str:
    rows = problem["m"] * problem["groups"]
    if problem["kind"] == "fprop" and rows <= 128:
        return f"fprop, M = {rows}"
    return "fprop, N = 576" if problem["kind"] == "fprop" and problem["n"] == 576 else str(problem["kind"])


def ratio(result: dict[str, Any], time: str = "sustained_us") -> float | None:
    """How many times as fast as DeepGEMM fp8c is; None where DeepGEMM did not run."""
    contenders = result["contenders"]
    if "deepgemm" not in contenders:
        return None
    return float(contenders["deepgemm"][time] / contenders["fp8c"][time])


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _row(result: dict[str, Any]) -> str:
    contenders = result["contenders"]
    cells = [f"{contenders[c]['sustained_tflops']:.4g}" if c in contenders else "–" for c in _COLUMNS]
    sustained, burst = ratio(result), ratio(result, "burst_us")
    compared = f"{sustained:.3f} ({burst:.3f})" if sustained is not None and burst is not None else "–"
    return f"| {result['name']} | " + " | ".join([*cells, compared, contenders["fp8c"]["tile"]]) + " |"
