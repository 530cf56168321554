"""Triton kernels: every operator but attention, on any GPU with FP8 conversions (compute capability 8.9 and up).

Importing this module registers them for CUDA, behind those of Hopper (`backends.cuda.operators`). A kernel is compiled at
its first call, into Triton's own cache.
"""

from __future__ import annotations

import torch

from fp8c.backends.cuda.operators import first_on_hopper
from fp8c.backends.triton import gather_sum, head_loss, norm, quantize, requantize, swiglu, transpose

#: The launchers by the name of their operator.
KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        quantize.quantize,
        quantize.quantize_both,
        quantize.quantize_weight,
        quantize.quantize_transposed,
        quantize.gather_quantize,
        requantize.dequantize,
        requantize.requantize,
        requantize.gather_quantized,
        requantize.gather_requantized,
        swiglu.swiglu_quantize,
        swiglu.swiglu_quantize_cached,
        swiglu.swiglu_backward_quantize,
        transpose.transposed,
        gather_sum.gather_sum,
        head_loss.linear_cross_entropy,
        norm.rms_norm_quantize,
    )
}

_LIBRARY = torch.library.Library("fp8c", "IMPL")  # type: ignore[no-untyped-call]
for _name, _kernel in KERNELS.items():
    _LIBRARY.impl(_name, first_on_hopper(_name, _kernel), "CUDA")  # type: ignore[no-untyped-call]
