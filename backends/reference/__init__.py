"""The CPU backend: exact formats, exact accumulators, and the specification of every kernel.

Importing it registers the CPU kernels of the operators in `fp8c.ops`.
"""

from __future__ import annotations

import torch

from fp8c.backends.reference import attention, gemm, quantize
from fp8c.backends.reference.gemm import accumulator
from fp8c.ops.decompositions import quantize_delayed

__all__ = ["accumulator"]

_LIBRARY = torch.library.Library("fp8c", "IMPL")  # type: ignore[no-untyped-call]
for _kernel in (
    quantize.quantize,
    quantize_delayed,
    quantize.dequantize,
    quantize.requantize,
    gemm.scaled_mm,
    gemm.scaled_grouped_mm,
    gemm.scaled_grouped_wgrad,
    gemm.scaled_mm_add_,
    gemm.scaled_grouped_wgrad_add_,
    attention.attention,
    attention.attention_backward,
):
    _LIBRARY.impl(_kernel.__name__, _kernel, "CPU")  # type: ignore[no-untyped-call]
