"""`fp8c doctor`: what this machine offers, and which implementation serves which operator."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

import fp8c.fused_ops  # noqa: F401  (defines the operators)
from fp8c.backends import lowering

SCHEMA = "fp8c.doctor/1"
_PACKAGES = ("torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "transformers", "deep_gemm")
_GEMMS = ("scaled_mm", "scaled_grouped_mm", "scaled_grouped_wgrad", "scaled_mm_add_", "scaled_grouped_wgrad_add_")
_ATTENTION = ("attention", "attention_backward")
_HOPPER, _FP8_SINCE = (9, 0), (8, 9)


@dataclass(frozen=True)
class Machine:
    """`capability` is None without a usable GPU; `compiler` is what builds the CUDA GEMMs, if anything does."""

    device: str
    capability: tuple[int, int] | None
    packages: dict[str, str]
    compiler: str | None


def this_machine() -> Machine:
    from fp8c.backends.cuda import build

    has_gpu = torch.cuda.is_available()
    found = build._compiler()
    return Machine(
        torch.cuda.get_device_name() if has_gpu else "no GPU",
        torch.cuda.get_device_capability() if has_gpu else None,
        {name: version(name) for name in _PACKAGES},
        None if found is None else " ".join(found),
    )


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def implementations(machine: Machine) -> dict[str, str]:
    """Operator -> who computes it there: "reference" (CPU), "cuda", "triton", "aten", or "portable" and why not more."""
    lowering.register_kernels("cpu")
    if machine.capability is None:
        return {name: "reference" for name in operator_names()}
    return {name: on_gpu(name, machine) for name in operator_names()}


def on_gpu(name: str, machine: Machine) -> str:
    assert machine.capability is not None
    if name in _ATTENTION:
        return "aten"
    if name in _GEMMS:
        if machine.capability != _HOPPER:
            return f"portable (the CUDA GEMMs are for compute capability 9.0, this is {dotted(machine.capability)})"
        return "cuda" if machine.compiler else "cuda where the kernel cache has it, else portable (no NVRTC, no nvcc)"
    if find_spec("triton") is None:
        return "portable (triton is not installed)"
    if machine.capability < _FP8_SINCE:
        return f"portable (FP8 conversions begin with 8.9, this is {dotted(machine.capability)})"
    from fp8c.backends.triton import KERNELS

    return "triton" if name in KERNELS else "portable"


def operator_names() -> list[str]:
    """Every operator of fp8c."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fp8c::")}
    return sorted(name.removeprefix("fp8c::") for name in names)


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def document() -> dict[str, Any]:
    machine = this_machine()
    return {
        "device": machine.device,
        "capability": None if machine.capability is None else dotted(machine.capability),
        "packages": machine.packages,
        "compiler": machine.compiler,
        "operators": implementations(machine),
    }


def text(found: dict[str, Any]) -> str:
    capability = f", compute capability {found['capability']}" if found["capability"] else ""
    lines = [f"{found['device']}{capability}", f"CUDA compiler: {found['compiler'] or 'none'}", ""]
    lines += [f"{name:<26} {number or 'not installed'}" for name, number in found["packages"].items()]
    lines += ["", *(f"{name:<26} {who}" for name, who in found["operators"].items())]
    return "\n".join(lines)
