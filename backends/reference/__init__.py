"""The CPU backend: exact formats, exact accumulators, and the specification of every kernel.

Importing it registers the CPU kernels of the operators in `fp8c.ops`.
"""

from __future__ import annotations

import torch

from fp8c.backends.reference.attention import attention, attention_backward
from fp8c.backends.reference.gemm import accumulator, scaled_grouped_mm, scaled_grouped_wgrad, scaled_mm
from fp8c.backends.reference.quantize import dequantize, quantize, requantize

__all__ = ["accumulator"]

_LIBRARY = torch.library.Library("fp8c", "IMPL")  # type: ignore[no-untyped-call]
for _kernel in (
    quantize,
    dequantize,
    requantize,
    scaled_mm,
    scaled_grouped_mm,
    scaled_grouped_wgrad,
    attention,
    attention_backward,
):
    _LIBRARY.impl(_kernel.__name__, _kernel, "CPU")  # type: ignore[no-untyped-call]
