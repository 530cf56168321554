"""The Triton kernels on a GPU, each against the oracle, bit for bit (`kernel_cases.py`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def load(name: str) -> ModuleType:
    """A module of this folder: under importlib mode tests are no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


GROUPS = ("quantize", "fused", "requantize", "swiglu", "combine")


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_agree_with_the_oracle(group: str) -> None:
    failed = []
    for name, case in load("kernel_cases").GROUPS[group]():
        try:
            case("cuda")
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)
