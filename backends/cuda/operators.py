"""The fused operators that Hopper has kernels for in CUDA C++; any other GPU, and what they don't take, is Triton's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fp8c.backends.cuda import columns, norm, packed, swiglu
from fp8c.backends.gemms.unsupported import Unsupported
from fp8c.formats import Element
from fp8c.ops import quantized_format

_HOPPER = (9, 0)


def _quantizer(fmt: str) -> ModuleType:
    return packed if quantized_format(fmt).element is Element.E5M6 else columns


def _quantize(x: Tensor, fmt: str, offs: Tensor | None = None) -> Any:
    return _quantizer(fmt).quantize(x, fmt, offs)


def _quantize_config(x: Tensor, fmt: str, offs: Tensor | None = None) -> Any:
    return _quantizer(fmt).quantize_config(x, fmt, offs)


#: By the operator's name: the launcher, and what says which instance serves a call, whose tensors may have no data.
KERNELS: dict[str, Callable[..., Any]] = {
    "swiglu_quantize_cached": swiglu.swiglu_quantize_cached,
    "swiglu_backward_quantize": swiglu.swiglu_backward_quantize,
    "rms_norm_quantize": norm.rms_norm_quantize,
    "quantize": _quantize,
    "quantize_both": columns.quantize_both,
    "gather_quantize": columns.gather_quantize,
    "requantize": columns.requantize,
    "gather_requantized": columns.gather_requantized,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "swiglu_quantize_cached": swiglu.cached_config,
    "swiglu_backward_quantize": swiglu.backward_config,
    "rms_norm_quantize": norm.norm_config,
    "quantize": _quantize_config,
    "quantize_both": columns.quantize_both_config,
    "gather_quantize": columns.gather_quantize_config,
    "requantize": columns.requantize_config,
    "gather_requantized": columns.gather_requantized_config,
}


def first_on_hopper(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation of an operator on CUDA: what Hopper has for it, else `otherwise`."""
    kernel = KERNELS.get(name)
    if kernel is None:
        return otherwise

    def serve(*arguments: Any) -> Any:
        device = arguments[0].device
        if device.type == "cuda" and _capability(device.index) == _HOPPER:
            try:
                return kernel(*arguments)
            except Unsupported:
                pass
        return otherwise(*arguments)

    return serve


@cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)
