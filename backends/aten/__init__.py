"""What PyTorch itself offers on CUDA: fused attention.

Importing it registers `fp8c::attention` and its backward for CUDA. The other operators run in their plain-tensor form
(`fp8c.ops.decompositions`, imported here) until a backend with kernels registers its own.
"""

from __future__ import annotations

import torch

import fp8c.ops.decompositions as _decompositions
from fp8c.backends.aten import attention

__all__: list[str] = []
del _decompositions

_LIBRARY = torch.library.Library("fp8c", "IMPL")  # type: ignore[no-untyped-call]
_LIBRARY.impl("attention", attention.attention, "CUDA")  # type: ignore[no-untyped-call]
_LIBRARY.impl("attention_backward", attention.attention_backward, "CUDA")  # type: ignore[no-untyped-call]
