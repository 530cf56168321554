"""`fp8c doctor`: what this machine offers, and which implementation serves which operator."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

import fp8c.ops.fused  # noqa: F401  (defines the operators)
from fp8c.backends import lowering
from fp8c.backends.gemms import candidates, choice, measured

SCHEMA = "fp8c.doctor/1"
_PACKAGES = ("torch", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "transformers", "deep_gemm")
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
    if name in candidates.OPERATORS:
        return gemm_on_gpu(machine)
    if find_spec("triton") is None:
        return "portable (triton is not installed)"
    if machine.capability < _FP8_SINCE:
        return f"portable (FP8 conversions begin with 8.9, this is {dotted(machine.capability)})"
    from fp8c.backends.cuda import operators
    from fp8c.backends.triton import KERNELS

    if machine.capability == _HOPPER and name in operators.KERNELS:
        has = "" if machine.compiler else " where the kernel cache has it (no NVRTC, no nvcc)"
        return f"cuda{has}, and triton for what it doesn't take"
    return "triton" if name in KERNELS else "portable"


def gemm_on_gpu(machine: Machine) -> str:
    """The default order of `backends.gemms`, as far as this machine has it."""
    assert machine.capability is not None
    if machine.capability < _FP8_SINCE:
        return f"portable (FP8 tensor cores begin with 8.9, this is {dotted(machine.capability)})"
    missing = candidates.reason_not_installed("triton")
    other = f"portable ({missing})" if missing else "triton"
    if machine.capability != _HOPPER:
        return f"{other} (the CUDA GEMMs are for compute capability 9.0, this is {dotted(machine.capability)})"
    if machine.compiler:
        return f"cuda, and {other} where it has no instance"
    return f"cuda where the kernel cache has it, else {other} (no NVRTC, no nvcc)"


def gemm_choice(machine: Machine) -> dict[str, Any]:
    """How the GEMMs' implementations are chosen here, and what was measured on this machine so far."""
    policy = choice.policy()
    found: dict[str, Any] = {
        "policy": "measure" if policy.measures else policy.first or "default",
        "implementations": {name: candidates.reason_not_installed(name) or "here" for name in candidates.NAMES},
    }
    if machine.capability is None:
        return found
    table = measured.table_of(torch.cuda.current_device())
    return found | {"table": str(table.path), "measured": {k: c.to_json() for k, c in sorted(table.choices.items())}}


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
        "gemms": gemm_choice(machine),
    }


def text(found: dict[str, Any]) -> str:
    capability = f", compute capability {found['capability']}" if found["capability"] else ""
    lines = [f"{found['device']}{capability}", f"CUDA compiler: {found['compiler'] or 'none'}", ""]
    lines += [f"{name:<26} {number or 'not installed'}" for name, number in found["packages"].items()]
    lines += ["", *(f"{name:<26} {who}" for name, who in found["operators"].items())]
    gemms = found["gemms"]
    lines += ["", f"GEMMs are chosen by: {gemms['policy']} (FP8C_GEMM, fp8c.compile(tune=True))"]
    lines += [f"  {name:<24} {state}" for name, state in gemms["implementations"].items()]
    for key, entry in gemms.get("measured", {}).items():
        times = ", ".join(f"{name} {us:.1f} us" for name, us in entry["us"].items())
        lines.append(f"  {key}: {entry['implementation']} ({times})")
    return "\n".join(lines)
