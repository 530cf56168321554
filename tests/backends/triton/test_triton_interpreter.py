"""The Triton kernels in Triton's interpreter, each against the oracle, bit for bit (`kernel_cases.py`).

In processes of their own: the interpreter is switched on by an environment variable that Inductor would see as well.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels' interpreter comes with triton")

ROOT = Path(__file__).parents[3]
CASES = Path(__file__).with_name("kernel_cases.py")
GROUPS = ("quantize", "fused", "requantize", "swiglu", "combine")


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_agree_with_the_oracle(group: str) -> None:
    run = subprocess.run(
        [sys.executable, str(CASES), group], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
