"""The implementations of the scaled GEMMs by name, each a module with functions of the operators' names and arguments.

An implementation reads operands as fp8c stores them. One that would need them laid out anew is no candidate: what it gains
in the product it loses in the copies. A call that it can't serve raises `Unsupported` before anything is written.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

import fp8c.ops.decompositions  # noqa: F401  (the portable forms)
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.ops import portable

OPERATORS = ("scaled_mm", "scaled_grouped_mm", "scaled_grouped_wgrad", "scaled_mm_add_", "scaled_grouped_wgrad_add_")
#: Tried in this order; what stands first is as fast as any measured on its GPUs, and is proven bit for bit.
DEFAULT = ("cuda", "triton")
#: Taken when they were measured to be faster, or asked for by name.
OTHERS = ("cublaslt", "deepgemm")
PORTABLE = "portable"
NAMES = (*DEFAULT, *OTHERS, PORTABLE)

_MODULES = {
    "cuda": "fp8c.backends.cuda.gemm",
    "triton": "fp8c.backends.triton.gemm",
    "cublaslt": "fp8c.backends.gemms.cublaslt",
    "deepgemm": "fp8c.backends.gemms.deepgemm",
}
_PACKAGES = {"triton": "triton", "deepgemm": "deep_gemm"}
_FP8_TENSOR_CORES_SINCE = (8, 9)


@cache
def operators(name: str) -> Mapping[str, Callable[..., Any]]:
    """Operator name -> implementation; empty when a package that it needs is not installed."""
    if name == PORTABLE:
        return {op: portable(op) for op in OPERATORS}
    if reason_not_installed(name):
        return {}
    module = importlib.import_module(_MODULES[name])
    return {op: getattr(module, op) for op in OPERATORS if hasattr(module, op)}


def reason_not_installed(name: str) -> str:
    package = _PACKAGES.get(name)
    return "" if package is None or find_spec(package) is not None else f"{package} is not installed"


def call(name: str, op: str, arguments: tuple[Any, ...]) -> Any:
    """Run `op` by one implementation. Raises: `Unsupported` when it has nothing for these arguments."""
    if name != PORTABLE:
        device = arguments[0].device
        if device.type == "cuda" and capability(device.index) < _FP8_TENSOR_CORES_SINCE:
            raise Unsupported("FP8 tensor cores begin with compute capability 8.9")
    function = operators(name).get(op)
    if function is None:
        raise Unsupported(reason_not_installed(name) or "it has no such product")
    return function(*arguments)


@cache
def capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)
