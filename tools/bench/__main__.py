"""`python -m fp8c.tools.bench NAME ...`: run one benchmark."""

import sys

from fp8c.tools.bench import gemm, gemm_table

BENCHMARKS = {"gemm": gemm.main, "gemm-table": gemm_table.main}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in BENCHMARKS:
        print(f"usage: python -m fp8c.tools.bench {{{','.join(BENCHMARKS)}}} ...", file=sys.stderr)
        return 2
    return BENCHMARKS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
