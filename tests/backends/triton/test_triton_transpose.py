"""`fp8c::transposed` in Triton's interpreter: a copy of bytes, exact for any size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels' interpreter comes with triton")

ROOT = Path(__file__).parents[3]
PROGRAM = """
import torch
from fp8c.backends.triton import transpose
for shape in [(128, 128), (3, 100, 260), (1, 1), (2, 129, 127)]:
    q = torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    out = transpose.transposed(q)
    assert out.is_contiguous() and torch.equal(out.view(torch.uint8), q.view(torch.uint8).mT), shape
q = torch.randint(0, 256, (64, 32), dtype=torch.uint8).view(torch.float8_e4m3fn).t()
assert torch.equal(transpose.transposed(q).view(torch.uint8), q.view(torch.uint8).mT)
"""


def test_bytes_are_moved() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
