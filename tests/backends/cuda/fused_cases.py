"""Each of Hopper's fused kernels once on small ragged problems, for compute-sanitizer: `python -m tests.backends.cuda.fused_cases`."""

from __future__ import annotations

import torch

import fp8c.ops.decompositions
import fp8c.ops.fused  # noqa: F401
from fp8c.backends.cuda.operators import KERNELS
from fp8c.backends.triton import quantize

ENDS = (0, 5, 140, 140, 300, 560, 640)  # of 700 rows: experts without rows, and rows of no expert
FORMATS = (("e4m3[1x128] fp32", "e4m3[128x1] fp32"), ("e4m3[1x128] pow2", "e4m3[128x1] pow2"))
PACKED = "e5m6[1x128] pow2"


def main() -> None:
    torch.manual_seed(1)
    ends = torch.tensor(ENDS, dtype=torch.int32, device="cuda")
    gate_up, dh = (torch.randn(700, width, device="cuda").bfloat16() for width in (768, 384))
    weight, taken = torch.rand(700, device="cuda"), torch.randint(0, 300, (700,), device="cuda")
    for rows, columns in FORMATS:
        pair = quantize.quantize(gate_up, rows)
        KERNELS["swiglu_backward_quantize"](dh, *pair, weight, ends, rows, columns, rows, columns)
        KERNELS["swiglu_backward_quantize"](dh, *pair, None, None, rows, columns, rows, columns)
        KERNELS["swiglu_quantize_cached"](gate_up, weight, FORMATS[0][0], FORMATS[0][0])
        KERNELS["rms_norm_quantize"](gate_up, gate_up[0], 1e-6, rows)
        KERNELS["quantize"](gate_up, columns, ends)
        KERNELS["quantize_both"](gate_up, rows, columns, ends)
        KERNELS["gather_quantize"](gate_up, taken, columns, ends)
        KERNELS["requantize"](*pair, rows, columns, ends)
        KERNELS["gather_requantized"](*pair, taken, rows, columns, ends)
    KERNELS["quantize"](gate_up, PACKED)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
