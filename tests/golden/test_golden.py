"""Golden tests: each file of this folder is a model with RUN and CHECK lines; `filecheck` compares.

    # RUN: --spec=deepseek_v3 --passes=assign-roles,insert-quantize
    def model(x: "bf16[256, 512]", w: "param bf16[128, 512]"):
        return x @ w.t()
    # CHECK: ...

An argument is data that needs a gradient; `param` makes it a parameter, `frozen` one that is not trained, `data` an
input without a gradient, and `i64[8] < 4` random whole numbers below 4. A file whose `model()` takes no argument returns
a module, and `example_inputs()` its arguments.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8c.tools import opt

FOLDER = Path(__file__).parent
FILES = sorted(p for p in FOLDER.glob("*.py") if not p.name.startswith("test_"))
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16, "i64": torch.int64, "i32": torch.int32}
_ARGUMENT = re.compile(r"(?:(param|frozen|data) )?(\w+)\[([\d, ]*)\](?: < (\d+))?")


class Wrapped(nn.Module):
    """A function whose `param` and `frozen` arguments are parameters of this module."""

    def __init__(self, function: Any, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.function = function
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self, **data: Tensor) -> Any:
        return self.function(**data, **dict(self.named_parameters()))


def make_model(namespace: ModuleType) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The module of a golden file and the arguments of its call."""
    function = namespace.model
    arguments = inspect.signature(function).parameters
    if not arguments:
        inputs = namespace.example_inputs()
        return function(), (inputs if isinstance(inputs, tuple) else ()), (inputs if isinstance(inputs, dict) else {})
    parameters, data = {}, {}
    for name, argument in arguments.items():
        match = _ARGUMENT.fullmatch(str(argument.annotation).strip("'\""))
        assert match is not None, f"argument {name}: {argument.annotation} is no tensor type"
        kind, dtype, sizes, limit = match.groups()
        shape = [int(s) for s in sizes.split(",") if s.strip()]
        if limit is not None:
            data[name] = torch.randint(int(limit), shape, dtype=DTYPES[dtype])
        elif kind in ("param", "frozen"):
            parameters[name] = nn.Parameter(torch.randn(shape).to(DTYPES[dtype]), requires_grad=kind == "param")
        else:
            data[name] = torch.randn(shape).to(DTYPES[dtype]).requires_grad_(kind != "data")
    return Wrapped(function, parameters), (), data


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fp8c_golden_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dynamo imports the module of a function it inlines
    spec.loader.exec_module(module)
    return module


def options(path: Path) -> dict[str, str]:
    line = next(line for line in path.read_text().splitlines() if line.startswith("# RUN:"))
    pairs = (a.removeprefix("--").partition("=") for a in shlex.split(line.removeprefix("# RUN:")))
    return {name: text for name, _, text in pairs}


def rewritten_text(path: Path) -> str:
    """The text of the file's graph after its passes, without roles and source lines unless `--provenance` asks."""
    module, args, kwargs = make_model(load(path))
    run = options(path)
    step = opt.capture_joint(module, *args, **kwargs)
    result = opt.run_passes(step, run["spec"], run["passes"].split(","), target=run.get("target", "cpu"))
    return result.text(provenance="provenance" in run)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """A file with collectives makes a fake process group of two when it is loaded."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    text = rewritten_text(path)
    done = subprocess.run(
        [sys.executable, "-m", "filecheck", str(path)],
        input=text,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nthe graph:\n{text}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_text_depends_on_the_model_only(path: Path) -> None:
    assert rewritten_text(path) == rewritten_text(path)


def test_filecheck_sees_a_wrong_graph() -> None:
    """The runner itself fails on a graph that is not the expected one."""
    done = subprocess.run(
        [sys.executable, "-m", "filecheck", str(FOLDER / "insert_quantize.py")],
        input="graph model\n  return ()\n",
        text=True,
        capture_output=True,
    )
    assert done.returncode != 0
