"""The kernels of `joined_cases.py`: in Triton's interpreter, in processes of their own, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels' interpreter comes with triton")

ROOT = Path(__file__).parents[3]
CASES = Path(__file__).with_name("joined_cases.py")
GROUPS = ("norm", "head")


@pytest.mark.parametrize("group", GROUPS)
def test_in_the_interpreter(group: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(CASES), group], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("group", GROUPS)
def test_on_a_gpu(group: str) -> None:
    spec = importlib.util.spec_from_file_location("joined_cases", CASES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["joined_cases"] = module
    spec.loader.exec_module(module)
    failed = []
    for name, case in module.GROUPS[group]():
        try:
            case("cuda")
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)
