"""The benchmark's table: ratios are of times, and each kind has the geometric mean of its own."""

from typing import Any

from fp8c.tools.bench.gemm_table import table


def result(m: int, deepgemm_us: float | None, own_us: float) -> dict[str, Any]:
    times = {"fp8c": own_us} | ({} if deepgemm_us is None else {"deepgemm": deepgemm_us})
    contenders = {
        name: {"sustained_us": us, "burst_us": us / 2, "sustained_tflops": 1e3 / us, "tile": "256x128"}
        for name, us in times.items()
    }
    problem = {"kind": "fprop", "m": m, "n": 4096, "k": 7168, "groups": 1}
    return {"problem": problem, "name": f"fprop {m} x 4096 x 7168", "contenders": contenders}


def test_rows_and_means() -> None:
    lines = list(table([result(4096, 200, 100), result(8192, 100, 200), result(64, 30, 10), result(128, None, 10)]))
    assert lines[2] == "| fprop 4096 x 4096 x 7168 | 5 | – | – | – | 10 | – | 2.000 (2.000) | 256x128 |"
    means = [line for line in lines if "geometric mean" in line]
    assert len(means) == 2  # none for M = 128, which has no peer
    assert "**fprop, geometric mean**" in means[0] and "**1.000** (1.000); lowest 0.500" in means[0]
    assert "**fprop, M = 64, geometric mean**" in means[1] and "lowest 3.000" in means[1]
    assert len({line.count("|") for line in lines}) == 1
