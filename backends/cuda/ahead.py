"""The CUDA kernels of a step, compiled for a Hopper GPU that is not present. Needs NVRTC or nvcc, no driver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fp8c.backends.cuda import build
from fp8c.backends.cuda.config import GemmConfig, Grouping, Output
from fp8c.backends.cuda.fused import FusedConfig
from fp8c.backends.cuda.gemm import OUTPUTS, plan_of
from fp8c.backends.cuda.operators import CONFIGS
from fp8c.backends.gemms.unsupported import Unsupported

_GROUPINGS = {
    "scaled_mm": Grouping.DENSE,
    "scaled_mm_add_": Grouping.DENSE,
    "scaled_grouped_mm": Grouping.ROW_GROUPS,
    "scaled_grouped_wgrad": Grouping.REDUCTION_GROUPS,
    "scaled_grouped_wgrad_add_": Grouping.REDUCTION_GROUPS,
}


@dataclass(frozen=True)
class CompiledInstance:
    """`key` names the instance in a kernel cache (`build.source_key`)."""

    key: str
    config: GemmConfig | FusedConfig
    cubin: bytes

    @property
    def name(self) -> str:
        return f"{self.config.kernel.removeprefix('fp8c_')}-{self.key[:8]}"


def instance(op: str, arguments: tuple[Any, ...], multiprocessors: int) -> GemmConfig:
    """The instance that serves a call whose tensors have no data. Raises: `Unsupported` where none does."""
    adds = op.endswith("_add_")
    a, _, b, _, *rest = arguments[1:] if adds else arguments
    offs = rest.pop(0) if isinstance(rest[0], Tensor) else None
    plan = plan_of(rest[0], rest[1], rest[2], _GROUPINGS[op])
    if not adds and rest[3] not in OUTPUTS:
        raise Unsupported(f"no instance writes {rest[3]}")
    output = Output.FP32_ADD if adds else OUTPUTS[rest[3]]
    return plan.instance(a, b, output, offs, multiprocessors)


def fused_instance(op: str, arguments: tuple[Any, ...]) -> FusedConfig | None:
    """The instance that serves a fused operator's call, whose tensors have no data; None where Triton serves it."""
    try:
        config: FusedConfig = CONFIGS[op](*arguments)
    except (KeyError, Unsupported):
        return None
    return config


def compile_instances(configs: Iterable[GemmConfig | FusedConfig]) -> list[CompiledInstance]:
    """Machine code of each, from the kernel cache where it has it. Raises: E0430, E0431."""
    launched = [k for c in configs for k in ((c, c.then) if isinstance(c, FusedConfig) and c.then else (c,))]
    return [CompiledInstance(build.source_key(c), c, build.cubin(c)) for c in dict.fromkeys(launched)]
