"""Hopper GEMMs in CUDA C++: block-scaled FP8 with FP32 promotion, dense and grouped (docs/hopper_gemm.md).

Importing this module registers them as the CUDA kernels of `fp8c::scaled_mm`, `scaled_grouped_mm`,
`scaled_grouped_wgrad` and the forms that add to an FP32 tensor. Nothing is compiled, and no GPU is touched, before the first call.
"""

from __future__ import annotations

import torch

from fp8c.backends.cuda import gemm

_LIBRARY = torch.library.Library("fp8c", "IMPL")  # type: ignore[no-untyped-call]
for _kernel in (
    gemm.scaled_mm,
    gemm.scaled_grouped_mm,
    gemm.scaled_grouped_wgrad,
    gemm.scaled_mm_add_,
    gemm.scaled_grouped_wgrad_add_,
):
    _LIBRARY.impl(_kernel.__name__, _kernel, "CUDA")  # type: ignore[no-untyped-call]
