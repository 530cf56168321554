"""`fp8c bench NAME ...`, `python -m fp8c.tools.bench NAME ...`: run one benchmark."""

import argparse
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
    parser = argparse.ArgumentParser(
        prog="fp8c bench",
        description="Measure on this machine's GPU, baselines in the same process.",
        epilog="`fp8c bench NAME --help` says what it measures and takes.",
    )
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    return BENCHMARKS[parser.parse_args(arguments[:1]).name](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
