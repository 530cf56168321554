"""Benchmarks on the machine's GPU: `python -m fp8c.tools.bench gemm --help`."""
