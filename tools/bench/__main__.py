"""`fp8c bench NAME ...`, `python -m fp8c.tools.bench NAME ...`: run one benchmark."""

import functools
import sys
from collections.abc import Callable

from fp8c.tools.bench import compile_time, gemm, gemm_table, kernels, optimizer, overlap, step, telemetry

BENCHMARKS: dict[str, Callable[[list[str]], int]] = {
    "compile": compile_time.main,
    "gemm": gemm.main,
    "gemm-table": gemm_table.main,
    "kernels": kernels.main,
    "layer": functools.partial(step.main, "layer"),
    "optimizer": optimizer.main,
    "overlap": overlap.main,
    "step": functools.partial(step.main, "step"),
    "telemetry": telemetry.main,
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in BENCHMARKS:
        print(f"usage: fp8c bench {{{','.join(BENCHMARKS)}}} ...", file=sys.stderr)
        return 2
    return BENCHMARKS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
