"""Every test starts from a fresh Dynamo and two threads; GPU tests say why they are skipped."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._functorch import config as functorch_config

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code, guard or recompile count of one test reaches the next; the random state is a known one."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with functorch_config.patch(enable_autograd_cache=False):  # tests look at how a step is made
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """tests/zoo.py as a module: under importlib mode the tests folder is not a package to import from."""
    name = "fp8c_test_zoo"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("zoo.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
