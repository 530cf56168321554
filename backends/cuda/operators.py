"""The fused operators that Hopper has kernels for in CUDA C++; any other GPU, and what they don't take, is Triton's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from fp8c.backends.cuda import norm, swiglu
from fp8c.backends.gemms.unsupported import Unsupported

_HOPPER = (9, 0)

#: By the operator's name: the launcher, and what says which instance serves a call, whose tensors may have no data.
KERNELS: dict[str, Callable[..., Any]] = {
    "swiglu_backward_quantize": swiglu.swiglu_backward_quantize,
    "rms_norm_quantize": norm.rms_norm_quantize,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "swiglu_backward_quantize": swiglu.backward_config,
    "rms_norm_quantize": norm.norm_config,
}


def first_on_hopper(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an operator on CUDA: what Hopper has for it, else `otherwise`."""
    kernel = KERNELS.get(name)
    if kernel is None:
        return otherwise

    def serve(*arguments: Any) -> Any:
        if _capability(arguments[0].device.index) == _HOPPER:
            try:
                return kernel(*arguments)
            except Unsupported:
                pass
        return otherwise(*arguments)

    return serve


@cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)
